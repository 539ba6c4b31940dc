"""Writes adapters in other layouts."""
