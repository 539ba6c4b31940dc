"""Routes of the server: openai."""
