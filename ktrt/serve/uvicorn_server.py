"""uvicorn with our guards, and an end that lets answers finish."""

from __future__ import annotations

import contextlib
import logging
import resource
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING

import uvicorn

from ktrt.errors import ConfigError
from ktrt.serve.protocol import GuardedProtocol

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from fastapi import FastAPI

    from ktrt.serve.settings import ServeSettings

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Connections that wait to be accepted. More would only be refused later.
_BACKLOG = 512
# Open files next to the connections: weights, libraries, logs, pipes.
_OTHER_FILES = 512


def allow_connections(count: int) -> None:
    """Raises this process' limit of open files, mostly 1,024 of which it may have more: without a
    file for a connection the server would accept none for a second."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        if most < wanted:
            logger.warning(
                "%d connections need %d open files, but this process may have %d (ulimit -Hn)",
                count, wanted, most,
            )  # fmt: skip


def bind(settings: ServeSettings) -> socket.socket:
    """Returns a socket for the address, which does not listen yet: a port that is taken is found
    before the model is loaded. ``ConfigError``: it is taken, or no address of this machine."""
    where = f"{settings.address}:{settings.port}"
    try:
        family, _, _, _, address = socket.getaddrinfo(
            settings.address, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # asyncio sets TCP_NODELAY only for sockets with this protocol. Without it the second write
        # of a response waits 40 ms for the client's delayed ACK, on connections that are kept.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"host: {settings.address!r} is no address: {error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        reason = error.strerror or error
        raise ConfigError(f"cannot listen on {where}: {reason}; --port takes another one") from None
    return listener


class HttpServer(uvicorn.Server):
    """Serves an application until SIGTERM or Ctrl-C.

    The first signal stops new requests and waits for those under way, at most ``drain_seconds``;
    a second one ends them at once. ``signalled`` holds the signals.
    """

    def __init__(self, app: FastAPI, settings: ServeSettings) -> None:
        class Protocol(GuardedProtocol):
            pass

        Protocol.settings = settings
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.address,
                port=settings.port,
                http=Protocol,
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                # The headers' names and values would be decoded by a rule of proxies; no proxy's
                # word about the client is believed.
                proxy_headers=False,
                backlog=_BACKLOG,
                h11_max_incomplete_event_size=settings.max_header_bytes,
                timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
            )
        )
        self._app, self._settings = app, settings
        self.signalled: list[int] = []

    def serve_on(self, listener: socket.socket) -> None:
        """Serves on a socket of ``bind`` until the end."""
        self.run(sockets=[listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to listen."""
        await super().startup(sockets)
        for each in sockets or []:
            host, port = each.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            keyed = "a key is asked for" if self._settings.api_key else "no key is asked for"
            logger.info(
                "Listening on http://%s:%d%s (%s)", shown, port, self._settings.root_path, keyed
            )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Notes a signal."""
        del frame
        self.signalled.append(sig)
        server = self._app.state.server
        server.draining = server.draining or time.perf_counter()
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles signals within the block; uvicorn's own raises them again afterwards, which would
        end the process before the session is closed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {each: signal.signal(each, self.handle_exit) for each in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
