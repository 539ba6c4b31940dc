"""Tests of ktrt.prompt.template.load."""

import logging
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from helpers.tiny_chat import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from ktrt.config import TemplateArgs
from ktrt.errors import ConfigError
from ktrt.generate.text_stream import TextStream
from ktrt.prompt.template.load import NamedTemplate, load_template
from ktrt.prompt.template.table import TEMPLATES

SPECIAL = tuple(
    sorted({text for spec in TEMPLATES.values() for text in (*spec.tokens, *spec.stop_words)})
)
TOKENIZER = make_tokenizer(SPECIAL)
BOS, EOS = TOKENIZER.bos_token, TOKENIZER.eos_token
USER = {"role": "user", "content": "你好"}
ASSISTANT = {"role": "assistant", "content": "我是 ktrt"}
SYSTEM = {"role": "system", "content": "Be brief."}
AGAIN = {"role": "user", "content": "再见"}

# Prompts of [system], user, assistant, user: literal, not built from the table.
EXPECTED = {
    "default": (
        f"Human: 你好{EOS}\nAssistant:我是 ktrt{EOS}\nHuman: 再见{EOS}\nAssistant:",
        f"System: Be brief.{EOS}\nHuman: 你好{EOS}\nAssistant:",
    ),
    "deepseek": (
        f"{BOS}User: 你好\n\nAssistant:我是 ktrt{EOS}User: 再见\n\nAssistant:",
        f"{BOS}Be brief.\n\nUser: 你好\n\nAssistant:",
    ),
    "deepseek3": (
        f"{BOS}<｜User｜>你好<｜Assistant｜>我是 ktrt{EOS}<｜User｜>再见<｜Assistant｜>",
        f"{BOS}Be brief.<｜User｜>你好<｜Assistant｜>",
    ),
    "qwen3_nothink": (
        (
            "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n我是 ktrt<|im_end|>\n"
            "<|im_start|>user\n再见<|im_end|>\n<|im_start|>assistant\n"
        ),
        (
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
        ),
    ),
    "mistral": (
        f"{BOS}[INST] 你好[/INST] 我是 ktrt{EOS}[INST] 再见[/INST]",
        f"{BOS}[INST] Be brief.\n\n你好[/INST]",
    ),
    "glm4": (
        "[gMASK]<sop><|user|>\n你好<|assistant|>\n我是 ktrt<|user|>\n再见<|assistant|>",
        "[gMASK]<sop><|system|>\nBe brief.<|user|>\n你好<|assistant|>",
    ),
    "minimax2": (
        (
            "]~!b[]~b]system\nYou are a helpful assistant. Your name is MiniMax-M2.1 and is built "
            "by MiniMax.[e~[\n]~b]user\n你好[e~[\n]~b]ai\n我是 ktrt[e~[\n]"
            "~b]user\n再见[e~[\n]~b]ai\n"
        ),
        "]~!b[]~b]system\nBe brief.[e~[\n]~b]user\n你好[e~[\n]~b]ai\n",
    ),
    "moonlight": (
        (
            "<|im_system|>system<|im_middle|>You are a helpful assistant provided by Moonshot-AI."
            "<|im_end|><|im_user|>user<|im_middle|>你好<|im_end|><|im_assistant|>assistant<|im_middle|>"
            "我是 ktrt<|im_end|>"
            "<|im_user|>user<|im_middle|>再见<|im_end|><|im_assistant|>assistant<|im_middle|>"
        ),
        (
            "<|im_system|>system<|im_middle|>Be brief.<|im_end|>"
            "<|im_user|>user<|im_middle|>你好<|im_end|><|im_assistant|>assistant<|im_middle|>"
        ),
    ),
    "gpt_oss": (
        (
            "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI."
            "<|end|><|start|>user<|message|>你好<|end|><|start|>assistant我是 ktrt"
            "<|start|>user<|message|>再见<|end|><|start|>assistant"
        ),
        (
            "<|start|>system<|message|>Be brief.<|end|>"
            "<|start|>user<|message|>你好<|end|><|start|>assistant"
        ),
    ),
}
SAME_AS = {
    "deepseekr1": "deepseek3",
    "qwen3": "qwen3_nothink",
    "qwen3_5": "qwen3_nothink",
    "qwen3_5_nothink": "qwen3_nothink",
    "glm4_moe": "glm4",
    "glm4_7": "glm4",
}


def template(name: str | None, **options: Any) -> Any:
    return load_template(TemplateArgs(name, **options), TOKENIZER)


def read(ids: Sequence[int]) -> str:
    return str(TOKENIZER.decode(list(ids), skip_special_tokens=False))


@pytest.mark.parametrize("name", [*EXPECTED, *SAME_AS])
def test_strings(name: str) -> None:
    expected, with_system = EXPECTED[SAME_AS.get(name, name)]
    chosen = template(name)
    assert read(chosen.encode([USER, ASSISTANT, AGAIN])) == expected
    assert read(chosen.encode([SYSTEM, USER])) == with_system


def test_a_system_prompt_inside_the_user_slot_comes_once() -> None:
    ids = template("mistral").encode([SYSTEM, USER, ASSISTANT, AGAIN])
    assert read(ids) == f"{BOS}[INST] Be brief.\n\n你好[/INST] 我是 ktrt{EOS}[INST] 再见[/INST]"


def test_default_system_prompts() -> None:
    own = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    assert read(template("qwen").encode([USER])).startswith(own + "<|im_end|>\n<|im_start|>user")
    assert read(template("qwen", default_system="").encode([USER])).startswith("<|im_start|>user")
    override = read(template("deepseek", default_system="Sei kurz.").encode([USER]))
    assert override == f"{BOS}Sei kurz.\n\nUser: 你好\n\nAssistant:"
    given = read(template("deepseek", default_system="Sei kurz.").encode([SYSTEM, USER]))
    assert given == f"{BOS}Be brief.\n\nUser: 你好\n\nAssistant:"


def test_slots_are_encoded_one_by_one() -> None:
    encode = TOKENIZER.encode
    ids = template("deepseek").encode([SYSTEM, USER])
    expected = [TOKENIZER.bos_token_id]
    expected += encode("Be brief.\n\n", add_special_tokens=False)
    expected += encode("User: 你好\n\nAssistant:", add_special_tokens=False)
    assert ids == expected


def test_content_with_braces_stays_literal() -> None:
    turn = {"role": "user", "content": "{eos} {c} {bos} %s"}
    ids = template("default").encode([turn])
    assert read(ids) == f"Human: {{eos}} {{c}} {{bos}} %s{EOS}\nAssistant:"


PLAIN = [name for name, spec in TEMPLATES.items() if spec.thought is None]
TURNS = st.lists(st.text(min_size=1, max_size=20), min_size=3, max_size=7).filter(
    lambda texts: len(texts) % 2 == 1
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PLAIN), TURNS, st.booleans())
def test_a_longer_conversation_starts_with_the_shorter_one(
    name: str, texts: list[str], system: bool
) -> None:
    turns = [
        {"role": "assistant" if index % 2 else "user", "content": text}
        for index, text in enumerate(texts)
    ]
    head = [SYSTEM] if system else []
    chosen = template(name)
    longer = chosen.encode(head + turns)
    shorter = chosen.encode(head + turns[:-2])
    assert longer[: len(shorter)] == shorter
    assert len(longer) > len(shorter)


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("deepseek", [EOS]),
        ("default", [EOS]),
        ("deepseek3", [EOS]),
        ("qwen", [EOS, "<|im_end|>"]),
        ("glm4", [EOS, "<|user|>", "<|observation|>"]),
        ("minimax2", [EOS, "[e~["]),
    ],
)
def test_stop_ids(name: str, stops: list[str]) -> None:
    assert template(name).stop_ids == set(TOKENIZER.convert_tokens_to_ids(stops))


class TestMissingTokens:
    PLAIN = make_tokenizer()

    @pytest.mark.parametrize("name", ["deepseek", "default", "mistral"])
    def test_templates_without_special_tokens_fit_any(self, name: str) -> None:
        assert load_template(TemplateArgs(name), self.PLAIN).name == name

    @pytest.mark.parametrize(
        ("name", "tokens"),
        [
            ("deepseek3", ["<｜User｜>", "<｜Assistant｜>"]),
            ("qwen", ["<|im_start|>", "<|im_end|>"]),
            ("glm4", ["[gMASK]", "<sop>", "<|observation|>"]),
        ],
    )
    def test_are_named(self, name: str, tokens: list[str]) -> None:
        with pytest.raises(ConfigError) as caught:
            load_template(TemplateArgs(name), self.PLAIN)
        message = str(caught.value)
        assert name in message
        assert all(token in message for token in tokens)
        assert "template: auto" in message

    @pytest.mark.parametrize(("name", "token"), [("deepseek", "bos"), ("default", "eos")])
    def test_bos_and_eos(self, name: str, token: str) -> None:
        missing: dict[str, Any] = {f"{token}_token": None}
        tokenizer = make_tokenizer(**missing)
        with pytest.raises(ConfigError, match=f"no token {token};"):
            load_template(TemplateArgs(name), tokenizer)

    def test_unknown_token_counts_as_missing(self) -> None:
        class Words:
            bos_token_id = eos_token_id = 1
            unk_token_id = 0
            chat_template = None

            def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
                return [0]

        words: Any = Words()
        with pytest.raises(ConfigError, match="im_start"):
            load_template(TemplateArgs("qwen"), words)


THOUGHT = {"role": "assistant", "content": "<think>\n嗯…\n</think>\n\n我是 ktrt"}


class TestReasoning:
    def test_earlier_thoughts_are_dropped(self) -> None:
        for name in ("qwen3", "deepseekr1"):
            chosen = template(name)
            thought = chosen.encode([USER, THOUGHT, AGAIN])
            assert thought == chosen.encode([USER, ASSISTANT, AGAIN])
            more = THOUGHT | {"content": THOUGHT["content"].replace("我", "\n\n我")}
            assert chosen.encode([USER, more, AGAIN]) == thought
        plain = template("qwen3_nothink")
        assert "嗯" in read(plain.encode([USER, THOUGHT, AGAIN]))

    def test_marks_of_a_thought_need_no_line_breaks(self) -> None:
        bare = THOUGHT | {"content": "<think>嗯…</think>我是 ktrt"}
        chosen = template("qwen3")
        assert chosen.encode([USER, bare, AGAIN]) == chosen.encode([USER, ASSISTANT, AGAIN])

    def test_marks_that_are_special_tokens_are_shown(self) -> None:
        """Otherwise a thought would belong to the reply in the next prompt."""
        chosen = template("gpt_oss")
        marks = ["<|start|>", "<|message|>", "<|end|>", "<|channel|>"]
        assert sorted(chosen.shown_tokens.values()) == sorted(marks)
        reply = (
            "<|channel|>analysis<|message|>嗯…<|end|><|start|>assistant<|channel|>final<|message|>"
        )
        stream = TextStream(TOKENIZER, skip_special_tokens=True, shown=chosen.shown_tokens)
        ids = TOKENIZER.encode(reply + "我是 ktrt", add_special_tokens=False)
        text = "".join(stream.push(each) for each in [*ids, TOKENIZER.eos_token_id])
        assert text == reply + "我是 ktrt"
        turns = [USER, {"role": "assistant", "content": text}, AGAIN]
        assert chosen.encode(turns) == chosen.encode([USER, ASSISTANT, AGAIN])
        assert template("qwen3").shown_tokens == template("qwen").shown_tokens == {}

    @pytest.mark.parametrize("name", [n for n, spec in TEMPLATES.items() if spec.thought])
    def test_the_switch(self, name: str) -> None:
        on, off = template(name), template(name, enable_thinking=False)
        assert (on.thinking, off.thinking) == (True, False)
        for switched, expected in ((on.with_thinking(False), off), (off.with_thinking(True), on)):
            assert switched.thinking is expected.thinking
            assert switched.encode([USER]) == expected.encode([USER])
        assert (on.thinking, off.thinking) == (True, False), "the template itself has changed"

    def test_no_switch(self) -> None:
        assert template("deepseek").thinking is None
        with pytest.raises(ConfigError, match="'deepseek' cannot switch thinking"):
            template("deepseek").with_thinking(False)

    @pytest.mark.parametrize(
        ("name", "empty"),
        [
            ("qwen3", "<think>\n\n</think>\n\n"),
            ("glm4_moe", "<think>\n\n</think>\n\n"),
            ("glm4_7", "</think>"),
        ],
    )
    def test_thinking_off_ends_the_prompt_with_an_empty_thought(
        self, name: str, empty: str
    ) -> None:
        on = template(name).encode([USER])
        off = template(name, enable_thinking=False).encode([USER])
        assert off == on + TOKENIZER.encode(empty, add_special_tokens=False)
        assert template(name, enable_thinking=True).encode([USER]) == on

    def test_no_effect_is_said(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO):
            template("deepseek", enable_thinking=False)
        assert "enable_thinking" in caplog.text


class TestAuto:
    JINJA = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
        "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
    )

    def tokenizer(self, jinja: str | None = JINJA) -> Any:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = jinja
        return tokenizer

    @pytest.mark.parametrize("name", [None, "auto"])
    def test_uses_the_tokenizers_own(self, name: str | None) -> None:
        tokenizer = self.tokenizer()
        chosen = load_template(TemplateArgs(name), tokenizer)
        expected = f"{BOS}[system] Be brief.\n[user] 你好\n[assistant]"
        assert tokenizer.decode(chosen.encode([SYSTEM, USER])) == expected
        assert chosen.stop_ids == {tokenizer.eos_token_id}
        assert chosen.name == "auto"

    def test_default_system_and_thinking(self) -> None:
        tokenizer = self.tokenizer()
        args = TemplateArgs(None, default_system="Sei kurz.", enable_thinking=False)
        chosen = load_template(args, tokenizer)
        ids = chosen.encode([USER])
        assert tokenizer.decode(ids) == f"{BOS}[system] Sei kurz.\n[user] 你好\n[assistant]False"

    @pytest.mark.parametrize(
        ("jinja", "default"),
        [
            ("{% if enable_thinking is defined and not enable_thinking %}no{% endif %}", True),
            ("{% if enable_thinking is defined and enable_thinking %}yes{% endif %}", False),
            ("{% if thinking %}yes{% endif %}", False),
            ("{{ messages[0].content }}", None),
        ],
    )
    def test_the_switch(
        self, jinja: str, default: bool | None, caplog: pytest.LogCaptureFixture
    ) -> None:
        tokenizer = self.tokenizer("hi " + jinja)
        chosen = load_template(TemplateArgs(), tokenizer)
        assert chosen.thinking is default
        if default is None:
            with pytest.raises(ConfigError, match="cannot switch thinking"):
                chosen.with_thinking(True)
            with caplog.at_level(logging.INFO):
                load_template(TemplateArgs(enable_thinking=False), tokenizer)
            assert "enable_thinking has no effect" in caplog.text
            return
        for thinking in (True, False):
            switched = chosen.with_thinking(thinking)
            configured = load_template(TemplateArgs(enable_thinking=thinking), tokenizer)
            assert switched.thinking is configured.thinking is thinking
            same = switched.encode([USER]) == chosen.encode([USER])
            assert same is (thinking is default)
            assert switched.encode([USER]) == configured.encode([USER])

    def test_missing_tokens_are_named(self, caplog: pytest.LogCaptureFixture) -> None:
        jinja = "<|im_start|>{{ messages[0].content }}<|im_end|><｜Assistant｜>"
        load_template(TemplateArgs(), self.tokenizer(jinja))
        assert "<|im_start|>, <|im_end|>, <｜Assistant｜>, which the tokenizer" in caplog.text
        caplog.clear()
        whole = make_tokenizer(("<|im_start|>", "<|im_end|>", "<｜Assistant｜>"))
        whole.chat_template = jinja
        load_template(TemplateArgs(), whole)
        assert not caplog.messages

    def test_none_there(self) -> None:
        with pytest.raises(ConfigError, match=r"has no chat template.*deepseek"):
            load_template(TemplateArgs(), self.tokenizer(None))

    def test_a_template_that_refuses(self) -> None:
        jinja = (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
            "{{ messages[-1].content }}"
        )
        chosen = load_template(TemplateArgs(), self.tokenizer(jinja))
        with pytest.raises(ConfigError, match="no system"):
            chosen.encode([SYSTEM, USER])

    def test_a_broken_one_is_found_at_start(self) -> None:
        with pytest.raises(ConfigError, match="chat template"):
            load_template(TemplateArgs(), self.tokenizer("{% for %}"))


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("deepsek", "deepseek"),
        ("deepseek-v3", "deepseek3"),
        ("Qwen3-VL", "qwen3_vl"),
        ("qwen3vl_nothink", "qwen3_vl_nothink"),
        ("openchat_3.6", "openchat-3.6"),
        ("glm4.7", "glm4_7"),
        ("hunyuan_moe", "hunyuan"),
        ("mixtral", "mistral"),
        ("Kimi-K2", "moonlight"),
        ("olmoe", "olmo"),
        ("ling2", "bailing_v2"),
        ("phi3.5", "phi"),
    ],
)
def test_unknown_name_comes_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{name}'.*did you mean '{near}'.*known: auto"):
        template(name)


def test_an_empty_system_message_is_none() -> None:
    """The template's default applies, as in training."""
    empty = SYSTEM | {"content": ""}
    for name in ("qwen", "deepseek"):
        assert template(name).encode([empty, USER]) == template(name).encode([USER])


def test_every_entry_is_a_template() -> None:
    for name, spec in TEMPLATES.items():
        assert isinstance(template(name), NamedTemplate)
        assert "{c}" in spec.user
        assert "{c}" in spec.assistant
        assert "{c}" in spec.system
        assert spec.models
        slots = (spec.prefix, spec.system, spec.user, spec.assistant)
        marks = {*re.findall(r"\{.*?\}", "".join(slots))} - {"{c}", "{bos}", "{bos?}", "{eos}"}
        assert all(mark == "{|}" or mark.startswith("{token ") for mark in marks), name
        thought = () if spec.thought is None else (spec.thought.begin, spec.thought.end)
        for token in spec.tokens:
            assert any(token in text for text in (*slots, *thought)), (name, token)


def test_imports_without_torch() -> None:
    code = "import sys, ktrt.prompt.template.load\n"
    code += "assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
