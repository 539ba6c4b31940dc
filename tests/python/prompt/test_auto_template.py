"""Tests of prompt.template.auto: several chat templates by name, and templates that want parts."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_chat import make_tokenizer

from ktrt.config import ModelArgs, TemplateArgs
from ktrt.errors import ConfigError
from ktrt.prompt.template.load import load_template
from ktrt.prompt.tokenizer.load import load_tokenizer

TEXTS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ '\\n' }}{% endfor %}"
PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{{ '\\n' }}{% endfor %}"
)
# Some templates do this: a string has no such element, so jinja gives an undefined value.
INDEXED = "{% for m in messages %}[{{ m.role }}]{{ m.content[0]['text'] }}{{ '\\n' }}{% endfor %}"
TOOLS = "{% for t in tools %}{{ t.name }}{% endfor %}"
BROKEN = "{{ messages[0]['content'] + 1 }}"
SAID = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
]
SHOWN = "[system]Be brief.\n[user]one\n[assistant]two\n[user]three\n"


def shown(chat_template: Any) -> str:
    tokenizer = make_tokenizer(chat_template=chat_template)
    text: str = tokenizer.decode(load_template(TemplateArgs("auto"), tokenizer).encode(SAID))
    return text


@pytest.mark.parametrize(
    ("templates", "line"),
    [
        ({"rag": "!" + TEXTS, "chat": BROKEN, "default": TEXTS}, ""),
        ({"rag": "!" + TEXTS, "chat": TEXTS}, "'chat' is used"),
        ({"tool_use": TOOLS, "rag": BROKEN, "plain": TEXTS}, "'plain' is used"),
        ({"tool_use": TOOLS, "chat": PARTS}, "'chat' is used"),
    ],
    ids=["default", "chat", "first that fits", "in parts"],
)
def test_one_of_several(
    templates: dict[str, str], line: str, caplog: pytest.LogCaptureFixture
) -> None:
    as_listed = [{"name": name, "template": text} for name, text in templates.items()]
    with caplog.at_level(logging.INFO):
        assert shown(as_listed) == shown(templates) == SHOWN
    assert line in caplog.text


@pytest.mark.parametrize("template", [PARTS, INDEXED], ids=["loop", "index"])
def test_a_template_that_wants_parts(template: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert shown(template) == SHOWN
    assert "one text part" in caplog.text


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (BROKEN, "can only concatenate"),
        ("{% for m in", "nexpected"),
        ("{{ raise_exception('no') }}", "refuses this: no"),
        ({"tool_use": BROKEN, "rag": BROKEN}, "tool_use: .*rag: "),
    ],
    ids=["type error", "syntax", "raises", "several"],
)
def test_none_that_fits_is_one_clear_error(template: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=f"takes a conversation of texts.*{words}.*deepseek"):
        shown(template)


def test_one_that_shows_nothing_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert shown({"tool_use": TOOLS, "rag": "!"}) == "!"
    assert "'rag' does not show what the user says" in caplog.text


def test_files_of_templates(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v2"}')
    further = tmp_path / "additional_chat_templates"

    def found() -> str:
        tokenizer = load_tokenizer(ModelArgs(tmp_path))
        text: str = tokenizer.decode(load_template(TemplateArgs("auto"), tokenizer).encode(SAID))
        return text

    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": TEXTS}))
    with caplog.at_level(logging.INFO):
        assert found() == SHOWN
    assert "chat_template.json" in caplog.text
    (tmp_path / "chat_template.jinja").write_text("!" + TEXTS)
    assert found() == "!" + SHOWN
    (tmp_path / "chat_template.jinja").unlink()
    further.mkdir()
    (further / "tool_use.jinja").write_text(TOOLS)
    (further / "chat.jinja").write_text("?" + TEXTS)
    assert found() == "?" + SHOWN
