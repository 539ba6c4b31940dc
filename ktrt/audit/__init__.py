"""What an adapter changes, and whether it is applied: ``python -m ktrt.audit``."""
