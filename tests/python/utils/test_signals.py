"""Tests of ktrt.utils.signals: SIGTERM and SIGHUP wait for shielded blocks."""

import io
import os
import signal
from pathlib import Path

import pytest

from ktrt.chat.conversation import Conversation, ConversationFile, read_conversation
from ktrt.chat.dialog import Keeping, Talk
from ktrt.chat.terminal import Terminal
from ktrt.utils.signals import (
    Terminated,
    is_waiting,
    shielded,
    terminations,
)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_raised_at_once_elsewhere(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with terminations():
        with pytest.raises(Terminated) as caught:
            signal.raise_signal(number)
        assert caught.value.exit_code == code
    assert signal.getsignal(number) is before


def test_a_shielded_block_is_finished() -> None:
    done: list[str] = []

    def work() -> None:
        with shielded(lambda: done.append("woken")), shielded():
            signal.raise_signal(signal.SIGTERM)
            done.append("waits" if is_waiting() else "lost")
        done.append("never")

    with terminations(), pytest.raises(Terminated):
        work()
    assert done == ["waits"]
    assert not is_waiting()


def test_a_waiting_block_is_woken() -> None:
    done: list[str] = []

    def wait() -> None:
        with shielded(lambda: done.append("woken")):
            signal.raise_signal(signal.SIGTERM)
            raise EOFError  # the signal says more

    with terminations(), pytest.raises(Terminated):
        wait()
    assert done == ["woken"]


def test_a_save_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = ConversationFile(tmp_path / "c.json")
    talk = Talk.__new__(Talk)
    talk.terminal = Terminal(io.BytesIO(), io.StringIO(), io.StringIO())
    talk.keeping, talk.conversation = Keeping(save=file), Conversation()
    talk.conversation.add("a", "b")
    sync = os.fsync

    def terminated(descriptor: int) -> None:
        signal.raise_signal(signal.SIGTERM)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", terminated)
    with terminations(), pytest.raises(Terminated):
        talk.save()
    assert len(read_conversation(file.path).turns) == 2
    assert [each.name for each in tmp_path.iterdir()] == ["c.json"]


def test_ignored_ones_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminations():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
