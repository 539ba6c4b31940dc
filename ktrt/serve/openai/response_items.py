"""A reply as the items of a response, with the events that build them."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from ktrt.prompt.reply import Content, Reasoning, ToolCallStart

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ktrt.prompt.reply import Event

# Name and data of an event.
Emitted = tuple[str, dict[str, Any]]
_DELTAS = {
    "message": "response.output_text",
    "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}


class Items:
    """The output of a response as it grows: one item is open at a time."""

    def __init__(self) -> None:
        self.output: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._pieces: list[str] = []
        self._scores: list[dict[str, Any]] = []

    def push(self, events: Iterable[Event], scores: Sequence[dict[str, Any]] = ()) -> list[Emitted]:
        """Appends events of a reply, and their tokens' log probabilities, which belong to the
        message only."""
        found: list[Emitted] = []
        for event in events:
            if isinstance(event, Content):
                found += self._begin("message")
                found += self._grow(event.text, scores)
                scores = ()
            elif isinstance(event, Reasoning):
                found += self._begin("reasoning")
                found += self._grow(event.text)
            elif isinstance(event, ToolCallStart):
                found += self._close("completed")
                found += self._begin("function_call", call_id=event.id, name=event.name)
            else:
                found += self._grow(event.text)
        return found

    def finish(self, status: str) -> list[Emitted]:
        """Ends the last item; a reply without any has an empty message."""
        found = [] if self.output else self._begin("message")
        return found + self._close(status)

    def _begin(self, kind: str, **fields: str) -> list[Emitted]:
        if self._open is not None and self._open["type"] == kind:
            return []
        found = self._close("completed")
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[kind]
        item: dict[str, Any] = {
            "id": f"{prefix}_{uuid.uuid4().hex}",
            "type": kind,
            "status": "in_progress",
        }
        if kind == "message":
            item |= {"role": "assistant", "content": []}
        elif kind == "reasoning":
            item |= {"summary": [], "content": []}
        else:
            item |= {**fields, "arguments": ""}
        self._open, self._pieces, self._scores = item, [], []
        self.output.append(item)
        found.append(("response.output_item.added", self._place() | {"item": dict(item)}))
        if kind != "function_call":
            data = self._part_place() | {"part": self._part()}
            found.append(("response.content_part.added", data))
        return found

    def _grow(self, text: str, scores: Sequence[dict[str, Any]] = ()) -> list[Emitted]:
        item = self._open
        assert item is not None
        self._pieces.append(text)
        name = f"{_DELTAS[item['type']]}.delta"
        if item["type"] == "function_call":
            return [(name, self._item_place() | {"delta": text})]
        data = self._part_place() | {"delta": text}
        if item["type"] == "message":
            entries = [_with_bytes(each) for each in scores]
            self._scores += entries
            data["logprobs"] = entries
        return [(name, data)]

    def _close(self, status: str) -> list[Emitted]:
        item = self._open
        if item is None:
            return []
        text, name = "".join(self._pieces), f"{_DELTAS[item['type']]}.done"
        found: list[Emitted] = []
        item["status"] = status
        if item["type"] == "function_call":
            item["arguments"] = text
            data = self._item_place() | {"arguments": text, "name": item["name"]}
            found.append((name, data))
        else:
            part = self._part()
            item["content"] = [part]
            data = self._part_place() | {"text": text}
            if item["type"] == "message":
                data["logprobs"] = part["logprobs"]
            found += [
                (name, data),
                ("response.content_part.done", self._part_place() | {"part": part}),
            ]
        found.append(("response.output_item.done", self._place() | {"item": dict(item)}))
        self._open = None
        return found

    def _part(self) -> dict[str, Any]:
        """Returns the open item's part."""
        text = "".join(self._pieces)
        if self._open is not None and self._open["type"] == "message":
            scores = list(self._scores)
            return {"type": "output_text", "text": text, "annotations": [], "logprobs": scores}
        return {"type": "reasoning_text", "text": text}

    def _place(self) -> dict[str, Any]:
        return {"output_index": len(self.output) - 1}

    def _item_place(self) -> dict[str, Any]:
        return {"item_id": self.output[-1]["id"], **self._place()}

    def _part_place(self) -> dict[str, Any]:
        return {**self._item_place(), "content_index": 0}


def _with_bytes(entry: dict[str, Any]) -> dict[str, Any]:
    """Returns an entry in which bytes are never null, as the clients of this endpoint expect."""
    found = {**entry, "bytes": entry["bytes"] or []}
    if "top_logprobs" in entry:
        found["top_logprobs"] = [_with_bytes(each) for each in entry["top_logprobs"]]
    return found
