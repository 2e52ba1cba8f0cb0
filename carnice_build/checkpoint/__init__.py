"""Checkpoints: safetensors headers, byte sources and profiles."""
