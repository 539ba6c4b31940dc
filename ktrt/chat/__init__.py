"""The chat in the terminal: ``python -m ktrt.chat``."""
