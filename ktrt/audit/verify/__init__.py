"""Verifies that a loaded model matches its files."""
