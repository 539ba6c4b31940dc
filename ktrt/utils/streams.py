"""Standard streams: reopened if the shell closed them, in UTF-8, without complaints at exit."""

import io
import os
import sys
from contextlib import suppress
from typing import Any

_NAMES = ("stdin", "stdout", "stderr")


def occupy_descriptors() -> None:
    """Opens closed descriptors of the standard streams on /dev/null.

    Otherwise the next opened file would get such a descriptor, and printed text would land in that
    file.
    """
    for number in range(len(_NAMES)):
        if not _is_open(number):
            _open_null(number)


def open_standard_streams() -> frozenset[str]:
    """Opens closed standard streams on /dev/null (``occupy_descriptors`` says why); returns their
    names."""
    closed = set()
    for number, name in enumerate(_NAMES):
        if getattr(sys, name) is None or not _is_open(number):
            closed.add(name)
            _open_null(number)
            mode = "w" if number else "r"
            stream = open(number, mode, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    return frozenset(closed)


def escape_unknown(stream: Any) -> None:
    """Lets ``stream`` show characters that its encoding lacks as escapes instead of raising."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
        stream.reconfigure(errors="backslashreplace")


def abandon(stream: Any) -> None:
    """Redirects further output of ``stream`` to /dev/null: its reader has gone or its disk is full,
    and Python's flush at exit would complain."""
    with suppress(OSError, ValueError):
        number = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)


def finish(*streams: Any) -> None:
    """Flushes the streams; abandons those that fail."""
    for stream in streams:
        try:
            stream.flush()
        except (OSError, ValueError):
            abandon(stream)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _open_null(number: int) -> None:
    null = os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
    if null != number:
        os.dup2(null, number)
        os.close(null)
