"""Binds a named template to a tokenizer: ids of its tokens, and encoding as in training."""

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from ktrt.errors import ConfigError
from ktrt.prompt.template.table import TemplateSpec

_MARK = re.compile(r"(\{bos\??\}|\{eos\}|\{token [^}]+\}|\{\|\})")
_DEFAULT_EOS = "<|endoftext|>"  # LLaMA-Factory's eos for a tokenizer without one


@dataclass(frozen=True)
class Bound:
    """A tokenizer that encodes as in training, and the ids of the template's marks."""

    tokenizer: Any
    marks: Mapping[str, int | None]
    stop_ids: frozenset[int]

    def compile(self, slot: str) -> list[str | int]:
        """Returns the slot as texts, and ids in place of its marks."""
        parts: list[str | int] = []
        for part in _MARK.split(slot):
            if part not in self.marks:
                parts += [part] if part else []
            elif (token := self.marks[part]) is not None:
                parts.append(token)
        return parts


def bind(name: str, spec: TemplateSpec, tokenizer: Any, more_slots: str = "") -> Bound:
    """Binds a template, and slots next to the spec's, to a tokenizer. Raises ``ConfigError`` with
    the tokens that it lacks."""
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
    slots = "".join((spec.prefix, spec.system, spec.user, spec.assistant, more_slots))
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
    if eos_text and eos_text != getattr(tokenizer, "eos_token", None):
        declared = [eos_text, *words]
    else:  # a stop word that is the tokenizer's eos already stays unchanged
        declared = [word for word in words if word != eos_text]
    encoding = _declare(name, declared, tokenizer)
    stops = {eos, tokenizer.eos_token_id, *(_token_id(encoding, word) for word in words)}
    return Bound(encoding, marks, frozenset(each for each in stops if each is not None))


def _token_id(tokenizer: Any, text: str) -> int | None:
    """Returns the id that the text encodes to; None for several ids or the unknown token."""
    encoded = tokenizer.encode(text, add_special_tokens=False)
    return encoded[0] if len(encoded) == 1 and encoded[0] != tokenizer.unk_token_id else None


def _vocabulary_id(tokenizer: Any, text: str) -> int | None:
    """Returns the id of a token, even if its text encodes to something else."""
    token: int | None = _token_id(tokenizer, text)
    if token is None and hasattr(tokenizer, "convert_tokens_to_ids"):
        token = tokenizer.convert_tokens_to_ids(text)
    return None if token == tokenizer.unk_token_id else token


def _declare(name: str, words: Iterable[str], tokenizer: Any) -> Any:
    """Returns the tokenizer, or a copy in which ``words`` are special tokens.

    LLaMA-Factory adds stop words as special tokens before it encodes. This changes ids if a word
    is an ordinary vocabulary entry, or swallows the white space after it: Phi-3's ``<|end|>``
    swallows the line break that follows it in the template.
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
    """Returns whether the token swallows white space, or is not found verbatim in any text."""
    return bool(token.lstrip or token.rstrip or token.single_word or token.normalized)


def _does_not_fit(name: str, missing: Iterable[str]) -> ConfigError:
    return ConfigError(
        f"template {name!r} does not fit this model: its tokenizer has no token "
        f"{', '.join(missing)}; set the template that the model (and adapter) was trained "
        "with, or `template: auto`"
    )
