"""Runs the blocks of README.md and docs/, and compares what they print with what is shown.

The comment above a console block says how it is compared, as docs/internals.md describes.
"""

import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers import documents
from helpers.documents import Block
from helpers.forks import KTRT, module

if TYPE_CHECKING:
    import subprocess

CONSOLES = [block for path in documents.guides() for block in documents.blocks(path, "console")]
PYTHON = [block for path in documents.guides() for block in documents.blocks(path, "python")]


@pytest.mark.parametrize("block", CONSOLES, ids=str)
def test_a_console_block_runs_or_says_when_it_did(block: Block) -> None:
    kind = r"run: (answers|output|lines(; differs: .+)?)|shown: \d{4}-\d\d-\d\d, .+"
    assert re.fullmatch(kind, block.marks), f"{block}: {block.marks!r}"


@pytest.mark.parametrize(
    "block", [each for each in CONSOLES if each.marks.startswith("run: ")], ids=str
)
def test_console(block: Block, tmp_path: Path) -> None:
    command, _, shown = block.text.removeprefix("$ ").partition("\n")
    asked = [line for line in shown.splitlines() if line.startswith("User: ")]
    result = run(command, "\n".join(line.removeprefix("User: ") for line in asked), tmp_path)
    assert (result.returncode == 2) == ("error: " in shown), result.stdout
    how, _, differs = block.marks.removeprefix("run: ").partition("; differs: ")
    output = result.stdout.replace(str(tmp_path / "OUT"), "OUT")
    if how == "output":
        assert output == shown
    elif how == "answers":
        assert answers(output) == answers(shown)
    else:
        # A terminal alone shows the welcome.
        left_out = ("User: ", "Type a message", *filter(None, differs.split(", ")))
        lines = [line for line in shown.splitlines() if line and not line.startswith(left_out)]
        missing = [line for line in lines if not is_shown(line, output)]
        assert not missing


def answers(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("Assistant: ")]


def is_shown(line: str, output: str) -> bool:
    """Whether ``output`` has the line; "…" in it stands for any text."""
    return re.search(rf"^{re.escape(line).replace('…', '.*')}$", output, re.MULTILINE) is not None


def run(command: str, stdin: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Runs a command line as the checkout's Python; the pack cache and new files are in
    ``folder``."""
    if command.startswith("printf "):
        text, _, command = command.partition(" | ")
        stdin = shlex.split(text)[1].replace("\\n", "\n")
    program, verb, *rest = shlex.split(command)
    assert program == "ktrt"
    rest = [str(folder / word) if word == "OUT" else word for word in rest]
    return KTRT.run(
        module(f"ktrt.{verb}"), *rest, text=stdin, errors_too=True,
        env=os.environ | {"KTRT_CACHE": "1", "KTRT_CACHE_DIR": str(folder / "cache"),
                          "XDG_STATE_HOME": str(folder), "COLUMNS": "120"},
    )  # fmt: skip


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python(block: Block) -> None:
    done = KTRT.run(block.text)
    assert done.returncode == 0, done.stdout
    assert re.search(r"[\u4e00-\u9fff]{5}", done.stdout)


def test_the_first_chat_shows_both_personas() -> None:
    blocks = documents.blocks(documents.DOCS / "start.md", "console")
    answers = [
        re.findall(r"^User: 你好，请介绍一下你自己。\nAssistant: (.*)$", block.text, re.MULTILINE)
        for block in blocks
    ]
    (with_adapter,), (without,) = answers
    assert with_adapter != without


def test_compare_adapters() -> None:
    adapters = "adapter_name_or_path: [examples/demo/adapter_a, examples/demo/adapter_b]"
    done = KTRT.run(
        "import runpy; runpy.run_path('examples/compare_adapters.py', run_name='__main__')",
        "/dev/stdin", "什么是 MoE？", "--max-new-tokens", "4",
        text=f"model_name_or_path: examples/demo/model\n{adapters}\n",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    names = [line.split()[1:3] for line in done.stdout.splitlines()]
    assert [each[-1] for each in names] == ["[base]", "[adapter_a]", "[adapter_b]"]
