"""Tests of ktrt.generate.grammar and ktrt.prompt.reply.structure: random models that can only write
what the grammar allows."""

import json
import shutil
import sys
import time
from collections import OrderedDict
from functools import cache
from pathlib import Path
from queue import LifoQueue
from typing import Any

import pytest
import torch
from helpers.llamafactory_prompts import byte_tokenizer

from ktrt.config import SamplingArgs
from ktrt.errors import ConfigError, KtrtError
from ktrt.generate.grammar import Grammars, _repetitions
from ktrt.generate.sampling import make_sampler, sample_rows
from ktrt.prompt.reply import (
    Content,
    Reasoning,
    ReplyFormat,
    ReplyParser,
    ToolArguments,
    ToolCallStart,
    calls_structure,
    joined,
    json_structure,
)
from ktrt.prompt.reply.table import BY_MARK, BY_TOOL_FORMAT, CALL_TEXTS, named_reply

pytest.importorskip("xgrammar")

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["a", "b"]}, "count": {"type": "integer"}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "pick", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]
THINK = ReplyFormat(("<think>", "</think>"))
PADDING = 64


@cache
def tokenizer() -> Any:
    marks = {mark for form in BY_MARK.values() for mark in form.marks}
    return byte_tokenizer(["<|stop|>", *sorted(marks)])


@cache
def grammars() -> Grammars:
    return Grammars(tokenizer(), len(tokenizer()) + PADDING)


def write(structure: dict[str, Any], begin: str = "", *, seed: int = 0, most: int = 3000) -> str:
    """Returns a random text that begins with ``begin`` and ends with a stop id."""
    stop = tokenizer().convert_tokens_to_ids("<|stop|>")
    constraint = grammars().compile(structure).constraint([stop])
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    wanted = tokenizer().encode(begin, add_special_tokens=False)
    while len(ids) < most:
        logits = torch.randn(len(tokenizer()) + PADDING, generator=generator)
        logits[stop] += 5
        logits[tokenizer().encode('"}]> \n', add_special_tokens=False)] += 3
        if len(ids) < len(wanted):
            logits[wanted[len(ids)]] = 1000
        constraint.mask(logits)
        token = int(logits.argmax())
        constraint.accept(token)
        if token == stop:
            constraint.mask(logits)  # nothing is left to allow
            text: str = tokenizer().decode(ids)
            assert text.startswith(begin)
            return text
        ids.append(token)
        assert token < len(tokenizer()), "a token of the padding"
    raise AssertionError(f"no end: {tokenizer().decode(ids)[:200]!r}")


@pytest.mark.parametrize("seed", range(5))
def test_json_of_a_schema(seed: int) -> None:
    found = json.loads(write(json_structure(None, "", SCHEMA), seed=seed))
    assert set(found) == {"kind", "count"}
    assert found["kind"] in ("a", "b")
    assert isinstance(found["count"], int)
    assert isinstance(json.loads(write(json_structure(None, ""), seed=seed)), dict)


def test_only_the_answer_after_a_thought_is_held_to_the_schema() -> None:
    for form, start, begin in (
        (THINK, "<think>\n", "Hm { </thin\n</think>\n\n"),
        (THINK, "", "<think>\nHm</think>"),
        (THINK, "<think></think>", ""),
        (None, "", ""),
        (BY_MARK["<|channel|>"], "", "<|channel|>analysis<|message|>Hm<|end|>"),
        (BY_MARK["<|channel|>"], "", "<|channel|>final<|message|>"),
        (BY_MARK["<|channel|>"], "… <|channel|>final<|message|>", ""),
    ):
        text = write(json_structure(form, start, SCHEMA), begin)
        parser = ReplyParser(form, start=start)
        events = joined([*parser.push(text), *parser.finish()])
        assert isinstance(events[-1], Content)
        assert set(json.loads(events[-1].text)) == {"kind", "count"}
        assert [type(each) for each in events[:-1]] == [Reasoning] * ("Hm" in text)


FORMS = [
    *(form for form in BY_MARK.values() if form.calls or form.channels),
    *(form for form in BY_TOOL_FORMAT.values() if form.calls),
]


@pytest.mark.parametrize("calls", [*CALL_TEXTS, ""])
def test_enforced_calls_are_read_as_calls(calls: str) -> None:
    base = {"deepseek31": "deepseek", "mistral_args": "mistral"}.get(calls, calls)
    form = next(each for each in FORMS if each.calls == base)
    form = ReplyFormat(None, form.blocks, form.channels, calls, form.short_ids)
    for seed in range(3):
        for name in (None, "pick"):
            begin = "<|channel|>commentary" if form.channels else ""
            structure = calls_structure(form, "", TOOLS, name=name, parallel=seed == 2)
            text = write(structure, begin, seed=seed)
            parser = ReplyParser(form, tools=TOOLS)
            events = joined([*parser.push(text), *parser.finish()])
            assert {type(each) for each in events} == {ToolCallStart, ToolArguments}, text
            names = [each.name for each in events if isinstance(each, ToolCallStart)]
            assert {*names} <= ({"pick", "now"} if name is None else {name})
            assert len(names) == 1 or seed == 2
            for at, each in enumerate(e for e in events if isinstance(e, ToolArguments)):
                arguments = json.loads(each.text)
                assert set(arguments) == ({"kind", "count"} if names[at] == "pick" else set())


def test_calls_of_an_adapter_for_gpt_oss_are_text_of_its_final_message() -> None:
    form = named_reply("gpt_oss", "default", None)
    for start, begin in (
        ("", "<|channel|>final<|message|>Action"),
        ("<|channel|>final<|message|>", ""),
    ):
        text = write(calls_structure(form, start, TOOLS, name="now"), begin)
        parser = ReplyParser(form, tools=TOOLS, start=start)
        events = joined([*parser.push(text), *parser.finish()])
        assert [each.name for each in events if isinstance(each, ToolCallStart)][:1] == ["now"]


def test_special_tokens_that_the_structure_does_not_name_never_come() -> None:
    named, other = tokenizer().convert_tokens_to_ids(["<think>", "<|call|>"])
    stop = tokenizer().convert_tokens_to_ids("<|stop|>")
    constraint = (
        grammars().compile(json_structure(THINK, "", {"type": "string"})).constraint([stop])
    )
    logits = torch.zeros(len(tokenizer()) + PADDING)
    constraint.mask(logits)
    assert logits[named] == 0
    for token in tokenizer().encode('"a', add_special_tokens=False):
        constraint.accept(token)
    logits = torch.zeros(len(tokenizer()) + PADDING)
    constraint.mask(logits)
    assert logits[tokenizer().encode("b", add_special_tokens=False)] == 0
    assert torch.isinf(logits[[other, stop]]).all()


def test_gemmas_quote_is_a_token() -> None:
    form = named_reply("gemma4", "gemma4", None)
    tools = [
        {"name": "say", "parameters": {"type": "object", "properties": {"it": {"const": "x"}}}}
    ]
    text = write(calls_structure(form, "", tools), '<|tool_call>call:say{it:<|"|>')
    assert text.startswith('<|tool_call>call:say{it:<|"|>x<|"|>')


def test_calls_that_cannot_be_enforced() -> None:
    for form in (None, THINK):
        with pytest.raises(ConfigError, match="expected auto or none, found a call to enforce"):
            calls_structure(form, "", TOOLS)
    with pytest.raises(ConfigError, match="expected a function 'other' among tools"):
        calls_structure(BY_MARK["<tool_call>"], "", TOOLS, name="other")
    with pytest.raises(ConfigError, match="with thinking off"):
        calls_structure(BY_MARK["<|channel|>"], "<|channel|>final<|message|>", TOOLS)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "banana"}, 'cannot be enforced: Unsupported type "banana"'),
        ({"$ref": "#"}, "cannot be enforced: Circular"),
        ({"$ref": "#/$defs/x"}, "cannot be enforced: Cannot find"),
        ({"type": "string", "pattern": "(["}, "cannot be enforced: Regex"),
        ({"type": "string", "pattern": "a" * 2000}, "pattern: expected at most 1000 characters"),
        (
            {"type": "string", "pattern": "((a{0,99}b){0,99}c){0,99}"},
            "20000 at most, .* found 970299",
        ),
        ({"type": "string", "pattern": r"(\({9})(a{9,}[(]){9999999999}"}, "in all patterns, found"),
        ({"anyOf": [{"pattern": "(a{99}){99}"}] * 11}, "100000 in all patterns, .*107811 so far"),
        ({"patternProperties": {"((a{0,99}b){0,99}c){0,99}": {}}}, "20000 at most"),
        ({"$ref": "http://127.0.0.1/x"}, "expected a place in the schema itself"),
        ({"type": "array", "maxItems": 10**9}, "maxItems: expected at most 5000, found 1000000000"),
        ({"enum": ["x" * 100] * 5000}, "the schema has .* bytes; at most"),
        ({"properties": {"not": {"type": "string"}}, "not": {}}, "the schema: not cannot be enf"),
        ({"allOf": [{}, {}], "items": [{"uniqueItems": True}]}, "allOf, uniqueItems cannot be"),
        ({"default": float("nan")}, "is no JSON"),
        (7, "the schema: expected a mapping, found 7"),
    ],
)
def test_schemas_that_are_refused(schema: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        grammars().compile(json_structure(None, "", schema))


def test_a_deep_schema_is_refused() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(400):
        schema = {"type": "array", "items": schema}
    with pytest.raises(ConfigError, match="more than 64 levels"):
        grammars().compile(json_structure(None, "", schema))


def test_not_strict_tolerates_what_is_not_enforced() -> None:
    structure = json_structure(None, "", SCHEMA | {"not": {"type": "null"}}, strict=False)
    grammars().compile(structure)


def test_compiled_grammars_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    own = grammars()
    asked: list[str] = []
    compile_text = Grammars._compile

    def counted(self: Grammars, xgrammar: Any, text: str) -> Any:
        asked.append(text)
        return compile_text(self, xgrammar, text)

    monkeypatch.setattr(Grammars, "_compile", counted)
    monkeypatch.setattr("ktrt.generate.grammar._ENTRIES", 2)
    monkeypatch.setattr(own, "_kept", OrderedDict())
    for name in "aabac":
        own.compile(json_structure(None, "", {"const": name}))
    assert len(asked) == 3
    own.compile(json_structure(None, "", {"const": "a"}))
    assert len(asked) == 3
    own.compile(json_structure(None, "", {"const": "b"}))
    assert len(asked) == 4


def test_a_grammar_that_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process ends, and another one compiles the next."""
    monkeypatch.setattr(grammars(), "_seconds", 0.5)
    slow = {"anyOf": [{"type": "string", "pattern": f"(.{{0,140}}{n}){{0,140}}"} for n in range(5)]}
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=r"takes more than 0.5 s to compile"):
        Grammars.compile(grammars(), json_structure(None, "", slow))
    assert time.monotonic() - begin < 30
    monkeypatch.setattr(grammars(), "_seconds", 60.0)
    assert grammars().compile(json_structure(None, "", {"const": "other"}))


def test_after_an_interrupt_no_schema_gets_anothers_grammar(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(_file: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ktrt.generate.grammar_worker._read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            grammars().compile(json_structure(None, "", {"const": "first"}))
    assert write(json_structure(None, "", {"const": "second"})).strip() == '"second"'


def test_files_of_the_present_folder_are_no_modules_of_a_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "resource.py").write_text("raise SystemExit(3)\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each or str(tmp_path.parent) for each in sys.path])
    assert Grammars(tokenizer(), len(tokenizer())).compile(json_structure(None, "", {"const": 2}))


def test_a_process_that_ends_for_another_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(KtrtError, match="ended with code 1") as caught:
        Grammars(tokenizer(), len(tokenizer())).compile(json_structure(None, "", {"const": 3}))
    assert not isinstance(caught.value, ConfigError)


def test_when_all_processes_are_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars(), "_compilers", LifoQueue())
    monkeypatch.setattr(grammars(), "_seconds", 0.01)
    with pytest.raises(KtrtError, match="other requests are still being compiled") as caught:
        grammars().compile(json_structure(None, "", {"const": 1}))
    assert not isinstance(caught.value, ConfigError)  # 503: the same request may succeed later


@pytest.mark.parametrize(
    "pattern", [r"\({200}[(]{200}a{200}", "(a{200}){100}", "a{", "(a{3}){4}b{5}"]
)
def test_repetitions_next_to_each_other_are_allowed(pattern: str) -> None:
    assert _repetitions(pattern) <= 20_000


def test_a_grammar_that_is_slow_at_every_token_fails_its_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two such patterns held the thread of all answers for minutes."""
    monkeypatch.setattr("ktrt.generate.grammar._SLOWEST", -1.0)
    constraint = grammars().compile(json_structure(None, "")).constraint([0])
    logits = torch.zeros(1, len(tokenizer()) + PADDING)
    (error,) = sample_rows([make_sampler(SamplingArgs(), [], constraint)], logits)
    assert isinstance(error, ConfigError)
    assert "s a token" in str(error)


def test_without_xgrammar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(ConfigError, match=r"pip install 'ktrt\[serve\]'"):
        grammars().compile(json_structure(None, ""))


def test_logits_of_another_size() -> None:
    """An adapter that adds words has more logits than the base."""
    size = len(tokenizer()) + PADDING
    constraint = grammars().compile(json_structure(None, "")).constraint([0])
    for more in (8, -8):
        logits = torch.zeros(size + more)
        constraint.mask(logits)
        assert torch.isinf(logits[size:]).all()
        assert [tokenizer().decode(each)[:1] for each in logits.isfinite().nonzero().tolist()] == [
            "{"
        ] * int(logits.isfinite().sum())
