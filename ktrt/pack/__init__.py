"""Packs a model's experts ahead of the first chat: ``python -m ktrt.pack``."""
