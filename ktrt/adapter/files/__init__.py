"""Adapter folder → named tensors and settings, checked for damage."""
