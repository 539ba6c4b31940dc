"""Tests of ktrt.generate.response: a whole answer from its tokens."""

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from ktrt.generate.response import Response, TokenResponse


def token(text: str, number: int, **values: Any) -> TokenResponse:
    given: dict[str, Any] = {
        "finish_reason": None, "prompt_tokens": 9, "reused_tokens": 4, "generated_tokens": number,
        "prefill_seconds": 0.5, "decode_seconds": 0.1 * (number - 1),
    }  # fmt: skip
    return TokenResponse(text=text, token=10 + number, **(given | values))


def test_whole() -> None:
    found = Response.whole([token("你", 1), token("", 2), token("好!", 3, finish_reason="stop")])
    assert found == Response(
        text="你好!",
        finish_reason="stop",
        prompt_tokens=9,
        reused_tokens=4,
        generated_tokens=3,
        prefill_seconds=0.5,
        decode_seconds=0.2,
        token_ids=(11, 12, 13),
    )
    assert (found.logprobs, found.top_logprobs) == ((), ())
    assert found.summary() == (
        "prompt 9 tokens (4 reused), first token after 0.50 s; 3 tokens, 10.0 per second, stop"
    )


def test_logprobs() -> None:
    first = token("a", 1, logprob=-0.5, top_logprobs=((11, -0.5), (3, -1.5)))
    last = token("b", 2, logprob=-0.25, top_logprobs=((12, -0.25),), finish_reason="length")
    found = Response.whole([first, last])
    assert found.logprobs == (-0.5, -0.25)
    assert found.top_logprobs == (((11, -0.5), (3, -1.5)), ((12, -0.25),))


def test_an_answer_under_way_says_so() -> None:
    assert token("a", 1).summary().endswith("1 tokens, 0.0 per second, interrupted")


def test_responses_are_immutable() -> None:
    for response in (token("a", 1), Response.whole([token("a", 1, finish_reason="stop")])):
        with pytest.raises(FrozenInstanceError):
            response.text = "x"  # type: ignore[misc]
