"""Processes whose imports are done: forks of one that has imported ktrt, torch and transformers,
which takes 4 s of a core. Tests of imports and of memory start new interpreters instead.

Started as a program, this file is the process that forks.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parents[3]
_LIMIT = 300.0  # seconds


class Fork:
    """A process, with the parts of ``subprocess.Popen`` that tests use. ``stdout`` is its output
    as text."""

    def __init__(self, stdout: IO[str], status: IO[str]) -> None:
        self.stdout = stdout
        self._status = status
        self.pid = int(status.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._status.closed:
            with suppress(ProcessLookupError):  # it has ended by itself
                self.kill()
            self.wait()
        self.stdout.close()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float = 300) -> int:
        """Returns the exit code, negative for a signal."""
        if not select.select([self._status], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(f"fork {self.pid}", timeout)
        with self._status:
            return int(self._status.readline())


class Forks:
    """Runs code in forks of one process, which imports ``modules`` when it is first used and ends
    with this one."""

    def __init__(self, *modules: str) -> None:
        self.modules = modules

    @cached_property
    def _requests(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = f"{ROOT}:{ROOT}/tests/python:{os.environ.get('PYTHONPATH', '')}"
        with theirs:
            subprocess.Popen(
                [sys.executable, "-m", "helpers.forks", str(theirs.fileno()), *self.modules],
                cwd=ROOT, env=os.environ | {"PYTHONPATH": path.rstrip(":")},
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
            )  # fmt: skip
        return ours

    def start(
        self, code: str, *arguments: str, text: str = "", env: Mapping[str, str] | None = None,
        errors_too: bool = False,
    ) -> Fork:  # fmt: skip
        """Runs ``code`` with ``arguments`` in the checkout. ``text``: its standard input, as much
        as a pipe holds; ``errors_too``: ``stdout`` gets what it writes to standard error."""
        given, writer = os.pipe()
        os.write(writer, text.encode())
        os.close(writer)
        output, written = os.pipe()
        status, status_written = os.pipe()
        request = json.dumps([code, arguments, dict(os.environ if env is None else env)])
        streams = [given, written, written if errors_too else 2, status_written]
        socket.send_fds(self._requests, [request.encode()], streams)
        for each in (given, written, status_written):
            os.close(each)
        return Fork(os.fdopen(output, encoding="utf-8"), os.fdopen(status))

    def run(self, code: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Like ``start``, to its end; killed after five minutes."""
        with self.start(code, *arguments, **options) as process:
            limit = threading.Timer(_LIMIT, process.kill)
            limit.start()
            try:
                output = process.stdout.read()
                return subprocess.CompletedProcess(arguments, process.wait(), output)
            finally:
                limit.cancel()


def module(name: str) -> str:
    """Returns code that does what ``python -m NAME`` does."""
    return f"import runpy; runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"


KTRT = Forks("ktrt.api", "ktrt.loading.model", "ktrt.export.checkpoint", "ktrt.chat.dialog")

KT_KERNEL = Forks("kt_kernel.sft.artifacts", "kt_kernel.sft.convert_kt_to_sglang_adapter")


def _serve(requests: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        data, streams, _, _ = socket.recv_fds(requests, 1 << 20, 4)
        if not data:
            return
        if os.fork() == 0:
            requests.close()
            _watch(json.loads(data), streams)
        for each in streams:
            os.close(each)


def _watch(request: list[Any], streams: list[int]) -> None:
    """Forks once more; reports the process's number and, at its end, its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    status = streams.pop()
    child = os.fork()
    if child == 0:
        os.close(status)
        code, arguments, env = request
        os._exit(_run(code, arguments, env, streams))
    for each in (0, 1, 2, *streams):
        os.close(each)
    os.write(status, b"%d\n" % child)
    os.write(status, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    os._exit(0)


def _run(code: str, arguments: list[str], env: dict[str, str], streams: list[int]) -> int:
    """Does what a new interpreter does with ``-c CODE ARGUMENTS``; returns its exit code."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - a number
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["-c", *arguments]
    result = 0
    try:
        exec(compile(code, "<fork>", "exec"), {"__name__": "__main__"})  # noqa: S102
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        result = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
        result = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return result


if __name__ == "__main__":
    for name in sys.argv[2:]:
        importlib.import_module(name)
    _serve(socket.socket(fileno=int(sys.argv[1])))
