"""Settings of the server: command line before environment before defaults."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """``api_key`` None: no key is asked for, and the server listens on loopback only.
    ``model_name``: the base model's name; None: its folder's."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    admin_key: str | None = None
    model_name: str | None = None
    # Requests that may wait for a slot; one more gets 429.
    max_waiting: int = 128
    # A folder: adapters below it may be loaded and unloaded at run time.
    adapter_root: str | None = None
