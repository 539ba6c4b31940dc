"""Writes a folder atomically: it appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from ktrt.errors import ConfigError
from ktrt.utils.temporaries import remove_stale, temporary_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# In addition to the data: directories, headers, and the file system's reserve.
_SPARE_BYTES = 64 << 20


def check_target(target: Path) -> None:
    """Raises ``ConfigError`` if ``target`` exists and is not an empty folder."""
    target = target.resolve()
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists():
        what = "a folder that is not empty" if target.is_dir() else "no folder"
        raise ConfigError(f"--out {target} exists and is {what}; name a new one, or empty it")


@contextmanager
def staged_folder(target: Path, size: int) -> Iterator[Path]:
    """Yields a temporary folder next to ``target`` for ``size`` bytes. At the end of the block it
    becomes ``target``; after an exception, Ctrl-C included, it is removed. Leftovers of killed
    processes for the same target are removed first.

    Raises ``ConfigError`` if ``target`` is not empty, its parent is not writable or the disk is
    full.
    """
    check_target(target)
    target = target.resolve()
    with ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_stale(target)
            folder = stack.enter_context(temporary_folder(target))
        except OSError as error:
            raise ConfigError(
                f"--out {target}: cannot write to {target.parent}: {error}"
            ) from error
        free = shutil.disk_usage(folder).free
        if free < size + _SPARE_BYTES:
            raise ConfigError(
                f"--out {target}: {free / 1e9:.2f} GB are free there, the export needs "
                f"{(size + _SPARE_BYTES) / 1e9:.2f} GB"
            )
        try:
            yield folder
            _publish(folder, target)
        except OSError as error:
            raise ConfigError(f"--out {target}: writing failed: {error}") from error


def _publish(folder: Path, target: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for inner, _, files in os.walk(folder):
        for each in [inner, *(os.path.join(inner, name) for name in files)]:  # noqa: PTH118
            _sync(each)
    check_target(target)
    folder.replace(target)
    _sync(str(target.parent))


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
