"""Adapters to quantization libraries, which they import only inside worker processes."""
