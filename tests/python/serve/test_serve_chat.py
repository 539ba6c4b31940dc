"""/v1/chat/completions, with OpenAI's own client."""

from __future__ import annotations

import json
import math
import socket
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from openai import OpenAI
    from openai.types.chat import ChatCompletion

    from ktrt.session import Session

QUESTION: list[Any] = [{"role": "user", "content": "你好，你是谁？"}]


def ask(client: OpenAI, **fields: Any) -> ChatCompletion:
    given = {"model": "adapter_a", "messages": QUESTION, "max_tokens": 12} | fields
    found: ChatCompletion = client.chat.completions.create(**given)
    return found


def pieces(client: OpenAI, **fields: Any) -> list[Any]:
    return list(ask(client, stream=True, **fields))


def text(answer: ChatCompletion, index: int = 0) -> str:
    return answer.choices[index].message.content or ""


@pytest.fixture(scope="module")
def plain(openai_client: OpenAI) -> str:
    """The answer to the question that most tests change one thing of."""
    return text(ask(openai_client))


def test_an_answer_is_the_sessions(openai_client: OpenAI, serve_session: Session) -> None:
    found = ask(openai_client, max_tokens=200)
    (handle,) = [serve_session.submit(QUESTION, adapter="adapter_a", max_new_tokens=200)]
    expected = handle.result(60)
    assert text(found) == expected.text
    assert found.choices[0].finish_reason == "stop"
    assert found.model == "adapter_a"
    assert found.usage
    assert found.usage.prompt_tokens == expected.prompt_tokens
    assert found.usage.completion_tokens == expected.generated_tokens
    assert found.usage.prompt_tokens_details
    assert ask(openai_client, model="demo", max_tokens=200) != text(found)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_tokens": 200},
        {"temperature": 1.5, "seed": 7, "logprobs": True, "top_logprobs": 3},
        {"n": 2, "temperature": 1.5, "seed": 7, "logprobs": True},
        {"stop": ["助手", "LoRA"], "max_tokens": 200},
    ],
    ids=["length", "stop", "seed", "n", "strings"],
)
def test_a_stream_is_the_whole_answer(openai_client: OpenAI, fields: dict[str, Any]) -> None:
    whole = ask(openai_client, **fields)
    chunks = pieces(openai_client, stream_options={"include_usage": True}, **fields)
    for index, choice in enumerate(whole.choices):
        own = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        first, *rest = own
        assert first.delta.role == "assistant"
        assert first.delta.content is None
        assert not any(each.delta.role for each in rest)
        assert "".join(each.delta.content or "" for each in rest) == choice.message.content
        assert [each.finish_reason for each in own if each.finish_reason] == [choice.finish_reason]
        assert own[-1].finish_reason
        assert not own[-1].delta.content
        scores = [each for one in own if one.logprobs for each in one.logprobs.content or ()]
        assert scores == (choice.logprobs.content if choice.logprobs else [])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(each.usage is None for each in chunks[:-1])
    assert len({each.id for each in chunks}) == 1


def test_events_as_they_are_sent(server_url: str) -> None:
    body = {
        "model": "adapter_a", "messages": QUESTION, "max_tokens": 3, "stream": True,
        "stream_options": {"continuous_usage_stats": True, "unknown": 1},
    }  # fmt: skip
    with httpx.stream("POST", f"{server_url}/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert "content-length" not in response.headers
        lines = [each for each in response.iter_lines() if each]
    assert lines[-1] == "data: [DONE]"
    assert all(each.startswith('data: {"') for each in lines[:-1])
    assert '"delta":{"role":"assistant"}' in lines[0]
    assert '"completion_tokens":1,' in lines[1]


def test_a_seed_repeats_and_choices_differ(openai_client: OpenAI) -> None:
    fields = {"temperature": 2.0, "top_p": 1.0, "seed": 5, "n": 3}
    first, again = ask(openai_client, **fields), ask(openai_client, **fields)
    texts = [text(first, index) for index in range(3)]
    assert texts == [text(again, index) for index in range(3)]
    assert len(set(texts)) > 1
    assert [each.index for each in first.choices] == [0, 1, 2]
    assert text(ask(openai_client, **fields | {"n": 1})) == texts[0]
    # OpenAI's seeds may be negative; the choices' seeds go round at the end.
    assert text(ask(openai_client, **fields | {"seed": -5})) != texts[0]
    last = ask(openai_client, **fields | {"seed": 2**63 - 1, "n": 2})
    assert text(last, 1) == text(ask(openai_client, **fields | {"seed": 0, "n": 1}))


def test_n_choices_compute_the_prompt_once(openai_client: OpenAI, serve_session: Session) -> None:
    before = serve_session.stats()
    messages = [{"role": "user", "content": "数一数这些词：" + "一、二、三。" * 30}]
    usage = ask(openai_client, messages=messages, n=4, max_tokens=2).usage
    assert usage
    now = serve_session.stats()
    assert now.prompt_tokens - before.prompt_tokens == 4 * usage.prompt_tokens
    held = now.prefix_hit_tokens - before.prefix_hit_tokens
    assert 3 * (usage.prompt_tokens - 1) <= held < 3.5 * usage.prompt_tokens
    assert usage.completion_tokens == 8


def test_stop_strings_and_ids(openai_client: OpenAI, serve_session: Session) -> None:
    whole = text(ask(openai_client, max_tokens=200))
    word = whole[8:10]
    found = ask(openai_client, stop=word, max_tokens=200)
    assert text(found) == whole[: whole.index(word)]
    assert found.choices[0].finish_reason == "stop"
    token = serve_session.submit(QUESTION, adapter="adapter_a").result(60).token_ids[3]
    found = ask(openai_client, extra_body={"stop_token_ids": [token]}, logprobs=True)
    assert found.choices[0].finish_reason == "stop"
    assert found.choices[0].logprobs
    assert len(found.choices[0].logprobs.content or ()) == 3
    assert whole.startswith(text(found))


def test_logprobs_are_the_texts_tokens(openai_client: OpenAI) -> None:
    found = ask(openai_client, max_tokens=200, logprobs=True, top_logprobs=2).choices[0]
    assert found.logprobs
    content = found.logprobs.content or []
    raw = b"".join(bytes(each.bytes or ()) for each in content)
    assert raw.decode() == found.message.content
    for each in content:
        assert each.logprob <= 0
        assert next(top.token for top in each.top_logprobs) == each.token  # greedy
        assert each.top_logprobs[0].logprob == each.logprob
        assert len(each.top_logprobs) == 2
    plain = ask(openai_client, logprobs=True).choices[0].logprobs
    assert plain
    assert [each.top_logprobs for each in plain.content or ()] == [[]] * 12


def test_half_characters_have_bytes(openai_client: OpenAI, serve_session: Session) -> None:
    """No token of the demo's vocabulary is a whole emoji."""
    ids = serve_session.tokenizer.encode("😀", add_special_tokens=False)
    assert len(ids) > 1
    bias = {str(ids[0]): 100}
    found = ask(openai_client, logit_bias=bias, max_tokens=2, logprobs=True).choices[0].logprobs
    assert found
    first = (found.content or [])[0]
    assert first.bytes == [0xF0]
    assert first.token == "\\xf0"


def test_logit_bias_and_penalties(
    openai_client: OpenAI, serve_session: Session, plain: str
) -> None:
    (token, *_) = serve_session.tokenizer.encode(plain, add_special_tokens=False)
    assert text(ask(openai_client, logit_bias={str(token): -100})) != plain
    assert text(ask(openai_client, logit_bias={})) == plain
    for name in ("presence_penalty", "frequency_penalty"):
        assert text(ask(openai_client, **{name: 2.0}))
    extras = {"repetition_penalty": 9.0, "top_k": -1, "min_p": 0.1, "skip_special_tokens": False}
    assert text(ask(openai_client, extra_body=extras)) != plain


def test_the_configured_sampling_is_the_default(openai_client: OpenAI, plain: str) -> None:
    """The demo's YAML has do_sample false; a temperature asks for sampling."""
    assert plain == text(ask(openai_client, temperature=0))
    hot = {"temperature": 2.0, "top_p": 1.0, "extra_body": {"top_k": 0}}
    assert len({text(ask(openai_client, seed=seed, **hot)) for seed in range(3)}) > 1
    cold = {"temperature": 2.0, "extra_body": {"do_sample": False}}
    assert text(ask(openai_client, **cold)) == plain


def test_messages_in_all_their_forms(openai_client: OpenAI) -> None:
    plain = text(ask(openai_client, messages=[{"role": "system", "content": "简短。"}, *QUESTION]))
    forms: list[list[Any]] = [
        [{"role": "developer", "content": "简短。"}, *QUESTION],
        [
            {"role": "system", "content": [{"type": "text", "text": "简短。"}]},
            {
                "role": "user", "name": "li", "refusal": None, "annotations": [],
                "content": [{"type": "text", "text": "你好，", "cache_control": {}},
                            {"type": "text", "text": "你是谁？"}],
            },
        ],
    ]  # fmt: skip
    for messages in forms:
        assert text(ask(openai_client, messages=messages)) == plain
    two = [{"role": "user", "content": "甲"}, {"role": "user", "content": "乙"}]
    one = [{"role": "user", "content": "甲\n\n乙"}]
    assert text(ask(openai_client, messages=two)) == text(ask(openai_client, messages=one))


def test_unknown_fields_are_tolerated(openai_client: OpenAI, plain: str) -> None:
    extra = {"nobody_knows": {"this": 1}, "store": True, "user": "me", "metadata": {"a": "b"}}
    assert text(ask(openai_client, extra_body=extra)) == plain


def test_adapters_by_name_and_by_weight(openai_client: OpenAI, plain: str) -> None:
    a, base = plain, text(ask(openai_client, model="demo"))
    weighted = ask(openai_client, model="", extra_body={"adapter_weights": {"adapter_a": 1.0}})
    assert text(weighted) == a != base
    assert text(ask(openai_client, model="adapter_a*1.0+adapter_b*0")) == a
    nothing = ask(openai_client, model="", extra_body={"adapter_weights": {}})
    assert text(nothing) == base


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"n": 0}, "n", "greater than"),
        ({"repetition_penalty": 1e-300, "temperature": 1}, None, "0.0001 … 10000"),
        ({"max_tokens": 0}, "max_tokens", "greater than"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "-100 to 100"),
        ({"logit_bias": {"999999": 1}}, None, "999999"),
        ({"stop": [""]}, "stop", "none empty"),
        ({"stop": 3}, "stop", "list of texts"),
        ({"stop": [str(each) for each in range(1000)]}, None, "at most 256 of"),
        ({"stop": "x" * 5000}, None, "found 1 of up to 5000"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs true"),
        ({"messages": []}, "messages", "not empty"),
        ({"messages": "hi"}, "messages", "list of messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, None, "user"),
        ({"messages": [{"role": "robot", "content": "x"}]}, None, "role"),
        ({"messages": [{"role": "user", "content": None}]}, None, "content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            None, "image_url",
        ),
        ({"modalities": ["text", "audio"]}, "modalities", "text"),
        ({"audio": {"voice": "alloy"}}, "audio", "text"),
        ({"guided_json": {}}, "guided_json", "response_format"),
        ({"logits_processors": ["x"]}, "logits_processors", "logit_bias"),
        ({"functions": [{"name": "f"}]}, "functions", "tools"),
        ({"tool_choice": "required"}, "tool_choice", "tools"),
        ({"tool_choice": "perhaps"}, "tool_choice", "auto"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": 5}}, "tool_choice", "allowed"),
        ({"tool_choice": {"type": "allowed_tools", "tools": 5}}, "tool_choice", "allowed"),
        ({"tools": [{"type": "web_search"}]}, "tools", "function"),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"properties": "x"}},
                    }
                ]
            },
            None, "parameters.properties",
        ),
        ({"chat_template_kwargs": {"color": 1}}, "chat_template_kwargs", "enable_thinking"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, None, "thinking"),
        ({"adapter_weights": {"nobody": 1.0}, "model": ""}, "adapter_weights", "adapter_a"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered(
    openai_client: OpenAI, fields: dict[str, Any], param: str | None, words: str
) -> None:
    import openai

    with pytest.raises(openai.APIStatusError) as caught:
        ask(openai_client, extra_body=fields)
    assert caught.value.status_code in (400, 404)
    assert words in caught.value.message
    assert caught.value.param == param
    with pytest.raises(openai.APIStatusError):
        pieces(openai_client, extra_body=fields)


def test_errors_are_the_clients_exceptions(openai_client: OpenAI) -> None:
    import openai

    with pytest.raises(openai.NotFoundError, match="adapter_a") as caught:
        ask(openai_client, model="nobody")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="tokens"):
        ask(openai_client, messages=[{"role": "user", "content": "word " * 3000}])


def test_a_neutral_value_of_an_unsupported_field_is_none(openai_client: OpenAI, plain: str) -> None:
    fields = {
        "modalities": ["text"], "min_tokens": 0, "use_beam_search": False, "length_penalty": 1.0,
        "functions": None, "ignore_eos": False, "reasoning_effort": "none", "logit_bias": None,
        "chat_template_kwargs": {"enable_thinking": False}, "response_format": {"type": "text"},
        "tools": [], "tool_choice": "none", "top_logprobs": None, "stream_options": None,
    }  # fmt: skip
    assert text(ask(openai_client, extra_body=fields)) == plain


def test_logprobs_do_not_depend_on_the_choice(openai_client: OpenAI) -> None:
    """They are the model's, before temperature and filters."""
    fields = {"logprobs": True, "top_logprobs": 1, "max_tokens": 1}
    cold = ask(openai_client, **fields).choices[0].logprobs
    hot = ask(openai_client, temperature=2, seed=3, **fields).choices[0].logprobs
    assert cold
    assert hot
    first, second = (cold.content or [])[0], (hot.content or [])[0]
    assert math.isclose(first.logprob, second.top_logprobs[0].logprob, abs_tol=1e-6)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(
    server_url: str, serve_session: Session, stream: bool
) -> None:
    body = {
        "model": "demo", "messages": QUESTION, "max_tokens": 1500, "stream": stream, "n": 2,
        "temperature": 1.0, "logit_bias": {"1": -100},
    }  # fmt: skip
    before = serve_session.stats()
    with socket.create_connection(("127.0.0.1", int(server_url.rpartition(":")[2]))) as client:
        text = json.dumps(body)
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
        client.sendall((head + text).encode())
        wait_until(lambda: serve_session.stats().running > 1)
    wait_until(lambda: serve_session.stats().running == 0)
    now = serve_session.stats()
    assert now.cancelled - before.cancelled == 2
    assert now.generated_tokens - before.generated_tokens < 1000


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.002)
