"""NVFP4, as ModelOpt exports it."""
