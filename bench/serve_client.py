"""A client of streamed chat completions that takes little of the processor: plain asyncio.

python bench/serve_client.py PORT STREAMS TOKENS    # reads answers, prints their tokens
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

# Bytes of a line of a stream; the reader's own limit is 64 KiB.
_LINE = 1 << 20


class Refused(Exception):
    """An answer with another status than 200."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        super().__init__(f"{status}: {body[:300].decode('utf-8', 'replace')}")
        self.status = status
        self.retry_after = float(headers.get("retry-after", "1"))


@dataclass
class Answer:
    """The answer to a request. ``first``: seconds to the first piece of text; ``gaps``: seconds
    between pieces; ``done``: the stream ended as it should. ``margin``: the least distance of a
    token's two largest log probabilities, with ``top_logprobs``."""

    text: str = ""
    id: str = ""
    model: str = ""
    finish_reason: str | None = None
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    first: float | None = None
    gaps: list[float] = field(default_factory=list)
    margin: float = float("inf")
    done: bool = False


class Client:
    """Asks one server; ``key`` is sent as a bearer token."""

    def __init__(self, host: str, port: int, key: str | None = None) -> None:
        self._host, self._port, self._key = host, port, key

    async def chat(
        self, model: str, messages: Sequence[Mapping[str, str]], *, leave_after: int | None = None,
        **options: Any,
    ) -> Answer:  # fmt: skip
        """Returns a streamed answer. ``leave_after``: closes the connection after that many pieces.
        ``Refused``; ``OSError`` and ``asyncio.IncompleteReadError``: the connection broke."""
        body = {"model": model, "messages": messages, "stream": True,
                "stream_options": {"include_usage": True}, **options}  # fmt: skip
        answer, pieces = Answer(), 0
        last = begin = time.perf_counter()
        async for event in self._events(body):
            if event == "[DONE]":
                answer.done = True
                break
            if _take(answer, json.loads(event)):
                now = time.perf_counter()
                if answer.first is None:
                    answer.first = now - begin
                else:
                    answer.gaps.append(now - last)
                last, pieces = now, pieces + 1
                if pieces == leave_after:
                    break
        return answer

    async def models(self, names: Sequence[str]) -> list[str]:
        """Returns ``names`` with ``base`` replaced by what the server calls its base model."""
        cards = json.loads(await self.get("/v1/models"))["data"]
        base = [card["id"] for card in cards if card.get("parent") is None]
        return [base[0] if name == "base" else name for name in names]

    async def get(self, path: str) -> bytes:
        """Returns the body of a page."""
        reader, writer = await self._send("GET", path, b"")
        try:
            headers = await _head(reader)
            if "content-length" in headers:
                return await reader.readexactly(int(headers["content-length"]))
            return b"".join([chunk async for chunk in _chunks(reader)])
        finally:
            writer.close()

    async def _events(self, body: Mapping[str, Any]) -> AsyncIterator[str]:
        """Yields the data of a stream's events."""
        reader, writer = await self._send("POST", "/v1/chat/completions", json.dumps(body).encode())
        try:
            await _head(reader)
            rest = b""
            async for chunk in _chunks(reader):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    if line.startswith(b"data:"):
                        yield line[5:].strip().decode()
        finally:
            writer.close()

    async def _send(
        self, method: str, path: str, body: bytes
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(self._host, self._port, limit=_LINE)
        key = f"Authorization: Bearer {self._key}\r\n" if self._key else ""
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n{key}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await writer.drain()
        return reader, writer


async def _head(reader: asyncio.StreamReader) -> dict[str, str]:
    """Returns the headers of an answer. ``Refused``: its status is not 200."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    status = int(head[0].split()[1])
    pairs = (line.partition(":") for line in head[1:] if line)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    if status != 200:
        body = await reader.read(int(headers.get("content-length", "0")) or 4096)
        raise Refused(status, headers, body)
    return headers


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Yields the parts of a chunked body; ``IncompleteReadError``: it ends before its end."""
    while size := int((await reader.readline()).partition(b";")[0] or b"x", 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


def _take(answer: Answer, event: Mapping[str, Any]) -> bool:
    """Adds an event to an answer; returns whether it brought text."""
    if "error" in event:
        raise Refused(500, {}, json.dumps(event["error"]).encode())
    answer.id, answer.model = event.get("id", answer.id), event.get("model", answer.model)
    if usage := event.get("usage"):
        answer.tokens, answer.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
        answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    for choice in event["choices"]:
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
        for token in (choice.get("logprobs") or {}).get("content") or ():
            best = [each["logprob"] for each in token["top_logprobs"]]
            if len(best) > 1:
                answer.margin = min(answer.margin, best[0] - best[1])
        if text := choice["delta"].get("content"):
            answer.text += text
            return True
    return False


async def read_all(port: int, streams: int, tokens: int) -> int:
    """Reads answers of all streams at once; returns their tokens."""
    client = Client("127.0.0.1", port)
    (model,) = await client.models(["base"])
    answers = await asyncio.gather(*(
        client.chat(
            model, [{"role": "user", "content": f"{stream}?"}], max_tokens=tokens, temperature=0
        )
        for stream in range(streams)
    ))  # fmt: skip
    if not all(each.done and each.text for each in answers):
        raise SystemExit("an answer is incomplete")
    return sum(each.tokens for each in answers)


if __name__ == "__main__":
    print(asyncio.run(read_all(*map(int, sys.argv[1:4]))))
