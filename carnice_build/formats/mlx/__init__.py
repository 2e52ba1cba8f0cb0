"""MLX affine quantization, as `mlx_lm.convert` does it."""
