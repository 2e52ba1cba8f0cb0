"""Symmetric INT4, as auto-round packs it."""
