"""Tests of ``ktrt chat --url`` with a fake OpenAI server; the real one is in test_chat_url_real."""

import io
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.chat_process import ChatProcess, environment
from helpers.fake_openai import FakeOpenAI

from ktrt.chat.__main__ import main
from ktrt.chat.terminal import Terminal


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("OPENAI_API_KEY", "API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with FakeOpenAI().running() as server:
        yield server


def run(server: FakeOpenAI | str, stdin: str, *arguments: str) -> tuple[int, str, str]:
    """Runs a piped chat in this process; returns exit code, stdout and stderr."""
    stdout, stderr = io.StringIO(), io.StringIO()
    terminal = Terminal(io.BytesIO(stdin.encode()), stdout, stderr)
    url = server if isinstance(server, str) else server.url
    code = main(["--url", url, "-q", *arguments], terminal=terminal)
    return code, stdout.getvalue(), stderr.getvalue()


def lines(server: FakeOpenAI, stdin: str, *arguments: str) -> list[str]:
    code, out, err = run(server, stdin, *arguments)
    assert (code, err) == (0, "")
    return out.splitlines()


def failure(server: FakeOpenAI | str, stdin: str, *arguments: str) -> str:
    """Returns the one line that a failing chat prints on stderr."""
    code, _, err = run(server, stdin, *arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


class TestConversation:
    def test_pipe_turns_and_commands(self, server: FakeOpenAI) -> None:
        assert lines(server, "你好\nhistory\n/undo\n/retry\nexit\n") == [
            "Assistant: 你好 你好",
            "Assistant: user: 你好 | assistant: 你好 你好",
            "Removed: history",
            "Assistant: 你好 你好",
        ]
        assert server.requests[0] == ("/v1/models", None)
        assert server.last["stream"] is True

    def test_one_shot(self, server: FakeOpenAI) -> None:
        assert run(server, "", "-p", "hi") == (0, "hi hi\n", "")
        assert run(server, "", "-p", "hi", "--no-stream") == (0, "hi hi\n", "")
        assert run(server, "two", "-p", "whole") == (0, "all at once\n", "")

    def test_json(self, server: FakeOpenAI) -> None:
        settings = ("logprobs=true", "top_logprobs=2")
        record = json.loads(run(server, "", "--json", "-p", "hi", *settings)[1])
        counts = ("finish_reason", "prompt_tokens", "reused_tokens", "generated_tokens")
        assert record["text"] == "hi hi"
        assert [record[name] for name in counts] == ["stop", 100, 60, 3]
        assert record["first_token_seconds"] > 0
        row = {"token": "hi", "logprob": -0.5}
        other = {"token": "other", "logprob": -1.5}
        assert record["logprobs"][0] == row | {"top": [row, other]}
        assert len(record["logprobs"]) == 3

    def test_a_thought_is_shown_and_not_sent_back(self, server: FakeOpenAI) -> None:
        assert lines(server, "think\nhistory\n") == [
            "Assistant: <think>", "hm, well", "</think>", "", "ja",
            "Assistant: user: think | assistant: ja",
        ]  # fmt: skip

    def test_save_and_resume(self, server: FakeOpenAI, tmp_path: Path) -> None:
        path = str(tmp_path / "c.json")
        lines(server, "hi\n", "--save", path, "--system", "Be brief.")
        saved = json.loads(Path(path).read_text("utf-8"))
        assert saved["model"] == f"base at {server.url}/v1"
        resumed = lines(server, "history\n", "--resume", path)
        assert resumed == ["Assistant: system: Be brief. | user: hi | assistant: hi hi"]

    def test_a_server_that_counts_and_a_full_context(self, server: FakeOpenAI) -> None:
        server.models[0] |= {"max_model_len": 600}
        server.counts = True
        talk = f"{'a' * 100}\n{'b' * 100}\nhistory\n"
        code, out, _ = run(server, talk, "max_new_tokens=250")
        assert code == 0
        assert out.splitlines()[-1].startswith("Assistant: user: bbb")
        assert "1 oldest turns are kept but not sent" in out
        server.counts = False
        assert "user: aaa" in run(server, talk, "max_new_tokens=250")[1].splitlines()[-1]


class TestChoices:
    def test_only_given_settings_are_sent(self, server: FakeOpenAI) -> None:
        assert lines(
            server, "/set top_k\n/set seed 3\nhi\n", "max_new_tokens=5", "stop=[a, b]"
        ) == [
            "top_k: the server's default",
            "seed = 3  (set here)",
            "Assistant: hi hi",
        ]
        sent = {name for name in server.last if name not in ("model", "messages", "stream")}
        assert sent == {"stream_options", "max_tokens", "stop", "seed"}
        assert server.last["stop"] == ["a", "b"]
        lines(server, "hi\n", "do_sample=false", "enable_thinking=false", "default_system=Hm.")
        assert server.last["temperature"] == 0
        assert server.last["chat_template_kwargs"] == {"enable_thinking": False}
        assert server.last["messages"][0] == {"role": "system", "content": "Hm."}

    def test_thinking(self, server: FakeOpenAI) -> None:
        assert lines(server, "/think\n/think on\nhi\n")[:2] == [
            "Thinking: the server decides", "Thinking: on",
        ]  # fmt: skip
        assert server.last["chat_template_kwargs"] == {"enable_thinking": True}

    @pytest.mark.parametrize(
        ("words", "model"),
        [
            ("/adapter pirate", "pirate"),
            ("/adapter persona=0.5 pirate=0.25", "persona*0.5+pirate*0.25"),
            ("/adapter pirate\n/adapter scale 2", "pirate*2.0"),
            ("/adapter pirate\n/adapter off", "base"),
            ("/adapter pirate\n/adapter off\n/adapter on", "pirate"),
            ("/model pirate", "pirate"),
            ("/model pirate\n/model base", "base"),
        ],
    )
    def test_adapters(self, server: FakeOpenAI, words: str, model: str) -> None:
        lines(server, f"{words}\nhi\n")
        assert server.last["model"] == model

    def test_lists(self, server: FakeOpenAI) -> None:
        assert lines(server, "/adapter\n/model\n", "--model", "persona") == [
            "* persona, weight 1", "  pirate",
            "  base", "* persona, adapter of base", "  pirate, adapter of base",
        ]  # fmt: skip
        server.models.append({"id": "late", "parent": "base"})
        assert "  late, adapter of base" in lines(server, "/model\n")

    def test_compare_sends_one_seed_to_both(self, server: FakeOpenAI) -> None:
        found = lines(server, "/compare hi\n", "--model", "pirate", "--json")
        assert [json.loads(each)["answered_by"] for each in found] == ["base model", "pirate"]
        bodies = [body for path, body in server.requests if path.endswith("completions")]
        assert [each["model"] for each in bodies] == ["base", "pirate"]
        assert bodies[0]["seed"] == bodies[1]["seed"]

    def test_the_model_must_be_clear(self, server: FakeOpenAI) -> None:
        assert "no model 'pirat' (did you mean 'pirate'?)" in failure(
            server, "", "--model", "pirat"
        )
        server.models.append({"id": "second"})
        assert "which model? it lists 2: base, second" in failure(server, "")
        assert lines(server, "hi\n", "--model", "second")
        assert server.last["model"] == "second"
        server.lists = False
        assert "404" in failure(server, "")
        assert lines(server, "hi\n", "--model", "anything")
        assert server.last["model"] == "anything"

    def test_a_server_without_weights(self, server: FakeOpenAI) -> None:
        for each in server.models:
            del each["owned_by"]
        assert "takes no weights" in failure(server, "/adapter pirate=0.5\n")
        assert "no adapter is active" in failure(server, "/adapter scale 2\n")
        assert "no adapter 'x' of base" in failure(server, "/adapter x\n")
        del server.models[1:]
        assert "lists no adapter of base" in failure(server, "/adapter\n")


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--plan",), "--plan: the model is in the server's memory"),
            (("chat.yaml",), "expected key=value with --url, found chat.yaml"),
            (("kt_num_threads=2",), "kt_num_threads: a setting of the server's model"),
            (("adapter_name_or_path=x",), "adapter_name_or_path: a setting of the server's model"),
            (("top_kk=3",), "unknown key 'top_kk' (did you mean 'top_k'?)"),
            (("top_k=x",), "top_k: expected an integer"),
            (("enable_thinking=3",), "enable_thinking: expected true or false"),
            (("--url", "ftp://x"), "--url: expected http://HOST:PORT"),
            (("--url", "http://a:b@x"), "--url: expected no user and password"),
            (("--url", "http://x:99999"), "is no URL"),
            (("--url", "http://x/v1?a=b"), "no query"),
            (("--api-key", "a\nb"), "the API key has characters"),
        ],
    )
    def test_arguments(
        self, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        stdout, stderr = io.StringIO(), io.StringIO()
        terminal = Terminal(io.BytesIO(b""), stdout, stderr)
        code: object = None
        try:
            code = main(["--url", "http://127.0.0.1:1", *arguments], terminal=terminal)
        except SystemExit as end:
            code = end.code
        shown = stderr.getvalue() + capsys.readouterr().err
        assert code == 2
        assert message in shown
        assert "a\nb" not in shown

    def test_arguments_that_need_a_server(self, capsys: pytest.CaptureFixture[str]) -> None:
        for arguments in (["--model", "x", "chat.yaml"], ["--api-key", "k", "chat.yaml"]):
            with pytest.raises(SystemExit):
                main(arguments)
            shown = capsys.readouterr().err
            assert "works with --url only" in shown

    @pytest.mark.parametrize(
        ("message", "shown"),
        [
            ("refuse", "400: temperature: expected 0 … 2, found 7\n"),
            ("busy", "429: the queue is full; ask again in 7 s\n"),
            ("page", "502: <html>bad gateway</html>\n"),
            ("moved", "has moved to http://elsewhere.example/v1: give --url that\n"),
            ("fail", "the engine is out of order\n"),
            ("cut", "the connection was closed before the answer was complete\n"),
        ],
    )
    def test_the_server_s_errors_in_one_line(
        self, server: FakeOpenAI, message: str, shown: str
    ) -> None:
        assert failure(server, f"{message}\n").endswith(shown)

    def test_no_server(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
            assert "nothing listens there" in failure(f"http://127.0.0.1:{port}", "")
            taken.listen()
            assert "no TLS connection" in _failure_of_a_plain_server(taken, port)

    def test_another_path(self, server: FakeOpenAI) -> None:
        assert "does the URL's path end in /v1?" in failure(f"{server.url}/api", "")
        assert run(f"{server.url}/v1/", "hi\n")[1] == "Assistant: hi hi\n"

    def test_fields_that_a_server_does_not_take(self, server: FakeOpenAI) -> None:
        server.refused = {
            "stream_options": "Unrecognized request argument supplied: stream_options",
            "max_tokens": "Unsupported parameter: use 'max_completion_tokens' instead.",
        }
        assert lines(server, "hi\nho\n", "max_new_tokens=5") == [
            "Assistant: hi hi",
            "Assistant: ho ho",
        ]
        assert server.last["max_completion_tokens"] == 5
        assert "stream_options" not in server.last
        # Two refusals for the first message, none for the second.
        assert [path for path, _ in server.requests].count("/v1/chat/completions") == 4
        server.refused["top_k"] = "Unrecognized request argument supplied: top_k"
        assert "400: Unrecognized request argument" in failure(server, "hi\n", "top_k=5")


def _failure_of_a_plain_server(listening: socket.socket, port: int) -> str:
    import threading

    def answer() -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(100)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        return failure(f"https://127.0.0.1:{port}", "")
    finally:
        thread.join()


class TestKeys:
    def test_sources_in_order(self, server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
        server.key = "secret"
        assert "401: Incorrect API key provided; give the server's key" in failure(server, "")
        assert "(none was sent)" in failure(server, "")
        monkeypatch.setenv("API_KEY", "secret")
        assert lines(server, "hi\n")
        monkeypatch.setenv("OPENAI_API_KEY", "other")
        assert "401" in failure(server, "")
        assert lines(server, "hi\n", "--api-key", "secret")

    def test_never_shown(self, server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
        server.key = "sk-very-secret"
        monkeypatch.setenv("API_KEY", server.key)
        code, out, err = run(server, "echo key\n", "--debug")
        assert code == 2
        assert "bad header Bearer …" in err
        assert "very-secret" not in out + err

    def test_unencrypted_to_another_host(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr("ktrt.chat.remote.connect.RemoteSession", _unreached)
        for url, warns in (
            ("http://10.1.2.3", True), ("https://10.1.2.3", False), ("http://127.0.0.1:1", False),
            ("http://127.evil.example", True),
        ):  # fmt: skip
            assert ("without encryption" in run(url, "", "--api-key", "k")[2]) is warns
            assert ("without encryption" in run(url, "")[2]) is False


def _unreached(*_: object, **__: object) -> object:
    raise KeyboardInterrupt


class TestProcess:
    @pytest.mark.parametrize("message", ["slow", "wait"])
    def test_ctrl_c_closes_the_connection(
        self, server: FakeOpenAI, tmp_path: Path, message: str
    ) -> None:
        with ChatProcess("--url", server.url, state=tmp_path, fake=False) as chat:
            chat.prompt()
            chat.say(message)
            chat.sees("Assistant: 0 1" if message == "slow" else "Assistant: ")
            time.sleep(0.1)
            pressed = time.monotonic()
            chat.interrupt()
            shown = chat.prompt()
            assert server.left.wait(2)
            assert time.monotonic() - pressed < 2
            assert ("stopped by you" if message == "slow" else "Stopped before a word") in shown
            chat.say("history")
            chat.sees(
                "Assistant: user: slow | assistant: 0 1" if message == "slow" else "Assistant: "
            )
            chat.prompt()
            chat.say("busy")
            assert "429: the queue is full; ask again in 7 s" in chat.prompt()
            chat.child.sendeof()
            assert chat.leaves() == 0

    def test_piped_ctrl_c(self, server: FakeOpenAI) -> None:
        command = [sys.executable, "-m", "ktrt.chat", "-q", "--url", server.url, "-p", "slow"]
        with subprocess.Popen(
            command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=10)
        assert (process.returncode, err) == (130, "error: interrupted\n")
        assert server.left.wait(2)

    def test_starts_without_torch(self, server: FakeOpenAI) -> None:
        script = (
            "import sys; from ktrt.chat.__main__ import main\n"
            f"assert main(['--url', {server.url!r}, '-q', '-p', 'hi']) == 0\n"
            "heavy = {'torch', 'transformers', 'numpy', 'httpx', 'pydantic', 'rich'}\n"
            "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment(), capture_output=True, text=True
        )
        assert (done.stdout, done.stderr) == ("hi hi\n", "")
