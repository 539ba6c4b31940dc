"""Tests of tools in the tokenizer's own chat template."""

import json
from typing import Any

import pytest
from helpers.llamafactory_prompts import byte_tokenizer

from ktrt.config import TemplateArgs
from ktrt.errors import ConfigError
from ktrt.prompt.messages import check_messages, plain_tools
from ktrt.prompt.template.base import Template
from ktrt.prompt.template.load import load_template

TOOL = {"type": "function", "function": {"name": "weather", "strict": False}}
CALL = {"name": "weather", "arguments": '{"city":  "Köln"}'}
TURNS = [
    {"role": "user", "content": "Hi"},
    {
        "role": "assistant",
        "content": "One moment.",
        "tool_calls": [{"id": "call_1", "type": "function", "function": CALL}],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "21"},
]
_TOOLS = (
    "{% for t in tools or [] %}[{{ t.function.name }}: {{ t.function.parameters|tojson }}]"
    "{% endfor %}"
)
_CALL = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>CALL</tool_call>{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
_AS_MAPPING = _CALL.replace("CALL", "{{ c.function.name }} {{ c.function.arguments|tojson }}")
_AS_TEXT = _CALL.replace("CALL", "{{ c.function.name + ' ' + c.function.arguments }}")
_SHORT_IDS = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}{% if c.id|length != 9 %}"
    "{{ raise_exception('ids of length 9') }}{% endif %}({{ c.id }}){% endfor %}"
    "{% if m.tool_call_id %}({{ m.tool_call_id }}){% endif %}{% endfor %}"
)


def template_of(source: Any) -> tuple[Template, Any]:
    tokenizer = byte_tokenizer(["<|user|>"])
    tokenizer.chat_template = source
    return load_template(TemplateArgs(), tokenizer), tokenizer


def prompt(source: Any, turns: list[Any] = TURNS, tools: list[Any] | None = None) -> str:
    template, tokenizer = template_of(source)
    ids = template.encode(check_messages(turns), plain_tools(tools))
    text: str = tokenizer.decode(ids)
    return text


@pytest.mark.parametrize("source", [_TOOLS + _AS_MAPPING, _TOOLS + _AS_TEXT])
def test_arguments_are_given_in_the_form_that_the_template_takes(source: str) -> None:
    shown = prompt(source, tools=[TOOL])
    parameters = json.dumps({"type": "object", "properties": {}})
    assert shown == (
        f"[weather: {parameters}]<|user|>Hi<|assistant|>One moment."
        '<tool_call>weather {"city": "Köln"}</tool_call><|tool|>21<|assistant|><think>\n'
    )


def test_ids_are_shortened_where_the_template_wants_it() -> None:
    shown = prompt(_SHORT_IDS + _AS_MAPPING)
    first, second = shown.split(")")[:2]
    assert first == second
    assert len(first) == 10


def test_what_the_template_does_not_show_is_refused() -> None:
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(ConfigError, match="tools: the tokenizer's chat template does not show"):
        prompt(plain, TURNS[:1], [TOOL])
    with pytest.raises(ConfigError, match="messages: the tokenizer's chat template shows no calls"):
        prompt(plain)
    python = _CALL.replace("CALL", "{{ c.function.name }} {{ c.function.arguments }}")
    assert '{"city": "Köln"}' in prompt(python), "a mapping that looks like Python's is no JSON"


def test_a_template_for_tools_is_used_with_tools_only() -> None:
    source = {"default": _AS_MAPPING, "tool_use": "TOOLS" + _TOOLS + _AS_MAPPING}
    assert prompt(source, tools=[TOOL]).startswith("TOOLS[weather")
    assert prompt(source).startswith("<|user|>")


def test_the_reply_begins_where_the_prompt_ends() -> None:
    template, _ = template_of(_AS_MAPPING)
    assert template.reply is not None
    assert template.reply_start == "<think>\n"
    switched = _AS_MAPPING.replace(
        "<think>\n", "{% if enable_thinking is false %}<think></think>{% endif %}"
    )
    template, _ = template_of(switched)
    assert template.reply_start == ""
    assert template.with_thinking(False).reply_start == "<think></think>"
    assert template.with_thinking(True).reply_start == ""


def test_special_tokens_around_calls_are_shown() -> None:
    tokenizer = byte_tokenizer(["<tool_call>", "</think>", "<|user|>"])
    tokenizer.chat_template = _AS_MAPPING
    template = load_template(TemplateArgs(), tokenizer)
    assert {*template.shown_tokens.values()} == {"<tool_call>", "</think>"}
