"""Tests of python -m ktrt.chat in a real terminal (a pty), over a session that echoes."""

import os
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
from helpers.chat_process import ALT_ENTER, TAB, UP, ChatProcess, paste

from ktrt.chat.conversation import Conversation, read_conversation, write_conversation


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
        chat.raw(b"\x80\xff")  # not characters: they must not end the chat either
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
            chat.say("")  # a second one that reaches the prompt has no effect
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


@pytest.fixture
def told(tmp_path: Path) -> Path:
    """A conversation of two turns; a retry of the second one is answered without end."""
    conversation = Conversation()
    conversation.add("a", "b")
    conversation.add("slow", "the old answer")
    write_conversation(tmp_path / "told.json", conversation)
    return tmp_path / "told.json"


def turns(path: Path) -> list[str]:
    return [turn["content"] for turn in read_conversation(path).turns]


OLD = ["a", "b", "slow", "the old answer"]


class TestRetrying:
    """The old answer stays until the new one is complete."""

    @pytest.fixture
    def chat(self, config: str, state: Path, told: Path) -> Iterator[ChatProcess]:
        with ChatProcess(config, "--resume", str(told), "--save", str(told), state=state) as chat:
            chat.prompt()
            chat.say("/retry")
            chat.sees("Assistant: 0 1 2")
            yield chat

    def test_killed(self, chat: ChatProcess, told: Path) -> None:
        chat.child.kill(signal.SIGKILL)
        chat.child.expect(pexpect.EOF)
        assert turns(told) == OLD

    def test_ctrl_c(self, chat: ChatProcess, told: Path) -> None:
        chat.interrupt()
        assert "Stopped: nothing was kept; the answer before stays." in chat.prompt()
        chat.say("history")
        chat.sees("user: slow | assistant: the old answer")
        chat.prompt()
        assert turns(told)[:4] == OLD

    def test_undone(self, chat: ChatProcess, config: str, state: Path, told: Path) -> None:
        """The old turn comes back, even if another message was asked in its place."""
        chat.interrupt()
        chat.prompt()
        chat.say("/undo")
        chat.prompt()
        chat.say("slow")
        chat.sees("Assistant: 0 1 2")
        chat.child.kill(signal.SIGKILL)
        chat.child.expect(pexpect.EOF)
        with ChatProcess(config, "--resume", str(told), state=state) as again:
            assert "/redo brings back slow" in again.prompt()
            again.say("/redo")
            again.prompt()
            again.say("history")
            again.sees("user: slow | assistant: the old answer")

    def test_terminated(self, chat: ChatProcess, told: Path) -> None:
        chat.child.kill(signal.SIGTERM)
        assert chat.leaves() == 143
        assert turns(told) == OLD


class TestTypingAhead:
    """Input that arrives while the chat is busy waits for the next prompt and runs nothing."""

    def test_a_paste_is_one_message(self, chat: ChatProcess) -> None:
        chat.say("slow")
        chat.sees("0 1 2")
        assert "\x1b[?2004l" not in chat.child.before, "the terminal marks pastes all the time"
        chat.keys(paste("one\n/exit\rexit\r\nlast") + "\x1b[D")
        chat.interrupt()
        chat.prompt()
        chat.sees("las")
        chat.say("")
        chat.sees("Assistant: one\r\n/exit\r\nexit\r\nlast one\r\n")
        chat.prompt()

    def test_a_paste_in_two_pieces(self, chat: ChatProcess) -> None:
        """The first piece arrives before the prompt, the second one in it; and the reverse."""
        chat.say("slow")
        chat.sees("0 1 2")
        chat.keys("\x1b[200~one\n/ex")
        chat.sees("5 6 ")
        chat.child.kill(signal.SIGINT)  # a Ctrl-C key would end the paste
        chat.prompt()
        chat.keys("it\rtwo\x1b[201~")
        chat.say("")
        chat.sees("Assistant: one\r\n/exit\r\ntwo one\r\n")
        chat.prompt()
        chat.keys("slow\r\x1b[200~three\n")
        chat.sees("0 1 2")
        chat.keys("/exit\x1b[201~!")
        chat.child.kill(signal.SIGINT)
        chat.prompt()
        chat.say("")
        chat.sees("Assistant: three\r\n/exit! ")
        chat.prompt()

    def test_a_paste_and_enter_is_sent(self, chat: ChatProcess) -> None:
        chat.say("slow")
        chat.sees("0 1 2")
        chat.keys("see: " + paste("one\n/exit\n") + "\r")
        chat.interrupt()
        chat.sees("Assistant: see: one\r\n/exit see: one\r\n/exit\r\n")
        chat.prompt()

    @pytest.mark.parametrize("command", ["/exit", "exit", "/clear", "clear"])
    def test_a_command_waits_for_the_user(self, chat: ChatProcess, command: str) -> None:
        chat.say("slow")
        chat.sees("0 1 2")
        chat.keys(paste(command) + "\r")
        chat.interrupt()
        chat.prompt()
        chat.say(" is what I pasted")
        if command[0] == "/":
            chat.sees(f"error: {command} stands alone, found 'is what I pasted' after it")
        else:
            chat.sees(f"Assistant: {command} is what I pasted")
        chat.prompt()

    def test_lines_without_marks(self, chat: ChatProcess) -> None:
        """A terminal that does not mark pasted text; \x0f would send a line, too."""
        chat.say("/compare slow")
        chat.sees("base model: ")
        chat.keys("one\r/exit\r\x0f\x00\x1b[Atwo\tx\x7fy\r")
        chat.interrupt()
        chat.prompt()
        chat.say("!")
        chat.sees("Assistant: one\r\n/exit\r\ntwo\ty! ")
        chat.prompt()

    def test_behind_the_enter_that_sent_a_message(self, chat: ChatProcess) -> None:
        chat.keys("a\rb\r/exit\rc\r")
        chat.sees("Assistant: a a\r\n")
        chat.prompt()
        chat.say("!")
        chat.sees("Assistant: b\r\n/exit\r\nc! ")
        chat.prompt()

    def test_while_the_model_is_loaded(self, config: str, tmp_path: Path, state: Path) -> None:
        with ChatProcess(config, "seed=14", state=state) as chat:
            chat.sees("\x1b[?2004h")
            chat.sees("Loading")
            chat.keys(paste("one\nexit\n") + "\r")
            (tmp_path / "model" / "loaded").touch()
            chat.sees("Assistant: one\r\nexit one")
            chat.prompt()

    def test_ctrl_d_leaves_after_the_answer(self, config: str, tmp_path: Path, state: Path) -> None:
        with ChatProcess(config, "seed=14", state=state) as chat:
            chat.sees("Loading")
            chat.keys(paste("one") + "\r\x04")
            (tmp_path / "model" / "loaded").touch()
            chat.prompt()
            chat.say("")
            chat.sees("Assistant: one one\r\n")
            chat.prompt()
            chat.say("prefill")
            chat.sees("reading the prompt")
            chat.keys("\x04")
            chat.interrupt()
            assert chat.leaves() == 0
        assert turns(last(state)) == ["one", "one one"]

    def test_a_paste_without_its_end(self, chat: ChatProcess) -> None:
        """Ctrl-C alone still works; one that arrives with other keys is part of the paste."""
        chat.say("slow")
        chat.sees("0 1 2")
        chat.keys("\x1b[200~lost")
        for _ in range(10):
            chat.interrupt()
            if chat.child.expect(["stopped by you", pexpect.TIMEOUT], timeout=1) == 0:
                break
        chat.prompt()
        chat.say("")
        chat.sees("Assistant: lost")
        chat.prompt()

    def test_control_characters_are_shown_and_do_nothing(self, chat: ChatProcess) -> None:
        chat.say("slow")
        chat.sees("0 1 2")
        chat.keys(paste("a\x00\x03\x04\x1a\x1c\x1b]0;title\x07\x1b[2Jb"))
        chat.interrupt()
        chat.prompt()
        chat.say("")
        chat.sees("Assistant: ")
        chat.prompt()
        chat.say("/undo")
        chat.sees("Removed: a\ufffd\ufffd\ufffd\ufffd \ufffd]0;title\ufffd\ufffd[2Jb")
        chat.prompt()


def last(state: Path) -> Path:
    (path,) = (state / "ktrt" / "conversations").iterdir()
    return path


class TestLeaving:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_while_loading(self, config: str, state: Path, number: signal.Signals) -> None:
        with ChatProcess(config, "seed=14", state=state) as chat:
            chat.sees("Loading")
            if number == signal.SIGINT:
                chat.interrupt()
                chat.sees("\x1b[?2004l")
                chat.sees("error: interrupted")
            else:
                chat.child.kill(number)
                chat.sees("\x1b[?2004l")
            assert chat.leaves() == 128 + number

    def test_nothing_reaches_the_shell(self, config: str, state: Path) -> None:
        then = 'read -r line; echo "[$line]"'
        with ChatProcess(config, state=state, then=then) as chat:
            before = chat.modes
            chat.prompt()
            assert chat.modes != before
            # At once: what is typed after the chat has left belongs to the shell.
            chat.keys("exit\rrm -r left\r" + paste("rm -r right\n"))
            chat.sees("\x1b[?2004l")
            while chat.modes != before:
                time.sleep(0.01)
            chat.keys("clean\r")
            chat.sees("[clean]")

    @pytest.mark.parametrize(
        ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=["term", "hup"]
    )
    def test_signals_keep_what_was_said(
        self, chat: ChatProcess, state: Path, number: signal.Signals, code: int
    ) -> None:
        chat.say("slow")
        chat.sees("Assistant: 0 1 2")
        chat.child.kill(number)
        chat.sees("\x1b[?2004l")
        assert chat.leaves() == code
        assert turns(last(state))[1].startswith("0 1 2")

    def test_a_signal_at_the_prompt(self, chat: ChatProcess) -> None:
        chat.keys("half a message")
        chat.sees("message")
        chat.child.kill(signal.SIGTERM)
        chat.sees("\x1b[?2004l")
        assert chat.leaves() == 143
        assert "Traceback" not in chat.child.before

    def test_a_terminal_without_escape_sequences(self, config: str, state: Path) -> None:
        with ChatProcess(config, state=state, term="dumb") as chat:
            chat.sees("User: ")
            chat.say("slow")
            chat.sees("Assistant: 0 1 2")
            chat.keys("one\r/exit\rtwo")
            chat.interrupt()
            chat.sees("User: ")
            chat.say("!")
            chat.sees("Assistant: one\r\n/exit\r\ntwo! ")
            assert "\x1b" not in chat.child.before
            chat.sees("User: ")
            chat.child.kill(signal.SIGTERM)
            assert chat.leaves() == 143

    def test_the_terminal_goes_away(self, chat: ChatProcess, state: Path) -> None:
        chat.say("slow")
        chat.sees("Assistant: 0 1 2")
        assert chat.hangs_up() == 129
        assert turns(last(state))[1].startswith("0 1 2")

    def test_modes_after_a_signal(self, config: str, state: Path) -> None:
        with ChatProcess(config, state=state, then="echo left; sleep 60") as chat:
            before = chat.modes
            chat.prompt()
            chat.say("slow")
            chat.sees("Assistant: 0 1 2")
            for pid in children(chat.child.pid):
                os.kill(pid, signal.SIGTERM)
            chat.sees("left")
            assert chat.modes == before


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_without_a_place_for_state(config: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with ChatProcess(config, state=tmp_path / "file") as chat:
        assert "no directory for histories" in chat.prompt()
        chat.say("a")
        chat.sees("Assistant: a a\r\n")
        chat.prompt()
