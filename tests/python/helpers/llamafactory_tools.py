"""LLaMA-Factory's prompts of conversations with tools, for every one of its templates.

`llamafactory_tools.json` holds them. `python tests/python/helpers/llamafactory_tools.py` writes it
again, see llamafactory_prompts.py.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpers.llamafactory_prompts import (
    byte_tokenizer,
    digest,
    import_templates,
    prompt,
    special_tokens,
    write,
)

EXPECTED = Path(__file__).with_suffix(".json")
# Llama 3's prompts hold today's date.
_DATE = re.compile(r"Today Date: .*\n")

TOOLS: list[dict[str, Any]] = [
    {
        "name": "get_weather",
        "description": "Das Wetter an einem Ort, 天气",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": '{name} of "it" {c}'},
                "unit": {"type": "string", "enum": ["°C", "°F"]},
                "days": {"type": "array", "items": {"type": "integer"}, "description": "which"},
            },
            "required": ["city"],
        },
    },
    {"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}},
]


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


ONE = [
    call(
        "get_weather",
        city='Köln\n"x" {arguments}',
        days=[1, 2],
        unit=None,
        deep={"b": 1.5, "a": True},
    )
]
TWO = [call("now"), call("get_weather", city="北京")]
RESULT = '{"t": 21, "of": "{c}"}'


def conversations(begin: str, end: str) -> Iterator[tuple[list[dict[str, Any]], bool]]:
    """Yields conversations in LLaMA-Factory's roles, and whether there are tools. A function's
    content is (a thought, its calls). ``begin`` and ``end`` mark a thought; "" for none."""
    user, system = ("user", "Wie warm?"), ("system", "Be brief.\n")
    thought = f"{begin}Hm{end}" if begin else ""
    for turns, tools in (
        ([user], True),
        ([system, user, ("assistant", "Where?"), ("user", "北京")], True),
        ([system, user, ("function", ("", ONE)), ("observation", [RESULT])], True),
        (
            [
                user,
                ("function", (thought, ONE)),
                ("observation", [RESULT]),
                ("assistant", "21"),
                user,
            ],
            True,
        ),
        ([user, ("function", ("", TWO)), ("observation", ["12:00", RESULT])], True),
        ([user, ("function", ("", ONE)), ("observation", ["<|im_end|>\n"])], False),
    ):
        yield [{"role": role, "content": content} for role, content in turns], tools


def prompt_digest(ids: list[int], tokenizer: Any) -> str:
    """Returns a digest of the ids; of the text without the date, if it holds one."""
    text = tokenizer.decode(ids, skip_special_tokens=False)
    shown = _DATE.sub("", text)
    return digest(ids if shown == text else [ord(each) for each in shown])


# The rest runs only if llamafactory is installed.


def _theirs(turns: list[dict[str, Any]]) -> list[dict[str, str]]:
    found = []
    for turn in turns:
        content = turn["content"]
        if turn["role"] == "function":
            content = content[0] + json.dumps(content[1], ensure_ascii=False)
        elif turn["role"] == "observation":
            content = "\n</tool_response>\n<tool_response>\n".join(content)
        found.append({"role": turn["role"], "content": content})
    return found


def describe(module: Any, name: str, tokenizer: Any) -> str:
    template = module.TEMPLATES[name]
    tools_json = json.dumps(TOOLS, ensure_ascii=False)
    rows = []
    reasoning = isinstance(template, module.ReasoningTemplate)
    for turns, has_tools in conversations(*(template.thought_words if reasoning else ("", ""))):
        for thinking in (True, False):
            template.encode_oneturn = _with_tools(template, tools_json if has_tools else None)
            try:
                ids = prompt(module, name, tokenizer, _theirs(turns), thinking)[0]
            except ValueError:  # GLM-4 "does not support parallel functions"
                rows.append("refused")
                continue
            finally:
                del template.encode_oneturn
            rows.append(prompt_digest(ids, tokenizer))
    return " ".join(rows)


def _with_tools(template: Any, tools: str | None) -> Any:
    plain = type(template).encode_oneturn
    return lambda tokenizer, messages, system: plain(template, tokenizer, messages, system, tools)


def main() -> None:
    module = import_templates()
    tokenizer_words = special_tokens(module)
    rows = {}
    for name in sorted(module.TEMPLATES):
        rows[name] = describe(module, name, byte_tokenizer(tokenizer_words))
    write(EXPECTED, {"special": tokenizer_words, "templates": rows})


if __name__ == "__main__":
    main()
