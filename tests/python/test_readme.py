"""The README says what is so: its commands exist, its YAML loads, its Python runs."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from helpers import templates_table

from ktrt.chat.commands import COMMANDS
from ktrt.config import (
    AdapterArgs,
    ExpertArgs,
    ModelArgs,
    SamplingArgs,
    TemplateArgs,
    load_config,
)
from ktrt.prompt.template.table import TEMPLATES

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def inline_code() -> list[str]:
    return re.findall(
        r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
    )


def test_ci_runs_the_readme_test_command() -> None:
    _, _, after = README.partition("Install what the tests need")
    command = re.findall(r"^```bash\n(.*?)\n```", after, re.MULTILINE | re.DOTALL)[0]
    assert (ROOT / ".ci" / "run").read_text("utf-8").splitlines()[-1] == command
    assert len(command.splitlines()) == 1


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    mentioned = {
        m
        for text in [*inline_code(), *blocks("bash")]
        for m in re.findall(r"\bmake ([\w-]+)", text)
    }
    assert mentioned
    assert mentioned <= set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))


def test_commands_have_modules() -> None:
    mentioned = set(re.findall(r"python -m ([\w.]+)", README)) - {"venv"}
    assert "ktrt.chat" in mentioned
    for module in mentioned:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_linked_and_named_files_exist() -> None:
    named = set(re.findall(r"\]\(([\w./-]+)\)", README))
    named |= {
        c
        for c in inline_code()
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?\.?(md|py|json|yaml)?", c)
        and c.split("/")[0] in {"csrc", "tests", "examples", "bench", "ktrt"}
    }
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


def test_the_yaml_loads_but_for_its_paths(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    for block in blocks("yaml"):
        (tmp_path / "config.yaml").write_text(block, "utf-8")
        paths = [key for key in yaml.safe_load(block) if key.endswith("_path")]
        config = load_config(tmp_path / "config.yaml", dict.fromkeys(paths, str(tmp_path)))
        assert config.model.model_name_or_path == tmp_path


def test_the_key_table_matches_the_configuration() -> None:
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| [^|]+ \| ([^|]+) \|$", README, re.MULTILINE)
    listed = {key for keys, _ in rows for key in re.findall(r"\w+", keys)}
    sections = (ModelArgs, AdapterArgs, ExpertArgs, TemplateArgs, SamplingArgs)
    known = {field.name: field for section in sections for field in fields(section)}
    assert listed <= set(known), "the table names keys that do not exist"
    unlisted = {"lora_rank", "lora_alpha", "enable_thinking", "skip_special_tokens"}
    assert set(known) - listed == unlisted
    for keys, defaults in rows:
        names = re.findall(r"\w+", keys)
        for name, text in zip(names, defaults.split(","), strict=True):
            default = known[name].default
            if isinstance(default, bool | int | float | str):
                assert text.strip().strip("`").lower() == str(default).lower(), name


def transcripts(name: str) -> list[tuple[list[str], list[str], list[str]]]:
    """The conversations shown: arguments of ktrt.chat, the user's lines, the answers."""
    _, _, after = README.partition(f"<!-- {name}: begin -->")
    text, _, _ = after.partition(f"<!-- {name}: end -->")
    found = []
    for part in text.split("$ python -m ktrt.chat ")[1:]:
        lines = part.splitlines()
        asked = [x.removeprefix("User: ") for x in lines if x.startswith("User: ")]
        answers = [x for x in lines if x.startswith("Assistant: ")]
        found.append((lines[0].split(), asked, answers))
    return found


def test_templates_that_are_named_exist() -> None:
    (item,) = re.findall(r"^- \*\*Template\*\*: (.*?)\. ", README, re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"`([a-z0-9_.-]+)`", item)) <= {*TEMPLATES, "auto"}


def test_the_table_of_templates_is_whole() -> None:
    block = templates_table.table_block()
    assert {*TEMPLATES} == set(re.findall(r"`([^`]+)` \(", block))
    if "<!-- templates: " not in README:
        pytest.skip("README has no table of templates")
    assert templates_table.current_block() == block, "run: helpers/templates_table.py"


def test_the_transcript_shows_both_personas() -> None:
    (_, asked, with_adapter), (_, asked_too, without) = transcripts("transcript")
    assert asked[0] == asked_too[0] == "你好，请介绍一下你自己。"
    assert with_adapter[0] != without[0]


@pytest.mark.parametrize(
    ("arguments", "asked", "answers"), [*transcripts("transcript"), *transcripts("chat")]
)
def test_the_transcript_is_real(arguments: list[str], asked: list[str], answers: list[str]) -> None:
    result = run("-m", "ktrt.chat", *arguments, stdin="\n".join(asked))
    shown = [line for line in result.splitlines() if line.startswith("Assistant: ")]
    assert shown == answers


def test_every_command_of_the_chat_is_listed() -> None:
    _, _, after = README.partition("| in the chat | does |")
    table, _, _ = after.partition("\n\n")
    assert set(re.findall(r"[`(]/(\w+)", table)) == set(COMMANDS)


def run(*arguments: str, stdin: str = "") -> str:
    """What a Python started in the checkout prints."""
    result = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, input=stdin,
        capture_output=True, text=True, encoding="utf-8", timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("code", blocks("python"))
def test_the_python_example_runs(code: str) -> None:
    out = run("-c", code)
    assert re.search(r"[\u4e00-\u9fff]{5}", out)
    assert "torch.Size([" in out
