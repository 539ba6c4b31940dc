"""Where an answer ends: fields that keep it going, log probabilities of a cut one, a server that is
asked to end, and an adapter for which there is no memory."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from ktrt.errors import AdapterError
from ktrt.machine.memory import Limit
from ktrt.serve.context import RequestFacts, current
from ktrt.serve.errors import ApiError
from ktrt.serve.vllm.runtime import _check_memory

if TYPE_CHECKING:
    from pathlib import Path

    from fastapi import FastAPI
    from openai import OpenAI

openai = pytest.importorskip("openai")
# Its answer ends after a few tokens.
SHORT = [{"role": "user", "content": "Hello"}]


def chat(client: OpenAI, **options: Any) -> Any:
    given = {"model": "demo", "messages": SHORT, "temperature": 0, "max_tokens": 60, **options}
    return client.chat.completions.create(**given)


@pytest.fixture(scope="module")
def short(openai_client: OpenAI) -> int:
    """The tokens of the answer, its end included."""
    found = chat(openai_client)
    assert found.choices[0].finish_reason == "stop"
    count: int = found.usage.completion_tokens
    return count


def test_an_answer_without_an_end(openai_client: OpenAI, short: int) -> None:
    found = chat(openai_client, extra_body={"ignore_eos": True})
    assert (found.choices[0].finish_reason, found.usage.completion_tokens) == ("length", 60)
    text = openai_client.completions.create(
        model="demo", prompt="Hello", max_tokens=60, temperature=0, extra_body={"ignore_eos": True}
    )
    assert text.usage is not None
    assert text.usage.completion_tokens == 60


def test_an_answer_of_a_least_length(openai_client: OpenAI, short: int) -> None:
    least = short + 4
    found = chat(openai_client, extra_body={"min_tokens": least})
    assert found.usage.completion_tokens > least  # the end comes on top
    same = chat(openai_client, extra_body={"min_tokens": short - 1})
    assert same.choices[0].message.content == chat(openai_client).choices[0].message.content


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extra_body": {"min_tokens": 61}}, "min_tokens: expected max_tokens \\(60\\) at most"),
        ({"stop": ["x"], "extra_body": {"min_tokens": 1}}, "min_tokens: expected no stop"),
        (
            {"response_format": {"type": "json_object"}, "extra_body": {"ignore_eos": True}},
            "ignore_eos: expected neither response_format",
        ),
    ],
)
def test_what_contradicts_it(openai_client: OpenAI, options: Any, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        chat(openai_client, **options)


def test_log_probabilities_end_with_the_text(openai_client: OpenAI) -> None:
    whole = chat(openai_client, logprobs=True).choices[0]
    text = whole.message.content
    # From the middle of a token to the middle of a later one.
    for first in range(1, 7):
        stop = text[first : first + 5]
        shown = text[: text.index(stop)]
        cut = chat(openai_client, logprobs=True, stop=[stop])
        assert cut.choices[0].message.content == shown
        tokens = [each.token for each in cut.choices[0].logprobs.content]
        assert tokens == [each.token for each in whole.logprobs.content][: len(tokens)]
        assert len("".join(tokens[:-1])) < len(shown) <= len("".join(tokens))
        chunks = list(chat(openai_client, logprobs=True, stop=[stop], stream=True))
        logprobs = [each.choices[0].logprobs for each in chunks]
        assert [t.token for each in logprobs if each for t in each.content] == tokens
        completion = openai_client.completions.create(
            model="demo", prompt="Hello", max_tokens=20, temperature=0, logprobs=1
        ).choices[0]
        stop = completion.text[first : first + 5]
        cut = openai_client.completions.create(
            model="demo", prompt="Hello", max_tokens=20, temperature=0, logprobs=1, stop=[stop]
        ).choices[0]
        names = cut.logprobs.tokens
        assert len("".join(names[:-1])) < len(cut.text) <= len("".join(names))


def test_a_request_from_before_the_end_is_answered(serve_app: FastAPI) -> None:
    """Its grammar may have been compiled while the process was asked to end."""
    server = serve_app.state.server
    before = current.set(RequestFacts())
    server.draining = time.perf_counter()
    try:
        server.check_ready()
        current.set(RequestFacts())
        with pytest.raises(ApiError, match="shutting down"):
            server.check_ready()
    finally:
        server.draining = None
        current.reset(before)


def test_an_adapter_for_which_there_is_no_memory(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x" * 1000)
    _check_memory(tmp_path, Limit(3000, "MemAvailable"))
    with pytest.raises(AdapterError, match="takes 0.00 GB of memory, 0.00 GB are free"):
        _check_memory(tmp_path, Limit(2999, "MemAvailable"))
