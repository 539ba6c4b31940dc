"""SIGTERM and SIGHUP as an exception: what was said is saved and the terminal is left in order."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Terminated(BaseException):
    """The process was asked to end. ``exit_code``: as a shell reports the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


_shields = 0
_waiting: int | None = None


@contextmanager
def terminations() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP raise ``Terminated`` in the main thread. One that the
    parent ignores stays ignored (nohup)."""
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
def shielded() -> Iterator[None]:
    """Finishes the block before ``Terminated`` is raised: for what must not be left half done."""
    global _shields, _waiting
    _shields += 1
    try:
        yield
    finally:
        _shields -= 1
        if not _shields and _waiting is not None:
            number, _waiting = _waiting, None
            raise Terminated(number)


def _terminate(number: int, _frame: object) -> None:
    global _waiting
    if _shields:
        _waiting = number
    else:
        raise Terminated(number)
