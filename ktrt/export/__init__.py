"""Writes base and adapter as one checkpoint: ``python -m ktrt.export``."""
