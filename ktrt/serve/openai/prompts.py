"""Prompts of /v1/completions: texts and token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ktrt.prompt.fit import check_characters
from ktrt.serve.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ktrt.session import Session


@dataclass(frozen=True)
class Prompt:
    """A prompt's token ids; ``text`` is what a client gave, None for ids."""

    ids: Sequence[int]
    text: str | None


def read_prompts(session: Session, given: object, *, add_special_tokens: bool) -> list[Prompt]:
    """Returns the prompts of a text, a list of texts, token ids, or a list of lists of token ids.

    A text gets what the tokenizer puts in front of every text (BOS), unless it begins with it.
    ``ApiError`` 400: neither of these, or no tokens.
    """
    many = isinstance(given, list) and not all(_is_id(each) for each in given)
    prompts: list[Any] = given if many and isinstance(given, list) else [given]
    found = []
    for index, each in enumerate(prompts):
        where = f"prompt[{index}]" if many else "prompt"
        if isinstance(each, str):
            ids = encode(session, each, add_special_tokens=add_special_tokens)
            found.append(Prompt(ids, each))
        elif isinstance(each, list) and all(_is_id(token) for token in each):
            found.append(Prompt(each, None))
        else:
            raise ApiError(
                400, f"{where}: expected a text or a list of token ids, found {each!r:.80}",
                param="prompt",
            )  # fmt: skip
        if not found[-1].ids:
            raise ApiError(400, f"{where}: expected at least one token, found none", param="prompt")
    return found


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def encode(session: Session, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Returns a text's token ids, with one BOS where the tokenizer writes one."""
    check_characters(len(text), session.context_limit)
    tokenizer = session.tokenizer
    ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    bos = tokenizer.bos_token_id
    return ids[1:] if add_special_tokens and bos is not None and ids[:2] == [bos, bos] else ids
