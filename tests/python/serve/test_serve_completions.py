"""/v1/completions, with OpenAI's own client."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types import Completion

    from ktrt.session import Session

PROMPT = "What is a star? A star is"


def complete(client: OpenAI, prompt: Any = PROMPT, **fields: Any) -> Completion:
    given = {"model": "demo", "prompt": prompt, "max_tokens": 6, "temperature": 0} | fields
    found: Completion = client.completions.create(**given)
    return found


def texts(answer: Completion) -> list[str]:
    assert [each.index for each in answer.choices] == list(range(len(answer.choices)))
    return [each.text for each in answer.choices]


def test_forms_of_a_prompt(openai_client: OpenAI, serve_session: Session) -> None:
    tokenizer = serve_session.tokenizer
    ids = tokenizer.encode(PROMPT, add_special_tokens=True)
    assert ids[0] == tokenizer.bos_token_id
    other = tokenizer.encode("Hello", add_special_tokens=True)
    (plain,) = texts(complete(openai_client))
    (hello,) = texts(complete(openai_client, "Hello"))
    assert plain
    assert texts(complete(openai_client, ids)) == [plain]
    assert texts(complete(openai_client, [PROMPT, "Hello"])) == [plain, hello]
    assert texts(complete(openai_client, [ids, other])) == [plain, hello]
    assert texts(complete(openai_client, [PROMPT, "Hello"], n=2)) == [plain] * 2 + [hello] * 2
    expected = serve_session.submit(prompt_ids=ids, adapter=None, max_new_tokens=6).result(60)
    assert plain == expected.text


def test_bos_is_written_once(openai_client: OpenAI, serve_session: Session) -> None:
    tokenizer = serve_session.tokenizer
    count = len(tokenizer.encode(PROMPT, add_special_tokens=False))
    extra: dict[str, Any]
    for prompt, extra, expected in (
        (PROMPT, {}, count + 1),
        (tokenizer.bos_token + PROMPT, {}, count + 1),
        (PROMPT, {"add_special_tokens": False}, count),
    ):
        usage = complete(openai_client, prompt, extra_body=extra).usage
        assert usage
        assert usage.prompt_tokens == expected


def test_usage_counts_all_prompts(openai_client: OpenAI) -> None:
    one, other = complete(openai_client).usage, complete(openai_client, "Hello").usage
    both = complete(openai_client, [PROMPT, "Hello"], n=2).usage
    assert one
    assert other
    assert both
    assert both.prompt_tokens == one.prompt_tokens + other.prompt_tokens
    assert both.completion_tokens == 24
    assert both.total_tokens == both.prompt_tokens + 24


@pytest.mark.parametrize("most", [0, 1])
def test_echo_scores_the_prompt(openai_client: OpenAI, serve_session: Session, most: int) -> None:
    """As lm-eval's local-completions asks."""
    tokenizer = serve_session.tokenizer
    prompts = [tokenizer.encode(each) for each in (PROMPT, "Hello 你好")]
    found = complete(openai_client, prompts, echo=True, logprobs=1, max_tokens=most)
    for ids, choice in zip(prompts, found.choices, strict=True):
        scores = choice.logprobs
        assert scores
        assert scores.token_logprobs
        assert scores.top_logprobs
        assert scores.tokens
        assert len(scores.tokens) == len(scores.token_logprobs) == len(ids) + most
        assert scores.token_logprobs[0] is None
        assert scores.top_logprobs[0] is None
        assert choice.text.startswith(tokenizer.decode(ids, skip_special_tokens=True))
        for token, value, top in list(
            zip(scores.tokens, scores.token_logprobs, scores.top_logprobs, strict=True)
        )[1:]:
            assert value is not None
            assert top[token] == value  # the chosen token is there, likely or not
            assert value <= max(top.values())
        assert choice.finish_reason == "length"
    assert found.usage
    assert found.usage.completion_tokens == 2 * most


def test_scores_of_a_prompt_are_those_it_was_generated_with(openai_client: OpenAI) -> None:
    made = complete(openai_client, logprobs=3).choices[0]
    read = complete(openai_client, PROMPT + made.text, echo=True, logprobs=3, max_tokens=1)
    assert made.logprobs
    assert read.choices[0].logprobs
    tokens = made.logprobs.tokens or []
    again = (read.choices[0].logprobs.tokens or [])[-len(tokens) - 1 : -1]
    if again != tokens:
        pytest.skip("the text has other tokens than those that were generated")
    values = (read.choices[0].logprobs.token_logprobs or [])[-len(tokens) - 1 : -1]
    assert values == pytest.approx(made.logprobs.token_logprobs, abs=0.05)  # BF16


def test_the_top_holds_the_chosen_token(openai_client: OpenAI) -> None:
    found = complete(openai_client, logprobs=1, temperature=5.0, top_p=1.0, seed=1,
                     extra_body={"top_k": 0}).choices[0].logprobs  # fmt: skip
    assert found
    assert found.top_logprobs
    assert all(t in top for t, top in zip(found.tokens or [], found.top_logprobs, strict=True))
    assert {len(top) for top in found.top_logprobs} <= {1, 2}
    assert 2 in {len(top) for top in found.top_logprobs}
    none = complete(openai_client, logprobs=0).choices[0].logprobs
    assert none
    assert [len(top) for top in none.top_logprobs or []] == [1] * 6


def test_offsets_point_into_the_text(openai_client: OpenAI, serve_session: Session) -> None:
    for echo in (False, True):
        found = complete(openai_client, "is 😀 x", echo=echo, logprobs=0, max_tokens=8).choices[0]
        assert found.logprobs
        offsets, tokens = found.logprobs.text_offset or [], found.logprobs.tokens or []
        assert offsets[0] == 0
        assert offsets == sorted(offsets)
        for offset, token in zip(offsets, tokens, strict=True):
            if not token.startswith(("bytes:", "<")):
                assert found.text[offset:].startswith(token)
    emoji = serve_session.tokenizer.encode("😀", add_special_tokens=False)
    parts = [each for each in tokens if each.startswith("bytes:")]
    assert len(parts) >= len(emoji) > 1
    assert parts[0] == "bytes:\\xf0"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prompt": [PROMPT, "Hello"], "n": 2, "logprobs": 2, "echo": True},
        {"echo": True, "max_tokens": 0},
        {"temperature": 2.0, "seed": 3, "logprobs": 1, "stop": [" a", "e"], "max_tokens": 40},
    ],
    ids=["plain", "lists", "echo", "stop"],
)
def test_a_stream_is_the_whole_text(openai_client: OpenAI, fields: dict[str, Any]) -> None:
    whole = complete(openai_client, **fields)
    chunks: list[Any] = list(
        complete(openai_client, stream=True, stream_options={"include_usage": True}, **fields)
    )
    for choice in whole.choices:
        own = [
            each.choices[0]
            for each in chunks
            if each.choices and each.choices[0].index == choice.index
        ]
        assert "".join(each.text for each in own) == choice.text
        assert own[-1].finish_reason == choice.finish_reason
        if choice.logprobs:
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                parts = [getattr(each.logprobs, name) for each in own if each.logprobs]
                assert [x for part in parts for x in part] == getattr(choice.logprobs, name)
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_the_default_length_is_openais(openai_client: OpenAI) -> None:
    usage = complete(openai_client, max_tokens=None, logit_bias={"1": -100}).usage
    assert usage
    assert usage.completion_tokens == 16


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": "", "add_special_tokens": False}, "prompt", "token"),
        ({"prompt": []}, "prompt", "token"),
        ({"prompt": ["a", 1]}, "prompt", "token ids"),
        ({"prompt": [["a"]]}, "prompt", "token ids"),
        ({"prompt": [-1]}, "prompt", "token ids"),
        ({"prompt": [1, 10**6]}, None, "1000000"),
        ({"prompt": {"a": 1}}, "prompt", "token ids"),
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"best_of": 3}, "best_of", "expected n"),
        ({"max_tokens": 0}, "max_tokens", "echo"),
        ({"logprobs": 21}, "logprobs", "20"),
        ({"prompt_logprobs": 1}, "prompt_logprobs", "echo"),
        ({"response_format": {"type": "json_object"}}, "response_format", "chat"),
        ({"prompt": ["a"] * 10_000}, "prompt", "fewer"),
    ],
)
def test_what_cannot_be_completed(
    openai_client: OpenAI, fields: dict[str, Any], param: str | None, words: str
) -> None:
    import openai

    with pytest.raises(openai.BadRequestError) as caught:
        complete(openai_client, extra_body=fields)
    assert words in caught.value.message
    assert caught.value.param == param
