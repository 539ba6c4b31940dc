"""The terminal: everything the chat reads and prints."""

import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, Self, TextIO

from ktrt.errors import KtrtError

PROMPT = "User: "
REPLY = "Assistant: "
_LEAVE_HINT = "Press Ctrl-C once more, or Ctrl-D, or type `exit`, to leave."


class Terminal:
    """Reads the user's lines and prints answers as they come.

    Interactive: lines come from an editor with history and multi-line paste, Ctrl-C and Ctrl-D mean
    what users expect. Otherwise every line of ``stdin`` is one message, in UTF-8 whatever the
    locale, and Ctrl-C raises ``KeyboardInterrupt``.
    """

    def __init__(
        self, stdin: BinaryIO, stdout: TextIO, stderr: TextIO, *, interactive: bool = False
    ) -> None:
        self.interactive = interactive
        self.stderr = stderr
        self._stdout = stdout
        self._read_line = _editor() if interactive else _line_reader(stdin)
        self._interrupted = False

    @classmethod
    def standard(cls) -> Self:
        """The process's own streams; interactive if a person sits at both ends."""
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(encoding="utf-8", errors="replace")
        interactive = sys.stdin.isatty() and sys.stdout.isatty()
        return cls(sys.stdin.buffer, sys.stdout, sys.stderr, interactive=interactive)

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

    def answer(self, pieces: Iterable[str]) -> str:
        """Prints an answer piece by piece and returns it; Ctrl-C, if interactive, ends it early."""
        shown: list[str] = []
        try:
            with _noted_interrupts() as interrupts:
                self._write(REPLY)
                for piece in pieces:
                    shown.append(piece)
                    self._write(piece)
                    if interrupts:
                        raise KeyboardInterrupt
        except KeyboardInterrupt:
            if not self.interactive:
                raise
        finally:
            self._write("\n")
        return "".join(shown)

    def note(self, text: str) -> None:
        """A line that is no answer."""
        self._write(f"{text}\n")

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


@contextmanager
def _noted_interrupts() -> Iterator[list[int]]:
    """The signals of Ctrl-C since the start of the block, each of which raises too.

    Python drops an exception raised inside a finaliser or a callback, so that a key pressed at the
    wrong microsecond would be lost without the note.
    """
    noted: list[int] = []

    def note(number: int, _frame: object) -> None:
        noted.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _editor() -> Callable[[], str]:
    from prompt_toolkit import PromptSession

    # Without a colour the renderer would put a cursor movement for the space at the end.
    session: PromptSession[str] = PromptSession([("ansigreen", PROMPT)])

    def read() -> str:
        # Bytes that are no UTF-8 arrive as lone surrogates, which no tokenizer takes.
        return session.prompt().encode("utf-8", "replace").decode("utf-8")

    return read


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
