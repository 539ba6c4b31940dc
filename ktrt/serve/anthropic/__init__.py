"""Routes of the server: anthropic."""
