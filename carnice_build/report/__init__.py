"""What people see: tables, progress and traces."""
