"""A folder that appears whole or not at all."""

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

# Beside the data: directories, headers, and what a file system wants to keep free.
_SPARE_BYTES = 64 << 20


def check_target(target: Path) -> None:
    """``ConfigError`` if something is at ``target`` that would be overwritten."""
    target = target.resolve()
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists():
        what = "a folder that is not empty" if target.is_dir() else "no folder"
        raise ConfigError(f"--out {target} exists and is {what}; name a new one, or empty it")


@contextmanager
def staged_folder(target: Path, size: int) -> Iterator[Path]:
    """A temporary folder beside ``target`` to write ``size`` bytes to. At the end of the block it
    becomes ``target``; after an exception, Ctrl-C included, it is removed. A folder that a killed
    process left for the same target is removed first.

    ``ConfigError``: ``target`` holds something, its parent cannot be written to, the disk is full.
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
