"""A conversation: system prompt, turns and settings; saves and reads it.

Files are JSON, written under another name and moved into place: after a power failure a reader
finds the old or the new conversation, never half of one.
"""

import json
import os
import secrets
import stat
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ktrt.errors import KtrtError
from ktrt.utils.temporaries import remove_all_stale, remove_stale, temporary_file

Turn = dict[str, str]

FORMAT = "ktrt conversation 1"
# Far beyond any model's context; a larger file is something else.
_MAX_BYTES = 64 << 20
# Number of the newest conversations that stay in the state directory.
_KEPT = 200


@dataclass
class Conversation:
    """The messages so far, and the settings of the next answer.

    ``system`` None: the configured system prompt. ``turns``: messages of user and assistant in
    turn, the assistant's last. ``unanswered``: the user's message that has no answer yet.
    ``settings``: sampling arguments that replace the configured ones; ``thinking`` None: as
    configured. ``model`` and ``adapter`` name the partner. ``undone``: turns that were taken back
    and are not yet replaced by a complete answer.
    """

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    unanswered: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    thinking: bool | None = None
    model: str = ""
    adapter: str = ""
    undone: list[Turn] = field(default_factory=list)

    def messages(self, text: str, left_out: int = 0) -> list[Turn]:
        """Returns the messages without the oldest ``left_out`` turns, and the user's ``text``."""
        system = [] if not self.system else [{"role": "system", "content": self.system}]
        return [*system, *self.turns[2 * left_out :], {"role": "user", "content": text}]

    def add(self, text: str, answer: str) -> None:
        """Appends a message and its answer."""
        self.turns += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": answer},
        ]

    def undo(self) -> str | None:
        """Takes back the last message with its answer; returns it, None if there is no message."""
        if self.unanswered is not None:
            removed, self.unanswered = self.unanswered, None
            return removed
        if not self.turns:
            return None
        last = self.turns[-2:]
        del self.turns[-2:]
        self.undone[:0] = last
        return last[0]["content"]

    def redo(self) -> str | None:
        """Restores the turn that was taken back last; returns its message, or None."""
        if not self.undone:
            return None
        again = self.undone[:2]
        del self.undone[:2]
        self.turns += again
        return again[0]["content"]

    def clear(self) -> None:
        """Removes all turns; keeps system prompt and settings."""
        self.turns.clear()
        self.undone.clear()
        self.unanswered = None

    @property
    def empty(self) -> bool:
        """Whether there are no messages."""
        return not self.turns and not self.undone and self.unanswered is None


class ConversationFile:
    """The file that a chat saves its conversation in.

    Changes that another program made to it are never overwritten.
    """

    def __init__(self, path: Path) -> None:
        """Takes a path without a file, or of a conversation that the caller has read; removes
        temporary files that killed processes left."""
        remove_stale(Path(os.path.realpath(path)))
        self.path = path
        self._seen = _identity(path)

    def save(self, conversation: Conversation) -> None:
        """Replaces the file's content. ``KtrtError``: another program wrote the file meanwhile, or
        it cannot be written."""
        if _identity(self.path) not in (self._seen, None):
            raise KtrtError(
                f"{self.path}: not saved, another program has changed this file; "
                "save under another name"
            )
        write_conversation(self.path, conversation)
        self._seen = _identity(self.path)

    def remove(self) -> None:
        """Removes the file if this chat wrote it. ``KtrtError``: it cannot be removed."""
        if self._seen is not None and _identity(self.path) == self._seen:
            try:
                self.path.unlink(missing_ok=True)
            except OSError as error:
                raise KtrtError(f"{self.path}: cannot be removed: {error.strerror}") from error
        self._seen = _identity(self.path)


def state_directory() -> Path:
    """Returns $XDG_STATE_HOME/ktrt, else ~/.local/state/ktrt, readable by this user only; makes it.
    ``KtrtError``."""
    root = Path(os.environ.get("XDG_STATE_HOME", ""))
    try:
        if not root.is_absolute():
            root = _home() / ".local" / "state"
        root.mkdir(parents=True, exist_ok=True)
        folder = root / "ktrt"
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise KtrtError(f"no directory for histories and conversations: {error}") from error
    return folder


def _home() -> Path:
    try:
        home = Path.home()
    except RuntimeError:  # neither HOME nor an entry in passwd
        home = Path()
    if os.environ.get("HOME") == "" or not home.is_absolute():
        raise KtrtError(
            "no directory for histories and conversations: neither HOME nor XDG_STATE_HOME is set"
        )
    return home


def exists(path: Path) -> bool:
    """Returns whether ``path`` exists. ``KtrtError``: it cannot be read, or links form a loop."""
    try:
        return _identity_or_error(path) is not None
    except OSError as error:
        raise KtrtError(f"cannot read {path}: {error.strerror}") from error


def expanded(path: str) -> Path:
    """Replaces a leading ~. ``KtrtError``: there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise KtrtError(f"{path}: {error}") from error


def new_autosave() -> ConversationFile:
    """Returns a new file among the saved conversations; removes all but the newest 200.
    ``KtrtError``: it cannot be made."""
    folder = state_directory() / "conversations"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        remove_all_stale(folder)
        for path in _newest_first(folder)[_KEPT - 1 :]:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise KtrtError(f"{folder}: no place for conversations: {error.strerror}") from error
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{secrets.token_hex(3)}.json"
    return ConversationFile(folder / name)


def last_conversation() -> Path:
    """Returns the file of the conversation that was saved last. ``KtrtError``: there is none."""
    folder = state_directory() / "conversations"
    found = _newest_first(folder)
    if not found:
        raise KtrtError(f"--resume: no conversation was saved in {folder} yet")
    return found[0]


def _newest_first(folder: Path) -> list[Path]:
    times: dict[Path, int] = {}
    for path in folder.glob("*.json"):
        identity = _identity(path)
        if identity is not None:
            times[path] = identity[0]
    return sorted(times, key=lambda path: (times[path], path.name), reverse=True)


def _identity(path: Path) -> tuple[int, int, int] | None:
    """Returns numbers that change when a file is written again; None if there is no file."""
    try:
        return _identity_or_error(path)
    except OSError:
        return None


def _identity_or_error(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def write_conversation(path: Path, conversation: Conversation) -> None:
    """Writes or replaces ``path`` atomically, readable by this user only. ``KtrtError``: it cannot
    be written; the old file is then unchanged."""
    content = {"format": FORMAT} | asdict(conversation)
    if not conversation.undone:
        del content["undone"]  # unknown to earlier versions
    data = json.dumps(content, ensure_ascii=False, indent=1).encode("utf-8", "replace")
    path = Path(os.path.realpath(path))
    try:
        with temporary_file(path) as (descriptor, temporary):
            with os.fdopen(descriptor, "wb", closefd=False) as file:
                file.write(data + b"\n")
            os.fsync(descriptor)
            temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise KtrtError(f"{path}: cannot save the conversation: {error.strerror}") from error


def _sync_folder(folder: Path) -> None:
    # Some file systems refuse; the file itself is on disk by now.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_conversation(path: Path) -> Conversation:
    """Reads a saved conversation. ``KtrtError`` names the file and the error in it."""
    text = read_text(path, _MAX_BYTES)
    try:
        # An escaped lone surrogate is valid JSON, but no file or tokenizer takes it.
        plain = json.dumps(json.loads(text), ensure_ascii=False).encode("utf-8", "replace")
        content = json.loads(plain)
    except (ValueError, RecursionError) as error:
        raise KtrtError(f"{path}: not a saved conversation: {error}") from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise KtrtError(f"{path}: not a saved conversation: expected format {FORMAT!r}")
    return _Checked(path, content).conversation()


def read_text(path: Path, max_bytes: int) -> str:
    """Reads a UTF-8 text file. ``KtrtError`` names the file: missing, not regular, larger than
    ``max_bytes``, not UTF-8, or with NUL bytes."""
    try:
        # Does not wait for a writer if it is a pipe.
        with os.fdopen(os.open(path.expanduser(), os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise KtrtError(f"{path}: expected a file, found a directory or device")
            data = file.read(max_bytes + 1)
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise KtrtError(f"cannot read {path}: {reason}") from error
    if len(data) > max_bytes:
        raise KtrtError(f"{path}: larger than the {max_bytes:,} bytes that are taken")
    return decode_text(data, str(path))


def decode_text(data: bytes, name: str) -> str:
    """Decodes ``data``. ``KtrtError`` says where it is not UTF-8, or that it has NUL bytes."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte {error.start + 1} is 0x{error.object[error.start]:02x}"
        raise KtrtError(f"{name}: not UTF-8 text ({found})") from error
    if "\0" in text:
        raise KtrtError(f"{name}: not text (it holds NUL bytes)")
    return text


class _Checked:
    """The fields of a saved conversation, checked."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self._path, self._content = path, content

    def conversation(self) -> Conversation:
        known = {each.name for each in fields(Conversation)}
        if unknown := sorted(set(self._content) - known):
            raise self._wrong(unknown[0], "no such key")
        return Conversation(
            system=self._value("system", str, None),
            turns=self._turns("turns"),
            unanswered=self._unanswered(),
            settings=self._value("settings", dict, {}),
            thinking=self._value("thinking", bool, None),
            model=self._value("model", str, ""),
            adapter=self._value("adapter", str, ""),
            undone=self._turns("undone"),
        )

    def _value(self, key: str, kind: type, default: Any) -> Any:
        value = self._content.get(key, default)
        if value is not default and not isinstance(value, kind):
            if value is None and default is None:
                return None
            raise self._wrong(key, f"expected {kind.__name__}, found {value!r:.80}")
        return value

    def _unanswered(self) -> str | None:
        text: str | None = self._value("unanswered", str, None)
        if text is not None and not text.strip():
            raise self._wrong("unanswered", "expected text that is not empty")
        return text

    def _turns(self, key: str) -> list[Turn]:
        turns = self._value(key, list, [])
        for index, turn in enumerate(turns):
            where = f"{key}[{index}]"
            role = ("user", "assistant")[index % 2]
            if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
                raise self._wrong(where, f"expected role and content, found {turn!r:.80}")
            if turn["role"] != role:
                raise self._wrong(where, f"expected {role}, found {turn['role']!r:.80}")
            if not isinstance(turn["content"], str) or not turn["content"].strip():
                raise self._wrong(f"{where}.content", "expected text that is not empty")
        if len(turns) % 2:
            raise self._wrong(key, "the last one is the user's, expected an answer to it")
        return list(turns)

    def _wrong(self, key: str, reason: str) -> KtrtError:
        return KtrtError(f"{self._path}: {key}: {reason}")
