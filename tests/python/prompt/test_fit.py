"""Tests of ktrt.prompt.fit: the limit of a conversation, and the dropped turns."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV2Config, Gemma3Config, LlamaConfig, MambaConfig, Qwen3Config

from ktrt.prompt.fit import Messages, context_limit, drop_turns


def limit(config: Any, cutoff_len: int | None = None) -> int:
    return context_limit(SimpleNamespace(config=config), cutoff_len)


class TestLimit:
    def test_positions(self) -> None:
        assert limit(LlamaConfig(max_position_embeddings=4096)) == 4096
        assert limit(LlamaConfig(max_position_embeddings=4096), 100) == 100
        assert limit(LlamaConfig(max_position_embeddings=4096), 5000) == 4096

    def test_none(self) -> None:
        assert limit(MambaConfig()) == sys.maxsize
        assert limit(MambaConfig(), 100) == 100

    def test_the_text_model_of_several(self) -> None:
        config = Gemma3Config(text_config={"max_position_embeddings": 777})
        assert limit(config) == 777

    def test_yarn(self) -> None:
        yarn = {"rope_type": "yarn", "rope_theta": 1e4}
        # DeepSeek-V2-Lite's config gives the length after stretching.
        stretched = yarn | {"factor": 40.0, "original_max_position_embeddings": 4096}
        config = DeepseekV2Config(max_position_embeddings=163840, rope_parameters=stretched)
        assert limit(config) == 163840
        # Qwen3's model card adds YaRN to a config with the length before stretching.
        added = yarn | {"factor": 4.0, "original_max_position_embeddings": 32768}
        assert limit(Qwen3Config(max_position_embeddings=40960, rope_parameters=added)) == 131072
        short = yarn | {"factor": 4.0}
        assert limit(Qwen3Config(max_position_embeddings=40960, rope_parameters=short)) == 163840


def conversation(lengths: list[int], system: int = 0) -> list[dict[str, str]]:
    """Returns messages of ``lengths`` tokens, one per letter."""
    found = [{"role": "system", "content": "s" * system}] if system else []
    for index, length in enumerate(lengths):
        role = "assistant" if index % 2 else "user"
        found.append({"role": role, "content": chr(ord("a") + index % 26) * length})
    return found


def count(messages: Messages) -> int:
    return 2 + sum(3 + len(message["content"]) for message in messages)


class TestDropTurns:
    def test_what_fits_stays(self) -> None:
        messages = conversation([10, 10, 10], system=5)
        assert count(messages) == 49
        assert drop_turns(messages, count, 59, 10) == (messages, 0)
        assert drop_turns(messages, count, 58, 10)[1] == 1

    def test_the_oldest_turn_goes_and_the_system_message_stays(self) -> None:
        messages = conversation([10, 10, 10, 10, 10], system=5)
        kept, dropped = drop_turns(messages, count, 90, 20)
        assert dropped == 1
        assert kept == [messages[0], *messages[3:]]

    def test_the_last_message_stays(self) -> None:
        messages = conversation([10, 10, 500], system=5)
        assert drop_turns(messages, count, 100, 10) == ([messages[0], messages[3]], 1)
        assert drop_turns(messages[3:], count, 100, 10) == (messages[3:], 0)

    def test_no_more_than_needed_where_a_quarter_is_too_much(self) -> None:
        messages = conversation([1, 1, 1, 1, 95])
        kept, dropped = drop_turns(messages, count, 130, 20)
        assert (dropped, count(kept)) == (1, 108)

    def test_a_growing_conversation_seldom_loses_turns(self) -> None:
        """Holds for a caller that keeps the remaining turns and for one that passes all again."""
        everything: list[Any] = []
        kept_by_caller: list[Any] = []
        starts, losses = [], 0
        for turn in range(60):
            new = conversation([10, 10], system=0)
            everything += new
            kept_by_caller += new
            fitted, dropped = drop_turns(everything[:-1], count, 400, 100)
            starts.append(dropped)
            assert count(fitted) <= 300
            fitted, dropped = drop_turns(kept_by_caller[:-1], count, 400, 100)
            kept_by_caller = [*fitted, new[1]]
            losses += dropped > 0
            assert turn < 15 or len(fitted) >= 11, "not too much at once"
        assert starts == sorted(starts)
        assert losses < 15
        assert len(set(starts)) < 15

    @settings(max_examples=200, deadline=None)
    @given(
        st.lists(st.integers(1, 30), min_size=1, max_size=15).filter(lambda x: len(x) % 2 == 1),
        st.integers(2, 200),
        st.integers(1, 100),
    )
    def test_whole_turns_and_room(self, lengths: list[int], most: int, answer: int) -> None:
        messages = conversation(lengths, system=4)
        kept, dropped = drop_turns(messages, count, most, answer)
        assert kept == [messages[0], *messages[1 + 2 * dropped :]]
        assert count(kept) <= most - min(answer, most // 2) or len(kept) == 2


@pytest.mark.parametrize("max_new_tokens", [1, 50])
def test_counts_are_few(max_new_tokens: int) -> None:
    calls = 0

    def counted(messages: Messages) -> int:
        nonlocal calls
        calls += 1
        return count(messages)

    drop_turns(conversation([10] * 2001), counted, 1000, max_new_tokens)
    assert calls < 25
