"""Chat templates: from messages to token ids.

A named template is a row of ``TEMPLATES`` bound to a tokenizer, ``auto`` is the tokenizer's own.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, Protocol

from ktrt.config import TemplateArgs
from ktrt.config.check import nearest
from ktrt.errors import ConfigError
from ktrt.template_binding import bind
from ktrt.template_table import TEMPLATES

_log = logging.getLogger(__name__)

Message = Mapping[str, str]


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None
    unk_token_id: int | None
    chat_template: Any

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def decode(self, token_ids: list[int], **options: Any) -> str: ...
    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any: ...


class Template(Protocol):
    """Renders checked messages that end with the user's, and knows which ids end the reply.

    ``thinking``: whether the model is let think first; None where the template has no such switch.
    ``shown_tokens``: the special tokens, with their text, that mark thoughts. They are part of a
    reply's text, where others may be skipped: without them thoughts could not be told apart.
    """

    name: str
    stop_ids: frozenset[int]
    shown_tokens: Mapping[int, str]

    @property
    def thinking(self) -> bool | None: ...

    def with_thinking(self, thinking: bool) -> "Template":
        """The same template with the switch set. ``ConfigError``: it has none."""
        ...

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The prompt's token ids; the reply is what follows them."""
        ...


def load_template(args: TemplateArgs, tokenizer: Tokenizer) -> Template:
    """The template that ``args`` names, bound to ``tokenizer``.

    ``ConfigError``: an unknown name; a special token of the template that the tokenizer does not
    encode to exactly one id; for ``auto``, a tokenizer without a chat template.
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
    """Finds it by the names of models too: `mixtral` means `mistral`."""
    models = {
        re.sub(r"[^a-z0-9.]+", "_", model.lower()): known
        for known, spec in TEMPLATES.items()
        for model in spec.models.split(", ")
    }
    return nearest(name, TEMPLATES, also=models)


class NamedTemplate:
    """A row of ``TEMPLATES`` bound to a tokenizer."""

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
            raise _no_switch(self.name)
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
        """Drops what stands between the marks as they are, then, between marks without their line
        breaks: models write both."""
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


def _no_switch(name: str) -> ConfigError:
    return ConfigError(
        f"template {name!r} cannot switch thinking on or off: it is no reasoning template"
    )


class AutoTemplate:
    """The tokenizer's own chat template."""

    name = "auto"
    shown_tokens: Mapping[int, str] = {}

    def __init__(self, args: TemplateArgs, tokenizer: Tokenizer) -> None:
        if not tokenizer.chat_template:
            raise ConfigError(
                "template: the model's tokenizer has no chat template of its own; set template to "
                f"one of {', '.join(TEMPLATES)}"
            )
        self._tokenizer = tokenizer
        self._default_system = args.default_system
        self._thinking = args.enable_thinking
        eos = tokenizer.eos_token_id
        self.stop_ids = frozenset[int](() if eos is None else (eos,))
        self._thinks_by_default = self._find_switch()
        self._check_tokens()
        if self._thinking is not None and self._thinks_by_default is None:
            _log.info("enable_thinking has no effect: the chat template has no such switch")

    @property
    def thinking(self) -> bool | None:
        default = self._thinks_by_default
        return default if default is None or self._thinking is None else self._thinking

    def with_thinking(self, thinking: bool) -> "AutoTemplate":
        if self._thinks_by_default is None:
            raise _no_switch(self.name)
        changed = copy(self)
        changed._thinking = thinking
        return changed

    def _find_switch(self) -> bool | None:
        """What the chat template does when nobody says; None if it does the same in any case."""
        probe = [{"role": "user", "content": "?"}]
        on, off, default = (self._render(probe, thinking) for thinking in (True, False, None))
        return None if on == off else default != off

    def _check_tokens(self) -> None:
        """A warning that names what looks like special tokens and is none to the tokenizer."""
        texts: str = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": "?"}], add_generation_prompt=True, tokenize=False
        )
        encode = self._tokenizer.encode
        unknown = [
            text
            for text in dict.fromkeys(re.findall(r"<[|｜][^<>|｜]+[|｜]>", texts))
            if len(encode(text, add_special_tokens=False)) != 1
        ]
        if unknown:
            _log.warning(
                "The chat template uses %s, which the tokenizer does not know as one token: do its "
                "files belong together?", ", ".join(unknown),
            )  # fmt: skip

    def encode(self, messages: Sequence[Message]) -> list[int]:
        turns = [dict(message) for message in messages]
        if self._default_system and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self._default_system})
        return self._render(turns, self._thinking)

    def _render(self, turns: list[dict[str, str]], thinking: bool | None) -> list[int]:
        from jinja2 import TemplateError

        # DeepSeek's templates (V3.1 on) and some others have the second name.
        options = {} if thinking is None else {"enable_thinking": thinking, "thinking": thinking}
        try:
            ids: list[int] = self._tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=True, return_dict=False, **options
            )
        except TemplateError as error:
            raise ConfigError(f"the tokenizer's chat template refuses this: {error}") from error
        return ids
