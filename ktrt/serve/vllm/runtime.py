"""Loads and unloads adapters while requests are answered."""

from __future__ import annotations

import asyncio
import logging
import stat
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ktrt.errors import AdapterBusyError, AdapterError
from ktrt.folders import find_adapter_folder
from ktrt.machine.memory import Limit, ram_limit
from ktrt.prompt.tokenizer.words import read_words
from ktrt.serve.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ktrt.serve.names import Names
    from ktrt.session import Session

T = TypeVar("T")
logger = logging.getLogger(__name__)

_LONGEST_NAME = 200
# Entries of an adapter's folder; a training's output has a few dozen.
_MOST_ENTRIES = 10_000
_WEIGHTS = (".safetensors", ".bin", ".pt")
# An adapter's weights at their most: as read, and as the engine takes them in float32.
_COPIES = 3


class RuntimeAdapters:
    """Loads adapters from folders below ``root``, and unloads any. Without ``root`` it does
    neither.

    All of it runs in one thread: reading and checking files takes seconds, and threads that wait
    for each other would be missing for requests. The engine is taken between steps, for the time
    of one layer's LoRA at most.
    """

    def __init__(self, session: Session, names: Names, root: Path | None) -> None:
        self._session, self._names, self._root = session, names, root
        self._thread = ThreadPoolExecutor(1, "ktrt-adapters")

    async def load(self, name: str, path: str, *, replace: bool = False) -> None:
        """Makes the adapter of a folder a model of this name; the name answers once every tensor
        has been checked and applied. ``replace``: takes the place of an adapter of this name.

        ``ApiError`` 403: loading is off; 404: no such folder; 409: the name is taken, or answers
        use the adapter to be replaced; 400: the adapter does not fit, with the reason.
        """
        await self._run(partial(self._load, name, path, replace=replace))

    async def unload(self, name: str) -> None:
        """Frees an adapter. ``ApiError`` 403: loading is off; 404: no such adapter; 409: answers
        use it."""
        await self._run(partial(self._unload, name))

    async def _run(self, call: Callable[[], T]) -> T:
        if self._root is None:
            raise ApiError(
                403, "loading of adapters at run time is off; start the server with --adapter-root "
                "FOLDER (or KTRT_ADAPTER_ROOT) to allow the adapters below it",
                kind="permission_error",
            )  # fmt: skip
        # A client that leaves does not interrupt a load.
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def _load(self, name: str, path: str, *, replace: bool) -> None:
        self._check_name(name, replace=replace)
        folder = self._folder(path)
        try:
            self._check_words(name, folder)
            _check_memory(folder, ram_limit())
            self._while_inactive(
                name, partial(self._session.adapters.load, name, folder, replace=replace)
            )
        except AdapterBusyError as error:
            raise _in_use(error) from error
        except AdapterError as error:
            raise ApiError(400, self._without_root(error), param="lora_path") from error
        logger.info("Loaded adapter %s from %s", name, folder)

    def _unload(self, name: str) -> None:
        if name == self._names.base:
            raise ApiError(400, f"{name!r} is the base model, not an adapter", param="lora_name")
        if name not in self._session.adapters.names:
            raise ApiError(
                404, f"there is no adapter {name!r:.200}; known: {self._names.known()}",
                param="lora_name", code="model_not_found",
            )  # fmt: skip
        try:
            self._while_inactive(name, partial(self._session.adapters.unload, name))
        except AdapterBusyError as error:
            raise _in_use(error) from error
        logger.info("Unloaded adapter %s", name)

    def _while_inactive(self, name: str, change: Callable[[], None]) -> None:
        """Requests name their adapter; the ones that a YAML activated at the start serve nobody,
        and must not keep one from being unloaded."""
        adapters = self._session.adapters
        active = adapters.active
        if name not in active:
            change()
            return
        adapters.activate({each: weight for each, weight in active.items() if each != name})
        try:
            change()
        except BaseException:
            adapters.activate(active)
            raise

    def _check_name(self, name: str, *, replace: bool) -> None:
        if not name.strip() or name != name.strip() or not name.isprintable():
            raise _bad_name(f"expected printable text without spaces at its ends, found {name!r}")
        if len(name) > _LONGEST_NAME:
            raise _bad_name(f"expected at most {_LONGEST_NAME} characters, found {len(name)}")
        if self._names.is_sum(name):
            raise _bad_name(f"{name!r} already means a weighted sum; expected another name")
        taken = name == self._names.base or (name in self._session.adapters.names and not replace)
        if taken:
            raise ApiError(
                409, f"lora_name: there is a model {name!r} already; unload it first, choose "
                "another name, or replace an adapter with load_inplace", param="lora_name",
                code="name_taken",
            )  # fmt: skip

    def _folder(self, given: str) -> Path:
        """Returns the folder of the adapter that ``given`` means, below the root with all its
        files, symbolic links resolved."""
        assert self._root is not None
        try:
            root = self._root.resolve()
            path = (root / given).resolve()
            if not path.is_relative_to(root):
                raise _outside(given)
            if not path.is_dir():
                raise ApiError(
                    404, f"lora_path: there is no folder {given!r:.200} below the server's adapter "
                    "root", param="lora_path",
                )  # fmt: skip
            folder, _ = find_adapter_folder(path)
            for entry in _entries(folder):
                if not entry.resolve().is_relative_to(root):
                    raise _outside(given)
                mode = entry.stat().st_mode
                if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    raise AdapterError(f"{entry.name} is neither a file nor a folder")
        except AdapterError as error:
            reason = self._without_root(error)
            raise ApiError(400, f"lora_path: {reason}", param="lora_path") from error
        except (OSError, ValueError, RuntimeError) as error:
            # A zero byte, a name that is too long, links in a circle, an unreadable folder.
            raise ApiError(
                400, f"lora_path: {given!r:.200} cannot be read", param="lora_path"
            ) from error
        return folder

    def _without_root(self, error: Exception) -> str:
        """Returns a message without the place of the root, which is nobody's business."""
        root = str((self._root or Path()).resolve())
        return str(error).replace(f"{root}/", "").replace(root, "the server's adapter root")

    def _check_words(self, name: str, folder: Path) -> None:
        """Refuses an adapter that adds words: the tokenizer is everybody's, and the base's texts
        would become other tokens while it is loaded."""
        words = read_words(name, folder, self._session.tokenizer)
        if words is not None and words.tokens:
            shown = ", ".join(token.content for token in list(words.tokens.values())[:4])
            raise AdapterError(
                f"{folder.name} adds {len(words.tokens)} words to the tokenizer ({shown}), which "
                "would change the prompts of all models; name it in the server's configuration"
            )


def _entries(folder: Path) -> Iterator[Path]:
    """Yields everything in a folder, whatever links lead to."""
    folders, count = [folder], 0
    while folders:
        for entry in sorted(folders.pop().iterdir()):
            count += 1
            if count > _MOST_ENTRIES:
                raise AdapterError(f"{folder.name} holds more than {_MOST_ENTRIES} files")
            yield entry
            if entry.is_dir() and not entry.is_symlink():
                folders.append(entry)


def _check_memory(folder: Path, limit: Limit) -> None:
    """``AdapterError``: the process would be killed rather than fail."""
    weights = sum(each.stat().st_size for each in folder.iterdir() if each.suffix in _WEIGHTS)
    needed = _COPIES * weights
    if needed > limit.free:
        raise AdapterError(
            f"loading {folder.name} takes {needed / 1e9:.2f} GB of memory, {limit.free / 1e9:.2f} "
            f"GB are free ({limit.what}): unload another adapter, or serve fewer answers at once"
        )


def _in_use(error: AdapterBusyError) -> ApiError:
    return ApiError(409, str(error), param="lora_name", code="adapter_in_use")


def _bad_name(reason: str) -> ApiError:
    return ApiError(400, f"lora_name: {reason:.300}", param="lora_name")


def _outside(given: str) -> ApiError:
    return ApiError(
        400, f"lora_path: {given!r:.200} leads outside of the server's adapter root",
        param="lora_path",
    )  # fmt: skip
