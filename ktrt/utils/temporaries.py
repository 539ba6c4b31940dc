"""Temporary files and folders next to their target, and the removal of stale ones.

The writer holds a lock (flock) on its temporary; the kernel drops it when the process ends, however
it ends. An unlocked one is stale. Process ids would not tell: they are reused, and containers have
separate ones.
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
    """Creates a locked file next to ``target``, readable by this user only; yields its descriptor
    and path. Removes the file at the end unless it was renamed."""

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
    """Does the same for a folder; yields its path."""

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
    """Removes temporaries of ``target`` that killed processes left."""
    _remove_stale(
        target.parent, re.compile(re.escape(_prefix(target)) + r"\w+" + re.escape(_SUFFIX))
    )


def remove_all_stale(folder: Path) -> None:
    """Removes temporaries that killed processes left in ``folder``, which must hold only ktrt's
    files. Earlier versions wrote temporaries without suffix and lock: removes these too."""
    _remove_stale(folder, re.compile(rf"\..+\.\w+({re.escape(_SUFFIX)})?"))


def _prefix(target: Path) -> str:
    return f".{target.name[:_MAX_NAME]}."


def _create_locked(target: Path, create: Callable[[Path], int]) -> tuple[int, Path]:
    while True:
        path = target.parent / f"{_prefix(target)}{secrets.token_hex(4)}{_SUFFIX}"
        descriptor = create(path)
        # On file systems without locks nothing is ever found stale.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_at(path, descriptor):
            return descriptor, path
        # Another process took it for stale before it was locked.
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
    """Raises ``OSError`` if the temporary is locked or cannot be removed."""
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
