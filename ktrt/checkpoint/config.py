"""Reads a model folder's config.json: checks types, settles the model type, bounds the sizes.

transformers builds anything that a config.json says, layer by layer. A damaged number must not cost
gigabytes or minutes before a tensor's shape contradicts it.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ktrt.checkpoint.quantization import Quantization, QuantizationKeys, read_quantization
from ktrt.errors import CheckpointError
from ktrt.utils.json_files import (
    JsonObject,
    read_json,
    shown,
    typed,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

logger = logging.getLogger(__name__)

_ADVICE = "Download the folder again, or correct the file."
# transformers' registries of classes that generate text.
AUTO_CLASSES = ("CausalLM", "ImageTextToText", "MultimodalLM")
_MAPPINGS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")
# Keys of repetitions in the building of a model. Published models have up to 130 layers and 512
# experts.
_REPEATED = re.compile(r"(^|_)(n_)?(layers?|depths?|blocks|modules|stages|levels)(_|$)")
_COUNTED = re.compile(r"(^|_)(experts?|heads?|labels|groups?|codebooks)(_|$)|^id2label$")
_MOST_LAYERS, _MOST_COUNTED = 1024, 1 << 16
# Largest size; excluded are numbers that are no sizes: positions, ids, pixels, bases …
_MOST = 1 << 24
_NO_SIZE = re.compile(
    r"theta|base|seed|pixels|length|position|token|numel|param|context|window|max|clip|limit|scale"
    r"|factor|bytes|version|_id$|time|date|eps|size_gb"
)


class _Config(JsonObject):
    model_type: str | None = None
    architectures: list[str] | None = None
    quantization_config: QuantizationKeys | None = None
    compression_config: QuantizationKeys | None = None
    transformers_weights: str | None = None
    auto_map: dict[str, Any] | None = None


@dataclass(frozen=True)
class ModelConfig:
    """``values``: for transformers' config class, without quantisation. ``known``: transformers
    has a class for ``model_type``. ``own_code``: the folder brings code. ``weights``: the file in
    the key transformers_weights."""

    file: Path
    values: dict[str, Any]
    model_type: str
    architectures: tuple[str, ...]
    known: bool
    own_code: bool
    quantization: Quantization
    weights: str | None

    def describe(self) -> str:
        """Returns model type and architectures, for messages."""
        names = f", architectures {', '.join(self.architectures)}" if self.architectures else ""
        return f"model type {self.model_type}{names}"


def read_model_config(folder: Path) -> ModelConfig:
    """Reads and checks a folder's config.json.

    Raises ``CheckpointError`` with file and key if it is absent, invalid JSON, of wrong types, or
    names neither a model type nor an architecture.
    """
    file = folder / "config.json"
    content = read_json(file, CheckpointError, "It describes every model folder.")
    content = _with_special_floats(file, content)
    head = typed(content, _Config, str(file), CheckpointError, _ADVICE)
    values, quantization = _without_quantization(file, content)
    model_type = _settle_types(file, values)
    if model_type is None:
        raise CheckpointError(
            f"{file} names no model_type that transformers knows, and no architectures: not the "
            "config.json of a model."
        )
    return ModelConfig(
        file=file,
        values=values,
        model_type=model_type,
        architectures=tuple(head.architectures or ()),
        known=_is_known(model_type),
        own_code=bool(head.auto_map),
        quantization=quantization,
        weights=head.transformers_weights,
    )


def check_sizes(config: ModelConfig, deepest: int | None = None) -> None:
    """Refuses impossible sizes before transformers builds them. ``deepest``: the largest layer
    number in the tensors' names.

    Raises ``CheckpointError`` with the key.
    """
    most = _MOST_LAYERS if deepest is None else max(128, 2 * (deepest + 1))
    for path, number in _numbers(config.values):
        key = path.rpartition(".")[2]
        limit, why = (None, "") if _NO_SIZE.search(key) else (_MOST, "no model has such a size")
        if _REPEATED.search(key):
            limit, why = most, "no model has that many"
            if deepest is not None:
                why = f"the tensors' names go up to {deepest}"
        elif _COUNTED.search(key):
            limit, why = _MOST_COUNTED, "no model has that many"
        if limit is not None and abs(number) > limit:
            raise CheckpointError(
                f"{config.file}: {path}: found {number}, expected at most {limit}: {why}. {_ADVICE}"
            )


def normal_name(class_name: str) -> str:
    """Normalises a class name for comparison, since publishers' spellings differ:
    KimiK25ForConditionalGeneration is transformers' Kimi_K25ForConditionalGeneration."""
    return re.sub(r"[^a-z0-9]", "", class_name.lower())


def is_class(class_name: str, architectures: tuple[str, ...]) -> bool:
    """Returns whether ``architectures`` names the class, in any spelling."""
    return normal_name(class_name) in map(normal_name, architectures)


def _with_special_floats(file: Path, content: Any) -> Any:
    """Returns a copy with floats in place of transformers' {"__float__": "Infinity"}."""
    try:
        return _decoded(content)
    except RecursionError as error:
        raise CheckpointError(f"{file} is nested too deeply. {_ADVICE}") from error


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: _decoded(inner) for key, inner in value.items()}
    return [_decoded(inner) for inner in value] if isinstance(value, list) else value


def _without_quantization(file: Path, content: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Removes the quantisation from the config and its inner configs; returns both."""
    found = Quantization()
    for where, inner in list(_configs(content)):
        for key in ("quantization_config", "compression_config"):
            claim = inner.pop(key, None)
            if claim is None:
                continue
            name = f"{where}.{key}" if where else key
            read = read_quantization(claim, f"{file}: {name}", _ADVICE)
            if found.method is None:
                found = read
    return content, found


def _configs(values: dict[str, Any], where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the config and its inner configs (text_config, vision_config …), with their keys."""
    yield where, values
    for key, value in values.items():
        if key.endswith("_config") and "quantization" not in key and isinstance(value, dict):
            yield from _configs(value, f"{where}.{key}" if where else key)


def _settle_types(file: Path, values: dict[str, Any]) -> str | None:
    """Replaces unknown model types by the types of the classes in ``architectures``, in all
    configs; returns the whole model's type, None if there is none."""
    for where, inner in _configs(values):
        if where:
            typed(inner, _Config, f"{file}: {where}", CheckpointError, _ADVICE)
        found, architectures = inner.get("model_type"), tuple(inner.get("architectures") or ())
        if found is not None and _is_known(found):
            if not where:
                _warn_of_contradiction(file, found, architectures)
            continue
        named = [t for name in architectures if (t := _type_of_class(name))]
        if named:
            inner["model_type"] = named[0]
            logger.info(
                "%s: transformers does not know the model type %s; architectures names %s, so "
                "this is read as %s", file, shown(found), ", ".join(architectures), named[0],
            )  # fmt: skip
    found = values.get("model_type")
    return found if isinstance(found, str) else None


def _warn_of_contradiction(file: Path, model_type: str, architectures: tuple[str, ...]) -> None:
    """Warns if model type and architectures disagree; transformers goes by the model type."""
    others = [name for name in architectures if normal_name(name) in _known_classes()]
    if others and not any(model_type in _known_classes()[normal_name(n)][1] for n in others):
        logger.warning(
            "%s: model_type is %s, but architectures names %s, a class of %s; transformers goes "
            "by model_type", file, model_type, others[0], _type_of_class(others[0]),
        )  # fmt: skip


def _is_known(model_type: object) -> bool:
    from transformers import CONFIG_MAPPING

    return isinstance(model_type, str) and model_type in CONFIG_MAPPING


_classes: dict[str, tuple[str, set[str]]] = {}


def _known_classes() -> dict[str, tuple[str, set[str]]]:
    """Returns transformers' classes that generate text: normal name → (name, model types)."""
    from transformers.models.auto import modeling_auto

    if not _classes:
        for mapping in _MAPPINGS:
            # The oldest supported transformers lacks the multimodal mapping.
            names = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {})
            for model_type, classes in names.items():
                for name in [classes] if isinstance(classes, str) else classes:
                    _classes.setdefault(normal_name(name), (name, set()))[1].add(model_type)
    return _classes


def _type_of_class(architecture: str) -> str | None:
    """Returns the model type of transformers' class of this name; None if there is none."""
    import transformers

    known = _known_classes().get(normal_name(architecture))
    if known is None:
        return None
    model_type = getattr(transformers, known[0]).config_class.model_type
    return str(model_type) if _is_known(model_type) else None


def _numbers(value: object, path: str = "") -> Iterator[tuple[str, int]]:
    """Yields all integers of the config, in lists too, with the path of their keys."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, path)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield path, value
