"""response_format and tool_choice of OpenAI: the demo model says what grammars allow."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("xgrammar", reason="grammars need `pip install '.[serve]'`")

if TYPE_CHECKING:
    from openai import OpenAI

SCHEMA: Any = {
    "type": "object",
    "properties": {"n": {"enum": [1, 2]}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}
FORMAT: Any = {
    "type": "json_schema",
    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "description": "d", "parameters": SCHEMA}}
    for name in ("look", "listen")
]
ASKED: Any = {
    "model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 200,
    "logit_bias": {},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _short(request: pytest.FixtureRequest) -> None:
    """Makes white space unlikely, which a small model would write for long."""
    tokenizer = request.getfixturevalue("serve_session").tokenizer
    blank = [
        each for each in range(len(tokenizer)) if not tokenizer.decode([each]).strip(" \t\r\n")
    ]
    ASKED["logit_bias"] = {str(each): -100 for each in blank if each > 2}


def fits(text: str) -> bool:
    found = json.loads(text)
    return set(found) == {"n", "ok"} and found["n"] in (1, 2) and isinstance(found["ok"], bool)


def test_json_of_a_schema(openai_client: OpenAI) -> None:
    whole: Any = openai_client.chat.completions.create(**ASKED, response_format=FORMAT, n=2)
    for choice in whole.choices:
        assert choice.finish_reason == "stop"
        assert fits(choice.message.content)
    chunks: Any = openai_client.chat.completions.create(
        **ASKED, response_format=FORMAT, stream=True
    )
    text = "".join(each.choices[0].delta.content or "" for each in chunks)
    assert text == whole.choices[0].message.content
    response: Any = openai_client.responses.create(
        model="demo", input="Hello", max_output_tokens=200,
        text={"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
        extra_body={"logit_bias": ASKED["logit_bias"]},
    )  # fmt: skip
    assert fits(response.output_text)


def test_any_json_object(openai_client: OpenAI) -> None:
    found: Any = openai_client.chat.completions.create(
        **ASKED, response_format={"type": "json_object"}
    ).choices[0]
    assert found.message.content.startswith("{")
    if found.finish_reason == "stop":
        assert isinstance(json.loads(found.message.content), dict)


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"look", "listen"}),
        ({"type": "function", "function": {"name": "listen"}}, {"listen"}),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "look"}}],
                },
            },
            {"look"},
        ),
    ],
    ids=["required", "named", "allowed"],
)
def test_a_call_that_is_asked_for(openai_client: OpenAI, choice: Any, names: set[str]) -> None:
    fields = {**ASKED, "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    whole: Any = openai_client.chat.completions.create(**fields).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content is None
    (call,) = whole.message.tool_calls
    assert call.function.name in names
    assert fits(call.function.arguments)
    chunks: Any = list(openai_client.chat.completions.create(**fields, stream=True))
    deltas = [each for chunk in chunks for each in chunk.choices[0].delta.tool_calls or ()]
    assert [each.function.name for each in deltas if each.id] == [call.function.name]
    assert "".join(each.function.arguments for each in deltas) == call.function.arguments
    assert len(deltas) > 2


def test_json_or_a_call(openai_client: OpenAI) -> None:
    """With auto and a format of JSON, the model chooses."""
    found: Any = openai_client.chat.completions.create(
        **ASKED, tools=TOOLS, response_format=FORMAT, parallel_tool_calls=False
    ).choices[0]
    if found.message.tool_calls:
        assert fits(found.message.tool_calls[0].function.arguments)
    else:
        assert fits(found.message.content)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"type": "xml"}, "json_schema"),
        ({}, "json_schema"),
        ({"type": "json_schema"}, "with a schema"),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "zzz"}}}, "zzz"),
        ({"type": "json_schema", "json_schema": {"schema": {"minItems": 10**7}}}, "at most"),
        ({"type": "json_schema", "json_schema": {"schema": {"not": {}}}}, "strict"),
        ({"type": "json_schema", "json_schema": {"schema": {"allOf": None}}}, "allOf"),
    ],
)
def test_a_format_that_cannot_be_held(openai_client: OpenAI, given: Any, words: str) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match=words):
        openai_client.chat.completions.create(**ASKED, response_format=given)
