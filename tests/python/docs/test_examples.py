"""Runs the blocks of README.md and docs/, and compares what they print with what is shown.

The comment above a console block says how it is compared, as docs/internals.md describes.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import documents
from helpers.documents import ROOT, Block

CONSOLES = [block for path in documents.guides() for block in documents.blocks(path, "console")]
PYTHON = [block for path in documents.guides() for block in documents.blocks(path, "python")]


@pytest.mark.parametrize("block", CONSOLES, ids=str)
def test_a_console_block_runs_or_says_when_it_did(block: Block) -> None:
    kind = r"run: (answers|output|lines(; differs: .+)?)|shown: \d{4}-\d\d-\d\d, .+"
    assert re.fullmatch(kind, block.marks), f"{block}: {block.marks!r}"


# Each that loads a model takes 4 s: only the pages that people read first are run here and always.
@pytest.mark.parametrize(
    "block",
    [
        pytest.param(each, id=str(each), marks=() if first else pytest.mark.long)
        for each in CONSOLES
        if each.marks.startswith("run: ")
        for first in [each.document.name in ("README.md", "start.md", "troubleshooting.md")]
    ],
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
    return subprocess.run(
        [sys.executable, "-m", f"ktrt.{verb}", *rest],
        cwd=ROOT, input=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, encoding="utf-8", timeout=300,
        env=os.environ | {"KTRT_CACHE": "1", "KTRT_CACHE_DIR": str(folder / "cache"),
                          "XDG_STATE_HOME": str(folder), "COLUMNS": "120"},
    )  # fmt: skip


# Runs each program of a JSON list by itself, in one process: importing torch and transformers takes
# longer than any of them. Writes what each printed and how it failed.
RUNNER = """
import contextlib, io, json, sys, traceback
results = []
for program in json.load(sys.stdin):
    printed, failure = io.StringIO(), ""
    with contextlib.redirect_stdout(printed):
        try:
            exec(compile(program, "example", "exec"), {"__name__": "__main__"})
        except BaseException:
            failure = traceback.format_exc()
    results.append([printed.getvalue(), failure])
json.dump(results, sys.stdout)
"""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, tuple[str, str]]:
    """Runs all Python blocks; (what it printed, traceback) by block."""
    done = subprocess.run(
        [sys.executable, "-c", RUNNER], input=json.dumps([block.text for block in PYTHON]),
        cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=300, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    return {str(block): (out, error) for block, (out, error) in zip(PYTHON, found, strict=True)}


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python(block: Block, outcomes: dict[str, tuple[str, str]]) -> None:
    printed, failure = outcomes[str(block)]
    assert not failure
    assert re.search(r"[\u4e00-\u9fff]{5}", printed)


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
    done = subprocess.run(
        [
            sys.executable, "examples/compare_adapters.py", "/dev/stdin", "什么是 MoE？",
            "--max-new-tokens", "4",
        ],
        cwd=ROOT, input=f"model_name_or_path: examples/demo/model\n{adapters}\n",
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    names = [line.split()[1:3] for line in done.stdout.splitlines()]
    assert [each[-1] for each in names] == ["[base]", "[adapter_a]", "[adapter_b]"]
