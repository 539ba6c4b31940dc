"""How long a conversation may be, and which of its turns go when it is longer."""

import sys
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Messages = Sequence[Mapping[str, str]]

# Of a context that is full, the part that is freed at once: then some turns pass before the next
# ones go, which makes the whole prompt new to the KV cache.
_FREED = 4


def context_limit(model: Any, cutoff_len: int | None = None) -> int:
    """The tokens, prompt and answer, of the model's context or ``cutoff_len``, the smaller one;
    ``sys.maxsize`` where the model's config has no limit.

    With YaRN a config may give the length before or after stretching; the stretched one counts.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or sys.maxsize
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "yarn" and rope.get("factor"):
        original = rope.get("original_max_position_embeddings") or limit
        limit = max(limit, int(original * rope["factor"]))
    return min(limit, cutoff_len or sys.maxsize)


def drop_turns(
    messages: Messages, count_tokens: Callable[[Messages], int], limit: int, max_new_tokens: int
) -> tuple[list[Mapping[str, str]], int]:
    """``messages`` without as many of the oldest turns (a user's message and its answer) as it
    takes to leave room for an answer, and how many those are.

    Room: ``max_new_tokens``, half of ``limit`` at most. A system message and the last message
    always stay, so that the result may still be too long. Where turns go, a quarter of the limit
    is freed, and a conversation that grows on from the same messages loses no more for a while.
    """
    system = [each for each in messages[:1] if each["role"] == "system"]
    rest = list(messages[len(system) :])
    room = limit - min(max_new_tokens, limit // 2)
    whole = count_tokens(messages)
    if whole <= room:
        return list(messages), 0

    def without(turns: int) -> list[Mapping[str, str]]:
        return [*system, *rest[2 * turns :]]

    def least(target: int) -> int | None:
        """The fewest turns to drop for a prompt of ``target`` tokens; None if that takes more than
        there are. Without a turn every template gives fewer tokens."""
        found = bisect_left(
            range(most + 1), -target, key=lambda turns: -count_tokens(without(turns))
        )
        return found if found <= most else None

    step = max(limit // _FREED, 1)
    freed = -(-(whole - room) // step) * step
    most = (len(rest) - 1) // 2
    dropped = least(whole - freed) or least(room) or most
    return without(dropped), dropped
