"""Tests of ktrt.utils.temporaries: leftovers of killed processes go at the next start, and no other
files."""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ktrt.chat.conversation import (
    Conversation,
    ConversationFile,
    new_autosave,
    write_conversation,
)
from ktrt.utils.staging import staged_folder
from ktrt.utils.temporaries import remove_stale, temporary_file

ROOT = Path(__file__).resolve().parents[3]
# Starts to write a file or folder, and never ends.
WRITER = """
import os, sys, time
from pathlib import Path
from ktrt.utils.staging import staged_folder
from ktrt.utils.temporaries import temporary_file
if sys.argv[1] == "file":
    half = temporary_file(Path(sys.argv[2]))
else:
    half = staged_folder(Path(sys.argv[2]), 1)
with half:
    print("half", flush=True)
    time.sleep(600)
"""


@contextmanager
def writer(kind: str, target: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", WRITER, kind, str(target)]
    path = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=path) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"half\n"
            yield child
        finally:
            child.kill()


def kill(child: subprocess.Popen[bytes]) -> None:
    child.send_signal(signal.SIGKILL)
    child.wait()


def test_a_chat_removes_leftovers_of_killed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    folder = tmp_path / "ktrt" / "conversations"
    folder.mkdir(parents=True)
    earlier = folder / ".20260101-120000-12-abc123.json.k3v_0x9a"  # without suffix and lock
    earlier.touch()
    with writer("file", folder / "1.json") as child:
        assert len(list(folder.glob(".1.json.*"))) == 1
        new_autosave()
        assert not earlier.exists()
        assert len(list(folder.iterdir())) == 1, "its process lives"
        kill(child)
        new_autosave()
    assert list(folder.iterdir()) == []


def test_next_to_a_file_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "told.json"
    others = [tmp_path / name for name in (".told.json.swp", ".notes.0a1b2c3d.part", "told.part")]
    for other in others:
        other.touch()
    (tmp_path / ".told.json.00000000.part").symlink_to(others[0])
    with writer("file", path) as child:
        ConversationFile(path)
        assert len(list(tmp_path.glob(".told.json.*.part"))) == 2
        kill(child)
        ConversationFile(path)
    left = {each.name for each in tmp_path.iterdir()}
    assert left == {each.name for each in others} | {".told.json.00000000.part"}


def test_a_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with writer("folder", out) as child:
        with staged_folder(out, 1):
            assert len(list(tmp_path.iterdir())) == 2
        out.rmdir()
        (left,) = tmp_path.iterdir()
        (left / "model.safetensors").touch()
        kill(child)
        with staged_folder(out, 1):
            assert not left.exists()


def test_found_stale_before_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = fcntl.flock
    stolen: list[Path] = []

    def late(descriptor: int, how: int) -> None:
        if not stolen:
            stolen.extend(tmp_path.iterdir())
            stolen[0].unlink()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with temporary_file(tmp_path / "a") as (_, path):
        assert path.exists()
        assert path not in stolen


def test_no_locks_on_this_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_descriptor: int, _how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with temporary_file(tmp_path / "a") as (_, path):
        remove_stale(tmp_path / "a")
        assert path.exists()
    write_conversation(tmp_path / "a", Conversation())


def test_the_longest_name(tmp_path: Path) -> None:
    path = tmp_path / ("你" * 85)
    write_conversation(path, Conversation())
    assert path.exists()
