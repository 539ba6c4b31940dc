"""Chat templates: from messages to token ids.

A named template is an entry of ``TEMPLATES`` bound to a tokenizer; ``auto`` is the tokenizer's own.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from copy import copy

from ktrt.config import TemplateArgs
from ktrt.config.check import nearest
from ktrt.errors import ConfigError
from ktrt.prompt.template.auto import AutoTemplate
from ktrt.prompt.template.base import (
    Message,
    Template,
    Tokenizer,
    no_switch,
)
from ktrt.prompt.template.binding import bind
from ktrt.prompt.template.table import TEMPLATES

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
        self._bound = bind(name, spec, tokenizer)
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
        self.shown_tokens: Mapping[int, str] = self._special_marks(tokenizer)
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

    def encode(self, messages: Sequence[Message]) -> list[int]:
        turns = list(messages)
        system = self._default_system
        if turns[0]["role"] == "system":
            system = turns.pop(0)["content"] or system
        before = ""
        ids = self._fill(self._prefix)
        if system and self._first_user_system is not None:
            before = self._first_user_system.replace("{c}", system)
        elif system:
            ids += self._fill(self._system, system)
        for turn in turns:
            if turn["role"] == "assistant":
                ids += self._fill(self._assistant, self._without_thought(turn["content"]))
            else:
                ids += self._fill(self._user, before + turn["content"])
                before = ""
        if self._thought and self._skip_thought:
            ids += self._fill([self._thought.empty])
        return ids

    def _fill(self, slot: Sequence[str | int], content: str = "") -> list[int]:
        ids: list[int] = []
        for part in slot:
            if isinstance(part, int):
                ids.append(part)
            elif text := part.replace("{c}", content):
                ids += self._bound.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _special_marks(self, tokenizer: Tokenizer) -> dict[int, str]:
        if self._thought is None:
            return {}
        ids = {*self._fill([self._thought.begin]), *self._fill([self._thought.end])}
        decode = tokenizer.decode
        special = [each for each in ids if not decode([each], skip_special_tokens=True)]
        return {each: decode([each], skip_special_tokens=False) for each in special}

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
