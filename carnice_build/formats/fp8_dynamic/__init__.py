"""FP8 weights with a scale a row and activations scaled a token, as llm-compressor saves them."""
