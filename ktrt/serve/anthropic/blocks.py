"""A reply as Anthropic's content blocks, whole and as events of a stream."""

from __future__ import annotations

import json
import re
import uuid
from typing import TYPE_CHECKING, Any

from ktrt.prompt.reply import Content, Reasoning, ToolCallStart

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ktrt.prompt.reply import Event
    from ktrt.serve.openai.reply import Reply

# Anthropic's ids; others, of a model's own call format, are taken as they are where they fit.
_ID = re.compile(r"[A-Za-z0-9_-]+")


class Blocks:
    """The content of a message as it grows: blocks of thought, text and calls, one after the
    other."""

    def __init__(self) -> None:
        self._blocks: list[dict[str, Any]] = []
        # A call's arguments so far, as text.
        self._json = ""
        # White space that may begin a text.
        self._held = ""

    def push(self, events: Sequence[Event]) -> Iterator[dict[str, Any]]:
        """Appends events of a reply; yields the events of a stream."""
        for event in events:
            if isinstance(event, ToolCallStart):
                number = event.id if _ID.fullmatch(event.id) else f"toolu_{uuid.uuid4().hex}"
                yield from self._begin(
                    {"type": "tool_use", "id": number, "name": event.name, "input": {}}
                )
            elif isinstance(event, Reasoning):
                yield from self._grow("thinking", event.text)
            elif isinstance(event, Content):
                yield from self._grow("text", event.text)
            else:
                self._json += event.text
                yield self._delta({"type": "input_json_delta", "partial_json": event.text})

    def end(self) -> Iterator[dict[str, Any]]:
        """Ends the last block; yields the events of a stream."""
        if not self._blocks:
            return
        last = self._blocks[-1]
        if last["type"] == "tool_use":
            last["input"] = _arguments(self._json)
            self._json = ""
        yield {"type": "content_block_stop", "index": len(self._blocks) - 1}

    @property
    def content(self) -> list[dict[str, Any]]:
        """The blocks, complete after ``end``."""
        return self._blocks

    def _begin(self, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self.end()
        self._blocks.append(block)
        start = {"type": "content_block_start", "index": len(self._blocks) - 1}
        yield {**start, "content_block": dict(block)}

    def _grow(self, kind: str, text: str) -> Iterator[dict[str, Any]]:
        if not self._blocks or self._blocks[-1]["type"] != kind:
            if kind == "text" and not text.strip():
                self._held += text
                return
            if kind == "text":
                # Between a thought or a call and a text, white space separates them.
                text = text.lstrip() if self._blocks else self._held + text
            self._held = ""
            empty = {"type": kind, kind: ""}
            yield from self._begin(empty | ({"signature": ""} if kind == "thinking" else {}))
        self._blocks[-1][kind] += text
        yield self._delta({"type": f"{kind}_delta", kind: text})

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        index = len(self._blocks) - 1
        return {"type": "content_block_delta", "index": index, "delta": delta}


def _arguments(text: str) -> dict[str, Any]:
    """Returns a call's arguments. An answer that ended within them has none that can be read: its
    stop reason says so."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def stop_of(reply: Reply, max_tokens: int) -> tuple[str, str | None]:
    """Returns Anthropic's stop reason and the stop sequence that ended the answer."""
    last, reason = reply.last, reply.finish_reason
    if reason == "tool_calls":
        return "tool_use", None
    if last is not None and reason == "length":
        full = last.generated_tokens >= max_tokens
        return ("max_tokens" if full else "model_context_window_exceeded"), None
    found: str | None = last.stop_string if last is not None else None
    return ("stop_sequence", found) if found is not None else ("end_turn", None)
