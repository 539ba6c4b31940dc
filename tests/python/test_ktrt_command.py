"""Tests of the command `ktrt`: verbs, help, version, and how usage lines call it."""

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ktrt import __version__
from ktrt.__main__ import VERBS, main
from ktrt.utils.program import program

ROOT = Path(__file__).resolve().parents[2]


def run(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)


def test_the_script_is_this_function() -> None:
    """pyproject.toml names the function that the installed script calls."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    module, _, function = project["scripts"]["ktrt"].partition(":")
    assert getattr(importlib.import_module(module), function) is main


def test_every_package_with_a_command_is_a_verb() -> None:
    found = {path.parent.name for path in (ROOT / "ktrt").glob("*/__main__.py")}
    assert found == set(VERBS)


def test_help_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: python -m ktrt VERB [CONFIG] [key=value …] [options]"
    for verb, line in VERBS.items():
        assert f"  {verb:<8}{line}" in lines
    assert max(map(len, lines)) <= 100


def test_help_and_version_import_little() -> None:
    """Only the standard library and three small modules of ktrt."""
    code = (
        "import sys; from ktrt.__main__ import main; before = set(sys.modules); main(sys.argv[1:]);"
        "print(sorted(m for m in sys.modules if m.startswith('ktrt')),"
        "sorted({'torch', 'yaml', 'numpy', 'rich'} & set(sys.modules)), file=sys.stderr)"
    )
    for word, line in (("--help", "usage: "), ("--version", f"ktrt {__version__}\n")):
        done = run("-c", code, word)
        assert done.stdout.startswith(line)
        modules = ["ktrt", "ktrt.__main__", "ktrt.utils"]
        modules += ["ktrt.utils.program", "ktrt.utils.streams"]
        assert done.stderr == f"{modules} []\n"


@pytest.mark.parametrize("words", ["ktrt --help", "ktrt audit --help"])
def test_help_in_ascii(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = run("-m", *words.split())
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\" in done.stdout


@pytest.mark.parametrize("words", ["--help", "--version"])
def test_output_that_cannot_be_written(words: str) -> None:
    """No traceback, and the codes of the verbs."""
    command = [sys.executable, "-m", "ktrt", words]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 2
    expected = "standard output cannot be written: No space left on device"
    assert done.stderr == f"python -m ktrt: error: {expected}\n"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["chta"], "unknown verb 'chta' (did you mean 'chat'?)"),
        (["Doctor", "c.yaml"], "unknown verb 'Doctor' (did you mean 'doctor'?)"),
        (["train"], f"unknown verb 'train'; expected {', '.join(VERBS)}"),
        ([], f"expected a verb: {', '.join(VERBS)}; --help describes them"),
        (
            ["chat.yaml"],
            f"expected a verb ({', '.join(VERBS)}) before 'chat.yaml', as in "
            "`python -m ktrt chat chat.yaml`",
        ),
        (["--debug", "chat"], f"expected a verb ({', '.join(VERBS)}) before '--debug'"),
    ],
)
def test_wrong_verbs(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err == f"python -m ktrt: error: {line}\n"


def test_the_rest_is_the_verbs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A verb gets the other words, and its exit code is returned."""
    seen: list[list[str]] = []

    def audit(words: list[str]) -> int:
        seen.append(words)
        return 1

    monkeypatch.setattr("ktrt.audit.__main__.main", audit)
    assert main(["audit", "c.yaml", "--verify", "--kt_backend", "AMXInt8"]) == 1
    assert seen == [["c.yaml", "--verify", "--kt_backend", "AMXInt8"]]
    with pytest.raises(SystemExit) as caught:
        main(["bench", "--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"ktrt {__version__}\n"


@pytest.mark.parametrize(
    ("script", "name", "verbs_name"),
    [
        ("/home/me/.venv/bin/ktrt", "ktrt", "ktrt chat"),
        ("/src/ktrt/__main__.py", "python -m ktrt", "python -m ktrt chat"),
        ("/src/ktrt/chat/__main__.py", "python -m ktrt", "python -m ktrt.chat"),
        ("", "python -m ktrt", "python -m ktrt.chat"),
    ],
)
def test_usage_lines_say_how_it_was_called(
    script: str, name: str, verbs_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [script])
    assert (program(), program("chat")) == (name, verbs_name)


@pytest.mark.parametrize("called", ["ktrt doctor", "ktrt.doctor"])
def test_usage_line_of_a_process(called: str) -> None:
    done = run("-m", *called.split(), "--kt_num_threads")
    assert done.returncode == 2
    assert done.stderr.startswith(f"usage: python -m {called} [-h]")
    assert done.stderr.endswith(
        "--kt_num_threads: expected a value, as in --kt_num_threads VALUE\n"
    )
