"""Chats in separate processes, piped or in a pseudo-terminal."""

import os
import re
import shlex
import sys
import termios
from pathlib import Path
from typing import Any, Self

import pexpect
from helpers import fake_chat

ROOT = Path(__file__).resolve().parents[3]
# Key sequences.
UP, ALT_ENTER, TAB = "\x1b[A", "\x1b\r", "\t"


def environment(**changes: str) -> dict[str, str]:
    """Returns the environment of a chat process, with buffered output."""
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    return inherited | {"PYTHONPATH": path} | changes


def paste(text: str) -> str:
    """Returns a terminal's byte sequence for pasted text."""
    return f"\x1b[200~{text}\x1b[201~"


class ChatProcess:
    """A chat at a terminal of 24 lines and 100 columns."""

    def __init__(
        self,
        *arguments: str,
        state: Path,
        fake: bool = True,
        seconds: int = 20,
        then: str | None = None,
        term: str = "xterm",
    ) -> None:
        """``then``: a shell command to run in the same terminal afterwards."""
        start = [fake_chat.__file__] if fake else ["-m", "ktrt.chat"]
        command = [sys.executable, *start, *arguments]
        if then is not None:
            command = ["bash", "-c", f"{shlex.join(command)}; {then}"]
        self.child: Any = pexpect.spawn(
            command[0],
            command[1:],
            env=environment(TERM=term, PROMPT_TOOLKIT_NO_CPR="1", XDG_STATE_HOME=str(state)),
            encoding="utf-8",
            timeout=seconds,
            dimensions=(24, 100),
            cwd=str(ROOT),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.close(force=True)

    def keys(self, text: str) -> None:
        """Presses keys."""
        self.child.send(text)

    def raw(self, data: bytes) -> None:
        """Sends bytes, text or not."""
        os.write(self.child.child_fd, data)

    def say(self, text: str) -> None:
        """Types a line."""
        self.keys(text + "\r")

    def sees(self, text: str) -> str:
        """Waits for ``text``; returns the output before it, without escape sequences."""
        self.child.expect_exact(text)
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.child.before)

    def prompt(self) -> str:
        """Waits for the next prompt; returns the output before it."""
        # Keys redraw `User: `, but only a new prompt enables bracketed paste.
        self.child.expect(r"\x1b\[\?2004h[^\n]*?User: ")
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.child.before)

    def interrupt(self) -> None:
        """Presses Ctrl-C."""
        self.child.sendintr()

    def leaves(self) -> int:
        """Waits for the end; returns the exit code."""
        self.child.expect(pexpect.EOF)
        self.child.close()
        return int(self.child.exitstatus)

    def hangs_up(self) -> int:
        """Closes the terminal; returns the exit code."""
        os.close(self.child.child_fd)
        self.child.ptyproc.closed = self.child.ptyproc.terminated = True
        self.child.closed = self.child.terminated = True
        self.child.ptyproc.fd = self.child.child_fd = -1
        _, status = os.waitpid(self.child.pid, 0)
        return os.waitstatus_to_exitcode(status)

    @property
    def modes(self) -> list[Any]:
        """The terminal's modes, like stty's."""
        return termios.tcgetattr(self.child.child_fd)
