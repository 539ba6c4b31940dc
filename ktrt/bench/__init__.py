"""Speeds of a configuration on this machine: ``python -m ktrt.bench``."""
