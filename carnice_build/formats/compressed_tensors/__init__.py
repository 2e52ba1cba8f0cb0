"""Asymmetric INT4 of compressed-tensors, after the AWQ of llm-compressor."""
