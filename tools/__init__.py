"""Scripts for developers of ktrt; not installed."""
