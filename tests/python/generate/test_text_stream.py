"""Tests of ktrt.generate.text_stream: whole characters, and stop strings that nobody sees."""

from itertools import pairwise
from typing import Any

import pytest
from helpers.tiny_chat import make_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ktrt.generate.text_stream import StopStrings, TextStream


def pieces(tokenizer: Any, ids: list[int], *, skip: bool = True) -> list[str]:
    stream = TextStream(tokenizer, skip_special_tokens=skip)
    return [stream.push(token) for token in ids]


class TestTextStream:
    TOKENIZER = make_tokenizer()

    @settings(max_examples=100, deadline=None)
    @given(st.text(max_size=80))
    @example("你好🙂🚀👨‍👩‍👧 mixed, 専門家 ñ")
    @example("a" * 200 + "路由器" * 30)
    def test_whole_text_never_half_a_character(self, text: str) -> None:
        ids = self.TOKENIZER.encode(text, add_special_tokens=False)
        found = pieces(self.TOKENIZER, ids)
        whole = self.TOKENIZER.decode(ids, skip_special_tokens=True)
        assert "".join(found) == whole.removesuffix("�")
        if "�" not in whole:
            assert not any("�" in piece for piece in found)

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=150))
    def test_any_ids_at_all(self, ids: list[int]) -> None:
        whole = self.TOKENIZER.decode(ids, skip_special_tokens=True)
        assert "".join(pieces(self.TOKENIZER, ids)) == whole.removesuffix("�")

    def test_emoji_comes_whole_and_at_once(self) -> None:
        ids = self.TOKENIZER.encode("🧭", add_special_tokens=False)
        assert len(ids) > 1
        assert pieces(self.TOKENIZER, ids) == [""] * (len(ids) - 1) + ["🧭"]

    def test_special_tokens(self) -> None:
        eos = self.TOKENIZER.eos_token_id
        assert pieces(self.TOKENIZER, [eos]) == [""]
        assert pieces(self.TOKENIZER, [eos], skip=False) == ["</s>"]

    def test_a_character_around_skipped_tokens(self) -> None:
        *head, last = self.TOKENIZER.encode("🧭", add_special_tokens=False)
        ids = [*head, *[self.TOKENIZER.eos_token_id] * 50, last]
        assert pieces(self.TOKENIZER, ids) == [""] * (len(ids) - 1) + ["🧭"]

    def test_the_window_stays_small(self) -> None:
        longest = 0
        tokenizer = self.TOKENIZER

        class Spy:
            def decode(self, ids: list[int], **options: Any) -> str:
                nonlocal longest
                longest = max(longest, len(ids))
                return str(tokenizer.decode(ids, **options))

        ids = tokenizer.encode("专家混合模型很高兴 tiny 🙂 " * 150, add_special_tokens=False)
        assert len(ids) > 1000
        pieces(Spy(), ids)
        assert longest < 64


def shown(stops: list[str], pieces: list[str]) -> tuple[list[str], str | None]:
    """The text after each piece, and the stop string that was found."""
    stream, texts, text = StopStrings(stops), [], ""
    for piece in pieces:
        text += stream.push(piece)
        texts.append(text)
    texts.append(text + stream.flush())
    return texts, stream.found


def expected(stops: list[str], text: str) -> tuple[str, str | None]:
    """Character by character: the first time that the text ends with stop strings, the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            found = max(ending, key=len)
            return text[: end - len(found)], found
    return text, None


def cut(text: str, borders: list[int]) -> list[str]:
    edges = [0, *sorted(border % (len(text) + 1) for border in borders), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


class TestStopStrings:
    @settings(max_examples=400, deadline=None)
    @given(
        st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
        st.text("abc", max_size=14),
        st.lists(st.integers(0, 20), max_size=8),
    )
    @example(["abc", "b"], "ab", [1])
    @example(["aab"], "aaab", [1, 2, 3])
    @example(["bc", "abc"], "abc", [])
    def test_any_texts_cut_anywhere(self, stops: list[str], text: str, borders: list[int]) -> None:
        texts, found = shown(stops, cut(text, borders))
        assert (texts[-1], found) == expected(stops, text)
        # Shown text stays, and is never the beginning of a stop string that comes.
        assert all(texts[-1].startswith(each) for each in texts)

    def test_as_early_as_possible(self) -> None:
        texts, _ = shown(["</s>"], ["Hi <", "b> a </", "i> ", "x"])
        assert texts == ["Hi ", "Hi <b> a ", "Hi <b> a </i> ", *["Hi <b> a </i> x"] * 2]

    def test_nothing_follows(self) -> None:
        stream = StopStrings(["\n\n"])
        assert stream.push("one\n") == "one"
        assert stream.push("\ntwo") == ""
        assert stream.found == "\n\n"
        assert stream.push("three") == stream.flush() == ""

    @pytest.mark.parametrize("stops", [[], ["xyz"]])
    def test_none_there(self, stops: list[str]) -> None:
        assert shown(stops, ["a", "b"]) == (["a", "ab", "ab"], None)
