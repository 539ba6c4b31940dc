"""Turns SIGTERM and SIGHUP into an exception, to save the conversation and restore the terminal."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Terminated(SystemExit):
    """The process was asked to end. ``exit_code`` is the shell's code for the signal.

    A ``SystemExit``, so that no ``except Exception`` treats it as a failure.
    """

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number
        super().__init__(self.exit_code)


_shields: list[Callable[[], None]] = []
_waiting: int | None = None


@contextmanager
def terminations() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP raise ``Terminated`` in the main thread within the block. A signal
    that the parent ignores (nohup) stays ignored."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, _terminate)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def shielded(wake: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Delays ``Terminated`` to the end of a block that must not be left half done. The signal
    handler calls ``wake``, in case the block waits for something else."""
    global _waiting
    _shields.append(wake)
    try:
        yield
    finally:
        _shields.pop()
        if not _shields and _waiting is not None:
            number, _waiting = _waiting, None
            raise Terminated(number)


def is_waiting() -> bool:
    """Returns whether a signal waits for the end of a shielded block."""
    return _waiting is not None


def _terminate(number: int, _frame: object) -> None:
    global _waiting
    if not _shields:
        raise Terminated(number)
    _waiting = number
    _shields[-1]()
