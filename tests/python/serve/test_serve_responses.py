"""/v1/responses, with OpenAI's own client."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.responses import Response

QUESTION = "你好，你是谁？"


def respond(client: OpenAI, **fields: Any) -> Response:
    given = {"model": "adapter_a", "input": QUESTION, "max_output_tokens": 200} | fields
    found: Response = client.responses.create(**given)
    return found


def test_a_response_is_the_chats_answer(openai_client: OpenAI) -> None:
    found = respond(openai_client, instructions="简短。", metadata={"a": "b"})
    chat = openai_client.chat.completions.create(
        model="adapter_a", max_tokens=200,
        messages=[
            {"role": "system", "content": "简短。"},
            {"role": "user", "content": QUESTION},
        ],
    )  # fmt: skip
    assert found.output_text == chat.choices[0].message.content
    assert found.status == "completed"
    assert found.error is None
    assert found.metadata == {"a": "b"}
    assert found.usage
    assert chat.usage
    assert found.usage.input_tokens == chat.usage.prompt_tokens
    assert found.usage.output_tokens == chat.usage.completion_tokens


def test_a_response_that_ends_early_is_incomplete(openai_client: OpenAI) -> None:
    found = respond(openai_client, max_output_tokens=3)
    assert found.status == "incomplete"
    assert found.incomplete_details
    assert found.incomplete_details.reason == "max_output_tokens"
    assert found.output[0].status == "incomplete"


@pytest.mark.parametrize("fields", [{}, {"max_output_tokens": 4, "top_logprobs": 2}])
def test_a_stream_is_the_whole_response(openai_client: OpenAI, fields: dict[str, Any]) -> None:
    whole = respond(openai_client, **fields)
    events: list[Any] = list(respond(openai_client, stream=True, **fields))
    assert [each.sequence_number for each in events] == list(range(len(events)))
    kinds = [each.type for each in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added",
    ]  # fmt: skip
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done",
        f"response.{whole.status}",
    ]  # fmt: skip
    deltas = events[4:-4]
    assert "".join(each.delta for each in deltas) == whole.output_text == events[-4].text
    assert len({each.item_id for each in deltas}) == 1
    part = whole.output[0].content[0]
    scores = [entry for each in deltas for entry in each.logprobs]
    assert [each.token for each in scores] == [each.token for each in part.logprobs]
    assert bool(scores) == bool(fields)
    last = events[-1].response
    assert last.output_text == whole.output_text
    assert last.usage.output_tokens == whole.usage.output_tokens
    assert events[0].response.status == "in_progress"


def test_the_clients_own_accumulation(openai_client: OpenAI) -> None:
    with openai_client.responses.stream(
        model="adapter_a", input=QUESTION, max_output_tokens=200
    ) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == respond(openai_client).output_text


def test_a_conversation_of_items(openai_client: OpenAI) -> None:
    first = respond(openai_client)
    items: list[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": QUESTION}]},
        *[each.model_dump() for each in first.output],
        {"type": "message", "role": "user", "content": "谢谢你！"},
    ]
    found = respond(openai_client, input=items)
    chat = openai_client.chat.completions.create(
        model="adapter_a", max_tokens=200,
        messages=[
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "谢谢你！"},
        ],
    )  # fmt: skip
    assert found.output_text == chat.choices[0].message.content
    assert found.usage
    assert found.usage.input_tokens_details.cached_tokens > 0


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "input"),
        ({"conversation": "conv_1"}, "conversation", "input"),
        ({"background": True}, "background", "stream"),
        ({"truncation": "auto"}, "truncation", "disabled"),
        ({"include": ["file_search_call.results"]}, "include", "logprobs"),
        ({"input": []}, "input", "not empty"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "function_call"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0]", "text only",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools", "function"),
        ({"text": {"format": "json"}}, "text.format", "mapping"),
        ({"reasoning": {"effort": 3}}, "reasoning.effort", "text"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered(
    openai_client: OpenAI, fields: dict[str, Any], param: str, words: str
) -> None:
    import openai

    with pytest.raises(openai.BadRequestError) as caught:
        respond(openai_client, extra_body=fields)
    assert words in caught.value.message
    assert caught.value.param == param
