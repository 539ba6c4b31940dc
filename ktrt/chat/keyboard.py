"""The keyboard for the whole chat, also between prompts.

The terminal stays in raw mode and marks pasted text. Input that arrives during an answer (or while
the model loads, or a command runs) waits for the next prompt: as text that the user may edit and
must send, never as commands. None of it reaches the shell after the chat.
"""

import os
import select
import signal
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Self, TextIO

from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
from prompt_toolkit.input.vt100 import Vt100Input
from prompt_toolkit.key_binding import KeyPress
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import Output, create_output

from ktrt.utils.signals import shielded

_PASTE_END = "\x1b[201~"
# A terminal returns at most 4095 bytes.
_READ_BYTES = 4096
_ENTER = (Keys.ControlM, Keys.ControlJ)
# Keys that a user may type ahead, in addition to text: none of them sends a line.
_EDITING = {
    Keys.ControlH, Keys.Delete, Keys.Left, Keys.Right, Keys.Home, Keys.End, Keys.ControlA,
    Keys.ControlE, Keys.ControlW, Keys.ControlU, Keys.ControlK, Keys.ControlD,
}  # fmt: skip
# At the end, input is dropped until none has come for the first number of seconds (within a paste,
# the second one); the third one bounds all of it.
_QUIET, _QUIET_IN_PASTE, _DRAIN = 0.05, 0.5, 3.0
# Seconds that SIGTSTP may take; in a process group without a shell it does nothing.
_STOPPING = 0.2


class Keyboard:
    """Reads the terminal; within ``prompting`` a prompt reads it through ``input`` and
    ``output``."""

    def __init__(
        self, stdin: TextIO, stdout: TextIO, *, marks: bool, is_command: Callable[[str], bool]
    ) -> None:
        """``marks``: the terminal knows escape sequences, so it can mark pasted text.
        ``is_command``: recognises texts that only the user may send."""
        self.input = _Input(stdin)
        self.output: Output = create_output(stdout)
        # A prompt would switch it off at its end; the chat needs it until the chat ends.
        self.output.disable_bracketed_paste = lambda: None  # type: ignore[method-assign]
        self._marks = marks
        self._is_command = is_command
        self._in, self._out = stdin.fileno(), stdout.fileno()
        self._pending: list[KeyPress] = []
        self._watcher: threading.Thread | None = None
        self._wake_read, self._wake_write = os.pipe()
        self._before: list[object] | None = None

    @contextmanager
    def held(self) -> Iterator[Self]:
        """Keeps the terminal in raw mode within the block; restores it afterwards."""
        with suppress(termios.error):
            self._before = termios.tcgetattr(self._in)
        on_continue = signal.signal(signal.SIGCONT, lambda *_: self._hold())
        try:
            self._hold()
            self._watch()
            yield self
        finally:
            with shielded():
                self._stop_watching()
                signal.signal(signal.SIGCONT, on_continue)
                self._mark_pastes(on=False)
                self._drain()
                self._release()
                os.close(self._wake_read)
                os.close(self._wake_write)

    @contextmanager
    def prompting(self) -> Iterator[None]:
        """Within the block a prompt reads ``input``, which starts with the text typed before."""
        self._stop_watching()
        store_typeahead(self.input, self._typed_ahead())
        try:
            yield
        finally:
            # Input that arrived together with the Enter that ended the prompt.
            self._take(get_typeahead(self.input))
            self._watch()

    def suspend(self) -> None:
        """Stops the process like Ctrl-Z, with the terminal as the shell expects it."""
        self._mark_pastes(on=False)
        self._release()
        os.kill(0, signal.SIGTSTP)
        time.sleep(_STOPPING)
        self._hold()

    def _watch(self) -> None:
        self._watcher = threading.Thread(target=self._read_on, name="keyboard", daemon=True)
        self._watcher.start()

    def _stop_watching(self) -> None:
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            os.write(self._wake_write, b".")
            watcher.join()
            os.read(self._wake_read, 1)

    def _read_on(self) -> None:
        poll = select.poll()
        poll.register(self._in, select.POLLIN)
        poll.register(self._wake_read, select.POLLIN)
        while True:
            events = dict(poll.poll())
            if self._wake_read in events:
                return
            if not self._in_foreground():
                time.sleep(_STOPPING)  # the keys are the shell's
                continue
            self._take(self.input.read_keys())
            if self.input.closed or events.get(self._in, 0) & ~select.POLLIN:
                return  # the terminal has gone

    def _take(self, keys: Sequence[KeyPress]) -> None:
        for press in keys:
            key = press.key
            if key == Keys.ControlC:
                self._interrupt()
            elif key == Keys.ControlZ:
                self.suspend()
            elif key == Keys.ControlBackslash:
                self._quit()
            elif key == Keys.ControlI:
                self._pending.append(_text("\t"))
            elif key in (Keys.BracketedPaste, *_ENTER) or key in _EDITING or _is_text(press):
                self._pending.append(press)

    def _typed_ahead(self) -> list[KeyPress]:
        """Returns the waiting keys for a prompt: Enter begins a new line. A paste, or a text that
        ends with one, is sent if Enter follows."""
        keys, self._pending = self._pending, []
        if self._is_sent(keys):
            return keys
        while keys and keys[-1].key in _ENTER:
            keys.pop()
        return [_text("\n") if press.key in _ENTER else press for press in keys]

    def _is_sent(self, keys: Sequence[KeyPress]) -> bool:
        text = keys[:-1]
        return (
            len(keys) > 1
            and keys[-1].key == Keys.ControlM
            and text[-1].key == Keys.BracketedPaste
            and all(_is_text(press) or press.key == Keys.BracketedPaste for press in text)
            and not self._is_command("".join(press.data for press in text))
        )

    def _interrupt(self) -> None:
        self._write("^C")
        main = threading.main_thread().ident
        if main is not None:
            signal.pthread_kill(main, signal.SIGINT)

    def _quit(self) -> None:
        self._mark_pastes(on=False)
        self._release()
        os.kill(os.getpid(), signal.SIGQUIT)

    def _hold(self) -> None:
        """Sets raw mode, except in the background, where the change would stop the process."""
        if self._in_foreground():
            with suppress(termios.error):
                self.input.raw_mode().__enter__()
            self._mark_pastes(on=True)

    def _release(self) -> None:
        if self._before is not None and self._in_foreground():
            with suppress(termios.error):
                termios.tcsetattr(self._in, termios.TCSANOW, self._before)  # type: ignore[arg-type]

    def _drain(self) -> None:
        """Drops typed and pasted input, including input that is still arriving."""
        poll = select.poll()
        poll.register(self._in, select.POLLIN)
        end = time.monotonic() + _DRAIN
        while self._in_foreground() and time.monotonic() < end:
            quiet = _QUIET_IN_PASTE if self.input.in_paste else _QUIET
            if dict(poll.poll(quiet * 1000)).get(self._in) != select.POLLIN:
                break
            self.input.read_keys()
        if self._in_foreground():
            with suppress(termios.error):
                termios.tcflush(self._in, termios.TCIFLUSH)

    def _in_foreground(self) -> bool:
        try:
            return os.tcgetpgrp(self._in) == os.getpgrp()
        except OSError:  # not the controlling terminal, so no other process reads it
            return True

    def _mark_pastes(self, *, on: bool) -> None:
        if self._marks:
            self._write(f"\x1b[?2004{'h' if on else 'l'}")

    def _write(self, text: str) -> None:
        with suppress(OSError):
            os.write(self._out, text.encode())


class _Input(Vt100Input):
    @property
    def in_paste(self) -> bool:
        """Returns whether a paste has begun and not ended."""
        return bool(getattr(self.vt100_parser, "_in_bracketed_paste", False))

    def read_keys(self) -> list[KeyPress]:
        data = self.stdin_reader.read(_READ_BYTES)
        if data and not data.strip("\x03") and self.in_paste:
            # A separate Ctrl-C was pressed by the user: the mark at the paste's end is lost.
            self.vt100_parser.feed(_PASTE_END)
        self.vt100_parser.feed(data)
        keys, self._buffer = self._buffer, []
        return keys


def _text(text: str) -> KeyPress:
    return KeyPress(Keys.BracketedPaste, text)


def _is_text(press: KeyPress) -> bool:
    # Other keys have names such as "c-a" and "left".
    return len(press.key) == 1 and ord(press.key) >= 32 and not 127 <= ord(press.key) < 160
