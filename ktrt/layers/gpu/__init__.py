"""Layers outside the experts on a GPU: kernels of ktrt, and how they stand in."""
