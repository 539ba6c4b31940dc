"""Base and adapter as one checkpoint: ``python -m ktrt.export``."""
