"""The page at ``/``: a chat with the models, a comparison of two, and the audit as a picture."""
