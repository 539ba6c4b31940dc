"""Where settings come from: a YAML file read strictly, and ``key=value`` overrides."""

import re
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from ktrt.config.check import describe, shown
from ktrt.errors import ConfigError

_SHOWN = 200
_MERGE_TAG = "tag:yaml.org,2002:merge"
_FLOAT_TAG = "tag:yaml.org,2002:float"


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, with duplicate keys refused (it keeps the last one silently)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE_TAG:
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                break  # PyYAML says so, with the line
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1, as PyYAML reads it, takes "1e-5" for text; people mean the number.
_StrictLoader.add_implicit_resolver(
    _FLOAT_TAG, re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> dict[str, object]:
    """The mapping in a YAML (or JSON) file.

    ``ConfigError`` with file, line and column: no such file, not UTF-8, a syntax error, a key given
    twice, or something other than a mapping with text keys.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except IsADirectoryError as error:
        raise ConfigError(
            f"{path} is a folder, expected a YAML file. For a model's folder without one give "
            f"model_name_or_path={path}"
        ) from error
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
    """What a path of a configuration may mean, the first one that exists in front: as given (from
    the current directory), else beside the YAML file. ``ConfigError``: no path at all."""
    try:
        path = given.expanduser()
        tried = [path] if folder is None or path.is_absolute() else [path, folder / path]
        return sorted(tried, key=lambda each: not each.exists())
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{where}: {key}: {shown(str(given))} is no path: {reason}") from error


def parse_overrides(pairs: Sequence[str], text_keys: Iterable[str]) -> dict[str, object]:
    """``key=value`` arguments. Values are YAML scalars, those of ``text_keys`` are taken literally.

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
        # What PyYAML's constructors raise of a date, number or tag that is none; they name no line.
        reason = " ".join(str(error).split())[:_SHOWN]
        raise ConfigError(
            f"{where}: not valid YAML: {type(error).__name__}: {reason}; put texts in quotes"
        ) from error
