"""Compiles grammars in a separate process: xgrammar cannot be interrupted, and the states of a
hostile schema take hours and all memory."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ktrt.errors import ConfigError, KtrtError

if TYPE_CHECKING:
    from collections.abc import Iterator

_LENGTH = struct.Struct("<Q")
_DONE, _REFUSED = b"+", b"-"
# Importing xgrammar takes 3 s, on a busy machine 20.
_START_SECONDS = 120
# Address space next to the libraries', and the size of one compiled grammar: usually less than 1
# MB, 10 MB with 40 patterns, which take 2 s with 102,400 tokens.
_MOST_SPACE = 3 << 30
_MOST_COMPILED = 64 << 20
# Signals that end a process without memory: C++ aborts or fails, or the kernel kills it.
_OUT_OF_MEMORY = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGKILL)
# From the end of its output to the end of the process.
_END_SECONDS = 5.0


class GrammarWorker:
    """The process. It ends itself when a grammar takes too long, and when this object is gone.
    ``vocabulary``: xgrammar's tokenizer, serialized."""

    def __init__(self, vocabulary: str) -> None:
        # "-P": no module of the present folder. A separate group: Ctrl-C is not for it.
        command = [sys.executable, "-P", "-m", "ktrt.generate.grammar_worker"]
        paths = os.pathsep.join(each or str(Path.cwd()) for each in sys.path)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, process_group=0,
        )  # fmt: skip
        with contextlib.suppress(OSError):  # it has ended: ``compile`` finds out
            _write(self._stdin, vocabulary.encode())

    def compile(self, text: str, seconds: float) -> str:
        """Returns a structural tag's grammar, serialized. ``ConfigError``: xgrammar refuses it;
        after one for time or memory the process is gone. ``KtrtError``: it ended for another
        reason."""
        try:
            _write(self._stdin, f"{seconds} {text}".encode())
            reply = _read(self._stdout)
        except OSError:
            reply = None
        except BaseException:
            # The reply that is under way would be taken for the next schema's.
            self._end(0)
            raise
        if reply is None:
            code = self._end(_END_SECONDS)
            if -code not in (signal.SIGALRM, *_OUT_OF_MEMORY):
                raise KtrtError(f"the process that compiles grammars ended with code {code}")
            what = f"{seconds:g} s" if code == -signal.SIGALRM else f"{_MOST_SPACE >> 30} GB"
            raise ConfigError(f"the schema takes more than {what} to compile; make it smaller")
        if reply[:1] == _REFUSED:
            raise ConfigError(reply[1:].decode())
        return reply[1:].decode()

    def _end(self, seconds: float) -> int:
        """Waits for the end of the process, then kills it; returns its exit code."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    @property
    def alive(self) -> bool:
        """Whether it can compile another one."""
        return self._process.poll() is None

    @property
    def _stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def _stdout(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout


def _write(file: IO[bytes], data: bytes) -> None:
    file.write(_LENGTH.pack(len(data)) + data)
    file.flush()


def _read(file: IO[bytes]) -> bytes | None:
    """Returns the next message; None: the other end is closed."""
    head = file.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    data = file.read(length)
    return data if len(data) == length else None


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Ends the process if the block takes longer: SIGALRM has no handler."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _compiled(compiler: Any, text: str) -> bytes:
    try:
        grammar = compiler.compile_structural_tag(text)
        size = grammar.memory_size_bytes
        if size > _MOST_COMPILED:
            reason = f"its grammar has {size >> 20} MB, at most {_MOST_COMPILED >> 20} are allowed"
            return _REFUSED + reason.encode()
        serialized: str = grammar.serialize_json()
        return _DONE + serialized.encode()
    except Exception as error:  # noqa: BLE001 - of xgrammar
        return _REFUSED + str(error).encode()


def main() -> None:
    """Compiles what standard input brings until it is closed."""
    # Answers go before schemas. What libraries print is no reply.
    os.nice(5)
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with _limited(_START_SECONDS):
        vocabulary = _read(sys.stdin.buffer)
        if vocabulary is None:
            return
        import xgrammar

        info = xgrammar.TokenizerInfo.deserialize_json(vocabulary.decode())
        compiler = xgrammar.GrammarCompiler(info, max_threads=2, cache_enabled=False)
    pages = Path("/proc/self/statm").read_text("ascii").split()[0]
    space = int(pages) * resource.getpagesize() + _MOST_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    while (asked := _read(sys.stdin.buffer)) is not None:
        seconds, _, text = asked.decode().partition(" ")
        with _limited(float(seconds)):
            reply = _compiled(compiler, text)
        with contextlib.suppress(BrokenPipeError):
            _write(replies, reply)


if __name__ == "__main__":
    main()
