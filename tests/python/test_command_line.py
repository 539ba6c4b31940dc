"""Tests of ktrt.command_line: one boundary for errors and one way to read arguments."""

import importlib
import logging
import os
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from ktrt import command_line
from ktrt.command_line import new_parser, parse, run_command
from ktrt.errors import CheckpointError, EngineError, KtrtError
from ktrt.export import __main__ as export

COMMANDS = ["audit", "bench", "chat", "doctor", "export", "pack"]
QUIET = Namespace(debug=False)


def raising(error: BaseException) -> Callable[[], int]:
    def body() -> int:
        raise error

    return body


class TestBoundary:
    @pytest.mark.parametrize("code", [0, 1])
    def test_the_codes_of_a_command_that_ran(self, code: int) -> None:
        assert run_command(lambda: code, QUIET, level=logging.WARNING) == code

    @pytest.mark.parametrize(
        ("error", "code", "line"),
        [
            (CheckpointError("no config.json"), 2, "error: no config.json\n"),
            (
                EngineError("the engine failed: x:\nexpected 3"), 2,
                "error: the engine failed: x: expected 3 (--debug shows where)\n",
            ),
            (KeyboardInterrupt(), 130, "error: interrupted\n"),
            (BrokenPipeError(), 141, ""),
            (
                ValueError("KTRT_ISA=avx10\nis not known"), 2,
                "error: ValueError: KTRT_ISA=avx10 is not known (--debug shows where)\n",
            ),
            (
                FileNotFoundError(2, "No such file", "a.safetensors"), 2,
                "error: FileNotFoundError: [Errno 2] No such file: 'a.safetensors' "
                "(--debug shows where)\n",
            ),
            (
                MemoryError(), 2,
                "error: MemoryError: there is not enough memory (--debug shows where)\n",
            ),
            (
                UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"), 2,
                "error: UnicodeEncodeError: 'utf-8' codec can't encode character '\\udcff' in "
                "position 0: surrogates not allowed (--debug shows where)\n",
            ),
            (RuntimeError(), 2, "error: RuntimeError: no message (--debug shows where)\n"),
            # A panic of a library in Rust is not an Exception.
            (type("PanicException", (BaseException,), {})("x"), 2,
             "error: PanicException: x (--debug shows where)\n"),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
    )  # fmt: skip
    def test_a_failure_is_one_line(
        self, error: BaseException, code: int, line: str, capfd: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(command_line, "abandon", lambda _stream: None)
        assert run_command(raising(error), QUIET, level=logging.WARNING) == code
        assert capfd.readouterr().err == line

    def test_ctrl_c_that_a_library_turns_into_its_own_failure(
        self, capfd: pytest.CaptureFixture[str]
    ) -> None:
        def body() -> int:
            try:
                signal.raise_signal(signal.SIGINT)
            except BaseException:  # noqa: BLE001 - as libraries have it
                raise ModuleNotFoundError(
                    "Could not import module 'BloomPreTrainedModel'"
                ) from None
            return 0

        before = signal.getsignal(signal.SIGINT)
        assert run_command(body, QUIET, level=logging.WARNING) == 130
        assert capfd.readouterr().err == "error: interrupted\n"
        assert signal.getsignal(signal.SIGINT) is before

    @pytest.mark.parametrize("error", [KtrtError("why"), ValueError("why")])
    def test_debug_shows_where(self, error: Exception, capfd: pytest.CaptureFixture[str]) -> None:
        run_command(raising(error), Namespace(debug=True), level=logging.WARNING)
        text = capfd.readouterr().err
        assert "Traceback" in text
        assert "in body" in text
        assert "--debug" not in text

    @pytest.mark.parametrize("name", COMMANDS)
    def test_every_command_has_it(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        """Any exception within a command ends in the same line and code."""
        module = importlib.import_module(f"ktrt.{name}.__main__")
        config = tmp_path / "chat.yaml"
        config.write_text(f"model_name_or_path: {tmp_path}\n")
        monkeypatch.setattr(module, "load_config", lambda *_: raising(ZeroDivisionError("x"))())
        words = [str(config), *(["--out", "x"] if name == "export" else [])]
        assert module.main(words) == 2
        assert capfd.readouterr().err == "error: ZeroDivisionError: x (--debug shows where)\n"
        assert module.main([*words, "--debug"]) == 2
        assert "Traceback" in capfd.readouterr().err

    @pytest.mark.parametrize("name", ["audit", "bench", "chat", "export", "pack"])
    def test_a_link_instead_of_weights(
        self, name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """An interrupted download leaves one; the folder is checked before anything else."""
        monkeypatch.delenv("KTRT_CACHE")
        for folder in ("model", "adapter"):
            (tmp_path / folder).mkdir()
        (tmp_path / "adapter/adapter_config.json").write_text("{}")
        (tmp_path / "model/config.json").write_text('{"model_type": "mixtral"}')
        (tmp_path / "model/model.safetensors").symlink_to("../blobs/12ab")
        words = [f"model_name_or_path={tmp_path}/model", f"adapter_name_or_path={tmp_path}/adapter"]
        words += {"export": ["--out", "x"], "chat": ["--plan"]}.get(name, [])
        words.append(f"ktrt_cache_dir={tmp_path}")
        assert importlib.import_module(f"ktrt.{name}.__main__").main(words) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert "model.safetensors is a link to ../blobs/12ab, which is not there" in line


class TestProcess:
    """Commands with streams that a shell redirects or closes; listing an empty cache is fast."""

    def run(self, redirection: str, tmp_path: Path) -> tuple[int, str]:
        command = f"exec '{sys.executable}' -m ktrt.pack --list --dir '{tmp_path}' {redirection}"
        root = Path(__file__).resolve().parents[2]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        # Buffered, the usual setting: a failure then comes at the end.
        environment.pop("PYTHONUNBUFFERED", None)
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, env=environment, timeout=60
        )
        return done.returncode, done.stderr

    def test_closed_standard_streams(self, tmp_path: Path) -> None:
        line = "error: standard output is closed: there is nowhere to write to\n"
        assert self.run(">&-", tmp_path) == (2, line)
        assert self.run("<&-", tmp_path) == (0, "")
        assert self.run("2>&- >&- <&-", tmp_path) == (2, "")

    def test_a_file_does_not_take_a_closed_streams_place(self, tmp_path: Path) -> None:
        code = "import sys; from ktrt.command_line import new_parser, parse; "
        code += "parse(new_parser('x', 'y'), []); sys.exit(open('/dev/null').fileno() <= 2)"
        for closed in ("<&-", ">&-", "2>&- >&-"):
            words = ["bash", "-c", f"exec '{sys.executable}' -c \"{code}\" {closed}"]
            assert subprocess.run(words, timeout=60).returncode == 0

    def test_an_instruction_set_that_is_none(self) -> None:
        root = Path(__file__).resolve().parents[2]
        environment = {**os.environ, "PYTHONPATH": str(root), "KTRT_ISA": "avx10"}
        done = subprocess.run(
            [sys.executable, "-m", "ktrt.doctor"], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: KTRT_ISA=avx10 is not known; unset it or set it to")

    def test_a_full_disk(self, tmp_path: Path) -> None:
        code, text = self.run("> /dev/full", tmp_path)
        assert code == 2
        assert text == "error: standard output cannot be written: No space left on device\n"

    def test_no_reader(self, tmp_path: Path) -> None:
        assert self.run("| true; exit ${PIPESTATUS[0]}", tmp_path)[0] in (0, 141)

    def test_an_encoding_without_our_signs(self, tmp_path: Path) -> None:
        code = "import argparse, logging; from ktrt.command_line import run_command as run; run("
        code += "lambda: print('‖ΔW‖') or 0, argparse.Namespace(debug=False), level=0)"
        environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
        assert done.stdout == b"\\u2016\\u0394W\\u2016\n"
        assert done.stderr == b""


def arguments(*words: str) -> Namespace:
    parser = new_parser("test", "A test.")
    parser.add_argument("-p", "--prompt")
    parser.add_argument("--resume", nargs="?", const="")
    parser.add_argument("-v", "--verbose", action="store_true")
    return parse(parser, words)


class TestArguments:
    @pytest.mark.parametrize(
        ("words", "overrides"),
        [
            (["c.yaml", "--template", "qwen3"], ["template=qwen3"]),
            (["--template", "qwen3", "c.yaml"], ["template=qwen3"]),
            (["c.yaml", "--template=qwen3", "top_k=3"], ["top_k=3", "template=qwen3"]),
            (["c.yaml", "--kt-num-threads", "3"], ["kt_num_threads=3"]),
            (["c.yaml", "--kt_config.kt_backend", "AMXInt8"], ["kt_config.kt_backend=AMXInt8"]),
            (["c.yaml", "--presence_penalty", "-1"], ["presence_penalty=-1"]),
            (["c.yaml", "--default_system", "a=b c"], ["default_system=a=b c"]),
            (["c.yaml", "--default_system="], ["default_system="]),
            (["--use_kt", "c.yaml"], ["use_kt=true"]),
            (["c.yaml", "--use_kt", "True"], ["use_kt=True"]),
            (["c.yaml", "--use_kt", "top_k=3"], ["top_k=3", "use_kt=true"]),
            (["c.yaml", "--bf16", "--do_sample", "-v"], ["bf16=true", "do_sample=true"]),
            (["c.yaml", "--deepspeed", "ds.json"], ["deepspeed=ds.json"]),
            (["c.yaml", "-p", "--what does this flag do?"], []),
            (["c.yaml", "--resume", "--top_k", "3", "top_p=1"], ["top_p=1", "top_k=3"]),
            (["c.yaml", "--tokenized_path", "a.yaml"], ["tokenized_path=a.yaml"]),
        ],
    )
    def test_keys_as_options(self, words: list[str], overrides: list[str]) -> None:
        args = arguments(*words)
        assert args.config == "c.yaml"
        assert args.overrides == overrides

    def test_without_a_file(self) -> None:
        args = arguments("--model_name_or_path", "m", "template=qwen")
        assert args.config == {}
        assert args.overrides == ["template=qwen", "model_name_or_path=m"]
        assert arguments().config is None

    def test_a_file_with_an_equals_sign(self, tmp_path: Path) -> None:
        file, folder = tmp_path / "a=b", tmp_path / "model=1"
        file.touch()
        folder.mkdir()
        assert arguments("top_k=3", str(file)).config == str(file)
        assert arguments("top_k=3", str(folder)).config == str(folder)
        assert arguments("a=b.yaml").config == "a=b.yaml"

    @pytest.mark.parametrize("value", ["model_name_or_path=m/config.json", "template=a.yaml"])
    def test_a_value_that_looks_like_a_file(self, value: str) -> None:
        args = arguments("top_k=3", value)
        assert (args.config, args.overrides) == ({}, ["top_k=3", value])

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--tempersture", "3"], "--tempersture (did you mean '--temperature'?)"),
            (["--verbos=3"], "ignored explicit argument"),
            (["--promt", "3"], "--promt (did you mean '--prompt'?)"),
            (["--torch-dtype", "bfloat16"], "--torch-dtype (did you mean '--infer_dtype'?)"),
            (["--zzzz"], "unknown option --zzzz; keys of the configuration are key=value"),
            (["--top_k"], "--top_k: expected a value, as in --top_k VALUE"),
            (["--top_k", "--template", "x"], "--top_k: expected a value"),
            (["-p", "caf\udce9"], r"the argument b'caf\xe9' is not UTF-8 text"),
            (["top_k=\udcff"], r"the argument b'top_k=\xff' is not UTF-8 text"),
            (["caf\udce9.yaml"], r"the argument b'caf\xe9.yaml' is not UTF-8 text"),
        ],
    )
    def test_wrong_ones(
        self, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as caught:
            arguments("c.yaml", *words)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize("name", COMMANDS)
    def test_every_command_has_them(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        module: Any = importlib.import_module(f"ktrt.{name}.__main__")
        seen: list[object] = []

        def load_config(*given: object) -> None:
            seen.extend(given)
            raise KtrtError

        monkeypatch.setattr(module, "load_config", load_config)
        out = ["--out", "x"] if name == "export" else []
        assert module.main(["c.yaml", "--kt_num_threads", "3", *out]) == 2
        assert seen == ["c.yaml", ["kt_num_threads=3"]]


def test_choices_of_export_are_those_of_its_parts() -> None:
    """export repeats them, so that arguments are parsed without torch."""
    from ktrt.adapter.write.adapter import LAYOUTS
    from ktrt.export.checkpoint import DtypeName

    assert export.LAYOUTS == LAYOUTS
    assert get_args(DtypeName) == export.DTYPES
