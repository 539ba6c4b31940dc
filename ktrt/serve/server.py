"""The server's state, which endpoints get by ``Depends(get_server)``."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.requests import Request

from ktrt.generate.grammar import Grammars
from ktrt.serve.admission import Admission
from ktrt.serve.context import current
from ktrt.serve.errors import ApiError
from ktrt.serve.generation import Asked, Generation
from ktrt.serve.memory_limit import MemoryLimit
from ktrt.serve.metrics import Metrics
from ktrt.serve.names import Names
from ktrt.serve.openai.token_text import TokenTexts
from ktrt.serve.vllm.audits import Audits
from ktrt.serve.vllm.runtime import RuntimeAdapters
from ktrt.serve.wakes import Wakes

if TYPE_CHECKING:
    from ktrt.serve.settings import ServeSettings
    from ktrt.session import Session

# Rendering is serial in the session; more threads only keep a long prompt's from delaying others.
_THREADS = 4
# Requests whose grammar is compiled wait here, up to 20 s each: never in the other threads.
_GRAMMAR_THREADS = 2


class Server:
    """A session with its settings, the names of its models, their changes and its metrics."""

    def __init__(self, session: Session, settings: ServeSettings) -> None:
        self.session, self.settings = session, settings
        self.memory_limit = MemoryLimit()
        root = settings.adapter_root
        folder = Path(root).expanduser() if root else None
        self.names = Names(session, settings.model_name, folder)
        self.runtime = RuntimeAdapters(session, self.names, folder)
        self.audits = Audits(session)
        self.metrics = Metrics(session, self.names.base, self.memory_limit)
        self.admission = Admission(session, settings)
        self.token_texts = TokenTexts(session.tokenizer)
        vocab_size = session.model.config.get_text_config().vocab_size
        self.grammars = Grammars(session.tokenizer, vocab_size)
        self.grammar_threads: Executor = ThreadPoolExecutor(
            _GRAMMAR_THREADS, thread_name_prefix="ktrt-grammars"
        )
        self.threads: Executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="ktrt-serve")
        self._wakes: Wakes | None = None
        # When the process was asked to end, by the clock of ``RequestFacts``.
        self.draining: float | None = None

    def wakes(self) -> Wakes:
        """Returns the way into the running event loop."""
        loop = asyncio.get_running_loop()
        if self._wakes is None or self._wakes.loop is not loop:
            self._wakes = Wakes(loop)
        return self._wakes

    def generate(self, asked: Asked) -> Generation:
        """Returns the answers to a request, to be entered as a context."""
        return Generation(self, asked)

    def check_ready(self) -> None:
        """``ApiError`` 503: no request can be answered. One that came before the process was asked
        to end still can: its grammar may have been compiled meanwhile."""
        facts = current.get()
        began = facts.started if facts is not None else time.perf_counter()
        if self.draining is not None and began >= self.draining:
            raise ApiError(
                503, "the server is shutting down", kind="server_error", code="shutting_down"
            )
        if not self.session.alive:
            raise ApiError(
                503, "the engine has failed; the server must be started again",
                kind="server_error", code="engine_failed",
            )  # fmt: skip


def get_server(request: Request) -> Server:
    """Returns the server of a request's app."""
    server: Server = request.app.state.server
    return server
