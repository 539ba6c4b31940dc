"""Chats in processes of their own, piped or in a pseudo-terminal."""

import os
import re
import sys
from pathlib import Path
from typing import Any, Self

import pexpect
from helpers import fake_chat

ROOT = Path(__file__).resolve().parents[3]
# What the keyboard sends.
UP, ALT_ENTER, TAB = "\x1b[A", "\x1b\r", "\t"


def environment(**changes: str) -> dict[str, str]:
    """For a chat process; buffered output, whatever this process has."""
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    return inherited | {"PYTHONPATH": path} | changes


def paste(text: str) -> str:
    """What a terminal sends for pasted text."""
    return f"\x1b[200~{text}\x1b[201~"


class ChatProcess:
    """A chat at a terminal of 24 lines and 100 columns."""

    def __init__(self, *arguments: str, state: Path, fake: bool = True, seconds: int = 20) -> None:
        start = [fake_chat.__file__] if fake else ["-m", "ktrt.chat"]
        self.child: Any = pexpect.spawn(
            sys.executable,
            [*start, *arguments],
            env=environment(TERM="xterm", PROMPT_TOOLKIT_NO_CPR="1", XDG_STATE_HOME=str(state)),
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
        """Waits for ``text``; returns what came before it, without colours and movements."""
        self.child.expect_exact(text)
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.child.before)

    def prompt(self) -> str:
        """Waits for the next prompt, likewise."""
        # Keys draw `User: ` again, but only a new prompt asks the terminal to mark what is pasted.
        before = self.sees("\x1b[?2004h")
        self.sees("User: ")
        return before

    def interrupt(self) -> None:
        """Presses Ctrl-C."""
        self.child.sendintr()

    def leaves(self) -> int:
        """Waits for the end; returns the exit code."""
        self.child.expect(pexpect.EOF)
        self.child.close()
        return int(self.child.exitstatus)
