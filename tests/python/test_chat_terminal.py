"""Tests of python -m ktrt.chat in a real terminal (a pty), over a session that echoes."""

import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.chat_process import ALT_ENTER, TAB, UP, ChatProcess, paste


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    path = tmp_path / "chat.yaml"
    path.write_text("model_name_or_path: model\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def chat(config: str, state: Path) -> Iterator[ChatProcess]:
    with ChatProcess(config, state=state) as chat:
        chat.prompt()
        yield chat


def test_a_conversation(chat: ChatProcess) -> None:
    chat.say("你好")
    chat.sees("Assistant: 你好 你好\r\n")
    assert "4 tokens, 30.0/s · first after 0.50 s" in chat.prompt()
    chat.say("clear")
    chat.sees("History has been removed.")
    chat.prompt()
    chat.say("exit")
    assert chat.leaves() == 0


class TestTyping:
    def test_lines_stay_one_message(self, chat: ChatProcess) -> None:
        chat.keys(paste("one\ntwo\r\nthree"))
        chat.say("")
        chat.sees("Assistant: one\r\ntwo\r\nthree one\r\n")
        chat.prompt()
        chat.say(f"four{ALT_ENTER}five")
        chat.sees("Assistant: four\r\nfive four\r\nfive\r\n")
        chat.prompt()
        chat.keys(paste("exit\nexit"))  # a paste sends nothing by itself
        chat.say("!")
        chat.sees("Assistant: exit\r\nexit! ")
        chat.prompt()

    def test_completion_and_mistakes(self, chat: ChatProcess) -> None:
        chat.keys("/und")
        chat.sees("/und")
        chat.keys(TAB)
        chat.sees("o")
        chat.say("")
        chat.sees("error: /undo: there is nothing to take back")
        chat.prompt()
        chat.say("/undu")
        chat.sees("did you mean 'undo'?")
        chat.prompt()
        chat.say("//undo")
        chat.sees("Assistant: /undo /undo\r\n")
        chat.prompt()

    def test_the_history_outlives_the_chat(
        self, chat: ChatProcess, config: str, state: Path
    ) -> None:
        chat.say(f"first{ALT_ENTER}line")
        chat.prompt()
        chat.raw(b"\x80\xff")  # no characters: they must not end the chat either
        chat.say("second")
        chat.sees("second\r\n")
        chat.prompt()
        chat.child.sendeof()
        assert chat.leaves() == 0
        assert stat.S_IMODE((state / "ktrt" / "history").stat().st_mode) == 0o600
        with ChatProcess(config, state=state) as again:
            again.prompt()
            again.keys(UP)
            again.sees("second")
            again.keys(UP)
            again.sees("line")
            again.say("")
            again.sees("Assistant: first\r\nline ")

    def test_ctrl_c_empties_the_line_then_hints_then_leaves(self, chat: ChatProcess) -> None:
        chat.keys("half a message")
        chat.sees("half a message")
        chat.interrupt()
        chat.say("a")
        chat.sees("Assistant: a a\r\n")
        chat.prompt()
        chat.interrupt()
        chat.sees("Ctrl-C once more")
        chat.prompt()
        chat.say("b")
        chat.sees("Assistant: b b\r\n")
        chat.prompt()
        chat.interrupt()
        chat.sees("Ctrl-C once more")
        chat.prompt()
        chat.interrupt()
        assert chat.leaves() == 0

    def test_ctrl_d_leaves(self, chat: ChatProcess) -> None:
        chat.child.sendeof()
        assert chat.leaves() == 0

    def test_a_terminal_that_changes_its_size(self, chat: ChatProcess) -> None:
        chat.child.setwinsize(10, 30)
        chat.keys("x" * 70)
        chat.child.setwinsize(30, 120)
        chat.say("y")
        chat.sees("Assistant: " + "x" * 70 + "y ")
        chat.prompt()
        chat.say("slow")
        chat.sees("2 3 ")
        chat.child.setwinsize(5, 20)
        chat.sees("8 9 ")
        chat.interrupt()
        chat.prompt()
        chat.say("a")
        chat.sees("Assistant: a a\r\n")


class TestStopping:
    def test_while_decoding(self, chat: ChatProcess) -> None:
        chat.say("slow")
        chat.sees("Assistant: 0 1 2")
        chat.interrupt()
        assert "stopped by you" in chat.prompt()
        chat.say("history")
        chat.sees("Assistant: user: slow | assistant: 0 1 2")
        chat.prompt()

    def test_while_prefilling(self, chat: ChatProcess) -> None:
        chat.say("a")
        chat.prompt()
        chat.say("prefill")
        chat.sees("reading the prompt, 0% of 10000 tokens")
        chat.interrupt()
        assert "Stopped before a word: nothing was kept." in chat.prompt()
        chat.say("history")
        chat.sees("Assistant: user: a | assistant: a a\r\n")
        chat.prompt()

    def test_a_second_time_stops_what_does_not_come_back(self, chat: ChatProcess) -> None:
        chat.say("stuck")
        chat.sees("Assistant: waiting")
        chat.interrupt()
        chat.sees("^C")
        chat.interrupt()
        chat.prompt()
        chat.say("history")
        chat.sees("Assistant: user: stuck | assistant: waiting\r\n")

    def test_impatience_is_no_crash(self, chat: ChatProcess) -> None:
        for _ in range(3):
            chat.say("slow")
            chat.sees("Assistant: 0 1")
            chat.interrupt()
            chat.interrupt()
            chat.prompt()
            chat.say("")  # if the second one reached the prompt, it counts no longer
            chat.prompt()
        chat.say("exit")
        assert "Traceback" not in chat.child.before
        assert chat.leaves() == 0

    def test_comparing(self, chat: ChatProcess) -> None:
        chat.say("/compare slow")
        chat.sees("base model: ")
        chat.interrupt()
        assert "Stopped." in chat.prompt()
        chat.say("/adapter")
        chat.sees("* persona, weight 1")
        chat.prompt()


@pytest.mark.parametrize(
    ("text", "message"),
    [("fail", "error: the engine is out of order"), ("bug", "error: ZeroDivisionError")],
)
def test_a_failure_keeps_the_conversation(chat: ChatProcess, text: str, message: str) -> None:
    chat.say("a")
    chat.prompt()
    chat.say(text)
    chat.sees(message)
    chat.prompt()
    chat.say("history")
    chat.sees("Assistant: user: a | assistant: a a\r\n")
    chat.prompt()
    chat.say("exit")
    assert chat.leaves() == 0


class TestResuming:
    def test_after_a_kill(self, chat: ChatProcess, config: str, state: Path) -> None:
        chat.say("/set seed 7")
        chat.prompt()
        chat.say("a")
        chat.prompt()
        chat.say("slow")
        chat.sees("Assistant: 0 1 2")
        chat.child.kill(signal.SIGKILL)
        with ChatProcess(config, "--resume", state=state) as again:
            start = again.prompt()
            assert "1 turn, and a message without an answer (slow)" in start
            again.say("/undo")
            again.prompt()
            again.say("history")
            again.sees("Assistant: user: a | assistant: a a\r\n")
            again.prompt()
            again.say("/set seed")
            again.sees("seed = 7  (set here)")

    def test_two_chats_at_once(self, chat: ChatProcess, config: str, state: Path) -> None:
        with ChatProcess(config, state=state) as other:
            other.prompt()
            for number in range(2):
                chat.say(f"a{number}")
                other.say(f"b{number}")
                chat.prompt()
                other.prompt()
        with ChatProcess(config, "--resume", state=state) as again:
            assert "2 turns" in again.prompt()
            again.say("history")
            seen = again.prompt()
        assert ("a0" in seen) != ("b0" in seen)
        assert len(list((state / "ktrt" / "conversations").iterdir())) == 3


def test_without_a_place_for_state(config: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with ChatProcess(config, state=tmp_path / "file") as chat:
        assert "no directory for histories" in chat.prompt()
        chat.say("a")
        chat.sees("Assistant: a a\r\n")
        chat.prompt()
