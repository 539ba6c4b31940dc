"""Checks prompts, and what names tokens, against a model before anything runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ktrt.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_CONTEXT_HOLDS = "the model's context holds"


def check_prompt(
    model: Any, prompt_ids: Sequence[int], limit: int, bound: str = "", *, answered: bool = True
) -> int:
    """Returns how many tokens can follow the prompt in a context of ``limit`` tokens; ``bound``:
    the limit's origin, for the message. ``answered``: one at least has to.

    ``ConfigError``: the prompt leaves no room there, or holds ids without an embedding.
    """
    rows = _embeddings(model)
    if max(prompt_ids) >= rows:
        raise ConfigError(
            f"the prompt holds token id {max(prompt_ids)}, the model has {rows} embeddings: this "
            "tokenizer does not belong to this model"
        )
    if len(prompt_ids) + answered > limit:
        raise ConfigError(
            f"the conversation has {len(prompt_ids)} tokens, "
            f"{bound or _CONTEXT_HOLDS} {limit}: shorten it, or start a new one"
        )
    return limit - len(prompt_ids)


def check_ids(prompt_ids: Sequence[int]) -> list[int]:
    """Returns a prompt that a caller gave as token ids. ``ConfigError``: it is none."""
    if isinstance(prompt_ids, str | bytes) or not hasattr(prompt_ids, "__iter__"):
        raise ConfigError(f"prompt_ids: expected a list of token ids, found {prompt_ids!r:.80}")
    ids = list(prompt_ids)
    for index, token in enumerate(ids):
        if type(token) is not int or token < 0:
            raise ConfigError(
                f"prompt_ids[{index}]: expected a token id, 0 or more, found {token!r:.80}"
            )
    if not ids:
        raise ConfigError("prompt_ids: expected one token id at least, found none")
    return ids


def check_biased(model: Any, tokens: Iterable[int]) -> None:
    """``ConfigError``: logit_bias names a token that the model does not have."""
    rows = _embeddings(model)
    unknown = [token for token in tokens if token >= rows]
    if unknown:
        raise ConfigError(
            f"logit_bias: expected token ids below {rows}, the model's embeddings, found "
            f"{unknown[0]}"
        )


def _embeddings(model: Any) -> int:
    table = model.get_input_embeddings()
    plain = table.get_base_layer() if hasattr(table, "get_base_layer") else table
    # With an adapter that has more words, those can be read while it is off, too.
    rows: int = getattr(plain, "num_embeddings", None) or table.weight.shape[0]
    return rows
