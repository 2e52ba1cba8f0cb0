"""The ways in which compressed-tensors stores weights."""
