"""The keys that name adapters (one folder, several, or a mapping), and which start active."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ktrt.config.check import check_value, describe, nearest, shown
from ktrt.errors import ConfigError
from ktrt.folders import find_adapter_folder

_log = logging.getLogger(__name__)

# Keys whose values may be lists or mappings.
ADAPTER_KEYS = ("adapter_name_or_path", "adapters", "adapter_weights")


def check_adapter_value(key: str, raw: object, where: str) -> Any:
    """Checks the value of one of ``ADAPTER_KEYS`` and returns it typed: a list of paths (a single
    text gives one path), a mapping of names to paths, or a mapping of names to numbers."""
    if key == "adapter_name_or_path":
        paths = raw if isinstance(raw, list | tuple) else [raw]
        return [_path(key, path, where) for path in paths]
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where}: {key}: expected a mapping of names, found {describe(raw)}")
    hint = Path if key == "adapters" else float
    for name in raw:
        if not isinstance(name, str) or not name.strip() or name != name.strip():
            raise ConfigError(f"{where}: {key}: expected names of adapters, found {describe(name)}")
    return {name: check_value(f"{key}.{name}", value, hint, where) for name, value in raw.items()}


def _path(key: str, raw: object, where: str) -> Path:
    """Returns the path, empty only for an empty text: "." must not mean the base alone."""
    path: Path = check_value(key, raw, Path, where)
    return Path.cwd() if raw and isinstance(raw, str) and path == Path() else path


def resolve_adapters(
    values: dict[str, Any], where: str, directory: Callable[[str, Path], Path]
) -> None:
    """Replaces the keys by existing folders: ``adapters`` by name, ``adapter_name_or_path`` for a
    single adapter. ``directory`` finds the folder that a key's path means.

    ``ConfigError``: no such folder, one folder or name twice, weights of unknown names.
    """
    paths = [path for path in values.pop("adapter_name_or_path", []) if path != Path()]
    named: Mapping[str, Path] = values.pop("adapters", {})
    if paths and named:
        raise ConfigError(
            f"{where}: adapter_name_or_path and adapters are both given; keep one of them"
        )
    if len(paths) == 1 and "," in str(paths[0]) and not _exists(paths[0], directory):
        paths = [Path(part.strip()) for part in str(paths[0]).split(",") if part.strip()]
    subfolder = values.get("adapter_folder", "")
    if named:
        folders = {
            name: _inside(directory(f"adapters.{name}", path), subfolder, where)
            for name, path in named.items()
        }
    else:
        found = [
            _inside(directory("adapter_name_or_path", path), subfolder, where) for path in paths
        ]
        folders = dict(zip(_unique_names(found, where), found, strict=True))
    if len(folders) == 1 and not named:
        values["adapter_name_or_path"] = found[0]
    elif folders:
        values["adapters"] = folders
    _check_weights(values.get("adapter_weights", {}), folders, where)


def _exists(path: Path, directory: Callable[[str, Path], Path]) -> bool:
    try:
        directory("adapter_name_or_path", path)
    except ConfigError:
        return False
    return True


def _inside(path: Path, subfolder: str, where: str) -> Path:
    inner = path / subfolder
    try:
        inside = inner.resolve().is_relative_to(path.resolve()) and inner.is_dir()
    except (OSError, ValueError, RuntimeError):
        inside = False
    if not inside:
        raise ConfigError(f"{where}: adapter_folder: no directory {shown(subfolder)} inside {path}")
    folder, note = find_adapter_folder(inner)
    if note:
        _log.info("%s", note)
    return folder


def _unique_names(folders: list[Path], where: str) -> list[str]:
    """Returns a name per folder: its last path components, as many as make the names unique."""
    resolved = [folder.resolve() for folder in folders]
    for folder in resolved:
        if resolved.count(folder) > 1:
            raise ConfigError(f"{where}: adapter_name_or_path: {folder} is given twice")
    names = []
    for folder in resolved:
        depth = 1
        while sum(other.parts[-depth:] == folder.parts[-depth:] for other in resolved) > 1:
            depth += 1
        names.append("/".join(folder.parts[-depth:]))
    return names


def _check_weights(weights: Mapping[str, float], folders: Mapping[str, Path], where: str) -> None:
    for name in weights:
        if name not in folders:
            known = f"; the adapters are {', '.join(folders)}" if folders else "; there is none"
            raise ConfigError(
                f"{where}: adapter_weights: unknown adapter {name!r}{nearest(name, folders)}{known}"
            )
