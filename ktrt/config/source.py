"""Sources of settings: YAML files, read strictly; models' folders; ``key=value`` overrides."""

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from ktrt.config.check import describe, shown
from ktrt.errors import ConfigError
from ktrt.folders import cached_snapshots, holds_adapter, holds_model

_SHOWN = 200
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_YAML = (".yaml", ".yml", ".json")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_MERGE_TAG = "tag:yaml.org,2002:merge"
_FLOAT_TAG = "tag:yaml.org,2002:float"


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, but refuses duplicate keys, of which it would keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE_TAG:
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                break  # PyYAML reports it, with the line
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# PyYAML reads YAML 1.1, where "1e-5" is text; users mean the number.
_StrictLoader.add_implicit_resolver(
    _FLOAT_TAG, re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_source(source: object) -> tuple[Mapping[str, object], str, Path | None]:
    """Reads a YAML file, a model's folder, or a mapping of the same keys. Returns its values, its
    name for messages, and a YAML file's folder.

    ``ConfigError``: none of the three, or what ``read_yaml`` refuses.
    """
    if isinstance(source, Mapping):
        return source, "config", None
    if not isinstance(source, str | PathLike):
        raise ConfigError(
            "expected the path of a YAML file, a model's folder or a mapping, found "
            f"{describe(source)}"
        )
    path = find_path("config", Path(source), "the configuration", None)[0]
    if path.is_dir():
        _check_is_model(path)
        return {"model_name_or_path": str(path)}, str(source), None
    if path.is_file():
        _check_is_text(path)
    elif path.suffix.lower() not in _YAML and not path.exists():
        raise ConfigError(
            f"there is no file or folder {path}: expected a YAML file or a model's folder"
            f"{hub_advice(path, 'name')}"
        )
    return read_yaml(path), str(source), path.parent


def _check_is_model(folder: Path) -> None:
    """Refuses a folder that is certainly not a model's; loading finds other errors."""
    if holds_model(folder):
        return
    if holds_adapter(folder):
        raise ConfigError(
            f"{folder} is an adapter's folder: expected its base model's folder, or a YAML file. "
            f"The adapter goes with it as adapter_name_or_path={folder}, in Python adapter="
        )
    files = sorted(path.name for path in folder.glob("*") if path.suffix in (".yaml", ".yml"))
    if files:
        raise ConfigError(
            f"{folder} is a folder without a model: did you mean {folder / files[0]}?"
        )


def _check_is_text(file: Path) -> None:
    """Refuses files of models and adapters."""
    if file.suffix.lower() == ".gguf":
        raise ConfigError(
            f"{file} is a GGUF file: expected a YAML file, or a model's folder with safetensors"
        )
    model = holds_model(file.parent)
    weights = file.suffix.lower() in _WEIGHTS
    if weights or (file.suffix == ".json" and (model or holds_adapter(file.parent))):
        what = "an adapter" if holds_adapter(file.parent) and not model else "a model"
        raise ConfigError(
            f"{file} is a file of {what}: expected a YAML file, or the folder of a model"
            f"{f': {file.parent}' if model else ''}"
        )


def hub_advice(given: Path, give: str) -> str:
    """Returns how to get a model that is named by its Hugging Face id; empty for other paths.
    ``give`` starts the advice: "name", "set KEY to"."""
    if not _HUB_ID.fullmatch(str(given)):
        return ""
    if cached := cached_snapshots(str(given)):
        return f". The hub's cache holds it: {give} {cached[-1]}"
    return (
        ". ktrt downloads nothing; if this is a Hugging Face id, run\n"
        f"  huggingface-cli download {given} --local-dir {given.name}\n"
        f"and {give} {given.name}"
    )


def read_yaml(path: Path) -> dict[str, object]:
    """Returns the mapping in a YAML (or JSON) file.

    ``ConfigError`` with file, line and column: no such file, not UTF-8, a syntax error, a key given
    twice, or something other than a mapping with text keys.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except ValueError as error:
        raise ConfigError(f"cannot read the config file {str(path)!r}: {error}") from error
    content = _parse(text, str(path))
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: expected a mapping of keys to values, found {describe(content)}"
        )
    for key in content:
        if not isinstance(key, str):
            raise ConfigError(f"{path}: expected text keys, found the key {describe(key)}")
    return content


def find_path(key: str, given: Path, where: str, folder: Path | None) -> list[Path]:
    """Returns the paths that ``given`` may mean, existing ones first: from the current directory,
    then from the YAML file's. ``ConfigError``: it is no valid path."""
    try:
        path = given.expanduser()
        tried = [path] if folder is None or path.is_absolute() else [path, folder / path]
        return sorted(tried, key=lambda each: not each.exists())
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{where}: {key}: {shown(str(given))} is no path: {reason}") from error


def parse_overrides(pairs: Sequence[str], text_keys: Iterable[str]) -> dict[str, object]:
    """Parses ``key=value`` arguments. Values are YAML scalars; values of ``text_keys`` are
    literal.

    ``ConfigError``: an argument without ``=``, or a key given twice.
    """
    overrides: dict[str, object] = {}
    literal = frozenset(text_keys)
    for pair in pairs:
        key, separator, text = pair.partition("=")
        key = key.strip()
        if not separator or not key:
            raise ConfigError(f"override {shown(pair)}: expected key=value")
        if key in overrides:
            raise ConfigError(f"override {shown(pair)}: the key {key!r} is given twice")
        if key in literal:
            overrides[key] = None if text in ("null", "~") else text
        else:
            overrides[key] = _parse(text, f"override {shown(pair)}")
    return overrides


def _parse(text: str, where: str) -> object:
    try:
        return yaml.load(text, _StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{where}{place}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"{where}: not valid YAML: nested too deeply") from error
    except Exception as error:
        # Raised by PyYAML's constructors for an invalid date, number or tag, without a line.
        reason = " ".join(str(error).split())[:_SHOWN]
        raise ConfigError(
            f"{where}: not valid YAML: {type(error).__name__}: {reason}; put texts in quotes"
        ) from error
