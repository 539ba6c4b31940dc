"""The terminal: everything the chat reads and prints."""

import io
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Self, TextIO

from ktrt.errors import KtrtError

PROMPT = "User: "
REPLY = "Assistant: "
_LEAVE_HINT = "Press Ctrl-C once more, or Ctrl-D, or type `exit`, to leave."
# A prompt that takes longer to read, or is longer, shows how far it is.
_QUIET_SECONDS = 0.5
_QUIET_TOKENS = 512
_CLEAR_LINE = "\r\x1b[K"
# What a model says must not steer the terminal: control characters but tab and newline are shown.
_HARMLESS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


class Terminal:
    """Reads the user's lines and prints answers as they come.

    Interactive: lines come from an editor with history and multi-line paste, Ctrl-C and Ctrl-D mean
    what users expect. Otherwise every line of ``stdin`` is one message, in UTF-8 whatever the
    locale, and Ctrl-C raises ``KeyboardInterrupt``.

    ``scripted``: only answers go to ``stdout``, without a prefix; the rest goes to ``stderr``.
    """

    def __init__(
        self, stdin: BinaryIO, stdout: TextIO, stderr: TextIO, *, interactive: bool = False
    ) -> None:
        self.interactive = interactive
        self.scripted = False
        self.stderr = stderr
        self._stdin = stdin
        self._stdout = stdout
        self._read_line = _line_reader(stdin)
        self._interrupted = False
        # Signals of Ctrl-C while an answer is made; None elsewhere.
        self._stops: list[int] | None = None
        self._progress = _Progress(stderr)

    @classmethod
    def standard(cls) -> Self:
        """The process's own streams; interactive if a person sits at both ends."""
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(encoding="utf-8", errors="replace")
        interactive = sys.stdin.isatty() and sys.stdout.isatty()
        return cls(sys.stdin.buffer, sys.stdout, sys.stderr, interactive=interactive)

    def use_script(self) -> None:
        """From now on: no editor, and nothing but answers on ``stdout``."""
        self.interactive = False
        self.scripted = True

    def use_editor(self, history: Path | None, complete: Callable[[str], Iterable[str]]) -> None:
        """Lets the user edit lines; ``history``: the file that keeps them (None: none)."""
        from ktrt.editor import Editor

        self._read_line = Editor(PROMPT, history, complete).read

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Within the block Ctrl-C acts on answers and on what is typed, and on nothing between."""
        before = signal.signal(signal.SIGINT, lambda _number, _frame: None)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def read(self) -> str | None:
        """What the user entered; None at the end: Ctrl-D, Ctrl-C twice, or no more lines.

        ``KtrtError``: a line of ``stdin`` that is not UTF-8.
        """
        while True:
            try:
                text = self._read_line()
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                if self._interrupted:
                    return None
                self._interrupted = True
                self.note(_LEAVE_HINT)
            except EOFError:
                return None
            else:
                self._interrupted = False
                return text

    def read_all(self) -> bytes:
        """What is left of ``stdin``."""
        return self._stdin.read()

    def answer(self, pieces: Iterable[str], prefix: str = REPLY) -> str:
        """Prints an answer piece by piece and returns it.

        Ctrl-C ends it after the piece at hand, a second one at once; interactive, what was said is
        returned, else ``KeyboardInterrupt``.
        """
        shown: list[str] = []
        start = "" if self.scripted else prefix
        try:
            with self._stoppable(start):
                self._write(start)
                for piece in pieces:
                    self._progress.clear()
                    shown.append(piece)
                    self._write(piece.translate(_HARMLESS) if self.interactive else piece)
                    self._stop_if_asked()
        finally:
            self._write("\n")
        return "".join(shown)

    def collect(self, pieces: Iterable[str], label: str) -> str:
        """Like ``answer``, printing nothing but, where a person waits, how far it is."""
        gathered: list[str] = []
        with self._stoppable(""):
            for count, piece in enumerate(pieces, start=1):
                gathered.append(piece)
                self._progress.show(f"{label}: {count} tokens")
                self._stop_if_asked()
        return "".join(gathered)

    def show_prefill(self, done: int, total: int) -> None:
        """Shows how much of a long prompt was read; Ctrl-C pressed meanwhile raises
        ``KeyboardInterrupt`` here."""
        self._stop_if_asked()
        if done < total and (total > _QUIET_TOKENS or self._progress.seconds > _QUIET_SECONDS):
            self._progress.show(f"reading the prompt, {done / total:.0%} of {total} tokens")

    @contextmanager
    def _stoppable(self, line: str) -> Iterator[None]:
        """Within the block Ctrl-C is noted for ``_stop_if_asked``, so that the model is left
        between two tokens, with its KV cache of use. ``line`` is drawn again after progress."""
        redrawn = line if self._stdout.isatty() else ""
        try:
            with _noted_interrupts() as self._stops:
                self._progress.start(lambda: self._write(redrawn))
                yield
        except KeyboardInterrupt:
            if not self.interactive:
                raise
        finally:
            self._stops = None
            self._progress.clear()

    def _stop_if_asked(self) -> None:
        if self._stops:
            raise KeyboardInterrupt

    def status(self, text: str) -> None:
        """A quiet line for a person; nothing elsewhere."""
        if self.interactive:
            self.note(f"\x1b[2m{text}\x1b[0m" if _styled() else text)

    def note(self, text: str) -> None:
        """A line that is no answer."""
        if self.scripted:
            print(text, file=self.stderr, flush=True)
        else:
            self._write(f"{text}\n")

    def record(self, text: str) -> None:
        """A line for the program that reads ``stdout``."""
        self._write(f"{text}\n")

    def columns(self, left: tuple[str, str], right: tuple[str, str]) -> None:
        """Two texts side by side, each (heading, text)."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(expand=True, show_lines=False)
        for heading, _ in (left, right):
            table.add_column(Text(heading), ratio=1, overflow="fold")
        table.add_row(*(Text(text.translate(_HARMLESS)) for _, text in (left, right)))
        Console(file=self._stdout, width=self.width, highlight=False).print(table)

    @property
    def width(self) -> int:
        """Columns of the terminal, as it is now."""
        return shutil.get_terminal_size().columns

    def error(self, message: str, trace: BaseException | None = None) -> None:
        """A failure, after the traceback of ``trace`` if that is given."""
        if trace is not None:
            traceback.print_exception(trace, file=self.stderr)
        print(f"error: {message}", file=self.stderr, flush=True)

    def abandon_output(self) -> None:
        """After a broken pipe: keeps the interpreter from complaining when it flushes at exit."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stdout.fileno())

    def _write(self, text: str) -> None:
        self._stdout.write(text)
        self._stdout.flush()


class _Progress:
    """A line that vanishes again, where ``stream`` is a terminal; nothing elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown = False
        self._began = time.monotonic()
        self._restore: Callable[[], None] = lambda: None

    @property
    def seconds(self) -> float:
        """Since ``start``."""
        return time.monotonic() - self._began

    def start(self, restore: Callable[[], None]) -> None:
        """``restore`` draws again what stood in the line before."""
        self._began = time.monotonic()
        self._restore = restore

    def show(self, text: str) -> None:
        if not self._stream.isatty() or not _styled():
            return
        # One column less than there are: a full line would wrap, and half of it stay.
        text = text[: max(0, shutil.get_terminal_size().columns - 1)]
        self._stream.write(f"{_CLEAR_LINE}\x1b[2m{text}\x1b[0m")
        self._stream.flush()
        self._shown = True

    def clear(self) -> None:
        if self._shown:
            self._shown = False
            self._stream.write(_CLEAR_LINE)
            self._stream.flush()
            self._restore()


def _styled() -> bool:
    """Whether the terminal knows escape sequences."""
    return os.environ.get("TERM", "dumb") not in ("", "dumb")


@contextmanager
def _noted_interrupts() -> Iterator[list[int]]:
    """The signals of Ctrl-C since the start of the block; the second one raises at once.

    The first one does not: raised in the middle of a forward, it would cost the KV cache, and
    Python drops an exception raised inside a finaliser or a callback.
    """
    noted: list[int] = []

    def note(number: int, _frame: object) -> None:
        noted.append(number)
        if len(noted) > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _line_reader(stdin: BinaryIO) -> Callable[[], str]:
    number = 0

    def read() -> str:
        nonlocal number
        line = stdin.readline()
        if not line:
            raise EOFError
        number += 1
        try:
            return line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise KtrtError(
                f"standard input, line {number}: not UTF-8 text "
                f"(byte {error.start + 1} is 0x{line[error.start]:02x})"
            ) from error

    return read
