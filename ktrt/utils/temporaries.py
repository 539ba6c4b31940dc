"""Temporary files and folders beside their target, and what killed processes left of them.

Whoever writes one holds a lock on it (flock), which the kernel drops when the process ends, however
it ends. One without a lock is stale: process ids come back and containers have their own.
"""

import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SUFFIX = ".part"
# Room for the suffix among the 255 bytes of a file's name.
_MAX_NAME = 40


@contextmanager
def temporary_file(target: Path) -> Iterator[tuple[int, Path]]:
    """Creates a locked file beside ``target`` for this user alone; yields its descriptor and path.
    What is still at the path in the end is removed."""

    def create(path: Path) -> int:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    descriptor, path = _create_locked(target, create)
    try:
        yield descriptor, path
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """The same for a folder."""

    def create(path: Path) -> int:
        path.mkdir(mode=0o700)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    descriptor, path = _create_locked(target, create)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def remove_stale(target: Path) -> None:
    """Removes what killed processes left beside ``target`` when they wrote it."""
    _remove_stale(
        target.parent, re.compile(re.escape(_prefix(target)) + r"\w+" + re.escape(_SUFFIX))
    )


def remove_all_stale(folder: Path) -> None:
    """Removes what killed processes left in ``folder``, which holds nobody else's files: also the
    temporaries of earlier versions, which had no suffix and no lock."""
    _remove_stale(folder, re.compile(rf"\..+\.\w+({re.escape(_SUFFIX)})?"))


def _prefix(target: Path) -> str:
    return f".{target.name[:_MAX_NAME]}."


def _create_locked(target: Path, create: Callable[[Path], int]) -> tuple[int, Path]:
    while True:
        path = target.parent / f"{_prefix(target)}{secrets.token_hex(4)}{_SUFFIX}"
        descriptor = create(path)
        # File systems without locks: nothing is ever found stale there either.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_at(path, descriptor):
            return descriptor, path
        # Another process found it stale before it was locked.
        os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _remove_stale(folder: Path, pattern: re.Pattern[str]) -> None:
    with suppress(OSError):
        for path in folder.iterdir():
            if pattern.fullmatch(path.name):
                with suppress(OSError):
                    _remove_if_stale(path)


def _remove_if_stale(path: Path) -> None:
    """``OSError``: it is locked, or cannot be removed."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid():
            return
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if stat.S_ISDIR(found.st_mode):
            shutil.rmtree(path, ignore_errors=True)
        elif stat.S_ISREG(found.st_mode):
            path.unlink()
    finally:
        os.close(descriptor)
