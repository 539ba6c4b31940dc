"""Tests of ktrt.chat.conversation: files are complete, and shared without loss."""

import json
import os
import pwd
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ktrt.chat.conversation import (
    FORMAT,
    Conversation,
    ConversationFile,
    exists,
    expanded,
    last_conversation,
    new_autosave,
    read_conversation,
    read_text,
    state_directory,
    write_conversation,
)
from ktrt.errors import KtrtError

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "ktrt"


def talked(*turns: tuple[str, str], **others: Any) -> Conversation:
    conversation = Conversation(**others)
    for text, answer in turns:
        conversation.add(text, answer)
    return conversation


class TestMessages:
    def test_system_turns_and_the_new_one(self) -> None:
        conversation = talked(("a", "b"), ("c", "d"), system="s")
        told = [(each["role"], each["content"]) for each in conversation.messages("e")]
        assert told == [
            ("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"),
            ("user", "e"),
        ]  # fmt: skip
        left = [each["content"] for each in conversation.messages("e", left_out=1)]
        assert left == ["s", "c", "d", "e"]

    def test_without_a_system_prompt(self) -> None:
        assert Conversation().messages("a") == [{"role": "user", "content": "a"}]


class TestFiles:
    def test_everything_comes_back(self, tmp_path: Path) -> None:
        kept = talked(
            ("你好\n🙂", "“b”"), system="s", unanswered="c", settings={"top_k": 3, "stop": ["x"]},
            thinking=False, model="m", adapter="a",
            undone=[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
        )  # fmt: skip
        write_conversation(tmp_path / "c.json", kept)
        assert read_conversation(tmp_path / "c.json") == kept
        assert stat.S_IMODE((tmp_path / "c.json").stat().st_mode) == 0o600

    def test_a_lone_surrogate_does_not_stop_saving(self, tmp_path: Path) -> None:
        write_conversation(tmp_path / "c.json", talked(("a\udcff", "b")))
        assert read_conversation(tmp_path / "c.json").turns[0]["content"] == "a?"

    def test_a_failure_leaves_the_old_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "c.json"
        write_conversation(path, talked(("a", "b")))

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(KtrtError, match=r"c\.json: cannot save .*: No space left"):
            write_conversation(path, talked(("a", "b"), ("c", "d")))
        assert len(read_conversation(path).turns) == 2
        assert [each.name for each in tmp_path.iterdir()] == ["c.json"]

    def test_no_such_folder(self, tmp_path: Path) -> None:
        with pytest.raises(KtrtError, match="cannot save"):
            write_conversation(tmp_path / "no" / "c.json", Conversation())

    def test_killed_while_writing(self, tmp_path: Path) -> None:
        path = tmp_path / "c.json"
        code = (
            "import sys; from pathlib import Path\n"
            "from ktrt.chat.conversation import Conversation, write_conversation\n"
            "told = Conversation()\n"
            "while True:\n"
            "    told.add('x' * 5000, 'y')\n"
            "    write_conversation(Path(sys.argv[1]), told)\n"
            "    print(end='.', flush=True)\n"
        )
        for seconds in (0.01, 0.05):
            child = subprocess.Popen(
                [sys.executable, "-c", code, str(path)],
                stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)},
            )  # fmt: skip
            assert child.stdout is not None
            child.stdout.read(3)
            time.sleep(seconds)
            child.send_signal(signal.SIGKILL)
            child.wait()
            child.stdout.close()
            assert len(read_conversation(path).turns) >= 6

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": "other"}, "expected format 'ktrt conversation 1'"),
            ({"turns": [{"role": "user", "content": "a"}]}, "turns: the last one is the user's"),
            ({"turns": [{"role": "assistant", "content": "a"}] * 2}, "turns[0]: expected user"),
            ({"turns": [{"role": "user", "content": " "}] * 2}, "turns[0].content: expected text"),
            ({"turns": [{"role": "user"}, 3]}, "turns[0]: expected role and content"),
            ({"turns": {}}, "turns: expected list, found {}"),
            ({"settings": []}, "settings: expected dict, found []"),
            ({"settings": None}, "settings: expected dict, found None"),
            ({"thinking": "yes"}, "thinking: expected bool, found 'yes'"),
            ({"system": 3}, "system: expected str, found 3"),
            ({"undone": [{"role": "user"}, 3]}, "undone[0]: expected role and content"),
            ({"sistem": "a"}, "sistem: no such key"),
            ({"unanswered": " "}, "unanswered: expected text that is not empty"),
        ],
    )
    def test_damage_is_named(self, tmp_path: Path, change: dict[str, Any], message: str) -> None:
        path = tmp_path / "c.json"
        path.write_text(json.dumps({"format": FORMAT, "turns": []} | change), "utf-8")
        with pytest.raises(KtrtError) as caught:
            read_conversation(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert message in str(caught.value)

    def test_half_a_character(self, tmp_path: Path) -> None:
        content = json.dumps({"format": FORMAT, "unanswered": "\ud83d a \U0001f642"})
        (tmp_path / "c.json").write_text(content, "utf-8")
        assert read_conversation(tmp_path / "c.json").unanswered == "? a \U0001f642"

    @pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000])
    def test_other_files_are_refused(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "c.json").write_text(text, "utf-8")
        with pytest.raises(KtrtError, match=r"c\.json: not a saved conversation"):
            read_conversation(tmp_path / "c.json")


class TestReadText:
    def test_limits(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes("\ufeff你好".encode())
        assert read_text(path, 100) == "你好"
        with pytest.raises(KtrtError, match="larger than the 8 bytes"):
            read_text(path, 8)
        assert read_text(path, 9) == "你好"

    @pytest.mark.parametrize(
        ("data", "message"),
        [("你好".encode("gbk"), r"not UTF-8 text \(byte 1 is 0xc4\)"), (b"a\0b", "NUL bytes")],
    )
    def test_other_encodings(self, tmp_path: Path, data: bytes, message: str) -> None:
        (tmp_path / "a").write_bytes(data)
        with pytest.raises(KtrtError, match=message):
            read_text(tmp_path / "a", 100)

    def test_what_is_no_file(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")  # would wait for a writer without end
        for path, message in (
            (tmp_path / "none", "No such file"),
            (tmp_path, "directory"),
            (tmp_path / "pipe", "expected a file"),
            (Path("/dev/zero"), "expected a file"),
            (Path("a\0b"), "cannot read"),
        ):
            with pytest.raises(KtrtError, match=message):
                read_text(path, 100)


class TestSharing:
    """Two chats save in one file."""

    def test_what_another_program_wrote_is_kept(self, tmp_path: Path) -> None:
        path = tmp_path / "c.json"
        mine, other = ConversationFile(path), ConversationFile(path)
        mine.save(talked(("a", "b")))
        mine.save(talked(("a", "b"), ("c", "d")))
        with pytest.raises(KtrtError, match="another program has changed this file"):
            other.save(talked(("x", "y")))
        other.remove()
        assert len(read_conversation(path).turns) == 4
        mine.remove()
        assert not path.exists()
        mine.save(talked(("a", "b")))
        path.unlink()  # writing it again loses nothing
        mine.save(talked(("a", "b")))
        assert len(read_conversation(path).turns) == 2

    def test_chats_have_files_of_their_own(self, state: Path) -> None:
        one, two = new_autosave(), new_autosave()
        assert one.path != two.path
        one.save(talked(("a", "b")))
        os.utime(one.path, ns=(0, 0))
        two.save(talked(("x", "y")))
        assert last_conversation() == two.path
        assert stat.S_IMODE(state.stat().st_mode) == 0o700

    def test_the_oldest_go(self, state: Path) -> None:
        new_autosave()
        for number in range(205):
            path = state / "conversations" / f"{number}.json"
            path.touch()
            os.utime(path, ns=(number, number))
        new_autosave()
        left = {int(each.stem) for each in (state / "conversations").iterdir()}
        assert left == set(range(6, 205))

    def test_what_cannot_be_removed_is_one_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = ConversationFile(tmp_path / "c.json")
        file.save(talked(("a", "b")))

        def refuse(_path: Path, **_options: Any) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "unlink", refuse)
        with pytest.raises(KtrtError, match=r"c\.json: cannot be removed: Permission denied"):
            file.remove()

    def test_a_loop_of_links(self, tmp_path: Path) -> None:
        (tmp_path / "a").symlink_to(tmp_path / "a")
        with pytest.raises(KtrtError, match="cannot read .*symbolic links"):
            exists(tmp_path / "a")
        assert not exists(tmp_path / "b" / "c")

    def test_nothing_to_resume(self) -> None:
        with pytest.raises(KtrtError, match="no conversation was saved"):
            last_conversation()


class TestStateDirectory:
    def test_a_relative_one_does_not_count(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("XDG_STATE_HOME", "relative")
        assert state_directory() == tmp_path / ".local" / "state" / "ktrt"
        monkeypatch.delenv("XDG_STATE_HOME")
        assert state_directory() == tmp_path / ".local" / "state" / "ktrt"

    @pytest.mark.parametrize("home", ["", "relative", None])
    def test_no_home(self, monkeypatch: pytest.MonkeyPatch, home: str | None) -> None:
        def nobody(_: int) -> None:
            raise KeyError("uid not found")

        monkeypatch.delenv("XDG_STATE_HOME")
        monkeypatch.setattr(pwd, "getpwuid", nobody)
        if home is None:
            monkeypatch.delenv("HOME")
        else:
            monkeypatch.setenv("HOME", home)
        with pytest.raises(KtrtError, match="neither HOME nor XDG_STATE_HOME is set"):
            state_directory()
        if home is None:
            with pytest.raises(KtrtError, match="~/x: "):
                expanded("~/x")

    def test_no_place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
        with pytest.raises(KtrtError, match="no directory for histories"):
            state_directory()
