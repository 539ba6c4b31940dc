"""Clients that break off, break the rules or read nothing: others do not notice."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

import ktrt
from ktrt.serve.app import create_app
from ktrt.serve.settings import ServeSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from fastapi import FastAPI

    from ktrt.session import Session

    Serving = Callable[[FastAPI, ServeSettings], AbstractContextManager[str]]

DEMO = Path(__file__).resolve().parents[3] / "examples" / "demo"
CHAT = "/v1/chat/completions"
STRICT = ServeSettings(
    model_name="demo", header_seconds=0.5, body_seconds=0.5, write_seconds=0.5, max_waiting=4,
    max_concurrent=4, max_messages=50,
)  # fmt: skip


def ask(text: str = "What is a star?", tokens: int = 8, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": "adapter_a", "messages": messages, "max_tokens": tokens, **more}


def endless(**more: Any) -> dict[str, Any]:
    """A request whose answer does not end by itself for a while."""
    return ask(tokens=400, logit_bias={"1": -100}, **more)


@pytest.fixture(scope="module")
def strict(serve_session: Session, serving: Serving) -> Iterator[FastAPI]:
    """An application with short limits over the shared session; ``state.url`` is its address."""
    app = create_app(serve_session, STRICT)
    with serving(app, STRICT) as url:
        app.state.url = url
        yield app


@pytest.fixture(scope="module")
def url(strict: FastAPI) -> str:
    address: str = strict.state.url
    return address


@pytest.fixture(scope="module")
def alone(url: str) -> str:
    """The answer that everybody else must get, whatever happens meanwhile."""
    return answer(url)


def answer(url: str) -> str:
    found = httpx.post(url + CHAT, json=ask(), timeout=60)
    assert found.status_code == 200, found.text
    text: str = found.json()["choices"][0]["message"]["content"]
    return text


@contextmanager
def others(url: str, alone: str) -> Iterator[None]:
    """Somebody else asks all the time within the block, and gets the right answer each time."""
    done = threading.Event()

    def keep_asking() -> list[str]:
        found: list[str] = []
        while not found or not done.is_set():
            found.append(answer(url))
        return found

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(keep_asking)
        try:
            yield
        finally:
            done.set()
        assert set(asking.result()) == {alone}


def connect(
    url: str, *, receive_buffer: int | None = None, address: str = "127.0.0.1"
) -> socket.socket:
    found = socket.socket()
    found.bind((address, 0))
    if receive_buffer is not None:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    found.settimeout(30)
    found.connect(("127.0.0.1", int(url.rpartition(":")[2])))
    return found


def request_bytes(body: dict[str, Any], path: str = CHAT) -> bytes:
    text = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text


def read_to_end(connection: socket.socket) -> bytes:
    parts = []
    try:
        while part := connection.recv(1 << 16):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def until(holds: Callable[[], bool], seconds: float = 10.0) -> float:
    """Waits until something holds; returns how long it took."""
    start = time.perf_counter()
    while not holds():
        assert time.perf_counter() - start < seconds
        time.sleep(0.002)
    return time.perf_counter() - start


def test_half_a_header_is_answered_and_closed(url: str, alone: str) -> None:
    with others(url, alone), connect(url) as half, connect(url) as nothing:
        half.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc")
        start = time.perf_counter()
        assert read_to_end(half).startswith(b"HTTP/1.1 408 ")
        assert read_to_end(nothing) == b""
        assert 0.3 < time.perf_counter() - start < 10


def test_half_a_header_after_a_whole_request_is_answered_too(url: str) -> None:
    with connect(url) as half:
        half.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in half.recv(4096)
        half.sendall(b"GET /health HTT")
        assert b"HTTP/1.1 408 " in read_to_end(half)


def test_a_header_that_drips_has_the_same_deadline(url: str) -> None:
    def drip(slow: socket.socket) -> None:
        for _ in range(1000):
            slow.sendall(b"G")
            time.sleep(0.02)

    with connect(url) as slow, pytest.raises(OSError, match=r"reset|Broken pipe"):
        drip(slow)


def test_half_a_body_is_answered_and_closed(url: str, alone: str) -> None:
    with others(url, alone), connect(url) as half:
        half.sendall(request_bytes(ask())[:-10])
        half.settimeout(20)
        found = half.recv(4096)
        assert found.startswith(b"HTTP/1.1 408 ")
        assert b"the body is not complete" in found + half.recv(4096) if b"{" not in found else True
        assert read_to_end(half) == b""


def test_a_body_in_tiny_chunks_is_refused(url: str, alone: str) -> None:
    """Each chunk of a byte cost the event loop 0.02 ms: four such clients stopped it for 5 s."""
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with connect(url) as connection, suppress(OSError):
        connection.sendall(head)
        for _ in range(200):
            connection.sendall(b"1\r\na\r\n" * 10_000)
        pytest.fail("2 million chunks were read")
    assert answer(url) == alone


def test_headers_have_a_limit(url: str) -> None:
    found = httpx.get(f"{url}/health", headers={"x-long": "x" * 40_000})
    assert found.status_code == 431
    assert "headers" in found.json()["error"]["message"]
    with connect(url) as endless_header:
        endless_header.sendall(b"GET /health HTTP/1.1\r\nx: " + b"y" * 100_000)
        assert read_to_end(endless_header).startswith(b"HTTP/1.1 431 ")


def test_a_body_of_64_mib_is_refused(url: str, alone: str) -> None:
    with others(url, alone):
        found = httpx.post(url + CHAT, content=b"x" * (64 << 20), timeout=60)
        assert found.status_code == 413

        def chunks() -> Iterator[bytes]:
            for _ in range(64):
                yield b"x" * (1 << 20)

        found = httpx.post(url + CHAT, content=chunks(), timeout=60)
        assert found.status_code == 413
    assert found.json()["error"]["message"].startswith("the body has more than 8388608 bytes")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"[" * 100_000, "100000 lists"),
        (b"[" * 40_000, "nested"),
        (b'{"messages":' + b"[" * 200 + b"]" * 200 + b"}", "nested"),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"temperature": -Infinity}', "Infinity"),
        (b'{"temperature": 1e999}', "too large"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "too large"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "half a character"),
        (b'{"messages": "\xff"}', "UTF-8"),
        (b'{"messages"', "no JSON"),
        (b"", "body"),
        (b"[]", "body"),
        (b'"text"', "body"),
        (b'{"messages": 1, "model": "demo"}', "messages"),
        (b'{"messages": [], "model": "no such"}', "mo"),
        (json.dumps(ask(tokens=10**30)).encode(), "max_tokens"),
        (json.dumps(ask(seed=2**64)).encode(), "seed"),
        (json.dumps(ask(n=10**6)).encode(), "n: "),
        (json.dumps({**ask(), "messages": ask()["messages"] * 51}).encode(), "messages"),
    ],
)
def test_bad_bodies_get_one_clear_error(url: str, body: bytes, words: str) -> None:
    headers = {"Content-Type": "application/json"}
    found = httpx.post(url + CHAT, content=body, headers=headers, timeout=60)
    assert found.status_code in (400, 404), found.text
    error = found.json()["error"]
    assert words in error["message"]
    assert len(error["message"]) < 1000
    if words == "n: ":
        return  # Anthropic's API has no such field
    found = httpx.post(f"{url}/v1/messages", content=body, headers=headers, timeout=60)
    assert 400 <= found.status_code < 500, found.text
    assert found.json()["type"] == "error"


@pytest.mark.parametrize(
    "path",
    ["/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/static/../../../etc/passwd",
     "//etc/passwd", "/static/%2e%2e%2f%2e%2e%2fsession.py", "/\x00", "/%00", "/%ff%fe",
     "/v1/models/../../x"],
)  # fmt: skip
def test_paths_do_not_leave_the_page(url: str, path: str) -> None:
    with connect(url) as raw:
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        found = read_to_end(raw)
    assert found.startswith((b"HTTP/1.1 404 ", b"HTTP/1.1 400 ")), found
    assert b"root:" not in found


@pytest.mark.parametrize(
    "data",
    [b"\x16\x03\x01\x02\x00\x01\x00", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
     b"\r\n" * 10 + b"\0\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",
     b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
     b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n"],
)  # fmt: skip
def test_what_is_not_http_is_refused(url: str, data: bytes) -> None:
    with connect(url) as raw:
        raw.sendall(data)
        assert read_to_end(raw).startswith(b"HTTP/1.1 40")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(
    strict: FastAPI, url: str, alone: str, stream: bool
) -> None:
    server = strict.state.server
    before = server.session.stats()
    with connect(url) as leaving:
        leaving.sendall(request_bytes(endless(stream=stream)))
        until(lambda: server.session.stats().generated_tokens > before.generated_tokens)
        assert server.admission.live == 1
    seconds = until(lambda: server.session.stats().cancelled > before.cancelled)
    steps = server.session.stats().steps - before.steps
    print(f"freed {1000 * seconds:.0f} ms after the end of the connection, after {steps} steps")
    until(lambda: server.admission.live == 0)
    assert server.session.stats().running == 0
    assert answer(url) == alone


def test_a_killed_client_frees_its_slot(strict: FastAPI, url: str) -> None:
    server = strict.state.server
    before = server.session.stats()
    code = (
        "import socket, sys, time\n"
        f"s = socket.create_connection(('127.0.0.1', {url.rpartition(':')[2]}))\n"
        f"s.sendall({request_bytes(endless(stream=True))!r})\n"
        "s.recv(100); print('asked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"asked\n"
        client.kill()
    until(lambda: server.session.stats().cancelled > before.cancelled)
    until(lambda: server.admission.live == 0)


def test_a_client_that_reads_nothing_is_closed(strict: FastAPI, url: str, alone: str) -> None:
    server = strict.state.server
    body = endless(stream=True, n=4, logprobs=True, top_logprobs=20)
    with others(url, alone), connect(url, receive_buffer=2048) as reader:
        reader.sendall(request_bytes(body))
        until(lambda: server.admission.live >= 4, 30)
        until(lambda: server.admission.live < 4, 60)
        assert b"[DONE]" not in read_to_end(reader)


def test_a_full_queue_says_when_to_come_back(strict: FastAPI, url: str, alone: str) -> None:
    server = strict.state.server
    with ThreadPoolExecutor(8) as pool:
        first = server.admission.most_of_client
        slots = [connect(url) for _ in range(first)]
        for each in slots:
            each.sendall(request_bytes(endless(stream=True)))
        until(lambda: server.admission.live == first)
        found = [httpx.post(url + CHAT, json=ask())]  # another client still has places
        for _ in range(server.admission.most - first):
            slots.append(connect(url, address="127.0.0.2"))
            slots[-1].sendall(request_bytes(endless(stream=True)))
        until(lambda: server.admission.live == server.admission.most)
        found += pool.map(lambda _: httpx.post(url + CHAT, json=ask()), range(4))
        for each in slots:
            each.close()
    for refused in found:
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["Retry-After"]) <= 120
        assert refused.json()["error"]["code"] == "queue_full"
    until(lambda: server.admission.live == 0)
    assert answer(url) == alone


def test_one_address_leaves_connections_to_others(serve_app: FastAPI, serving: Serving) -> None:
    settings = ServeSettings(model_name="demo", max_connections=4)
    with serving(serve_app, settings) as url, ExitStack() as stack:
        first = [stack.enter_context(connect(url)) for _ in range(3)]
        for address, status in (("127.0.0.1", b"503"), ("127.0.0.2", b"200")):
            with connect(url, address=address) as each:
                each.sendall(
                    b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
                )
                assert read_to_end(each).split()[1] == status
        first[0].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert first[0].recv(20).split()[1] == b"200"


def test_a_share_of_one_connection_is_one(serve_app: FastAPI, serving: Serving) -> None:
    settings = ServeSettings(model_name="demo", max_connections=1)
    with serving(serve_app, settings) as url:
        assert httpx.get(f"{url}/health").status_code == 200


def test_a_dead_engine_is_told_and_not_ready(serving: Serving) -> None:
    settings = ServeSettings(model_name="demo")
    with (
        ktrt.load(DEMO / "chat.yaml") as session,
        serving(create_app(session, settings), settings) as url,
    ):
        body = {**endless(), "model": "adapter_b"}
        with ThreadPoolExecutor(1) as pool:
            under_way = pool.submit(httpx.post, url + CHAT, json=body, timeout=60)
            until(lambda: session.stats().generated_tokens > 0, 60)

            def step() -> bool:
                raise RuntimeError("the engine is gone")

            session._steps.scheduler.step = step  # type: ignore[method-assign]
            cut = under_way.result()
        until(lambda: not session.alive)
        assert cut.status_code == 503
        assert "failed" in cut.json()["error"]["message"]
        found = httpx.post(url + CHAT, json=body)
        assert found.status_code == 503
        assert found.json()["error"]["code"] == "engine_failed"
        assert httpx.get(f"{url}/ready").status_code == 503
        assert httpx.get(f"{url}/health").status_code == 200
        assert "ktrt:engine_alive{" in httpx.get(f"{url}/metrics").text


@contextmanager
def served(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Runs ``python -m ktrt.serve`` over the demo; yields the process and its address."""
    command = [sys.executable, "-m", "ktrt.serve", str(DEMO / "chat.yaml"), "--port", "0"]
    environment = {**os.environ, "API_KEY": ""}
    with subprocess.Popen(
        [*command, *arguments], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if line.startswith("Listening on "):
                    yield process, line.split()[2]
                    break
            else:
                pytest.fail(f"the server did not start: {process.wait()}")
        finally:
            process.kill()


def test_sigterm_lets_answers_finish_within_its_limit() -> None:
    with served("--drain-seconds", "60") as (process, url):
        body = {**ask(tokens=60, logit_bias={"1": -100}), "model": "adapter_b"}
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(httpx.post, url + CHAT, json=body, timeout=60) for _ in range(4)]
            until(lambda: "\nvllm:num_requests_running{model_name=\"model\"} 4.0" in
                  httpx.get(f"{url}/metrics").text, 60)  # fmt: skip
            process.send_signal(signal.SIGTERM)
            found = [each.result() for each in asked]
        assert [each.status_code for each in found] == [200] * 4
        assert len({each.json()["choices"][0]["message"]["content"] for each in found}) == 1
        assert process.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
        assert process.stdout is not None
        lines = [json.loads(line) for line in process.stdout]
    answers = [line for line in lines if line["path"] == CHAT]
    assert [line["generated_tokens"] for line in answers] == [60] * 4
    assert "star" not in json.dumps(lines)


def test_a_second_sigterm_ends_at_once() -> None:
    with served() as (process, url):
        with connect(url) as stream:
            stream.sendall(request_bytes({**endless(stream=True), "model": "adapter_b"}))
            assert b"200 OK" in stream.recv(4096)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            assert b"[DONE]" not in read_to_end(stream)
        assert process.wait(30) == 143
