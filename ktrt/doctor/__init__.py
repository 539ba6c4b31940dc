"""What this machine has and reaches, and what to change: ``python -m ktrt.doctor``."""
