"""One HTTP request at a time to a server, which can be left at any moment."""

import http.client
import json
import queue
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, Self
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass

from ktrt import __version__
from ktrt.errors import KtrtError

# A server on the other side of the world answers a connection in 0.3 s; a host that drops packets
# never does.
_CONNECT_SECONDS = 10.0
# Pause between two looks at Ctrl-C while nothing comes.
_POLL_SECONDS = 0.05
# No timeout for reading: a long prompt may take minutes. A host that vanished is noticed after
# 30 + 6 * 10 seconds of silence of its kernel.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}
# Largest line of a stream, and largest body: a list of models, or an answer in one piece.
_MAX_BYTES = 16 << 20
_SHOWN = 500
# A shorter key may be a word of a message, and would be guessed in no time.
_SHORTEST_KEY = 8
# Pieces that may wait for a terminal that has stopped its output.
_WAITING = 1000


class ServerError(KtrtError):
    """The server refused a request: ``status``, and ``param``, the field that it names if any."""

    def __init__(self, message: str, status: int, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param


@dataclass(frozen=True)
class Address:
    """A server's URL, without a trailing slash, and the key that goes with every request.

    A URL without a path gets ``/v1``; another one is taken as it stands.
    """

    url: str
    key: str | None = field(default=None, repr=False)

    @classmethod
    def of(cls, url: str, key: str | None = None) -> Self:
        """Checks what a user gave. ``KtrtError`` says what is wrong; it never holds the key."""
        found = _split(url)
        if found.username is not None or found.password is not None:
            raise KtrtError("--url: expected no user and password in it; give the key by --api-key")
        if found.query or found.fragment:
            raise KtrtError(f"--url: expected no query or fragment, found {url!r:.200}")
        if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key):
            raise KtrtError(
                "the API key has characters that a header cannot hold: expected visible ASCII, "
                "without spaces around it"
            )
        path = found.path.rstrip("/") or "/v1"
        return cls(f"{found.scheme}://{found.netloc}{path}", key or None)

    @property
    def parts(self) -> SplitResult:
        return urlsplit(self.url)

    @property
    def host(self) -> str:
        return self.parts.hostname or ""

    @property
    def root(self) -> str | None:
        """The path of vLLM's endpoints, which are outside ``/v1``; None if the URL does not tell
        it."""
        path = self.parts.path
        return path.removesuffix("/v1") if path.endswith("/v1") else None

    @property
    def exposes_key(self) -> bool:
        """Whether the key travels unencrypted to another host."""
        return self.key is not None and self.parts.scheme == "http" and not self.loopback

    @property
    def loopback(self) -> bool:
        """Whether the host is this machine; no proxy is asked then."""
        try:
            return self.host == "localhost" or ip_address(self.host).is_loopback
        except ValueError:
            return False

    def hidden(self, text: str) -> str:
        """Returns a server's text in one line, without the key, at most 500 characters."""
        words = " ".join(text.split())
        if self.key is not None and len(self.key) >= _SHORTEST_KEY:
            words = words.replace(self.key, "…")
        return words if len(words) <= _SHOWN else f"{words[: _SHOWN - 1]}…"


def _split(url: str) -> SplitResult:
    try:
        found = urlsplit(url)
        port = found.port
    except ValueError as error:
        raise KtrtError(f"--url: {url!r:.200} is no URL: {error}") from error
    if found.scheme not in ("http", "https") or not found.hostname or port == 0:
        raise KtrtError(f"--url: expected http://HOST:PORT or https://HOST, found {url!r:.200}")
    if not url.isascii() or any(character.isspace() for character in url):
        raise KtrtError(f"--url: expected ASCII without spaces, found {url!r:.200}")
    return found


def nothing() -> None:
    """Waits on: the ``wait`` of a request that only ``KeyboardInterrupt`` ends."""


class Call:
    """A request under way, in a thread: whoever waits for it can leave at any moment.

    ``wait`` of the methods is called every 0.05 s while nothing comes, and may raise. ``close``
    closes the connection, by which the server learns that nobody waits any more.
    """

    def __init__(
        self, address: Address, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> None:
        """``path``: with the URL's own path."""
        self._address = address
        self._request = (method, path, body)
        self._came: queue.Queue[Any] = queue.Queue(_WAITING)
        self._lock = threading.Lock()
        self._closed = False
        self._socket: socket.socket | None = None
        threading.Thread(target=self._run, name="chat-request", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the request; idempotent."""
        with self._lock:
            self._closed = True
            if self._socket is not None:
                with suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def lines(self, wait: Callable[[], None] = nothing) -> Iterator[bytes]:
        """Yields the lines of a body. ``ServerError``: the server refused; ``KtrtError``: it cannot
        be reached, or the connection broke."""
        while True:
            try:
                item = self._came.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                wait()
                continue
            if item is None:
                return
            if isinstance(item, KtrtError):
                raise item
            yield item

    def json(self, wait: Callable[[], None] = nothing) -> Any:
        """Returns the body, read as JSON."""
        text = b"".join(self.lines(wait))
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            shown = self._address.hidden(text[:200].decode("utf-8", "replace"))
            raise KtrtError(
                f"{self._address.url}: expected JSON of an OpenAI server, found {shown!r}; is the "
                "URL's path right?"
            ) from error

    def _run(self) -> None:
        try:
            self._exchange()
        except KtrtError as error:
            self._put(error)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._put(KtrtError(f"{self._address.url}: {self._reason(error)}"))
        else:
            self._put(None)

    def _put(self, item: object) -> None:
        while not self._closed:
            with suppress(queue.Full):
                self._came.put(item, timeout=0.2)
                return

    def _exchange(self) -> None:
        method, path, body = self._request
        connection, target = _connection(self._address, path)
        try:
            connection.connect()
            connection.sock.settimeout(None)
            _keep_alive(connection.sock)
            with self._lock:
                if self._closed:
                    return
                self._socket = connection.sock
            data = None
            if body is not None:
                data = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
            connection.request(method, target, data, _headers(self._address, data is not None))
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise _refusal(self._address, path, response)
            self._read(response)
        finally:
            connection.close()

    def _read(self, response: http.client.HTTPResponse) -> None:
        total = 0
        streams = "event-stream" in response.headers.get("Content-Type", "")
        while line := response.readline(_MAX_BYTES + 1):
            total = len(line) if streams else total + len(line)
            if total > _MAX_BYTES:
                raise KtrtError(f"{self._address.url}: the answer has more than {_MAX_BYTES} bytes")
            self._put(line)

    def _reason(self, error: Exception) -> str:
        connected = self._socket is not None
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"its certificate is not trusted: {error.verify_message}"
        if isinstance(error, ssl.SSLError):
            return f"no TLS connection ({error.reason or error}); does it speak plain http?"
        if isinstance(error, socket.gaierror):
            return f"the host {self._address.host!r} is not known: {error.strerror}"
        if isinstance(error, ConnectionRefusedError):
            return "nothing listens there (connection refused); `ktrt serve CONFIG` starts a server"
        if isinstance(error, TimeoutError) and not connected:
            return f"no connection within {_CONNECT_SECONDS:.0f} s"
        what = "the connection broke" if connected else "no connection"
        return self._address.hidden(f"{what}: {error or type(error).__name__}")


def _connection(address: Address, path: str) -> tuple[http.client.HTTPConnection, str]:
    """Returns a connection, over a proxy of the environment if it names one, and the target to
    request there."""
    parts = address.parts
    secure = parts.scheme == "https"
    direct = address.loopback or proxy_bypass(address.host)
    proxy = None if direct else getproxies().get(parts.scheme)
    context = ssl.create_default_context() if secure else None
    if proxy is None:
        if context is not None:
            return http.client.HTTPSConnection(
                address.host, parts.port, timeout=_CONNECT_SECONDS, context=context
            ), path
        return http.client.HTTPConnection(address.host, parts.port, timeout=_CONNECT_SECONDS), path
    way = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    if way.scheme not in ("", "http") or not way.hostname:
        raise KtrtError(
            f"{parts.scheme}_proxy: expected http://HOST:PORT, found a proxy of another kind; "
            f"no_proxy={address.host} goes without it"
        )
    if context is None:
        plain = http.client.HTTPConnection(way.hostname, way.port, timeout=_CONNECT_SECONDS)
        return plain, f"http://{parts.netloc}{path}"
    tunnel = http.client.HTTPSConnection(
        way.hostname, way.port, timeout=_CONNECT_SECONDS, context=context
    )
    tunnel.set_tunnel(address.host, parts.port)
    return tunnel, path


def _keep_alive(connected: socket.socket) -> None:
    with suppress(OSError):
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):  # not on every system
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _headers(address: Address, with_body: bool) -> dict[str, str]:
    headers = {
        "Host": address.parts.netloc,
        "User-Agent": f"ktrt/{__version__}",
        "Accept": "application/json, text/event-stream",
        "Connection": "close",
    }
    if with_body:
        headers["Content-Type"] = "application/json"
    if address.key is not None:
        headers["Authorization"] = f"Bearer {address.key}"
    return headers


def _refusal(address: Address, path: str, response: http.client.HTTPResponse) -> ServerError:
    """Returns the error for a status other than 200, in one line with what to do."""
    status = response.status
    if 300 <= status < 400:
        target = address.hidden(response.headers.get("Location", "another place"))
        return ServerError(f"{address.url}: has moved to {target}: give --url that", status)
    text = response.read(1 << 16).decode("utf-8", "replace")
    message, param = server_message(text)
    words = address.hidden(message) or response.reason or "no reason given"
    error = f"{address.url}: {status}: {words}"
    if status in (401, 403):
        error += "; give the server's key by --api-key or OPENAI_API_KEY"
        error += "" if address.key else " (none was sent)"
    elif status == 404 and param is None and "model" not in words.lower():
        error += f"; {path} is no endpoint there, does the URL's path end in /v1?"
    elif status in (429, 503):
        seconds = response.headers.get("Retry-After", "")
        error += f"; ask again in {seconds} s" if seconds.isdigit() else "; ask again later"
    return ServerError(error, status, param)


def server_message(text: str) -> tuple[str, str | None]:
    """Returns the message of an error's body, and the field that it names. The body is OpenAI's, or
    FastAPI's ``detail``, or any text."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return text, None
    return message_of(content) or (text, None)


def message_of(content: object) -> tuple[str, str | None] | None:
    """Returns message and field of an error in JSON; None if it is no error."""
    if not isinstance(content, Mapping):
        return None
    error = content.get("error", content)
    if isinstance(error, str):
        return error, None
    if not isinstance(error, Mapping):
        return None
    message = error.get("message", error.get("detail"))
    if message is None:
        return None
    param = error.get("param")
    return str(message), param if isinstance(param, str) else None
