"""Limits a conversation to the model's context: drops the oldest turns of a longer one."""

import sys
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ktrt.errors import ConfigError

Messages = Sequence[Mapping[str, Any]]

# A full context is freed by 1/4 at once. Every drop makes the whole prompt new to the KV cache, so
# drops should be rare.
_FREED = 4
# Texts have 2 to 5 characters a token, source code with its indentation up to 8.
_CHARACTERS = 16
# Tokenized within 0.1 s: never refused by its characters.
_SOME_TEXT = 1 << 16


def context_limit(model: Any, cutoff_len: int | None = None) -> int:
    """Returns the most tokens of prompt and answer: the smaller of the model's context and
    ``cutoff_len``, ``sys.maxsize`` without either.

    With YaRN a config may give the length before or after stretching; the stretched one counts.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or sys.maxsize
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "yarn" and rope.get("factor"):
        original = rope.get("original_max_position_embeddings") or limit
        limit = max(limit, int(original * rope["factor"]))
    return min(limit, cutoff_len or sys.maxsize)


def check_characters(count: int, limit: int) -> None:
    """Refuses a text that is too long for a context of ``limit`` tokens without tokenizing it, 8 MB
    of which take 10 seconds. ``ConfigError``: it has too many characters."""
    if count > max(_SOME_TEXT, _CHARACTERS * limit):
        raise ConfigError(
            f"the conversation has {count} characters, the model's context holds {limit} tokens: "
            "shorten it, or start a new one"
        )


def count_characters(value: Any) -> int:
    """Returns the characters of all texts in messages."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(count_characters, value.values()))
    return sum(map(count_characters, value)) if isinstance(value, list | tuple) else 0


def drop_turns(
    messages: Messages, count_tokens: Callable[[Messages], int], limit: int, max_new_tokens: int
) -> tuple[list[Mapping[str, Any]], int]:
    """Drops the oldest turns (a user's message and all up to the next one) to leave room for an
    answer.

    Returns the remaining messages and the number of dropped turns. The room is
    ``max_new_tokens``, but at most half of ``limit``. The system message and the last message
    always stay, so the result may still be too long. A drop frees a quarter of the limit, so a
    growing conversation loses no more turns for a while.
    """
    system = [each for each in messages[:1] if each["role"] == "system"]
    rest = list(messages[len(system) :])
    # A turn with tools has several messages.
    begins = [index for index, each in enumerate(rest) if each["role"] == "user"] or [0]
    room = limit - min(max_new_tokens, limit // 2)
    whole = count_tokens(messages)
    if whole <= room:
        return list(messages), 0

    def without(turns: int) -> list[Mapping[str, Any]]:
        return [*system, *rest[begins[turns] :]]

    def least(target: int) -> int | None:
        """Returns the fewest turns to drop for a prompt of ``target`` tokens; None if all are too
        few. Every template gives fewer tokens for fewer turns."""
        found = bisect_left(
            range(most + 1), -target, key=lambda turns: -count_tokens(without(turns))
        )
        return found if found <= most else None

    quarter = max(limit // _FREED, 1)
    freed = -(-(whole - room) // quarter) * quarter
    most = max(len(begins) - 1, 0)
    dropped = least(whole - freed) or least(room) or most
    return without(dropped), dropped
