"""The chat's partner over HTTP: ``ktrt chat --url``. Imports neither torch nor an HTTP library.

The standard library's ``http.client`` is loaded in 0.06 s, httpx in 0.19 s; and closing its socket
from another thread ends an answer at once, in any phase of the request.
"""
