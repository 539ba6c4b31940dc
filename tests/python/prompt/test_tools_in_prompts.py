"""Compares tools, calls and results in the named templates with LLaMA-Factory's: equal ids for each
of its names."""

import json
from functools import cache
from typing import Any

import pytest
from helpers.llamafactory_prompts import byte_tokenizer
from helpers.llamafactory_tools import EXPECTED, TOOLS, conversations, prompt_digest

from ktrt.config import TemplateArgs
from ktrt.errors import ConfigError
from ktrt.prompt.messages import check_messages, plain_tools
from ktrt.prompt.template.load import load_template
from ktrt.prompt.template.table import TEMPLATES

DATA = json.loads(EXPECTED.read_text(encoding="utf-8"))
OPENAI_TOOLS = [{"type": "function", "function": {**each, "strict": True}} for each in TOOLS]


@cache
def shared_tokenizer() -> Any:
    return byte_tokenizer(DATA["special"])


def openai_messages(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a conversation as OpenAI's clients send it."""
    found: list[dict[str, Any]] = []
    for turn in turns:
        content = turn["content"]
        if turn["role"] == "function":
            thought, calls = content
            shown = [
                {"id": f"call_{at}", "type": "function", "function": _as_text(each)}
                for at, each in enumerate(calls)
            ]
            found.append({"role": "assistant", "content": thought or None, "tool_calls": shown})
        elif turn["role"] == "observation":
            found += [
                {"role": "tool", "tool_call_id": f"call_{at}", "content": each}
                for at, each in enumerate(content)
            ]
        else:
            found.append(turn)
    return found


def _as_text(call: dict[str, Any]) -> dict[str, str]:
    return {"name": call["name"], "arguments": json.dumps(call["arguments"], indent=1)}


@pytest.mark.parametrize("name", DATA["templates"])
def test_prompts_are_llama_factorys(name: str) -> None:
    tokenizer, thought = shared_tokenizer(), TEMPLATES[name].thought
    marks = (thought.begin, thought.end) if thought else ("", "")
    chosen = {
        thinking: load_template(TemplateArgs(name, enable_thinking=thinking), tokenizer)
        for thinking in (True, False)
    }
    expected = iter(DATA["templates"][name].split())
    for turns, has_tools in conversations(*marks):
        messages = check_messages(openai_messages(turns))
        for thinking, template in chosen.items():
            wanted = next(expected)
            tools = plain_tools(OPENAI_TOOLS) if has_tools else None
            if wanted == "refused":
                with pytest.raises(ConfigError, match="allows 1 call in an answer, found 2"):
                    template.encode(messages, tools)
                continue
            ids = template.encode(messages, tools)
            text = tokenizer.decode(ids, skip_special_tokens=False)
            assert prompt_digest(ids, tokenizer) == wanted, (turns, thinking, text)
