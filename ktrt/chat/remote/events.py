"""The stream of an OpenAI chat completion → pieces of an answer."""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ktrt.chat.remote.http import Address, message_of
from ktrt.errors import KtrtError

# Marks around a thought that a server sends apart from the answer, as most templates have them:
# without them a thought looks like the answer.
THOUGHT, END_OF_THOUGHT = "<think>\n", "\n</think>\n\n"
# Names of the thought's field: DeepSeek, SGLang and ktrt; vLLM and OpenRouter.
_THOUGHTS = ("reasoning_content", "reasoning")


@dataclass(frozen=True, kw_only=True)
class RemoteToken:
    """A piece of an answer, see ``ktrt.chat.partner.Piece``. Until the server tells the usage,
    ``generated_tokens`` counts pieces with text, one token each on most servers."""

    text: str
    token: str = ""
    logprob: float | None = None
    top_logprobs: tuple[tuple[str, float], ...] = ()
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    reused_tokens: int | None = None
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def summary(self) -> str:
        """Returns counts and speeds for a log line."""
        prompt = "?" if self.prompt_tokens is None else self.prompt_tokens
        return (
            f"prompt {prompt} tokens, first piece after {self.prefill_seconds:.2f} s; "
            f"{self.generated_tokens} tokens in {self.decode_seconds:.2f} s, "
            f"{self.finish_reason or 'interrupted'}"
        )


class AnswerReader:
    """Reads one answer: a stream of server-sent events, or one JSON object of a server that does
    not stream."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._asked = time.monotonic()
        self._first: float | None = None
        self._pieces = 0
        self._thinking = False
        self._finish: str | None = None
        self._usage: Mapping[str, Any] = {}

    def read(self, lines: Iterable[bytes]) -> Iterator[RemoteToken]:
        """Yields the answer's pieces; the last one has the finish reason and the counts.

        ``KtrtError``: the server reported an error, or the stream ended before the answer did.
        """
        for event in _events(lines):
            if event is None:
                self._finish = self._finish or "stop"
                break
            if (error := message_of(event)) is not None and "choices" not in event:
                raise self._failure(error[0])
            yield from self._event(event)
        if self._finish is None:
            raise self._failure("the connection was closed before the answer was complete")
        if self._thinking:
            yield self._piece(END_OF_THOUGHT)
        yield self._last()

    def _failure(self, reason: str) -> KtrtError:
        return KtrtError(f"{self._address.url}: {self._address.hidden(reason)}")

    def _event(self, event: Mapping[str, Any]) -> Iterator[RemoteToken]:
        if isinstance(usage := event.get("usage"), Mapping):
            self._usage = usage
        for choice in _mappings(event.get("choices")):
            if choice.get("index", 0) != 0:
                continue
            delta = choice.get("delta", choice.get("message"))
            text = self._text(delta if isinstance(delta, Mapping) else {})
            yield from self._tokens(text, _logprobs(choice))
            if isinstance(reason := choice.get("finish_reason"), str):
                self._finish = reason

    def _text(self, delta: Mapping[str, Any]) -> str:
        """Returns a delta's text, with marks around the thought."""
        thoughts = (delta.get(name) for name in _THOUGHTS)
        thought = next((each for each in thoughts if isinstance(each, str) and each), "")
        content = delta.get("content") or delta.get("refusal") or ""
        text = ""
        if thought:
            text += thought if self._thinking else THOUGHT + thought
            self._thinking = True
        if isinstance(content, str) and content:
            text += END_OF_THOUGHT + content if self._thinking else content
            self._thinking = False
        return text

    def _tokens(self, text: str, logprobs: Sequence[Mapping[str, Any]]) -> Iterator[RemoteToken]:
        """Yields one piece for each token with a logprob; the first one has the whole text."""
        if not logprobs:
            if text:
                yield self._piece(text)
            return
        for row in logprobs:
            yield self._piece(
                text,
                token=str(row.get("token", "")),
                logprob=_number(row.get("logprob")),
                top_logprobs=tuple(
                    (str(each.get("token", "")), value)
                    for each in _mappings(row.get("top_logprobs"))
                    if (value := _number(each.get("logprob"))) is not None
                ),
            )
            text = ""

    def _piece(self, text: str, **more: Any) -> RemoteToken:
        now = time.monotonic()
        self._first = self._first or now
        self._pieces += 1
        return RemoteToken(
            text=text,
            generated_tokens=self._pieces,
            prefill_seconds=self._first - self._asked,
            decode_seconds=now - self._first,
            **more,
        )

    def _last(self) -> RemoteToken:
        now = time.monotonic()
        first = self._first or now
        details = self._usage.get("prompt_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, Mapping) else None
        prompt = _count(self._usage, "prompt_tokens")
        generated = _count(self._usage, "completion_tokens")
        return RemoteToken(
            text="",
            finish_reason=self._finish,
            prompt_tokens=prompt,
            reused_tokens=cached if isinstance(cached, int) else None,
            generated_tokens=self._pieces if generated is None else generated,
            prefill_seconds=first - self._asked,
            decode_seconds=now - first,
        )


def _events(lines: Iterable[bytes]) -> Iterator[Mapping[str, Any] | None]:
    """Yields the JSON objects of ``data:`` lines, and None for ``[DONE]``; the body itself if there
    are no such lines."""
    whole: list[bytes] = []
    streams = False
    for line in lines:
        name, colon, value = line.partition(b":")
        if colon and name == b"data":
            streams = True
            done = value.strip() == b"[DONE]"
            yield None if done else _object(value)
        elif not streams and not line.startswith((b":", b"event:", b"id:", b"retry:")):
            whole.append(line)
    if body := b"".join(whole).strip():
        yield _object(body)


def _object(text: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, Mapping):
        shown = text[:80].decode("utf-8", "replace").strip()
        raise KtrtError(f"expected events of an OpenAI server with JSON in them, found {shown!r}")
    return found


def _mappings(found: object) -> list[Mapping[str, Any]]:
    return [each for each in found if isinstance(each, Mapping)] if isinstance(found, list) else []


def _logprobs(choice: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = choice.get("logprobs")
    return _mappings(found.get("content")) if isinstance(found, Mapping) else []


def _number(found: object) -> float | None:
    return float(found) if isinstance(found, int | float) else None


def _count(usage: Mapping[str, Any], name: str) -> int | None:
    found = usage.get(name)
    return found if isinstance(found, int) else None
