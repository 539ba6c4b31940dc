"""Reads an adapter folder: named tensors and settings, checked for damage."""
