"""Compares the named templates with the chat templates published with the models: equal prompts,
token by token, except for the listed differences."""

import re
from typing import Any

import pytest
from helpers.published_templates import PAIRS, PUBLISHED, Pair
from helpers.tiny_chat import make_tokenizer

from ktrt.config import TemplateArgs
from ktrt.prompt.template.load import load_template
from ktrt.prompt.template.table import TEMPLATES

SPECIAL = {text for spec in TEMPLATES.values() for text in (*spec.tokens, *spec.stop_words)}
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "你好"}
REPLY = {"role": "assistant", "content": "我是 ktrt\n:)"}
AGAIN = {"role": "user", "content": "再见"}
CONVERSATIONS = [[USER], [SYSTEM, USER], [SYSTEM, USER, REPLY, AGAIN]]


def tokenizer_of(pair: Pair) -> Any:
    bos, eos = pair.bos_eos
    special = tuple(sorted({*SPECIAL, bos, eos, "<think>", "</think>"}))
    tokenizer = make_tokenizer(special, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = PUBLISHED[pair.published]
    return tokenizer


def cases(pair: Pair) -> list[tuple[list[dict[str, str]], bool | None]]:
    """Returns conversations, and whether to think (None: not set)."""
    found = [turns for turns in CONVERSATIONS if pair.has_system or turns[0] is not SYSTEM]
    found += [] if pair.has_system else [[USER, REPLY, AGAIN]]
    reasoning = TEMPLATES[pair.named].thought is not None
    return [(turns, think) for turns in found for think in ([None, False] if reasoning else [None])]


def expected(pair: Pair, text: str, thinking: bool | None, used: set[str]) -> str:
    """Returns the published prompt with the differences applied. With thinking off, the prompt of a
    published template without the switch gets OFF at its end."""
    if thinking is False and any("OFF" in pattern for _, pattern, _ in pair.differences):
        text += "OFF"
    for name, pattern, replacement in pair.differences:
        changed = re.sub(pattern, replacement, text, flags=re.DOTALL)
        used |= {name} if changed != text else set()
        text = changed
    return text


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.published)
def test_named_equals_published_but_for_the_list(pair: Pair) -> None:
    tokenizer = tokenizer_of(pair)
    used: set[str] = set()
    for turns, thinking in cases(pair):
        options = {} if thinking is None else {"enable_thinking": thinking}
        args = TemplateArgs(pair.named, enable_thinking=thinking)
        ids = load_template(args, tokenizer).encode(turns)
        published = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, **options
        )
        assert tokenizer.decode(ids) == expected(pair, published, thinking, used)
        if not pair.differences:
            auto = load_template(TemplateArgs("auto", enable_thinking=thinking), tokenizer)
            assert auto.encode(turns) == ids
    assert used == {name for name, _, _ in pair.differences}, "a difference that is none"


@pytest.mark.parametrize(
    "pair", [p for p in PAIRS if p.named in ("qwen3", "deepseekr1", "qwen3_5")]
)
def test_earlier_thoughts_go_as_published(pair: Pair) -> None:
    tokenizer = tokenizer_of(pair)
    thought = REPLY | {"content": "<think>\n嗯…\n</think>\n\n" + REPLY["content"]}
    chosen = load_template(TemplateArgs(pair.named), tokenizer)
    assert chosen.encode([USER, thought, AGAIN]) == chosen.encode([USER, REPLY, AGAIN])
    published, plain = (
        tokenizer.apply_chat_template(
            [USER, reply, AGAIN], tokenize=False, add_generation_prompt=True
        )
        for reply in (thought, REPLY)
    )
    if pair.named == "deepseekr1":  # it keeps the line breaks after a thought
        published = published.replace("\n\n我是", "我是")
    assert published == plain


def test_the_most_used_templates_have_a_published_one() -> None:
    wanted = (
        "deepseek deepseek3 deepseekr1 qwen qwen3 qwen3_nothink qwen3_5 mistral glm4 glm4_moe "
        "glm4_7 gpt_oss minimax2 moonlight"
    )
    assert {pair.named for pair in PAIRS} == {*wanted.split()}
    same = ("qwen3_nothink", "qwen3_5_nothink", "qwen3_vl_nothink", "qwen3_omni_nothink")
    assert all(TEMPLATES[name] == TEMPLATES[same[0]] for name in same)
    thinking = ("qwen3", "qwen3_5", "qwen3_6", "qwen3_vl", "qwen3_omni")
    assert all(TEMPLATES[name] == TEMPLATES[thinking[0]] for name in thinking)
