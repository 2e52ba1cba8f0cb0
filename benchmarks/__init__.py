"""Measurements at true sizes: shape files, bench checkpoints, and the runs over them."""
