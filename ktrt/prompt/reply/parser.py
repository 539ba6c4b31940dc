"""Reads a reply piece by piece: thoughts, content, and where calls begin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from ktrt.prompt.reply.calls import CallReader
from ktrt.prompt.reply.channels import find_header, is_header
from ktrt.prompt.reply.events import Content, Reasoning, ToolArguments
from ktrt.prompt.reply.scan import Source, first_of, held_length
from ktrt.prompt.reply.table import HARMONY_MARKS, ReplyFormat

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ktrt.prompt.reply.events import Event

_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_BREAKS = tuple(each for each in HARMONY_MARKS if each != "<|constrain|>")
_BETWEEN_MESSAGES = "\n\n"


class Template(Protocol):
    """The used subset of a template."""

    @property
    def reply(self) -> ReplyFormat | None: ...
    @property
    def reply_start(self) -> str: ...


class ReplyParser:
    """Turns pieces of a reply's text into events.

    Joined events do not depend on the pieces' borders. Text that looks like a call and is none
    comes out as content; a call that ends early has the arguments that arrived. White space next
    to the marks of thoughts and calls is left out.

    ``tools``: the functions of the request; without any, calls are content. ``start``: the text of
    the reply that the prompt holds already, see ``Template.reply_start``.

    Each state is a method that takes what it is sure of from the source, and returns whether it
    did: its decision may depend on text that is there, never on text that is missing.
    """

    def __init__(
        self,
        form: ReplyFormat | None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        start: str = "",
    ) -> None:
        form = form or ReplyFormat()
        self._form = form
        self._has_tools = bool(tools)
        self._source = Source()
        self._calls = CallReader(self._source, tools or (), short_ids=form.short_ids)
        names = [each.get("function", each)["name"] for each in tools or ()]
        self._blocks = [each.named(names) for each in form.blocks] if tools else []
        self._state: Callable[[], bool] = self._begin_message if form.channels else self._content
        # Whether content has begun, and its last character; whether white space is dropped.
        self._spoke, self._last, self._trims = False, "", False
        self._messages = 0
        # Whether a call's arguments have begun.
        self._wrote = False
        if start:
            self._prime(start)

    def push(self, text: str) -> list[Event]:
        """Returns the events that are certain now."""
        self._source.text += text
        return self._run()

    def finish(self) -> list[Event]:
        """Returns the rest, at the reply's end."""
        self._source.ended = True
        return self._run()

    def _run(self) -> list[Event]:
        while self._state():
            pass
        return self._source.take_events()

    def _prime(self, start: str) -> None:
        self.push(start)
        if self._state == self._content:
            self._source.text = ""
        self._spoke, self._last, self._messages = False, "", 0

    # ---- content

    def _content(self) -> bool:
        source = self._source
        if self._trims:
            source.text = source.text.lstrip()
        if not source.text:
            return False
        self._trims = False
        marks = self._content_marks()
        at, mark = first_of(source.text, marks, self._is_allowed)
        if mark:
            text = source.take(at)
            said = text.rstrip()
            self._say(said)
            source.raw = text[len(said) :] + source.take(len(mark))
            self._enter(mark)
            return True
        length = len(source.text)
        if not source.ended and marks:
            length -= held_length(source.text, marks)
            length = len(source.text[:length].rstrip())
        self._say(source.take(length))
        return False

    def _content_marks(self) -> list[str]:
        marks = [mark for block in self._blocks for mark in block.marks]
        if self._form.channels:
            marks += _BREAKS
        elif self._form.thought and not self._spoke:
            marks.append(self._form.thought[0])
        return marks

    def _is_allowed(self, text: str, at: int, mark: str) -> bool:
        """Returns whether the mark at this place is one: some are only at a line's begin, and a
        thought only before content."""
        if self._form.thought and mark == self._form.thought[0]:
            return not text[:at].strip()
        if any(block.at_line and mark in block.marks for block in self._blocks):
            return (text[at - 1] if at else self._last or "\n") == "\n"
        return True

    def _say(self, text: str) -> None:
        if text:
            if not self._spoke and self._messages:
                text = _BETWEEN_MESSAGES + text
            self._source.events.append(Content(text))
            self._spoke, self._last = self._spoke or bool(text.strip()), text[-1]

    def _enter(self, mark: str) -> None:
        if self._form.thought and mark == self._form.thought[0]:
            self._source.raw = ""
            self._trims, self._state = True, self._thought
        elif self._form.channels and mark in HARMONY_MARKS:
            self._end_message(mark)
        else:
            block = next(each for each in self._blocks if mark in each.marks)
            self._calls.enter(block, mark)
            self._state = self._block

    # ---- thoughts

    def _thought(self) -> bool:
        ends = _BREAKS if self._form.channels else (self._form.thought or ("", ""))[1:]
        return self._until(ends, lambda text: self._source.events.append(Reasoning(text)))

    def _until(self, ends: Sequence[str], emit: Callable[[str], object]) -> bool:
        """Passes text on up to one of the marks, without white space at both ends."""
        source = self._source
        if self._trims:
            source.text = source.text.lstrip()
        self._trims = self._trims and not source.text
        at, mark = first_of(source.text, ends)
        if mark:
            text = source.take(at).rstrip()
        else:
            length = len(source.text)
            if not source.ended:
                length -= held_length(source.text, ends)
                length = len(source.text[:length].rstrip())
            text = source.take(length)
        if text:
            emit(text)
        if not mark:
            return False
        source.take(len(mark))
        if self._form.channels:
            self._end_message(mark)
        else:
            self._trims, self._state = True, self._content
        return True

    # ---- calls

    def _block(self) -> bool:
        moved = self._calls.step()
        if self._calls.failed:
            # The text of the mark is content, and what follows is looked at again.
            text, self._source.raw = self._source.raw, ""
            self._say(text)
            self._state = self._content
            return True
        if self._calls.closed:
            self._source.raw = self._last = ""
            self._trims, self._state = True, self._content
            return True
        return moved

    # ---- messages of the harmony format

    def _begin_message(self) -> bool:
        """Reads a header, if there is one; other text is content."""
        source = self._source
        source.text = source.text.lstrip()
        state = is_header(source.text)
        if state is None and not source.ended:
            return False
        self._spoke = False
        if state:
            self._state = self._header
        else:
            self._state = self._content
        return bool(source.text)

    def _header(self) -> bool:
        source = self._source
        found = find_header(source.text, ended=source.ended)
        if found is None:
            return False
        source.take(found.length)
        self._trims = True
        if found.function and self._has_tools:
            self._calls.start(found.function, None)
            self._wrote = False
            self._state = self._arguments
        else:
            self._state = self._thought if found.channel == "analysis" else self._content
        return True

    def _arguments(self) -> bool:
        index = self._calls.index
        wrote: list[str] = []

        def emit(text: str) -> None:
            wrote.append(text)
            self._source.events.append(ToolArguments(index, text))

        moved = self._until(_BREAKS, emit)
        self._wrote = self._wrote or bool(wrote)
        if moved and not self._wrote:
            emit("{}")
        return moved

    def _end_message(self, mark: str) -> None:
        self._source.raw = ""
        self._messages += self._spoke
        self._trims = True
        if mark in _ENDS:
            self._state = self._begin_message
        else:
            self._source.text = mark + self._source.text
            self._state = self._header


def reply_format(template: Template) -> ReplyFormat | None:
    """Returns how the template's models write thoughts and calls; None if nothing is known."""
    return template.reply


def reply_parser(
    template: Template, tools: Sequence[Mapping[str, Any]] | None = None
) -> ReplyParser:
    """Returns a parser for one reply to a prompt of ``template`` with ``tools``."""
    return ReplyParser(template.reply, tools=tools, start=template.reply_start)
