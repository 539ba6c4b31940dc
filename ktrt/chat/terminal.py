"""The terminal: everything the chat reads and prints."""

import errno
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
from typing import TYPE_CHECKING, BinaryIO, Self, TextIO

from ktrt.errors import KtrtError
from ktrt.utils.signals import Terminated
from ktrt.utils.streams import abandon, finish, open_standard_streams

if TYPE_CHECKING:
    from ktrt.chat.keyboard import Keyboard

PROMPT = "User: "
REPLY = "Assistant: "
_LEAVE_HINT = "Press Ctrl-C once more, or Ctrl-D, or type `exit`, to leave."
# A prompt that takes longer to compute, or has more tokens, shows its progress.
_QUIET_SECONDS = 0.5
_QUIET_TOKENS = 512
_CLEAR_LINE = "\r\x1b[K"
# Control characters of an answer, except tab and newline, are shown: they must not steer the
# terminal.
_HARMLESS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


class Terminal:
    """Reads the user's lines and prints answers as they come.

    Interactive: lines come from an editor with history and multi-line paste, and Ctrl-C and Ctrl-D
    act as users expect. Otherwise every line of ``stdin`` is one message, in UTF-8 for any locale,
    and Ctrl-C raises ``KeyboardInterrupt``.

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
        # Ctrl-C signals during an answer; None otherwise.
        self._stops: list[int] | None = None
        self._progress = _Progress(stderr)
        self._keyboard: Keyboard | None = None
        self._closed: frozenset[str] = frozenset()

    @classmethod
    def standard(cls) -> Self:
        """Returns the terminal of the process's streams; interactive if both are terminals."""
        closed = open_standard_streams()
        interactive = sys.stdin.isatty() and sys.stdout.isatty()
        terminal = cls(sys.stdin.buffer, sys.stdout, sys.stderr, interactive=interactive)
        terminal._closed = closed
        return terminal

    def require(self, *, stdin: bool) -> None:
        """``KtrtError``: standard output is closed, or, with ``stdin``, standard input."""
        if "stdout" in self._closed:
            raise KtrtError(
                "standard output is closed, answers have no place; >/dev/null drops them"
            )
        if stdin and "stdin" in self._closed:
            raise KtrtError("standard input is closed; pipe messages in, or give one with -p")

    def use_script(self) -> None:
        """Switches to scripted output: no editor, and only answers on ``stdout``."""
        self.interactive = False
        self.scripted = True

    @contextmanager
    def attended(self, is_command: Callable[[str], bool]) -> Iterator[None]:
        """Interactive: the chat owns the keyboard within the block. Text typed or pasted between
        prompts waits for the next one, only the user sends a text that ``is_command``, and nothing
        reaches the shell afterwards."""
        if not self.interactive:
            yield
            return
        from ktrt.chat.keyboard import Keyboard

        keyboard = Keyboard(sys.stdin, sys.stdout, marks=_styled(), is_command=is_command)
        with keyboard.held() as self._keyboard:
            yield

    def use_editor(self, history: Path | None, complete: Callable[[str], Iterable[str]]) -> None:
        """Lets the user edit lines, within ``attended``; ``history``: the file that keeps them, if
        any."""
        from ktrt.chat.editor import Editor

        if self._keyboard is not None:
            self._read_line = Editor(PROMPT, self._keyboard, history, complete).read

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Within the block Ctrl-C acts only on answers and on the line being typed."""
        before = signal.signal(signal.SIGINT, lambda _number, _frame: None)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before or signal.SIG_DFL)

    def read(self) -> str | None:
        """Reads a line of the user; None at the end: Ctrl-D, Ctrl-C twice, or no more lines.

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
        """Reads the rest of ``stdin``. ``KtrtError``: it cannot be read."""
        try:
            return self._stdin.read()
        except OSError as error:
            raise _unreadable(error) from error

    def answer(self, pieces: Iterable[str], prefix: str = REPLY) -> str:
        """Prints an answer piece by piece and returns it.

        Ctrl-C stops after the current token, pressed twice immediately. An interactive terminal
        then returns the partial answer, others raise ``KeyboardInterrupt``.
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
        """Like ``answer``, but prints only the progress, if interactive."""
        gathered: list[str] = []
        with self._stoppable(""):
            for count, piece in enumerate(pieces, start=1):
                gathered.append(piece)
                self._progress.show(f"{label}: {count} tokens")
                self._stop_if_asked()
        return "".join(gathered)

    def show_prefill(self, done: int, total: int) -> None:
        """Shows the progress of a long prompt; raises ``KeyboardInterrupt`` after Ctrl-C."""
        self._stop_if_asked()
        if done < total and (total > _QUIET_TOKENS or self._progress.seconds > _QUIET_SECONDS):
            self._progress.show(f"reading the prompt, {done / total:.0%} of {total} tokens")

    @contextmanager
    def _stoppable(self, line: str) -> Iterator[None]:
        """Within the block Ctrl-C is noted for ``_stop_if_asked``, which stops between two tokens:
        the KV cache stays usable. ``line`` is drawn again after progress."""
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
        """Prints a quiet line, if interactive."""
        if self.interactive:
            text = text.translate(_HARMLESS)
            self._write(f"\x1b[2m{text}\x1b[0m\n" if _styled() else f"{text}\n")

    def note(self, text: str) -> None:
        """Prints a line that is not an answer."""
        if self.scripted:
            self._complain(f"{text}\n")
        else:
            self._write(f"{text.translate(_HARMLESS) if self.interactive else text}\n")

    def record(self, text: str) -> None:
        """Prints a line for the program that reads ``stdout``."""
        self._write(f"{text}\n")

    def columns(self, left: tuple[str, str], right: tuple[str, str]) -> None:
        """Prints two texts, each (heading, text), in two columns."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(expand=True, show_lines=False)
        for heading, _ in (left, right):
            table.add_column(Text(heading.translate(_HARMLESS)), ratio=1, overflow="fold")
        table.add_row(*(Text(text.translate(_HARMLESS)) for _, text in (left, right)))
        drawn = io.StringIO()
        terminal = self._stdout.isatty()
        Console(file=drawn, width=self.width, highlight=False, force_terminal=terminal).print(table)
        self._write(drawn.getvalue())

    @property
    def width(self) -> int:
        """The terminal's current number of columns."""
        return shutil.get_terminal_size().columns

    def error(self, message: str, trace: BaseException | None = None) -> None:
        """Prints an error message, after the traceback of ``trace`` if it is given."""
        shown = "" if trace is None else "".join(traceback.format_exception(trace))
        shown += f"error: {message}\n"
        self._complain(shown.translate(_HARMLESS) if self.interactive else shown)

    def finish(self) -> None:
        """Flushes the output; ignores failures at exit."""
        finish(self._stdout, self.stderr)

    def _write(self, text: str) -> None:
        """``BrokenPipeError``; ``Terminated``: the user's terminal has gone; ``KtrtError``: the
        disk is full, or the like."""
        try:
            self._stdout.write(text)
            self._stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            abandon(self._stdout)
            if self.interactive and error.errno == errno.EIO:
                raise Terminated(signal.SIGHUP) from error
            raise KtrtError(f"standard output cannot be written: {error.strerror}") from error

    def _complain(self, text: str) -> None:
        """Writes to standard error; ignores failures."""
        try:
            self.stderr.write(text)
            self.stderr.flush()
        except OSError:
            abandon(self.stderr)


class _Progress:
    """A line of progress that is erased at the end; nothing if ``stream`` is not a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown = False
        self._began = time.monotonic()
        self._restore: Callable[[], None] = lambda: None

    @property
    def seconds(self) -> float:
        """Seconds since ``start``."""
        return time.monotonic() - self._began

    def start(self, restore: Callable[[], None]) -> None:
        """``restore`` draws the line's earlier text again."""
        self._began = time.monotonic()
        self._restore = restore

    def show(self, text: str) -> None:
        if not self._stream.isatty() or not _styled():
            return
        # One column is left free: a full line would wrap, and half of it stay.
        text = text.translate(_HARMLESS)[: max(0, shutil.get_terminal_size().columns - 1)]
        self._draw(f"{_CLEAR_LINE}\x1b[2m{text}\x1b[0m")
        self._shown = True

    def clear(self) -> None:
        if self._shown:
            self._shown = False
            self._draw(_CLEAR_LINE)
            self._restore()

    def _draw(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            abandon(self._stream)


def _styled() -> bool:
    """Returns whether the terminal knows escape sequences."""
    return os.environ.get("TERM", "dumb") not in ("", "dumb")


@contextmanager
def _noted_interrupts() -> Iterator[list[int]]:
    """Yields the list of Ctrl-C signals in the block; the second one raises immediately.

    The first one does not: an exception in the middle of a forward would lose the KV cache, and
    Python drops exceptions raised inside a finaliser or a callback.
    """
    noted: list[int] = []

    def note(number: int, _frame: object) -> None:
        noted.append(number)
        if len(noted) > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    if signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None):
        yield noted  # the parent's choice, for a background job
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
        try:
            line = stdin.readline()
        except OSError as error:
            raise _unreadable(error) from error
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


def _unreadable(error: OSError) -> KtrtError:
    return KtrtError(f"standard input cannot be read: {error.strerror}")
