"""Content-addressed storage: packs of tensors, and what is known about actions and sources."""
