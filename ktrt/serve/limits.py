"""ASGI middlewares: keys, limits, request ids and the access log."""
