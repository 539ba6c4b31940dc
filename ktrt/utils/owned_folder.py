"""Folders whose contents are trusted because only this user and root can write to them.

A folder is opened once and the open descriptor is checked: the path may lead elsewhere a moment
later. All entries are then opened relative to that descriptor, without following links.
"""

from __future__ import annotations

import os
import pwd
import shutil
import stat
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pathlib import Path

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class NotTrustedError(Exception):
    """The reason to distrust a folder or file. ``ours``: this user can fix or replace it."""

    def __init__(self, reason: str, *, ours: bool) -> None:
        super().__init__(reason)
        self.ours = ours


class OwnedFolder:
    """An open folder. Its methods take names of direct entries, never paths."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self.descriptor = descriptor
        self.path = path

    @classmethod
    def root(cls, path: Path) -> Self:
        """Opens a folder that may also hold other users' folders, like /tmp.

        Its owner must be this user or root. Others may write to it only under the sticky bit, which
        forbids them to rename foreign entries. A group may write to a folder of this user
        (umask 002): each folder inside is checked separately.

        Raises ``NotTrustedError``, ``OSError``.
        """
        folder = cls(os.open(path, _FOLDER), path)
        try:
            status = os.fstat(folder.descriptor)
            _check_owner(path, status)
            allowed = stat.S_IWGRP if status.st_uid == os.geteuid() else 0
            if status.st_mode & _OTHERS_WRITE & ~allowed and not status.st_mode & stat.S_ISVTX:
                raise _writable(path, status)
        except NotTrustedError:
            folder.close()
            raise
        return folder

    def folder(self, name: str) -> OwnedFolder:
        """Opens a subfolder that nobody else can write to."""
        path = self.path / name
        if path.is_symlink():
            raise NotTrustedError(f"{path} is a link", ours=False)
        return OwnedFolder(
            self._checked(os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=self.descriptor), path),
            path,
        )

    def make_folder(self, name: str) -> OwnedFolder:
        """Creates and opens a subfolder with mode 755, whatever the umask."""
        os.mkdir(name, 0o755, dir_fd=self.descriptor)
        return self.folder(name)

    def open(self, name: str, flags: int = os.O_RDONLY, mode: int = 0o644) -> int:
        """Returns the descriptor of a regular file that nobody else can write to."""
        if "/" in name or name in ("", ".", ".."):
            raise ValueError(f"{name!r} is no file of {self.path}")
        path = self.path / name
        flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(name, flags, mode, dir_fd=self.descriptor)
        if flags & os.O_EXCL:
            return descriptor  # just made
        self._checked(descriptor, path)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise ValueError(f"{path} is no regular file")
        return descriptor

    def _checked(self, descriptor: int, path: Path) -> int:
        try:
            status = os.fstat(descriptor)
            _check_owner(path, status)
            if status.st_mode & _OTHERS_WRITE:
                raise _writable(path, status)
        except NotTrustedError:
            os.close(descriptor)
            raise
        return descriptor

    def read(self, name: str) -> bytes:
        with os.fdopen(self.open(name), "rb") as file:
            return file.read()

    def remove_folder(self, name: str) -> None:
        """Removes a subfolder and its contents; ignores errors."""
        shutil.rmtree(name, ignore_errors=True, dir_fd=self.descriptor)

    def rename(self, old: str, new: str) -> None:
        os.rename(old, new, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)

    def sync(self) -> None:
        """Writes the folder and its files to the disk."""
        for name in os.listdir(self.descriptor):  # noqa: PTH208
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self.descriptor)
            try:
                os.fsync(file)
            finally:
                os.close(file)
        os.fsync(self.descriptor)

    def close(self) -> None:
        os.close(self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_owner(path: Path, status: os.stat_result) -> None:
    user = os.geteuid()
    if status.st_uid not in (user, 0):
        allowed = _user(user) + (" or root" if user != 0 else "")
        reason = f"{path} belongs to {_user(status.st_uid)}, not to {allowed}"
        raise NotTrustedError(reason, ours=False)


def _writable(path: Path, status: os.stat_result) -> NotTrustedError:
    ours = status.st_uid == os.geteuid()
    return NotTrustedError(
        f"other users can write to {path} ({stat.filemode(status.st_mode)}; chmod go-w)", ours=ours
    )


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
