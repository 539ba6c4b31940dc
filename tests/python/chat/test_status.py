"""Tests of ktrt.chat.status."""

import json

import pytest
from helpers.fake_chat import FakeResponse

from ktrt.chat.status import Totals, as_dict, status_line

LAST = FakeResponse(
    text="", token=1, finish_reason="stop", generated_tokens=51, prompt_tokens=120,
    reused_tokens=20, prefill_seconds=0.5, decode_seconds=2.0,
)  # fmt: skip


def changed(**values: object) -> FakeResponse:
    return FakeResponse(**{**vars(LAST), **values})


@pytest.mark.parametrize(
    ("last", "limit", "line"),
    [
        (
            LAST,
            None,
            "51 tokens, 25.0/s · first after 0.50 s · prompt 120: 20 reused, 100 read at 200/s",
        ),
        (
            changed(finish_reason="length"),
            50.0,
            "51 tokens, 25.0/s (50% of the memory's limit) · first after 0.50 s · prompt 120: 20 "
            "reused, 100 read at 200/s · cut at max_new_tokens",
        ),
        (
            changed(finish_reason=None, generated_tokens=1, prefill_seconds=0.0),
            50.0,
            "1 token · first after 0.00 s · prompt 120: 20 reused, 100 read · stopped by you",
        ),
    ],
)
def test_the_line(last: FakeResponse, limit: float | None, line: str) -> None:
    assert status_line(last, limit) == line


def test_json() -> None:
    record = json.loads(json.dumps(as_dict(LAST, 50.0)))
    assert record == {
        "finish_reason": "stop",
        "prompt_tokens": 120,
        "reused_tokens": 20,
        "generated_tokens": 51,
        "first_token_seconds": 0.5,
        "decode_seconds": 2.0,
        "prefill_tokens_per_second": 200.0,
        "decode_tokens_per_second": 25.0,
        "share_of_bandwidth_limit": 0.5,
    }
    single = as_dict(changed(generated_tokens=1, decode_seconds=0.0), 50.0)
    assert single["decode_tokens_per_second"] is single["share_of_bandwidth_limit"] is None


def test_totals() -> None:
    totals = Totals()
    assert totals.lines() == [
        "answers           0",
        "prompt tokens     0: 0 reused, 0 read",
        "generated tokens  0",
    ]
    totals.add(LAST)
    totals.add(changed(generated_tokens=1, decode_seconds=0.0, reused_tokens=120))
    assert totals.lines() == [
        "answers           2",
        "prompt tokens     240: 140 reused, 100 read at 100.0/s",
        "generated tokens  52 at 25.0/s",
    ]
