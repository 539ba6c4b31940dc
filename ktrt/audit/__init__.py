"""Shows the changes of an adapter and verifies that they are applied: ``python -m ktrt.audit``."""
