"""Tests of ktrt.prompt.reply: thoughts, content and calls of every family, in any pieces."""

import json
import re
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ktrt.prompt.reply import (
    Content,
    Event,
    Reasoning,
    ReplyFormat,
    ReplyParser,
    ToolArguments,
    ToolCallStart,
    joined,
)
from ktrt.prompt.reply.table import BY_MARK, HARMONY_MARKS, named_reply, published_reply

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "maybe": {"type": ["string", "null"]},
                    "hot": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
                },
            },
        },
    },
    {"name": "now"},
]
DEEPSEEK = BY_MARK["<｜tool▁calls▁begin｜>"]
QWEN = BY_MARK["<tool_call>"]
GLM = BY_MARK["<arg_key>"]
MISTRAL = BY_MARK["[TOOL_CALLS]"]
KIMI = BY_MARK["<|tool_calls_section_begin|>"]
MINIMAX = BY_MARK["<minimax:tool_call>"]
SEED = BY_MARK["<seed:tool_call>"]
HARMONY = BY_MARK["<|channel|>"]
ACTION = named_reply("deepseek3", "default", None) or ReplyFormat()
TRAINED_MINIMAX = named_reply("minimax2", "minimax2", ("<think>\n", "\n</think>\n\n"))
MINIMAX1 = named_reply("minimax1", "minimax1", None)
LLAMA = named_reply("llama3", "llama3", None)
GLM4 = named_reply("glm4", "glm4", None)
GEMMA = named_reply("gemma4", "gemma4", ("<|channel>thought\n", "<channel|>"))
LFM = named_reply("lfm2", "lfm2", None)
LLAMA4 = named_reply("llama4", "llama3", None)
FORMS = (
    None, DEEPSEEK, QWEN, MISTRAL, KIMI, MINIMAX, SEED, HARMONY, ACTION, TRAINED_MINIMAX, MINIMAX1,
    LLAMA, LLAMA4, GLM4, GEMMA, LFM,
)  # fmt: skip


def parse(form: ReplyFormat | None, pieces: Iterable[str], **options: Any) -> list[Event]:
    parser = ReplyParser(form, **({"tools": TOOLS} | options))
    events = [event for piece in pieces for event in parser.push(piece)]
    return joined([*events, *parser.finish()])


def shown(events: Iterable[Event]) -> list[Any]:
    """Returns events without their kinds: content as text, thoughts as ("?", text), calls as
    ("!", name, arguments)."""
    found: list[Any] = []
    for event in events:
        if isinstance(event, Content):
            found.append(event.text)
        elif isinstance(event, Reasoning):
            found.append(("?", event.text))
        elif isinstance(event, ToolCallStart):
            assert event.index == sum(each[0] == "!" for each in found if each)
            found.append(("!", event.name, ""))
        else:
            at = next(at for at in reversed(range(len(found))) if found[at][0] == "!")
            found[at] = (*found[at][:2], found[at][2] + event.text)
    return found


WEATHER, NOW = ("!", "weather", '{"city": "Köln"}'), ("!", "now", "{}")
CALLS = '{"name": "weather", "arguments": {"city": "Köln"}}', '{"name": "now", "arguments": {}}'


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (
            DEEPSEEK,  # V3, R1
            "<think>\nHm\n</think>\n\nOK.\n\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function"
            '<｜tool▁sep｜>weather\n```json\n{"city": "Köln"}\n```<｜tool▁call▁end｜>\n'
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜>"
            "<｜tool▁calls▁end｜>",
        ),
        (
            DEEPSEEK,  # V3.1
            "<think>Hm</think>OK.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
            '{"city": "Köln"}<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>'
            "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ),
        (
            QWEN,
            f"<think>\nHm\n</think>\n\nOK.\n<tool_call>\n{CALLS[0]}\n</tool_call>\n"
            f"<tool_call>\n{CALLS[1]}\n</tool_call>",
        ),
        (
            QWEN,  # arguments first, and one bracket more
            '<think>Hm</think>OK.<tool_call>{"arguments": {"city": "Köln"}, "name": "weather"}'
            f"</tool_call><tool_call>{CALLS[1]}\n</tool_call>",
        ),
        (
            QWEN,  # Qwen3-Coder
            "<think>\nHm\n</think>\n\nOK.\n<tool_call>\n<function=weather>\n<parameter=city>\nKöln\n"
            "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n"
            "</tool_call>",
        ),
        (
            GLM,
            "\n<think>Hm</think>\nOK.\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Köln"
            "</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
        ),
        (
            GLM,  # LLaMA-Factory's, without ends
            "\n<think>Hm</think>\nOK.\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Köln"
            "</arg_value>\n\n<tool_call>now",
        ),
        (
            MINIMAX,
            "<think>\nHm\n</think>\n\nOK.\n<minimax:tool_call>\n"
            '<invoke name="weather">\n<parameter name="city">Köln</parameter>\n</invoke>\n'
            '<invoke name="now">\n</invoke>\n</minimax:tool_call>',
        ),
        (
            TRAINED_MINIMAX,
            '<think>\nHm\n</think>\n\nOK.<invoke name="weather">\n<parameter name="city">Köln'
            '</parameter>\n</invoke>\n<invoke name="now">\n</invoke>',
        ),
        (MISTRAL, f"[THINK]Hm[/THINK]OK.[TOOL_CALLS] [{CALLS[0]}, {CALLS[1]}]"),
        (
            MISTRAL,
            '[THINK]Hm[/THINK]OK.[TOOL_CALLS]weather[ARGS]{"city": "Köln"}'
            "[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{}",
        ),
        (
            KIMI,
            "<think>Hm</think>OK.<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0"
            '<|tool_call_argument_begin|>{"city": "Köln"}<|tool_call_end|><|tool_call_begin|>'
            "functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
            "<|tool_calls_section_end|>",
        ),
        (
            SEED,
            "<seed:think>Hm</seed:think>OK.\n<seed:tool_call>\n<function=weather>\n<parameter=city>"
            "Köln</parameter>\n</function>\n</seed:tool_call>\n<seed:tool_call>\n<function=now\n"
            "</function>\n</seed:tool_call>",
        ),
        (
            HARMONY,
            "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>commentary"
            "<|message|>OK.<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
            '<|constrain|>json<|message|>{"city": "Köln"}<|call|><|start|>assistant '
            "to=functions.now<|channel|>commentary json<|message|>{}<|call|>",
        ),
    ],
)
def test_families(form: ReplyFormat, text: str) -> None:
    assert shown(parse(form, [text])) == [("?", "Hm"), "OK.", WEATHER, NOW]


def test_calls_as_llama_factory_writes_them_by_default() -> None:
    text = f"OK.\nAction: weather\nAction Input: {WEATHER[2]}\nAction: now\nAction Input: {{}}"
    assert shown(parse(ACTION, [text])) == ["OK.", WEATHER, NOW]
    for prose in ("My Action: now", "Action: dance\nAction Input: {}", "Action: now\nor never {"):
        assert shown(parse(ACTION, [prose])) == [prose]
    parser = ReplyParser(ACTION, tools=TOOLS)
    assert parser.push("Action: dance ") == [Content("Action:"), Content(" dance")], "at once"
    assert MINIMAX1 is not None
    text = f"OK.<tool_calls>\n{CALLS[0]}\n{CALLS[1]}\n</tool_calls>"
    assert shown(parse(MINIMAX1, [text])) == ["OK.", WEATHER, NOW]


def test_calls_without_marks() -> None:
    """Llama's: an object of a known function at a line's begin, or a list of them."""
    assert LLAMA is not None
    renamed = CALLS[0].replace("arguments", "parameters")
    assert shown(parse(LLAMA, [renamed])) == [WEATHER]
    assert shown(parse(LLAMA, [*f"[{renamed}, {CALLS[1]}]"])) == [WEATHER, NOW]
    assert shown(parse(LLAMA, [f"OK.\n{CALLS[1]}"])) == ["OK.", NOW]
    unknown = '{"name": "dance", "parameters": {}}'
    for prose in (unknown, f"[{unknown}]", f"Try {CALLS[1]}", '{"name": "Bob"}', "[1] a", '[{"a'):
        assert shown(parse(LLAMA, [prose])) == shown(parse(LLAMA, [*prose])) == [prose]
    assert published_reply("a dictionary of argument name and its value.") == LLAMA


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (GLM4, 'OK.\nweather\n{"city": "Köln"}\nnow\n{}'),
        (
            GEMMA,  # the published form
            'OK.<|tool_call>call:weather{city:<|"|>Köln<|"|>}<tool_call|>'
            "<|tool_call>call:now{}<tool_call|>",
        ),
        (
            GEMMA,  # LLaMA-Factory's
            'OK.<|tool><|tool_call>call:weather{city:<|"|>Köln<|"|>}<tool_call|>'
            "<|tool_call>call:now{}<tool_call|><tool|>",
        ),
        (LFM, 'OK.<|tool_call_start|>[weather(city="Köln"), now()]<|tool_call_end|>'),
        (LFM, f"OK.<|tool_call_start|>[{CALLS[0]}, {CALLS[1]}]<|tool_call_end|>"),
        (LLAMA4, 'OK.\n[weather(city="Köln"), now()]'),
        (LLAMA4, "OK.<|python_start|>[weather(city='Köln'), now()]<|python_end|>"),
        (LLAMA4, f"OK.<|python_start|>{CALLS[0]}; {CALLS[1]}<|python_end|>"),
    ],
)
def test_families_without_thoughts(form: ReplyFormat | None, text: str) -> None:
    assert shown(parse(form, [text])) == shown(parse(form, [*text])) == ["OK.", WEATHER, NOW]


@pytest.mark.parametrize(
    ("form", "arguments"),
    [
        (
            LFM,
            r"""a="x, \"y\")\n", b='it"s', c=[1, -2.5e3, (True, None)], d={"k": {'l': false}},""",
        ),
        (
            GEMMA,
            'a:<|"|>x, "y")\n<|"|>,b:"it\\"s",c:[1,-2.5e3,[true,null,],],d:{k:{<|"|>l<|"|>:false}}',
        ),
    ],
)
def test_values_of_a_program(form: ReplyFormat, arguments: str) -> None:
    call = f"<|tool_call_start|>[f({arguments})]<|tool_call_end|>"
    if form is GEMMA:
        call = f"<|tool_call>call:f{{{arguments}}}<tool_call|>"
    (_, found) = parse(form, [call])
    assert isinstance(found, ToolArguments)
    expected = {
        "a": 'x, "y")\n',
        "b": 'it"s',
        "c": [1, -2500, [True, None]],
        "d": {"k": {"l": False}},
    }
    assert json.loads(found.text) == expected
    if form is LFM:
        parser = ReplyParser(form, tools=TOOLS)
        first = parser.push(call.partition("b=")[0])[1:]
        assert first == [ToolArguments(0, r'''{"a": "x, \"y\")\n"''')], "at once"


@pytest.mark.parametrize("form", FORMS)
def test_text_without_marks_is_content(form: ReplyFormat | None) -> None:
    text = 'Hello {x} <b> [1] \n\n{"name": 1}\n \n'
    assert parse(form, [text]) == [Content(text)]
    assert parse(form, [*text]) == [Content(text)]
    assert parse(form, []) == []


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        (QWEN, "a <tool_call> b", ["a <tool_call> b"]),
        (QWEN, "<tool_call></tool_call>.", ["<tool_call></tool_call>."]),
        (
            QWEN,
            "<tool_call>\n{'name': 1}\n</tool_call>",
            ["<tool_call>\n{'name': 1}\n</tool_call>"],
        ),
        (QWEN, "see `<tool_call>f(x)</tool_call>`", ["see `<tool_call>f(x)</tool_call>`"]),
        (QWEN, '<tool_call>{"name": "now", "ar', ['<tool_call>{"name": "now", "ar']),
        (
            QWEN,
            '<tool_call>{"name": "now", "arguments": {"a": "</tool_call>',
            [("!", "now", '{"a": "</tool_call>')],
        ),
        (
            QWEN,
            '<tool_call>{"name": "now", "arguments": {"a": 1</tool_call>bye',
            [("!", "now", '{"a": 1'), "bye"],
        ),
        (QWEN, f"<tool_call>{CALLS[1]}}}</tool_call>", [NOW, "}</tool_call>"]),
        (GLM, "<tool_call>now<arg_key>a</arg_key>1", [("!", "now", "{}"), "<arg_key>a</arg_key>1"]),
        (
            GLM,
            "<tool_call>now<arg_key>a</arg_key><arg_value>x",
            [("!", "now", '{"a": "x')],
        ),
        (DEEPSEEK, "<｜tool▁calls▁begin｜>{}", ["<｜tool▁calls▁begin｜>{}"]),
        (GLM4, "weather\nis fine {now}", ["weather\nis fine {now}"]),
        (GLM4, 'dance\n{"a": 1}', ['dance\n{"a": 1}']),
        (LFM, "<|tool_call_start|>[f(1)]", ["<|tool_call_start|>[f(1)]"]),
        (LFM, "<|tool_call_start|>[f(a=1, 2)", [("!", "f", '{"a": 1}'), " 2)"]),
        (LFM, '<|tool_call_start|>[f(a=1, b="x', [("!", "f", '{"a": 1,  b="x')]),
        (LFM, "<|tool_call_start|>[f(a=1e999)]", ["<|tool_call_start|>[f(a=1e999)]"]),
        (GEMMA, "<|tool_call>call:f{a:1]<tool_call|>", ["<|tool_call>call:f{a:1]<tool_call|>"]),
        (LLAMA4, "[dance(a=1)]", ["[dance(a=1)]"]),
        (LLAMA4, "[now(os.system)]", ["[now(os.system)]"]),
        (HARMONY, "<|channel|>analysis<|message|>Hm", [("?", "Hm")]),
        (HARMONY, "<|channel|>ana", []),
        (QWEN, "<think>\nHm", [("?", "Hm")]),
        (QWEN, "I said <think> once", ["I said <think> once"]),
    ],
)
def test_what_is_no_call(form: ReplyFormat, text: str, expected: list[Any]) -> None:
    assert shown(parse(form, [text])) == expected
    assert shown(parse(form, [*text])) == expected


def test_calls_without_end_are_read_once() -> None:
    """A line each that begins a call, and all of those after it: 2,000 took 8 s."""
    text = "[now(a=[\n" * 2000
    begin = time.thread_time()
    assert shown(parse(LLAMA4, [text])) == [text]
    assert shown(parse(LLAMA4, [text + "])]" * 1000])) == [text + "])]" * 1000]
    assert time.thread_time() - begin < 1


def test_without_tools_calls_are_content() -> None:
    text = f"<think>x</think><tool_call>\n{CALLS[0]}\n</tool_call>"
    assert shown(parse(QWEN, [text], tools=None)) == [("?", "x"), text.partition("</think>")[2]]


def test_arguments_come_as_they_are_written() -> None:
    parser = ReplyParser(QWEN, tools=TOOLS)
    parser.push('<tool_call>{"name": "weather", "arguments": {"city": "K')
    assert parser.push("öl") == [ToolArguments(0, "öl")]


def test_tags_hold_values_of_the_schemas_types() -> None:
    def value(key: str, text: str) -> object:
        call = f"<tool_call><function=weather><parameter={key}>\n{text}\n</parameter></function>"
        (_, arguments) = parse(QWEN, [call])
        assert isinstance(arguments, ToolArguments)
        return json.loads(arguments.text)[key]

    assert value("city", "12") == "12"
    assert value("city", '"12"') == '"12"'
    assert value("days", " 12") == 12
    assert value("days", "twelve") == "twelve"
    assert value("maybe", "null") is None
    assert value("maybe", "12") == "12"
    assert value("hot", "True") is True
    assert value("other", "[1, NaN]") == "[1, NaN]"
    assert value("other", '{"a": [1]}') == {"a": [1]}
    assert value("other", "[" * 5000) == "[" * 5000
    assert value("other", 'a "b"\n\\') == 'a "b"\n\\'


def test_the_prompt_may_hold_the_begin_of_a_reply() -> None:
    for start, text, expected in (
        ("<think>\n", "Hm</think>\nOK", [("?", "Hm"), "OK"]),
        ("<think>\n\n</think>\n\n", "\nOK", ["OK"]),
        ("</think>", "OK", ["OK"]),
    ):
        assert shown(parse(QWEN, [*text], start=start)) == expected
    final = "<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>"
    assert shown(parse(HARMONY, ["OK"], start=final)) == ["OK"]


def test_ids() -> None:
    def ids(form: ReplyFormat, text: str) -> list[str]:
        return [each.id for each in parse(form, [text]) if isinstance(each, ToolCallStart)]

    call = f"<tool_call>{CALLS[1]}</tool_call>"
    first, second = ids(QWEN, call * 2)
    assert re.fullmatch("call_[0-9a-f]{24}", first)
    assert first != second
    (short,) = ids(MISTRAL, f"[TOOL_CALLS][{CALLS[1]}]")
    assert re.fullmatch("[A-Za-z0-9]{9}", short)
    text = "<|tool_calls_section_begin|><|tool_call_begin|>functions.now:3"
    assert ids(KIMI, text + "<|tool_call_argument_begin|>{}") == ["functions.now:3"]


def test_published_templates_are_told_by_their_marks() -> None:
    assert published_reply("… '<tool_call>\\n<function=' + name …</think>") == BY_MARK["<function="]
    deepseek = "… <｜tool▁calls▁begin｜>"
    assert [(published_reply(deepseek + more) or QWEN).calls for more in ("```json", "")] == [
        "deepseek",
        "deepseek31",
    ]
    for text, calls in (
        ("{{- '<|channel>thought\\n' }}{{- '<|tool_call>call:' + name }}", "gemma"),
        ("{{- 'List of tools: <|tool_list_start|>[' }}", "lfm"),
        ("{{ '在调用上述函数时，请使用 Json 格式表示调用的参数。' }}<|observation|>", "glm4"),
        ("{{- '<|python_start|>' }} … dictionary of argument name and its value}", "llama"),
    ):
        assert (published_reply(text) or QWEN).calls == calls
    assert GEMMA is not None
    assert {'<|"|>', "<|tool_call>", "<tool_call|>", "<channel|>"} <= {*GEMMA.marks}
    assert published_reply("{{ message.content }}") is None
    assert "<｜tool▁sep｜>" in DEEPSEEK.marks
    assert "<|tool_call_argument_begin|>" in KIMI.marks
    assert {"[ARGS]", "[CALL_ID]", "[TOOL_CALLS]", "[THINK]"} <= {*MISTRAL.marks}


# ---- any text, in any pieces

_SNIPPETS = sorted(
    {
        *(mark for form in FORMS if form for mark in form.marks),
        *HARMONY_MARKS, *CALLS, "{", "}", "[", "]", ",", ":", '"', "\\", "\n", " ", "<", ">", "=",
        '{"name": "now", "arguments": {', '"name"', "weather", "now", "analysis", "final", "json",
        "commentary to=functions.now", "Action Input:", "\nAction:", "function", "```json\n", '">',
        "</arg_key>\n<arg_value>", "functions.now:0", '{"city": "', "city>", "<tool_ca", "</th",
        "weather\n", "now(", "a=", "call:now{", "a:", "')",
    }
)  # fmt: skip


def pieces_of(text: str, cuts: Sequence[int]) -> list[str]:
    borders = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in pairwise(borders)]


def without_ids(events: Iterable[Event]) -> list[Event]:
    return [
        ToolCallStart(each.index, "", each.name) if isinstance(each, ToolCallStart) else each
        for each in events
    ]


@settings(max_examples=300, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    parts=st.lists(st.one_of(st.sampled_from(_SNIPPETS), st.just("WORD")), max_size=14),
    cuts=st.lists(st.integers(0, 400), max_size=8),
)
@example(QWEN, ['<tool_call>{"name": "now", "arguments": {}', ", ", "WORD", " }"], [])
def test_pieces_change_nothing(form: ReplyFormat | None, parts: list[str], cuts: list[int]) -> None:
    numbered = [f"W{at}x" if part == "WORD" else part for at, part in enumerate(parts)]
    text = "".join(numbered)
    whole = parse(form, [text])
    assert without_ids(parse(form, pieces_of(text, cuts))) == without_ids(whole)
    assert without_ids(parse(form, [*text])) == without_ids(whole)
    if form is None or not form.channels:  # a header's words are no text
        out = repr(whole)
        assert all(word in out for word in numbered if re.fullmatch(r"W\d+x", word))
