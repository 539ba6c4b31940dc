"""Reads a reply piece by piece."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ktrt.prompt.reply.events import Content, Event
from ktrt.prompt.reply.table import ReplyFormat


class _Template(Protocol):
    @property
    def reply(self) -> ReplyFormat | None: ...
    @property
    def reply_start(self) -> str: ...


class ReplyParser:
    """Turns pieces of a reply's text into events.

    Joined events do not depend on the pieces' borders. Text that looks like a call and is none
    comes out as content; a call that ends early has the arguments that arrived.

    ``tools``: the functions of the request; without any, calls are content. ``start``: the text of
    the reply that the prompt holds already, see ``Template.reply_start``.
    """

    def __init__(
        self,
        form: ReplyFormat | None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        start: str = "",
    ) -> None:
        self._form, self._tools, self._start = form, tools, start

    def push(self, text: str) -> list[Event]:
        """Returns the events that are certain now."""
        return [Content(text)] if text else []

    def finish(self) -> list[Event]:
        """Returns the rest, at the reply's end."""
        return []


def reply_format(template: _Template) -> ReplyFormat | None:
    """Returns how the template's models write thoughts and calls; None if nothing is known."""
    return template.reply


def reply_parser(
    template: _Template, tools: Sequence[Mapping[str, Any]] | None = None
) -> ReplyParser:
    """Returns a parser for one reply to a prompt of ``template`` with ``tools``."""
    return ReplyParser(template.reply, tools=tools, start=template.reply_start)
