"""Edits the user's line, with history, several lines and completion. Needs a terminal."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.application import run_in_terminal
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.utils import is_dumb_terminal

from ktrt.chat.keyboard import Keyboard
from ktrt.utils.signals import is_waiting, shielded

_log = logging.getLogger(__name__)

# Maps the text before the cursor to its completions.
Complete = Callable[[str], Iterable[str]]


class Editor:
    """Reads messages: Enter sends, Alt-Enter and pasted line ends begin a new line, Tab completes,
    the arrows move through the history."""

    def __init__(
        self, prompt: str, keyboard: Keyboard, history: Path | None, complete: Complete | None
    ) -> None:
        """``history``: the file, made if it is missing; None keeps the history in memory."""
        self._keyboard = keyboard
        self._session: PromptSession[str] = PromptSession(
            # Without a colour the renderer would put a cursor movement for the space at the end.
            [("ansigreen", prompt)],
            history=_open_history(history),
            key_bindings=_keys(keyboard),
            completer=None if complete is None else _Completer(complete),
            complete_while_typing=False,
            multiline=True,
            prompt_continuation="",
            input=keyboard.input,
            # With its default output it would also draw on terminals without escape sequences.
            output=None if is_dumb_terminal() else keyboard.output,
        )

    def read(self) -> str:
        """Reads a message. ``EOFError``: Ctrl-D; ``KeyboardInterrupt``: Ctrl-C on an empty line."""
        with self._keyboard.prompting():
            if is_dumb_terminal():  # read by another application, without pre_run
                return printable(self._session.prompt())
            # Raised in the middle of an event loop, SIGTERM would be reported as its failure.
            with shielded(self._leave):
                return printable(self._session.prompt(pre_run=self._leave_if_asked))

    def _leave_if_asked(self) -> None:
        app = self._session.app
        if is_waiting() and app.future is not None and not app.future.done():
            app.exit(exception=EOFError())

    def _leave(self) -> None:
        loop = self._session.app.loop
        if loop is not None:
            loop.call_soon_threadsafe(self._leave_if_asked)


def printable(text: str) -> str:
    """Replaces lone surrogates in ``text``: bytes that are not UTF-8 arrive as such, and neither
    tokenizers nor files take them."""
    return text.encode("utf-8", "replace").decode("utf-8")


class _History(FileHistory):
    """A history that several chats append to; a failure is one warning."""

    _failed = False

    def load_history_strings(self) -> Iterable[str]:
        try:
            yield from super().load_history_strings()
        except OSError as error:
            _log.warning("%s: the history cannot be read: %s", self.filename, error.strerror)

    def store_string(self, string: str) -> None:
        try:
            super().store_string(printable(string))
        except OSError as error:
            if not self._failed:
                self._failed = True
                _log.warning("%s: the history cannot be written: %s", self.filename, error.strerror)


def _open_history(path: Path | None) -> History:
    if path is None:
        return InMemoryHistory()
    try:
        # Messages are private.
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
    except OSError as error:
        _log.warning("%s: the history is not kept: %s", path, error.strerror)
        return InMemoryHistory()
    return _History(str(path))


class _Completer(Completer):
    def __init__(self, complete: Complete) -> None:
        self._complete = complete

    def get_completions(self, document: Document, _event: CompleteEvent) -> Iterator[Completion]:
        before = document.text_before_cursor
        for text in self._complete(before):
            yield Completion(text, start_position=-len(before), display=text.split("/")[-1] or text)


def _keys(keyboard: Keyboard) -> KeyBindings:
    keys = KeyBindings()
    # In the search through the history they keep their usual meaning.
    typing = has_focus(DEFAULT_BUFFER)

    @keys.add("enter", filter=typing)
    def _send(event: Any) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    def _new_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c", filter=typing)
    @keys.add("<sigint>")
    def _interrupt(event: Any) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    @keys.add("c-z")
    def _suspend(_event: Any) -> None:
        run_in_terminal(keyboard.suspend)

    return keys
