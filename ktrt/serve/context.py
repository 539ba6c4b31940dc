"""Facts of the request at hand, which its access log line and its answers' metrics share."""

from __future__ import annotations

import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


@dataclass
class RequestFacts:
    """A request on its way. ``more``: fields for its line in the access log."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    client: str = ""
    started: float = field(default_factory=time.perf_counter)
    more: dict[str, Any] = field(default_factory=dict)


# One object per request: tasks that a request starts inherit it.
current: ContextVar[RequestFacts | None] = ContextVar("ktrt_request", default=None)
