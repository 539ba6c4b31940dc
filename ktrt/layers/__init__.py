"""Layers other than the experts that run in the engine or in kernels written for them."""
