"""A small OpenAI server for the tests of its clients, in a thread.

Special messages: ``slow`` streams for ever, ``wait`` never answers, ``fail`` fails in the middle of
an answer, ``cut`` ends the connection there, ``refuse`` is a bad request, ``busy`` gets 429,
``page`` an HTML page of a gateway, ``moved`` a redirect, ``echo key`` an error that repeats the
key, ``whole`` an answer that is not streamed, ``think`` has a thought, ``history`` prints the
messages, ``settings`` the request. Other messages come twice.
"""

import json
import select
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODELS: list[dict[str, Any]] = [
    {"id": "base", "object": "model", "owned_by": "ktrt", "parent": None},
    {"id": "persona", "object": "model", "owned_by": "ktrt", "parent": "base"},
    {"id": "pirate", "object": "model", "owned_by": "ktrt", "parent": "base"},
]


@dataclass
class FakeOpenAI:
    """``requests``: (path, body) so far. ``refused``: fields that get a 400, with the message.
    ``counts``: whether there is a ``/tokenize``, with a token per character. ``left`` is set when a
    client has closed the connection of an unfinished answer."""

    models: list[dict[str, Any]] = field(default_factory=lambda: [dict(each) for each in MODELS])
    key: str | None = None
    refused: dict[str, str] = field(default_factory=dict)
    counts: bool = False
    lists: bool = True
    requests: list[tuple[str, Any]] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    @property
    def last(self) -> dict[str, Any]:
        """The body of the last chat completion."""
        found = [body for path, body in self.requests if path.endswith("/chat/completions")]
        assert isinstance(found[-1], dict)
        return found[-1]

    @contextmanager
    def running(self) -> Iterator["FakeOpenAI"]:
        """Serves on a free port of the loopback within the block."""
        fake = self

        class Handler(_Handler):
            state = fake

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            server.daemon_threads = True
            thread = threading.Thread(target=server.serve_forever, args=(0.02,))
            thread.start()
            self.url = f"http://127.0.0.1:{server.server_port}"
            try:
                yield self
            finally:
                server.shutdown()
                thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: FakeOpenAI

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._note(None)
        if self._allowed() and self.path == "/v1/models" and self.state.lists:
            self._json(200, {"object": "list", "data": self.state.models})
        elif self._allowed():
            self._json(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._note(body)
        if not self._allowed():
            return
        for name, message in self.state.refused.items():
            if name in body:
                self._error(400, message, name)
                return
        if self.path == "/v1/chat/completions":
            self._chat(body)
        elif self.path == "/tokenize" and self.state.counts:
            self._json(200, {"count": sum(len(each["content"]) for each in body["messages"])})
        else:
            self._json(404, {"detail": "Not Found"})

    def _note(self, body: object) -> None:
        self.state.requests.append((self.path, body))
        self.state.headers.append(dict(self.headers))

    def _allowed(self) -> bool:
        key = self.state.key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return True
        self._error(401, "Incorrect API key provided", None)
        return False

    def _chat(self, body: Mapping[str, Any]) -> None:
        text = body["messages"][-1]["content"]
        if text == "wait":
            self._wait_for_the_end()
        elif text == "refuse":
            self._error(400, "temperature: expected\n0 … 2, found 7", "temperature")
        elif text == "busy":
            self._error(429, "the queue is full", None, {"Retry-After": "7"})
        elif text == "echo key":
            self._error(400, f"bad header {self.headers['Authorization']}", None)
        elif text == "page":
            self._send(502, b"<html>bad gateway</html>", "text/html", {})
        elif text == "moved":
            self._send(307, b"", "text/plain", {"Location": "http://elsewhere.example/v1"})
        elif text == "whole":
            message = {"role": "assistant", "content": "all at once"}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            usage = {"prompt_tokens": 9, "completion_tokens": 3}
            self._json(200, {"choices": [choice], "usage": usage})
        else:
            self._stream(text, body)

    def _stream(self, text: str, body: Mapping[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.end_headers()
        try:
            self._event(_choice({"role": "assistant"}))
            for delta in _deltas(text, body):
                self._event(_choice(delta, logprobs=_logprobs(delta, body)))
                if text == "slow":
                    time.sleep(0.02)
            if text == "cut":
                return
            if text == "fail":
                self._event({"error": {"message": "the engine is out of order", "code": 500}})
                return
            self._event(_choice({}, finish_reason="stop"))
            if body.get("stream_options", {}).get("include_usage"):
                details = {"cached_tokens": 60}
                usage = {"prompt_tokens": 100, "completion_tokens": 3}
                self._event({"choices": [], "usage": usage | {"prompt_tokens_details": details}})
            self.wfile.write(b"data: [DONE]\n\n")
        except ConnectionError:
            self.state.left.set()

    def _event(self, content: object) -> None:
        self.wfile.write(b"data: " + json.dumps(content).encode() + b"\n\n: comment\n")
        self.wfile.flush()

    def _wait_for_the_end(self) -> None:
        select.select([self.connection], [], [], 30)  # readable: closed, nothing is left to read
        self.state.left.set()

    def _error(
        self, status: int, message: str, param: str | None, headers: Mapping[str, str] = {}
    ) -> None:
        error = {"message": message, "type": "invalid_request_error", "param": param}
        self._json(status, {"error": error}, headers)

    def _json(self, status: int, content: object, headers: Mapping[str, str] = {}) -> None:
        self._send(status, json.dumps(content).encode(), "application/json", headers)

    def _send(self, status: int, data: bytes, kind: str, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def _choice(delta: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": None}
    return {"object": "chat.completion.chunk", "choices": [choice | more], "usage": None}


def _logprobs(delta: Mapping[str, str], body: Mapping[str, Any]) -> dict[str, Any] | None:
    if not body.get("logprobs") or "content" not in delta:
        return None
    row = {"token": delta["content"], "logprob": -0.5, "bytes": None}
    top = [row, {"token": "other", "logprob": -1.5}]
    return {"content": [row | {"top_logprobs": top[: body.get("top_logprobs", 0)]}]}


def _deltas(text: str, body: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    if text == "history":
        turns = body["messages"][:-1]
        yield {"content": " | ".join(f"{turn['role']}: {turn['content']}" for turn in turns)}
    elif text == "settings":
        sent = {name: value for name, value in body.items() if name != "messages"}
        yield {"content": json.dumps(sent)}
    elif text == "slow":
        yield from ({"content": f"{number} "} for number in range(10_000))
    elif text in ("fail", "cut"):
        yield {"content": "half an "}
    elif text == "think":
        yield from ({"reasoning_content": "hm, "}, {"reasoning_content": "well"}, {"content": "ja"})
    else:
        yield from ({"content": text}, {"content": " "}, {"content": text})
