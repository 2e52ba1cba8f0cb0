"""Recipes: YAML with positions, inheritance and overrides, checked against a schema."""
