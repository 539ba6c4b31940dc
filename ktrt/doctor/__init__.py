"""Examines this machine and advises on settings: ``python -m ktrt.doctor``."""
