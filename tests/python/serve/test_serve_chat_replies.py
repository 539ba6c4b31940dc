"""Thoughts and tool calls in OpenAI's endpoints, of a model that says what a test wrote."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from helpers.scripted_server import ScriptedServer

from ktrt.errors import EngineError
from ktrt.prompt.reply.table import BY_MARK
from ktrt.serve.server import get_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fastapi import FastAPI
    from openai import OpenAI

QWEN = BY_MARK["<tool_call>"]
THOUGHT = "<think>\nIt asks for the weather.\n</think>\n\n"
PARIS = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>'
ROME = PARIS.replace("Paris", "Rome")
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather", "description": "Tells the weather", "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
]  # fmt: skip
ASKED: Any = {"model": "demo", "messages": [{"role": "user", "content": "Weather?"}]}


@pytest.fixture
def scripted(serve_app: FastAPI, openai_client: OpenAI) -> Callable[..., Any]:
    """A context in which the application's model says ``texts``."""

    @contextmanager
    def saying(*texts: str, **options: Any) -> Iterator[ScriptedServer]:
        server = ScriptedServer(
            serve_app.state.server, texts, options.pop("reply", QWEN), **options
        )
        serve_app.dependency_overrides[get_server] = lambda: server
        try:
            yield server
        finally:
            serve_app.dependency_overrides.clear()

    return saying


def calls_of(chunks: list[Any], index: int = 0) -> list[dict[str, str]]:
    """Puts the calls of a stream together, as clients do."""
    found: list[dict[str, str]] = []
    for chunk in chunks:
        for choice in chunk.choices:
            for call in (choice.delta.tool_calls or ()) if choice.index == index else ():
                if call.id:
                    assert call.index == len(found)
                    assert call.type == "function"
                    found.append({"id": call.id, "name": call.function.name, "arguments": ""})
                found[call.index]["arguments"] += call.function.arguments or ""
    return found


def joined(chunks: list[Any], name: str, index: int = 0) -> str:
    own = [each.choices[0] for each in chunks if each.choices and each.choices[0].index == index]
    return "".join(getattr(each.delta, name, None) or "" for each in own)


def test_a_thought_and_calls(openai_client: OpenAI, scripted: Callable[..., Any]) -> None:
    with scripted(THOUGHT + PARIS + "\n" + ROME):
        whole = openai_client.chat.completions.create(**ASKED, tools=TOOLS)
        chunks = list(openai_client.chat.completions.create(**ASKED, tools=TOOLS, stream=True))
    message: Any = whole.choices[0].message
    assert whole.choices[0].finish_reason == "tool_calls"
    assert message.content is None
    assert message.reasoning_content == message.reasoning == "It asks for the weather."
    assert [each.function.name for each in message.tool_calls] == ["weather", "weather"]
    cities = [json.loads(each.function.arguments)["city"] for each in message.tool_calls]
    assert cities == ["Paris", "Rome"]
    assert len({each.id for each in message.tool_calls}) == 2
    streamed = calls_of(chunks)
    assert [each["arguments"] for each in streamed] == [
        each.function.arguments for each in message.tool_calls
    ]
    assert joined(chunks, "reasoning_content") == message.reasoning_content
    assert joined(chunks, "reasoning") == message.reasoning_content
    assert joined(chunks, "content") == ""
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert whole.usage
    assert whole.usage.completion_tokens_details
    thought = whole.usage.completion_tokens_details.reasoning_tokens or 0
    assert 5 <= thought < whole.usage.completion_tokens


def test_a_thought_and_text(openai_client: OpenAI, scripted: Callable[..., Any]) -> None:
    with scripted(THOUGHT + "Sunny, <tool_call> is a mark."):
        whole: Any = openai_client.chat.completions.create(**ASKED)
        chunks = list(openai_client.chat.completions.create(**ASKED, stream=True))
    message = whole.choices[0].message
    assert message.content == "Sunny, <tool_call> is a mark."
    assert message.tool_calls is None
    assert joined(chunks, "content") == message.content
    assert whole.choices[0].finish_reason == "stop"


def test_a_thought_that_the_prompt_begins(
    openai_client: OpenAI, scripted: Callable[..., Any]
) -> None:
    with scripted("Hm.\n</think>\n\nYes.", reply_start="<think>\n"):
        found: Any = openai_client.chat.completions.create(**ASKED).choices[0].message
    assert (found.reasoning_content, found.content) == ("Hm.", "Yes.")


def test_one_call_only(openai_client: OpenAI, scripted: Callable[..., Any]) -> None:
    fields = {**ASKED, "tools": TOOLS, "parallel_tool_calls": False}
    with scripted(PARIS + "\n" + ROME, PARIS) as server:
        whole: Any = openai_client.chat.completions.create(**fields)
        chunks: Any = list(openai_client.chat.completions.create(**fields, stream=True))
        two: Any = openai_client.chat.completions.create(**fields, n=2)
        assert server.left == 3
    for calls in (whole.choices[0].message.tool_calls, two.choices[1].message.tool_calls):
        assert len(calls) == 1
        assert json.loads(calls[0].function.arguments)["city"] == "Paris"
    assert len(calls_of(chunks)) == 1
    # The second call's begin ended the answer.
    assert whole.usage.completion_tokens < two.usage.completion_tokens
    assert whole.usage.completion_tokens < len(PARIS + ROME) / 3 - 10
    reasons = [each.choices[0].finish_reason for each in chunks]
    assert reasons.count("tool_calls") == 1
    assert reasons[-1] == "tool_calls"


def test_calls_of_each_choice(openai_client: OpenAI, scripted: Callable[..., Any]) -> None:
    with scripted(PARIS, "Sunny."):
        chunks = list(openai_client.chat.completions.create(**ASKED, tools=TOOLS, n=2, stream=True))
    assert len(calls_of(chunks, 0)) == 1
    assert not calls_of(chunks, 1)
    assert joined(chunks, "content", 1) == "Sunny."


def test_a_call_that_is_cut_off(openai_client: OpenAI, scripted: Callable[..., Any]) -> None:
    with scripted(PARIS[:-30], reason="length"):
        found: Any = openai_client.chat.completions.create(**ASKED, tools=TOOLS).choices[0]
    assert found.finish_reason == "length"
    assert found.message.tool_calls[0].function.arguments.startswith('{"city": "Pa')


def test_no_tools_no_calls(openai_client: OpenAI, scripted: Callable[..., Any]) -> None:
    with scripted(PARIS) as server:
        found: Any = openai_client.chat.completions.create(
            **ASKED, tools=TOOLS, tool_choice="none"
        ).choices[0]
        assert server.asked[0].tools is None
    assert found.message.content == PARIS
    assert found.finish_reason == "stop"


def test_what_the_engine_gets(openai_client: OpenAI, scripted: Callable[..., Any]) -> None:
    history: Any = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant", "content": None, "reasoning": "Hm.", "refusal": None,
            "tool_calls": [
                {
                    "id": "c1", "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]  # fmt: skip
    with scripted("Sunny.") as server:
        openai_client.chat.completions.create(
            model="adapter_a", messages=history, tools=TOOLS,
            extra_body={"chat_template_kwargs": {"enable_thinking": False}},
        )  # fmt: skip
        openai_client.chat.completions.create(**ASKED, reasoning_effort="high")
        (first, second) = server.asked
    assert first.adapter == "adapter_a"
    assert first.thinking is False
    assert second.thinking is True
    assert first.tools
    assert first.tools[0]["name"] == "weather"
    assert "strict" not in first.tools[0]
    messages: Any = first.messages
    assert [each["role"] for each in messages] == ["user", "assistant", "tool"]
    assert messages[1]["reasoning_content"] == "Hm."
    (call,) = messages[1]["tool_calls"]
    assert call["function"]["arguments"] == {"city": "Rome"}


@pytest.mark.parametrize("error", [EngineError("it broke"), RuntimeError("secret")])
def test_an_error_within_a_stream(
    openai_client: OpenAI, scripted: Callable[..., Any], error: Exception
) -> None:
    import openai

    with scripted("Sunny.", error=error) as server:
        stream = openai_client.chat.completions.create(**ASKED, stream=True)
        with pytest.raises(openai.APIError, match="failed|internal") as caught:
            list(stream)
        assert "secret" not in str(caught.value)
        text = openai_client.completions.create(model="demo", prompt="a", stream=True)
        with pytest.raises(openai.APIError, match="failed|internal"):
            list(text)
        events: Any = list(openai_client.responses.create(model="demo", input="a", stream=True))
        assert events[-1].type == "response.failed"
        assert events[-1].response.error.code == "server_error"
        assert server.left == 3


def test_a_response_with_thought_and_calls(
    openai_client: OpenAI, scripted: Callable[..., Any]
) -> None:
    tools: Any = [{"type": "function", **TOOLS[0]["function"]}]
    fields: Any = {"model": "demo", "input": "Weather?", "tools": tools}
    with scripted(THOUGHT + "Let me see.\n" + PARIS + "\n" + ROME) as server:
        whole = openai_client.responses.create(**fields)
        events: list[Any] = list(openai_client.responses.create(**fields, stream=True))
        with openai_client.responses.stream(**fields) as stream:
            final = stream.get_final_response()
        assert server.asked[0].tools
        assert server.asked[0].tools[0]["name"] == "weather"
    kinds = ["reasoning", "message", "function_call", "function_call"]
    output: Any = whole.output
    assert [each.type for each in output] == kinds
    assert output[0].content[0].text == "It asks for the weather."
    assert output[1].content[0].text.strip() == "Let me see."
    assert json.loads(output[3].arguments)["city"] == "Rome"
    assert output[2].call_id != output[3].call_id
    assert whole.status == "completed"
    plain = [each.model_dump(exclude={"id", "call_id"}) for each in output]
    for other in (events[-1].response, final):
        dumped = [
            each.model_dump(exclude={"id", "call_id", "parsed_arguments"}) for each in other.output
        ]
        assert [each["type"] for each in dumped] == kinds
        assert [each.get("arguments") for each in dumped] == [x.get("arguments") for x in plain]
    assert [each.sequence_number for each in events] == list(range(len(events)))
    for place, kind in enumerate(kinds):
        own = [each for each in events if getattr(each, "output_index", None) == place]
        assert own[0].type == "response.output_item.added"
        assert own[0].item.type == own[-1].item.type == kind
        assert own[-1].type == "response.output_item.done"
    deltas = [each.delta for each in events if each.type.endswith("arguments.delta")]
    assert "".join(deltas) == output[2].arguments + output[3].arguments


def test_calls_of_a_responses_client_come_back(
    openai_client: OpenAI, scripted: Callable[..., Any]
) -> None:
    tools: Any = [{"type": "function", **TOOLS[0]["function"]}]
    with scripted(THOUGHT + PARIS + "\n" + ROME) as server:
        first = openai_client.responses.create(
            model="demo", input="Weather?", tools=tools,
        )  # fmt: skip
        items: list[Any] = [{"role": "user", "content": "Weather?"}]
        items += [each.model_dump() for each in first.output]
        items += [
            {"type": "function_call_output", "call_id": each.call_id, "output": "sunny"}
            for each in first.output
            if each.type == "function_call"
        ]
        openai_client.responses.create(model="demo", input=items, tools=tools)
        messages: Any = server.asked[1].messages
    assert [each["role"] for each in messages] == ["user", "assistant", "tool", "tool"]
    assert messages[1]["reasoning_content"] == "It asks for the weather."
    assert [each["id"] for each in messages[1]["tool_calls"]] == [
        each["tool_call_id"] for each in messages[2:]
    ]
