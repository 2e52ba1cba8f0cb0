"""Adapters to quantization libraries, imported only inside worker processes."""
