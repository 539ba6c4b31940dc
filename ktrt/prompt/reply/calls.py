"""Reads a block of calls."""

from __future__ import annotations

import re
import secrets
import string
from typing import TYPE_CHECKING, Any

from ktrt.prompt.reply.events import ToolArguments, ToolCallStart
from ktrt.prompt.reply.json_text import JsonScanner, dumped, is_text, parsed, typed
from ktrt.prompt.reply.notation import ArgumentScanner, read_argument
from ktrt.prompt.reply.scan import first_of, starts_with
from ktrt.prompt.reply.table import HeadCall, ObjectCall, ProgramCall, TagCall

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ktrt.prompt.reply.scan import Source
    from ktrt.prompt.reply.table import CallBlock

# An object whose arguments can be passed on as they come.
_OBJECT_HEAD = re.compile(
    r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_NAME = re.compile(r"[^\s<>\"'`{}()\[\],;=]+")
_SHORT = string.ascii_letters + string.digits
# Longer names and keys are none.
_MOST = 200


class CallReader:
    """Reads from ``source`` the calls of one block after another.

    ``enter`` begins a block; ``step`` reads on until ``closed`` (the block is over) or ``failed``:
    then ``source.raw`` is text that looked like a call, and the source has what follows.
    """

    def __init__(
        self, source: Source, tools: Sequence[Mapping[str, Any]], *, short_ids: bool
    ) -> None:
        self._source, self._short_ids = source, short_ids
        functions = [each.get("function", each) for each in tools]
        self._schemas = {each["name"]: each.get("parameters") or {} for each in functions}
        self.index = -1
        self.closed = self.failed = False
        self._state: Callable[[], bool] = self._between

    def enter(self, block: CallBlock, mark: str) -> None:
        """Begins a block, or the call of one that is a single call, whose mark was read."""
        self._block, self._first = block, True
        self.closed = self.failed = False
        self._state = self._between
        if not block.begin:
            if mark in block.kept:
                self._source.raw = self._source.raw.removesuffix(mark)
                self._source.text = mark + self._source.text
            self._begin(mark)

    def step(self) -> bool:
        """Reads on; returns whether it did."""
        return self._state()

    def start(self, name: str, given: str | None) -> None:
        """Reports a call."""
        self.index += 1
        if given is None and self._short_ids:
            given = "".join(secrets.choice(_SHORT) for _ in range(9))
        elif given is None:
            given = f"call_{secrets.token_hex(12)}"
        self._source.events.append(ToolCallStart(self.index, given, name))

    def _write(self, text: str) -> None:
        if text:
            self._source.events.append(ToolArguments(self.index, text))

    def _fail(self) -> bool:
        self.failed = True
        return False

    def _end_call(self) -> bool:
        """Ends the call that was read; returns True."""
        self._source.raw = ""
        self._first = False
        self._state = self._between
        return True

    # ---- between calls

    def _between(self) -> bool:
        source, block = self._source, self._block
        source.take_raw(len(source.text) - len(source.text.lstrip()))
        ignored = block.before if self._first else (*block.between, block.begin)
        mark = starts_with(source.text, (block.end, *block.calls, *ignored), ended=source.ended)
        if mark is None or (not source.text and not source.ended):
            return False
        if mark in block.calls and (mark or source.text):
            if mark and mark not in block.kept:
                source.take_raw(len(mark))
            self._begin(mark)
            return True
        if mark and mark != block.end:
            source.take_raw(len(mark))
            return True
        if self._first:
            source.take_raw(len(mark))
            return self._fail()
        source.take(len(mark))
        self.closed = True
        return True

    def _begin(self, mark: str) -> None:
        call = self._block.calls[mark]
        self._kept = mark if mark in self._block.kept else ""
        if isinstance(call, ObjectCall):
            self._scanner, self._scanned = JsonScanner(), 0
            self._object_call = call
            self._state = self._object
        elif isinstance(call, HeadCall):
            self._head_call = call
            self._state = self._head
        elif isinstance(call, ProgramCall):
            self._program = call
            self._state = self._program_head
        else:
            self._tag: TagCall = call
            self._state = self._tag_name

    # ---- a JSON object

    def _object(self) -> bool:
        source = self._source
        head = _OBJECT_HEAD.match(source.text)
        name = _decoded(head[1]) if head else None
        if head and name is not None and self._is_tool(name):
            self.start(name, None)
            source.take(head.end())
            self._pass_value(self._object_end)
            return True
        found = self._scanner.find_end(source.text[self._scanned :])
        if found is None:
            self._scanned = len(source.text)
            if source.ended:
                source.take_raw(self._scanned)
                return self._fail()
            return False
        end, complete = self._scanned + found[0], found[1]
        call = _call_of(source.text[:end]) if complete else None
        if call is None or not self._is_tool(call[0]):
            source.take_raw(end)
            return self._fail()
        source.take(end)
        self.start(call[0], None)
        self._write(call[1])
        return self._end_call()

    def _is_tool(self, name: str) -> bool:
        return not self._object_call.known or name in self._schemas

    def _object_end(self) -> bool:
        """Skips the end of the object, with other keys if there are some."""
        source = self._source
        text = source.text.lstrip()
        if not text:
            return self._end_call() if source.ended else False
        if text[0] not in "},":
            return self._end_call()
        source.text = text
        self._scanner = JsonScanner(depth=1)
        self._state = self._object_rest
        return True

    def _object_rest(self) -> bool:
        source = self._source
        found = self._scanner.find_end(source.text)
        source.take_raw(len(source.text) if found is None else found[0])
        if not found and not source.ended:
            return False
        try:
            parsed('{"": 0' + source.raw)
        except ValueError:
            return self._fail() if source.raw.strip("},\n ") else self._end_call()
        return self._end_call()

    # ---- a head, then a JSON object

    def _head(self) -> bool:
        source, call = self._source, self._head_call
        ends = [each for each in (self._block.end, *self._block.between) if each.startswith("<")]
        text = source.text[: call.most]
        at, mark = first_of(text, ("{", *ends))
        known = re.match(r"\s*(\S+)\s", text) if call.known else None
        if known and known[1] not in self._schemas:
            return self._no_head()
        if not mark:
            return self._no_head() if source.ended or len(source.text) >= call.most else False
        head = re.fullmatch(call.head, text[:at])
        if head is None or (call.known and head["name"] not in self._schemas):
            return self._no_head()
        source.take(at)
        self.start(head["name"], head.groupdict().get("id"))
        if mark == "{":
            self._pass_value(self._end_call)
            return True
        self._write("{}")
        return self._end_call()

    def _no_head(self) -> bool:
        """Makes content of a mark in the call's text: it would be found again."""
        self._source.take_raw(len(self._kept))
        return self._fail()

    # ---- a JSON value that is passed on

    def _pass_value(self, after: Callable[[], bool]) -> None:
        self._scanner, self._after = JsonScanner(), after
        self._state = self._value
        self._source.raw = ""

    def _value(self) -> bool:
        source = self._source
        found = self._scanner.find_end(source.text)
        if found is None:
            self._write(source.take(len(source.text)))
            return False
        self._write(source.take(found[0]))
        self._state = self._after if found[1] else self._end_call
        return True

    # ---- as in a program

    def _program_head(self) -> bool:
        source, call = self._source, self._program
        text = source.text[: call.most]
        at, mark = first_of(text, ("{" if call.notation == "gemma" else "(",))
        if not mark:
            return self._fail() if source.ended or len(source.text) >= call.most else False
        head = re.fullmatch(call.head, text[:at])
        if head is None or (call.known and head["name"] not in self._schemas):
            return self._fail()
        source.take_raw(at + len(mark))
        self._name, self._keys = head["name"], -1  # reported with its first argument, or at its end
        return self._next_argument()

    def _next_argument(self) -> bool:
        self._argument = ArgumentScanner(self._program.notation)
        self._state = self._argument_or_end
        return True

    def _argument_or_end(self) -> bool:
        source, notation = self._source, self._program.notation
        end = self._argument.find_end(source.text, ended=source.ended)
        if end is None:
            return self._cut_off() if source.ended else False
        text, mark = source.text[:end].strip(), source.text[end]
        is_last = mark == ("}" if notation == "gemma" else ")")
        found = read_argument(text, notation) if text else None
        if not (found or (is_last and not text)) or not (is_last or mark == ","):
            source.take_raw(end)  # calls within it are not looked for: that would be quadratic
            return self._fail() if self._keys < 0 else self._break_off()
        if self._keys < 0:
            self.start(self._name, None)
            self._keys, source.raw = 0, ""
        source.take(end + 1)
        if found:
            self._write(f"{', ' if self._keys else '{'}{dumped(found[0])}: {found[1]}")
            self._keys += 1
        if not is_last:
            return self._next_argument()
        self._write("}" if self._keys else "{}")
        return self._end_call()

    def _cut_off(self) -> bool:
        """Ends a call without its end: arguments that arrived, and JSON that stays open."""
        source = self._source
        if self._keys < 0:
            source.take_raw(len(source.text))
            return self._fail()
        self._write(", " + source.take(len(source.text)))
        return self._end_call()

    # ---- tags

    def _tag_name(self) -> bool:
        source, tag = self._source, self._tag
        text = source.text[:_MOST]
        if tag.name_end:
            at, mark = first_of(text, (tag.name_end,))
            found = bool(mark)
        else:
            match = re.search(r"[\s<>]", text)
            at, mark = (match.start(), "") if match else (len(text), "")
            found = match is not None
            mark = ">" if match and match[0] == ">" else ""
        if not found and (source.ended or len(source.text) >= _MOST):
            if not (source.ended and text in self._schemas and not tag.name_end):
                return self._fail()
        elif not found:
            return False
        self._name = text[:at]
        if not _NAME.fullmatch(self._name):
            return self._fail()
        source.take_raw(at + len(mark))
        # The call is reported once its next mark shows that it is one.
        self._keys = -1
        self._state = self._tag_next
        return True

    def _tag_next(self) -> bool:
        source, tag, block = self._source, self._tag, self._block
        source.take_raw(len(source.text) - len(source.text.lstrip()))
        marks = (tag.key, tag.end, block.end, block.begin)
        mark = starts_with(source.text, marks, ended=source.ended)
        if mark is None or (not source.text and not source.ended):
            return False
        if not mark and self._keys < 0 and not (not source.text and self._name in self._schemas):
            return self._fail()
        if self._keys < 0:
            self.start(self._name, None)
            self._keys, source.raw = 0, ""
        if mark == tag.key:
            source.take_raw(len(mark))
            self._state = self._tag_key
            return True
        if mark and mark == tag.end:
            source.take(len(mark))
        self._write("{}" if self._keys == 0 else "}")
        return self._end_call()

    def _tag_key(self) -> bool:
        source, tag = self._source, self._tag
        end = tag.key_end
        text = source.text[:_MOST]
        at, mark = first_of(text, (end,))
        if not mark:
            return self._break_off() if source.ended or len(source.text) >= _MOST else False
        rest = source.text[at + len(end) :]
        if tag.value_begin:
            space = len(rest) - len(rest.lstrip())
            begin = starts_with(rest[space:], (tag.value_begin,), ended=source.ended)
            if begin is None or (not rest[space:] and not source.ended):
                return False
            if not begin:
                return self._break_off()
            rest = rest[space + len(begin) :]
        self._key = text[:at].strip()
        source.take(len(source.text) - len(rest))
        source.raw = ""
        self._state = self._tag_value
        return True

    def _tag_value(self) -> bool:
        source = self._source
        at, mark = first_of(source.text, (self._tag.value_end,))
        if not mark and not source.ended:
            return False
        text = source.take(at if mark else len(source.text)).removeprefix("\n")
        properties = self._schemas.get(self._name, {}).get("properties") or {}
        self._write(f"{', ' if self._keys else '{'}{dumped(self._key)}: ")
        self._keys += 1
        if not mark:  # cut off: so is the JSON
            self._write(dumped(text)[:-1])
            return self._end_call()
        self._write(typed(text.removesuffix("\n"), properties.get(self._key)))
        source.take(len(mark))
        self._state = self._tag_next
        return True

    def _break_off(self) -> bool:
        """Ends the call before a key that is none, which is content."""
        self._write("{}" if self._keys == 0 else "}")
        return self._fail()


def _decoded(text: str) -> str | None:
    """Returns the name that JSON text holds; None for none that can be one."""
    try:
        name = parsed(text)
    except ValueError:
        return None
    return name if isinstance(name, str) and name.strip() and is_text(name) else None


def _call_of(text: str) -> tuple[str, str] | None:
    """Returns name and arguments of a JSON object; None if it is no call."""
    try:
        call = parsed(text)
    except ValueError:
        return None
    name = call.get("name") if isinstance(call, dict) else None
    if not isinstance(name, str) or not name.strip() or not is_text(name):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):  # JSON inside of JSON
        try:
            if isinstance(parsed(arguments), dict) and is_text(arguments):
                return name, arguments
        except ValueError:
            pass
    return name, dumped(arguments if arguments is not None else {})
