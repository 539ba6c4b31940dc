"""Tests of python -m ktrt.chat, in the process and piped; those with a terminal are in
test_chat_terminal."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import fake_chat
from helpers.chat_process import environment

from ktrt.chat.__main__ import main
from ktrt.chat.conversation import Conversation, read_conversation, write_conversation
from ktrt.chat.terminal import Terminal
from ktrt.config import Config
from ktrt.errors import AdapterError

FAKE = Path(fake_chat.__file__)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "model").mkdir()
    path = tmp_path / "chat.yaml"
    path.write_text("model_name_or_path: model\n", encoding="utf-8")
    return str(path)


def run(
    config: str,
    stdin: str,
    *arguments: str,
    open_session: Callable[[Config], Any] = fake_chat.open_session,
) -> tuple[int, str, str]:
    """Runs a piped chat in this process; returns exit code, stdout and stderr."""
    stdout, stderr = io.StringIO(), io.StringIO()
    terminal = Terminal(io.BytesIO(stdin.encode()), stdout, stderr)
    code = main([config, *arguments], open_session=open_session, terminal=terminal)
    return code, stdout.getvalue(), stderr.getvalue()


class TestPiped:
    def test_answers_and_exits(self, config: str) -> None:
        assert run(config, "你好\nexit\nnever read\n") == (0, "Assistant: 你好 你好\n", "")

    def test_end_of_input_is_an_exit(self, config: str) -> None:
        assert run(config, "你好")[:2] == (0, "Assistant: 你好 你好\n")
        assert run(config, "") == (0, "", "")

    def test_empty_lines_are_not_sent(self, config: str) -> None:
        assert run(config, "\n  \n\t\nhistory\n")[1] == "Assistant: \n"

    def test_turns_accumulate_and_clear_forgets_them(self, config: str) -> None:
        _, out, _ = run(config, " a \nhistory\nclear\nhistory\n")
        assert out.splitlines() == [
            "Assistant: a a",
            "Assistant: user: a | assistant: a a",
            "History has been removed.",
            "Assistant: ",
        ]

    def test_an_empty_answer_is_no_turn(self, config: str) -> None:
        assert run(config, "silence\nhistory\n")[1] == "Assistant: \nAssistant: \n"

    def test_overrides_reach_the_session(self, config: str) -> None:
        seen = []

        def spy(config: Config) -> Any:
            seen.append(config)
            return fake_chat.EchoSession()

        run(config, "", "top_k=3", "--debug", "default_system=a b", open_session=spy)
        assert seen[0].sampling.top_k == 3
        assert seen[0].template.default_system == "a b"

    def test_the_session_is_closed(self, config: str) -> None:
        for stdin in ("a\n", "fail\n"):
            session = fake_chat.EchoSession()

            def give(_: Config, session: Any = session) -> Any:
                return session

            run(config, stdin, open_session=give)
            assert session.closed == 1

    def test_commands_work_in_a_pipe_but_for_files(self, config: str) -> None:
        lines = "a\n/undo\n/set seed 3\nhistory\n//x\n"
        assert run(config, lines)[1].splitlines() == [
            "Assistant: a a",
            "Removed: a",
            "seed = 3  (set here)",
            "Assistant: ",
            "Assistant: /x /x",
        ]
        code, out, err = run(config, "/save x.json\na\n")
        assert (code, out) == (2, "")
        assert "/save works in a terminal only" in err

    def test_nothing_is_left_on_disk(self, config: str, tmp_path: Path) -> None:
        run(config, "a\n")
        assert not (tmp_path / "state").exists()

    def test_without_streaming(self, config: str) -> None:
        assert run(config, "a\nb\n", "--no-stream")[1] == "Assistant: a a\nAssistant: b b\n"


class TestOneShot:
    def test_only_the_answer_on_stdout(self, config: str) -> None:
        assert run(config, "never read\n", "-p", "你好") == (0, "你好 你好\n", "")
        assert run(config, "", "-p", "/help")[1] == "/help /help\n"  # no command

    def test_files_and_standard_input(self, config: str, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("A\n", "utf-8")
        arguments = ("-p", "q", "--file", str(tmp_path / "a.txt"), "--file", "-")
        _, out, _ = run(config, "B\n", *arguments)
        sent = "a.txt:\n```\nA\n```\n\nstandard input:\n```\nB\n```\n\nq"
        assert out == f"{sent} {sent}\n"

    def test_system(self, config: str) -> None:
        assert run(config, "", "-p", "history", "--system", "Be brief.")[1] == "system: Be brief.\n"

    def test_save_and_resume(self, config: str, tmp_path: Path) -> None:
        file = str(tmp_path / "told.json")
        run(config, "", "-p", "a", "--save", file)
        code, out, err = run(config, "", "-p", "history", "--resume", file, "--save", file)
        assert (code, out) == (0, "user: a | assistant: a a\n")
        assert err == f"Resumed {file}: 1 turn\n"
        assert len(read_conversation(Path(file)).turns) == 4
        code, _, err = run(config, "", "-p", "b", "--save", file)
        assert code == 2
        assert "holds another conversation" in err

    def test_resuming_with_another_model(self, config: str, tmp_path: Path) -> None:
        file = str(tmp_path / "told.json")
        run(config, "", "-p", "a", "--save", file)
        (tmp_path / "other").mkdir()
        other = f"model_name_or_path={tmp_path / 'other'}"
        code, _, err = run(config, "", "-p", "b", "--resume", file, other)
        assert code == 0
        assert f"It was held with {tmp_path / 'model'} (no adapter)." in err

    def test_resume_takes_no_configuration_for_its_file(self, config: str, tmp_path: Path) -> None:
        conversations = tmp_path / "state" / "ktrt" / "conversations"
        assert "no conversation was saved" in run(config, "", "-p", "b", "--resume")[2]
        kept = Conversation()
        kept.add("x", "y")
        conversations.mkdir()
        write_conversation(conversations / "1.json", kept)
        for arguments in (["--resume", config], [config, "--resume", "seed=3"]):
            terminal = Terminal(io.BytesIO(), out := io.StringIO(), io.StringIO())
            arguments += ["-p", "history"]
            main(arguments, open_session=fake_chat.open_session, terminal=terminal)
            assert out.getvalue() == "user: x | assistant: y\n"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--resume", "none.json"], "cannot read none.json: No such file"),
            (["-p", "a", "--file", "none.txt"], "cannot read none.txt: No such file"),
            (["--save", "no/folder/c.json", "-p", "a"], "--save: there is no directory no/folder"),
        ],
    )
    def test_wrong_files(self, config: str, arguments: list[str], message: str) -> None:
        loaded = []

        def spy(config: Config) -> Any:
            loaded.append(config)
            return fake_chat.EchoSession()

        code, _, err = run(config, "", *arguments, open_session=spy)
        assert message in err
        assert (code, loaded) == (2, []), "what can be known, is before the model is loaded"

    @pytest.mark.parametrize("arguments", [["-p", " "], ["--file", "-"]])
    def test_usage(self, config: str, arguments: list[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            main([config, *arguments])
        assert caught.value.code == 2

    def test_ctrl_c(self, config: str) -> None:
        def interrupting(_: Config) -> Any:
            session = fake_chat.EchoSession()
            pieces = session._pieces

            def interrupted(*arguments: Any) -> Iterator[str]:
                for piece in pieces(*arguments):
                    signal.raise_signal(signal.SIGINT)
                    yield piece

            session._pieces = interrupted  # type: ignore[method-assign, assignment]
            return session

        for arguments in (["-p", "a"], ["-p", "a", "--json"]):
            code, out, err = run(config, "", *arguments, open_session=interrupting)
            assert (code, err) == (130, "error: interrupted\n")
            assert out in ("a\n", "")


class TestJson:
    def test_one_object_per_answer(self, config: str) -> None:
        code, out, err = run(config, "你好\n/undo\nhistory\n", "--json")
        first, second = (json.loads(line) for line in out.splitlines())
        assert (code, err) == (0, "Removed: 你好\n")
        assert first["text"] == "你好 你好"
        assert first["finish_reason"] == "stop"
        assert (first["prompt_tokens"], first["reused_tokens"]) == (100, 60)
        assert first["generated_tokens"] == 4
        assert first["prefill_tokens_per_second"] == 80
        assert first["dropped_turns"] == 0
        assert "logprobs" not in first
        assert second["text"] == ""

    def test_logprobs(self, config: str) -> None:
        arguments = ("-p", "a", "--json", "logprobs=true", "top_logprobs=2")
        seen: dict[str, Any] = {}

        def with_sampling(config: Config) -> Any:
            session = fake_chat.EchoSession()
            session.sampling = config.sampling
            seen["sampling"] = config.sampling
            return session

        (line,) = run(config, "", *arguments, open_session=with_sampling)[1].splitlines()
        rows = json.loads(line)["logprobs"]
        assert len(rows) == 4
        top = [{"id": 65, "token": "A", "logprob": -0.5}, {"id": 66, "token": "B", "logprob": -1.5}]
        assert rows[0] == {"id": 65, "token": "A", "logprob": -0.5, "top": top}

    def test_compare(self, config: str) -> None:
        _, out, _ = run(config, "/compare a\n", "--json")
        rows = [json.loads(line) for line in out.splitlines()]
        assert [row["answered_by"] for row in rows] == ["base model", "persona"]
        assert [row["text"] for row in rows] == ["a a", "a a"]

    def test_a_failure_prints_no_object(self, config: str) -> None:
        code, out, err = run(config, "a\nfail\nb\n", "--json")
        assert (code, out.count("\n")) == (2, 1)
        assert err == "error: the engine is out of order\n"


class TestFailures:
    """One clear message on stderr and exit code 2."""

    def test_config(self, config: str) -> None:
        code, out, err = run(config, "", "kt_bakend=AMXInt8")
        assert (code, out) == (2, "")
        assert err == "error: override: unknown key 'kt_bakend' (did you mean 'kt_backend'?)\n"

    def test_missing_file(self) -> None:
        code, _, err = run("/no/such.yaml", "")
        assert code == 2
        assert err.count("\n") == 1
        assert "/no/such.yaml" in err

    def test_loading(self, config: str) -> None:
        def refuse(_: Config) -> Any:
            raise AdapterError("layers.3: expected [8, 64], found [8, 32]")

        code, out, err = run(config, "a\n", open_session=refuse)
        assert (code, out) == (2, "")
        assert err == "error: layers.3: expected [8, 64], found [8, 32]\n"

    def test_generation(self, config: str) -> None:
        code, out, err = run(config, "a\nfail\nb\n")
        assert code == 2
        assert out == "Assistant: a a\nAssistant: half an \n"
        assert err == "error: the engine is out of order\n"

    def test_a_defect_too(self, config: str) -> None:
        code, _, err = run(config, "bug\n")
        assert code == 2
        assert err == "error: ZeroDivisionError: by zero (--debug shows where)\n"

    def test_debug_shows_the_traceback(self, config: str) -> None:
        code, _, err = run(config, "fail\n", "--debug")
        assert code == 2
        assert "Traceback" in err
        assert err.endswith("error: the engine is out of order\n")

    def test_invalid_input(self, config: str) -> None:
        stdout, stderr = io.StringIO(), io.StringIO()
        terminal = Terminal(io.BytesIO(b"a\n\xff\xfe\n"), stdout, stderr)
        assert main([config], open_session=fake_chat.open_session, terminal=terminal) == 2
        assert stdout.getvalue() == "Assistant: a a\n"
        assert "line 2: not UTF-8" in stderr.getvalue()

    def test_ctrl_c_while_loading(self, config: str) -> None:
        def interrupt(_: Config) -> Any:
            raise KeyboardInterrupt

        assert run(config, "", open_session=interrupt) == (130, "", "error: interrupted\n")

    @pytest.mark.parametrize("arguments", [[], ["a.yaml", "--nonsense"], ["a.yaml", "-v", "-q"]])
    def test_usage(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert "usage" in capsys.readouterr().err


class TestLog:
    @pytest.mark.parametrize(
        ("flag", "shown"),
        [([], "IW"), (["-v"], "DIW"), (["--quiet"], "W")],
    )
    def test_levels(self, config: str, flag: list[str], shown: str) -> None:
        def talk(_: Config) -> Any:
            logger = logging.getLogger("ktrt.loading.model")
            logger.debug("D line")
            logger.info("I line\nof two")
            logger.warning("W line")
            logging.getLogger("transformers").warning("noise")
            return fake_chat.EchoSession()

        _, out, err = run(config, "", *flag, open_session=talk)
        lines = {"D": "DEBUG: D line\n", "I": "I line\nof two\n", "W": "WARNING: W line\n"}
        assert err == "".join(lines[each] for each in shown)
        assert out == ""

    @pytest.mark.parametrize(
        ("flags", "complete"),
        [
            ([], False),
            (["-v"], True),
            (["--debug"], True),
            (["-q"], None),
            (["-q", "--debug"], None),
        ],
    )
    def test_the_debug_block(self, config: str, flags: list[str], complete: bool | None) -> None:
        """The model's structure, complete at DEBUG; None: hidden."""

        def talk(_: Config) -> Any:
            logger = logging.getLogger("ktrt.debug")
            logger.info("complete" if logger.isEnabledFor(logging.DEBUG) else "short")
            logging.getLogger("ktrt.loading.model").debug("details")
            return fake_chat.EchoSession()

        _, _, err = run(config, "", *flags, open_session=talk)
        shown = {True: "complete\n", False: "short\n", None: ""}[complete]
        assert err == shown + ("DEBUG: details\n" if "-v" in flags else "")
        assert logging.getLogger("ktrt.debug").level == logging.NOTSET

    def test_speeds_come_after_the_answer(self, config: str) -> None:
        log = io.StringIO()
        terminal = Terminal(io.BytesIO(b"a\n"), log, log)
        main([config, "-v"], open_session=fake_chat.open_session, terminal=terminal)
        assert log.getvalue() == "Assistant: a a\nDEBUG: some tokens\n"

    def test_handlers_are_taken_off_again(self, config: str) -> None:
        before = list(logging.getLogger("ktrt").handlers)
        run(config, "")
        assert logging.getLogger("ktrt").handlers == before


def process(*arguments: str, env: dict[str, str] | None = None, **options: Any) -> Any:
    """Runs a chat process to its end; ``env`` replaces variables."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment(**(env or {})),
        capture_output=True,
        timeout=60,
        **options,
    )


class TestProcess:
    @pytest.mark.parametrize(
        "env",
        [
            {"LANG": "C", "LC_ALL": "C"},
            {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
            {"PYTHONIOENCODING": "latin-1"},
        ],
    )
    def test_utf8_whatever_the_locale(self, config: str, env: dict[str, str]) -> None:
        done = process(str(FAKE), config, env=env, input="\ufeff你好🙂\nexit\n".encode())
        assert done.returncode == 0, done.stderr
        assert done.stdout == "Assistant: 你好🙂 你好🙂\n".encode()
        assert done.stderr == b""

    def test_failure(self, config: str) -> None:
        done = process(str(FAKE), config, "seed=13", input=b"a\n")
        assert (done.returncode, done.stdout) == (2, b"")
        assert done.stderr == b"error: no such luck\n"

    def test_broken_pipe(self, config: str) -> None:
        command = f"'{sys.executable}' '{FAKE}' '{config}' | head -n 1; echo ${{PIPESTATUS[0]}}"
        lines = b"".join(b"%d\n" % number for number in range(20_000))
        done = subprocess.run(
            ["bash", "-c", command], input=lines, env=environment(), capture_output=True, timeout=60
        )
        assert done.stdout == b"Assistant: 0 0\n141\n"
        assert done.stderr == b""

    @pytest.mark.parametrize(
        ("redirections", "code", "message"),
        [
            ("<&-", 2, "error: standard input is closed; "),
            ("-p a <&-", 0, ""),
            ("-p a --file - <&-", 2, "error: standard input is closed; "),
            ("-p a >&-", 2, "error: standard output is closed, "),
            ("-p a <&- >&-", 2, "error: standard output is closed, "),
            ("-p a --json >/dev/full", 2, "error: standard output cannot be written: No space"),
            ("0>written", 2, "error: standard input cannot be read: Bad file descriptor"),
            ("-p a 2>&-", 0, ""),
            ("-p a 2>/dev/full", 0, ""),
            ("-p fail 2>/dev/full", 2, ""),
            ("<&- >&- 2>&-", 2, ""),
            ("-p a --save kept.json <&- 2>&-", 0, ""),
        ],
    )
    def test_streams_that_are_closed_or_full(
        self, config: str, tmp_path: Path, redirections: str, code: int, message: str
    ) -> None:
        command = f"'{sys.executable}' '{FAKE}' '{config}' {redirections}"
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment(), input=b"",
            capture_output=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert done.stderr.decode().startswith(message)
        assert done.stderr.count(b"\n") == int(bool(message))
        assert done.stdout == (b"a a\n" if code == 0 else b"half an \n" * ("fail" in redirections))
        if "--save" in redirections:
            assert len(read_conversation(tmp_path / "kept.json").turns) == 2

    def test_terminated_in_a_pipe(self, config: str, tmp_path: Path) -> None:
        command = [sys.executable, str(FAKE), config, "-p", "slow", "--save", "kept.json"]
        with subprocess.Popen(
            command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as child:
            assert child.stdout is not None
            assert child.stdout.read(5) == b"0 1 2"
            child.terminate()
            _, err = child.communicate(timeout=60)
        assert (child.returncode, err) == (143, b"")
        assert read_conversation(tmp_path / "kept.json").turns[1]["content"].startswith("0 1 2")

    def test_hang_ups_that_the_parent_ignores(self, config: str, tmp_path: Path) -> None:
        """nohup ignores them."""
        command = f"trap '' HUP; '{sys.executable}' '{FAKE}' '{config}'"
        with subprocess.Popen(
            ["bash", "-c", f"{command}; exit $?"], env=environment(), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, start_new_session=True,
        ) as child:  # fmt: skip
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(b"a\n")
            child.stdin.flush()
            assert child.stdout.readline() == b"Assistant: a a\n"
            os.killpg(child.pid, signal.SIGHUP)
            out, _ = child.communicate(b"b\n", timeout=60)
        assert (child.returncode, out) == (0, b"Assistant: b b\n")

    def test_help_is_fast_and_says_what_there_is(self) -> None:
        start = time.perf_counter()
        done = process("-X", "importtime", "-m", "ktrt.chat", "--help")
        seconds = time.perf_counter() - start
        assert done.returncode == 0
        for word in (b"config", b"key=value", b"--debug", b"--verbose", b"--quiet"):
            assert word in done.stdout
        modules = {line.split(b"|")[-1].strip() for line in done.stderr.splitlines()}
        assert not {b"torch", b"transformers", b"prompt_toolkit"} & modules
        assert seconds < 1
