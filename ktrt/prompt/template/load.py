"""Chat templates: from messages to token ids.

A named template is an entry of ``TEMPLATES`` bound to a tokenizer; ``auto`` is the tokenizer's own.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from itertools import groupby
from operator import itemgetter

from ktrt.config import TemplateArgs
from ktrt.config.check import nearest
from ktrt.errors import ConfigError
from ktrt.prompt.reply.table import named_reply
from ktrt.prompt.template.auto import AutoTemplate
from ktrt.prompt.template.base import (
    Message,
    Template,
    Tokenizer,
    Tool,
    no_switch,
    special_marks,
)
from ktrt.prompt.template.binding import bind
from ktrt.prompt.template.table import TEMPLATES
from ktrt.prompt.template.table.tools import BETWEEN_RESULTS, TOOL_FORMATS, TOOL_SLOTS, ToolSlots
from ktrt.prompt.template.tool_text import calls_text, tools_text

_log = logging.getLogger(__name__)


def load_template(args: TemplateArgs, tokenizer: Tokenizer) -> Template:
    """Returns the template that ``args`` names, bound to ``tokenizer``.

    Raises ``ConfigError`` for an unknown name, for a special token that the tokenizer does not
    encode to exactly one id, and, with ``auto``, for a tokenizer without a chat template.
    """
    if args.template in (None, "", "auto"):
        return AutoTemplate(args, tokenizer)
    name = str(args.template)
    if name not in TEMPLATES:
        raise ConfigError(
            f"template: unknown name {name!r}{_nearest_template(name)}; "
            f"known: auto, {', '.join(TEMPLATES)}"
        )
    if args.enable_thinking is False and TEMPLATES[name].thought is None:
        _log.info("enable_thinking has no effect: %s is not a reasoning template", name)
    return NamedTemplate(name, args, tokenizer)


def _nearest_template(name: str) -> str:
    """Suggests a template; knows models' names too: `mixtral` means `mistral`."""
    models = {
        re.sub(r"[^a-z0-9.]+", "_", model.lower()): known
        for known, spec in TEMPLATES.items()
        for model in spec.models.split(", ")
    }
    return nearest(name, TEMPLATES, also=models)


class NamedTemplate:
    """An entry of ``TEMPLATES`` bound to a tokenizer."""

    def __init__(self, name: str, args: TemplateArgs, tokenizer: Tokenizer) -> None:
        spec = TEMPLATES[name]
        self.name = name
        slots = TOOL_SLOTS.get(name, ToolSlots())
        self._bound = bind(name, spec, tokenizer, slots.calls + slots.results)
        self.stop_ids = self._bound.stop_ids
        self._prefix = self._bound.compile(spec.prefix)
        self._system = self._bound.compile(spec.system)
        self._user = self._bound.compile(spec.user)
        self._assistant = self._bound.compile(spec.assistant)
        self._first_user_system = spec.system if spec.system_in_user else None
        self._default_system = (
            spec.default_system if args.default_system is None else args.default_system
        )
        self._thought = spec.thought
        self._tool_format = TOOL_FORMATS[slots.format]
        self._calls = self._bound.compile(slots.calls) or self._assistant
        self._results = self._bound.compile(slots.results) or self._user
        thought = None if spec.thought is None else (spec.thought.begin, spec.thought.end)
        self.reply = named_reply(name, slots.format, thought)
        marks = (*(thought or ()), *(self.reply.marks if self.reply else ()))
        self.shown_tokens: Mapping[int, str] = special_marks(
            marks, self._bound.tokenizer.encode, tokenizer.decode
        )
        self._skip_thought = args.enable_thinking is False

    @property
    def thinking(self) -> bool | None:
        return None if self._thought is None else not self._skip_thought

    def with_thinking(self, thinking: bool) -> "NamedTemplate":
        if self._thought is None:
            raise no_switch(self.name)
        changed = copy(self)
        changed._skip_thought = not thinking
        return changed

    @property
    def reply_start(self) -> str:
        return self._thought.empty if self._thought and self._skip_thought else ""

    def encode(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> list[int]:
        turns = list(messages)
        system = self._default_system
        if turns[0]["role"] == "system":
            system = turns.pop(0)["content"] or system
        if tools:
            system += tools_text(self._tool_format, tools)
        before = ""
        ids = self._fill(self._prefix)
        if system and self._first_user_system is not None:
            before = self._first_user_system.replace("{c}", system)
        elif system:
            ids += self._fill(self._system, system)
        last = ""
        for role, group in groupby(turns, key=itemgetter("role")):
            if (last, role) == ("tool", "user"):
                # The results' slot ends with the begin of a reply.
                ids += self._fill(self._assistant)
            for turn in [*group] if role != "tool" else [_joined_results(group)]:
                ids += self._turn(turn, before)
                before = "" if role == "user" else before
            last = role
        return ids + self._fill([self.reply_start])

    def _turn(self, turn: Message, before: str) -> list[int]:
        content = turn["content"]
        if turn["role"] == "user":
            return self._fill(self._user, before + content)
        if turn["role"] == "tool":
            return self._fill(self._results, content)
        content = self._without_thought(content)
        if calls := turn.get("tool_calls"):
            content += calls_text(self.name, self._tool_format.calls, calls)
            return self._fill(self._calls, content)
        return self._fill(self._assistant, content)

    def _fill(self, slot: Sequence[str | int], content: str = "") -> list[int]:
        ids: list[int] = []
        for part in slot:
            if isinstance(part, int):
                ids.append(part)
            elif text := part.replace("{c}", content):
                ids += self._bound.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _without_thought(self, reply: str) -> str:
        """Drops the text between the marks, with and without their line breaks: models write
        both."""
        thought = self._thought
        if thought is None:
            return reply
        for begin, end in (
            (thought.begin, thought.end),
            (thought.begin.strip(), thought.end.strip()),
        ):
            marked = f"{re.escape(begin)}.*?{re.escape(end)}"
            reply = re.sub(marked, "", reply, flags=re.DOTALL)
        return reply.lstrip("\n")


def _joined_results(results: Iterable[Message]) -> Message:
    """Returns several calls' results as one message, as training joins them."""
    return {"role": "tool", "content": BETWEEN_RESULTS.join(each["content"] for each in results)}
