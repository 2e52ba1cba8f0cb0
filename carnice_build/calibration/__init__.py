"""Passes over a calibration: text to tokens, and tokens through a model layer by layer."""
