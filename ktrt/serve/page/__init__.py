"""Routes of the server: page."""
