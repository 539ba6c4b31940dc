"""Chat templates: from messages to token ids.

A named template is a row of ``TEMPLATES`` bound to a tokenizer, ``auto`` is the tokenizer's own.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import Any, Protocol

from ktrt.config import TemplateArgs
from ktrt.config.check import nearest
from ktrt.errors import ConfigError
from ktrt.template_table import TEMPLATES, TemplateSpec

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
            f"template: unknown name {name!r}{nearest(name, TEMPLATES)}; "
            f"known: auto, {', '.join(TEMPLATES)}"
        )
    if args.enable_thinking is False and TEMPLATES[name].thought is None:
        _log.info("enable_thinking has no effect: %s is not a reasoning template", name)
    return NamedTemplate(name, args, tokenizer)


class NamedTemplate:
    """A row of ``TEMPLATES`` bound to a tokenizer."""

    def __init__(self, name: str, args: TemplateArgs, tokenizer: Tokenizer) -> None:
        spec = TEMPLATES[name]
        self.name = name
        self._bound = _bind(name, spec, tokenizer)
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


@dataclass(frozen=True)
class _Bound:
    """A tokenizer that encodes as in training, with the ids of the template's marks."""

    tokenizer: Tokenizer
    marks: Mapping[str, int | None]
    stop_ids: frozenset[int]

    def compile(self, slot: str) -> list[str | int]:
        """A slot's texts and, in place of its marks, ids."""
        parts: list[str | int] = []
        for part in _MARK.split(slot):
            if part not in self.marks:
                parts += [part] if part else []
            elif (token := self.marks[part]) is not None:
                parts.append(token)
        return parts


_MARK = re.compile(r"(\{bos\??\}|\{eos\}|\{token [^}]+\}|\{\|\})")
_DEFAULT_EOS = "<|endoftext|>"  # which LLaMA-Factory gives a tokenizer that has none


def _bind(name: str, spec: TemplateSpec, tokenizer: Tokenizer) -> _Bound:
    """``ConfigError`` lists the tokens that the tokenizer lacks."""
    known = {text: _token_id(tokenizer, text) for text in spec.tokens}
    known |= {text: _vocabulary_id(tokenizer, text) for text in spec.stop_words}
    optional = [t for t in spec.optional_stop_words if _vocabulary_id(tokenizer, t) is not None]
    eos, eos_text = tokenizer.eos_token_id, None
    if spec.replaces_eos or eos is None:
        eos_text = spec.stop_words[0] if spec.replaces_eos else _DEFAULT_EOS
        eos = _vocabulary_id(tokenizer, eos_text)
    marks: dict[str, int | None] = {
        "{|}": None,
        "{bos}": tokenizer.bos_token_id,
        "{bos?}": tokenizer.bos_token_id,
        "{eos}": eos,
    }
    slots = "".join((spec.prefix, spec.system, spec.user, spec.assistant))
    for mark in dict.fromkeys(_MARK.findall(slots)):
        if mark.startswith("{token "):
            text = mark.removeprefix("{token ").removesuffix("}")
            known[text] = marks[mark] = _vocabulary_id(tokenizer, text)
    missing = [text for text, token in known.items() if token is None]
    missing += ["bos"] if "{bos}" in slots and tokenizer.bos_token_id is None else []
    missing += ["eos"] if eos is None and not spec.replaces_eos else []
    if missing:
        raise _does_not_fit(name, missing)
    words = [*spec.stop_words, *optional]
    own_eos = getattr(tokenizer, "eos_token", None)
    declared = [w for w in dict.fromkeys([*words, *([eos_text] if eos_text else [])])
                if w != own_eos or w != eos_text]  # fmt: skip
    encoding = _declare(name, declared, tokenizer)
    stops = {eos, tokenizer.eos_token_id, *(_token_id(encoding, word) for word in words)}
    return _Bound(encoding, marks, frozenset(each for each in stops if each is not None))


def _token_id(tokenizer: Tokenizer, text: str) -> int | None:
    """The id that the text is encoded to; None if these are several or it is unknown."""
    encoded = tokenizer.encode(text, add_special_tokens=False)
    return encoded[0] if len(encoded) == 1 and encoded[0] != tokenizer.unk_token_id else None


def _vocabulary_id(tokenizer: Any, text: str) -> int | None:
    """The id of a token that need not be what its text is encoded to."""
    token: int | None = _token_id(tokenizer, text)
    if token is None and hasattr(tokenizer, "convert_tokens_to_ids"):
        token = tokenizer.convert_tokens_to_ids(text)
    return None if token == tokenizer.unk_token_id else token


def _declare(name: str, words: Iterable[str], tokenizer: Any) -> Any:
    """The tokenizer, or a copy to which ``words`` are special tokens.

    LLaMA-Factory adds stop words as special tokens before it encodes. That changes ids where the
    tokenizer has a word in its vocabulary alone, or swallows the white space behind it: Phi-3's
    ``<|end|>`` does, and the line break that follows it in the template gets lost.
    """
    added_tokens = getattr(tokenizer, "added_tokens_decoder", None)
    if added_tokens is None:
        return tokenizer
    added = {each.content: each for each in added_tokens.values()}
    changed = [word for word in words if word not in added or _is_loose(added[word])]
    if not changed:
        return tokenizer
    from tokenizers import AddedToken

    own = deepcopy(tokenizer)
    own.add_tokens([AddedToken(w, normalized=False, special=True) for w in changed], True)
    if len(own) != len(tokenizer):
        raise _does_not_fit(name, changed)
    return own


def _is_loose(token: Any) -> bool:
    """Whether the token takes white space with it, or is not found in any text as it is."""
    return bool(token.lstrip or token.rstrip or token.single_word or token.normalized)


def _does_not_fit(name: str, missing: Iterable[str]) -> ConfigError:
    return ConfigError(
        f"template {name!r} does not fit this model: its tokenizer has no token "
        f"{', '.join(missing)}; set the template that the model (and adapter) was trained "
        "with, or `template: auto`"
    )


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
