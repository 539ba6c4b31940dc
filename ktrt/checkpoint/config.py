"""config.json of a model folder: typed, its model type settled, its sizes bounded.

transformers builds whatever a config.json says, layer by layer; a damaged number must not cost
gigabytes or minutes before a tensor's shape shows that it is wrong.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

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
_PositiveInt = Annotated[int, Field(gt=0)]
# FP8's block where config.json names none: every published checkpoint has it.
_BLOCK = (128, 128)
# Where transformers registers classes that generate text.
AUTO_CLASSES = ("CausalLM", "ImageTextToText", "MultimodalLM")
_MAPPINGS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")
# Numbers that transformers counts up to while it builds a model. Published models have up to 130
# layers and 512 experts.
_REPEATED = re.compile(r"(^|_)(n_)?(layers?|depths?|blocks|modules|stages|levels)(_|$)")
_COUNTED = re.compile(r"(^|_)(experts?|heads?|labels|groups?|codebooks)(_|$)|^id2label$")
_MOST_LAYERS, _MOST_COUNTED = 1024, 1 << 16
# No size is larger, apart from numbers that are no sizes: positions, ids, pixels, bases …
_MOST = 1 << 24
_NO_SIZE = re.compile(
    r"theta|base|seed|pixels|length|position|token|numel|param|context|window|max|clip|limit|scale"
    r"|factor|bytes|version|_id$|time|date|eps|size_gb"
)


class _Quantization(JsonObject):
    quant_method: str | None = None
    weight_block_size: Annotated[list[_PositiveInt], Field(min_length=2, max_length=2)] | None = (
        None
    )
    config_groups: dict[str, Any] | None = None


class _Config(JsonObject):
    model_type: str | None = None
    architectures: list[str] | None = None
    quantization_config: _Quantization | None = None
    compression_config: _Quantization | None = None
    transformers_weights: str | None = None
    auto_map: dict[str, Any] | None = None


@dataclass(frozen=True)
class Quantization:
    """``method``: what config.json claims, which copies of a folder often keep without reason: the
    tensors decide. ``block``: rows and columns of one FP8 scale."""

    method: str | None = None
    block: tuple[int, int] = _BLOCK


@dataclass(frozen=True)
class ModelConfig:
    """``values``: for transformers' config class, quantisation left out. ``known``: transformers
    has a class of its own for ``model_type``. ``own_code``: the folder brings code. ``weights``:
    the file that the key transformers_weights names."""

    file: Path
    values: dict[str, Any]
    model_type: str
    architectures: tuple[str, ...]
    known: bool
    own_code: bool
    quantization: Quantization
    weights: str | None

    def describe(self) -> str:
        """Model type and architectures, for messages."""
        names = f", architectures {', '.join(self.architectures)}" if self.architectures else ""
        return f"model type {self.model_type}{names}"


def read_model_config(folder: Path) -> ModelConfig:
    """Raises ``CheckpointError``, which names file and key, for a config.json that is absent, no
    JSON, of wrong types, or names neither a model type nor an architecture."""
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
    """Refuses numbers that no model has, before transformers counts up to them. ``deepest``: the
    number of the last layer that the folder's tensors name.

    Raises ``CheckpointError`` naming the key.
    """
    most = _MOST_LAYERS if deepest is None else max(128, 2 * (deepest + 1))
    for path, number in _numbers(config.values):
        key = path.rpartition(".")[2]
        limit, why = (None, "") if _NO_SIZE.search(key) else (_MOST, "no model has such a size")
        if _REPEATED.search(key):
            limit, why = most, "no model has so many"
            if deepest is not None:
                why = f"the tensors' names go up to {deepest}"
        elif _COUNTED.search(key):
            limit, why = _MOST_COUNTED, "no model has so many"
        if limit is not None and abs(number) > limit:
            raise CheckpointError(
                f"{config.file}: {path}: found {number}, expected at most {limit}: {why}. {_ADVICE}"
            )


def normal_name(class_name: str) -> str:
    """A class name without what publishers and transformers spell differently:
    KimiK25ForConditionalGeneration is transformers' Kimi_K25ForConditionalGeneration."""
    return re.sub(r"[^a-z0-9]", "", class_name.lower())


def is_class(class_name: str, architectures: tuple[str, ...]) -> bool:
    """Whether ``architectures`` names the class, in whatever spelling."""
    return normal_name(class_name) in map(normal_name, architectures)


def _with_special_floats(file: Path, content: Any) -> Any:
    """A copy, with numbers where transformers has written {"__float__": "Infinity"}."""
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
    """The config without its quantisation and that of its parts, and what that was."""
    found = Quantization()
    for where, part in list(_parts(content)):
        for key in ("quantization_config", "compression_config"):
            claim = part.pop(key, None)
            if claim is None:
                continue
            name = f"{where}.{key}" if where else key
            shape = typed(claim, _Quantization, f"{file}: {name}", CheckpointError, _ADVICE)
            if found.method is None:
                found = Quantization(shape.quant_method or "unnamed", _block(shape))
    return content, found


def _block(claim: _Quantization) -> tuple[int, int]:
    """The block of one FP8 scale, as DeepSeek-V3 or compressed-tensors name it."""
    if claim.weight_block_size:
        rows, columns = claim.weight_block_size
        return rows, columns
    for group in (claim.config_groups or {}).values():
        weights = group.get("weights") if isinstance(group, dict) else None
        block = weights.get("block_structure") if isinstance(weights, dict) else None
        if isinstance(block, list) and len(block) == 2 and all(_is_size(size) for size in block):
            return block[0], block[1]
    return _BLOCK


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _parts(values: dict[str, Any], where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The config and the configs of its parts (text_config, vision_config …), by their keys."""
    yield where, values
    for key, value in values.items():
        if key.endswith("_config") and "quantization" not in key and isinstance(value, dict):
            yield from _parts(value, f"{where}.{key}" if where else key)


def _settle_types(file: Path, values: dict[str, Any]) -> str | None:
    """Replaces the model types that transformers does not know by those of the classes that
    ``architectures`` names, in all parts; returns the whole model's, None if there is none."""
    for where, part in _parts(values):
        if where:
            typed(part, _Config, f"{file}: {where}", CheckpointError, _ADVICE)
        found, architectures = part.get("model_type"), tuple(part.get("architectures") or ())
        if found is not None and _is_known(found):
            if not where:
                _warn_of_contradiction(file, found, architectures)
            continue
        named = [t for name in architectures if (t := _type_of_class(name))]
        if named:
            part["model_type"] = named[0]
            logger.info(
                "%s: transformers does not know the model type %s; architectures names %s, so "
                "this is read as %s", file, shown(found), ", ".join(architectures), named[0],
            )  # fmt: skip
    found = values.get("model_type")
    return found if isinstance(found, str) else None


def _warn_of_contradiction(file: Path, model_type: str, architectures: tuple[str, ...]) -> None:
    """transformers goes by the model type."""
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
    """transformers' classes that generate text: normal name → (name, model types)."""
    from transformers.models.auto import modeling_auto

    if not _classes:
        for mapping in _MAPPINGS:
            # The multimodal mapping is younger than the oldest transformers that ktrt works with.
            names = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {})
            for model_type, classes in names.items():
                for name in [classes] if isinstance(classes, str) else classes:
                    _classes.setdefault(normal_name(name), (name, set()))[1].add(model_type)
    return _classes


def _type_of_class(architecture: str) -> str | None:
    """The model type of transformers' class of this name; None if there is no such class."""
    import transformers

    known = _known_classes().get(normal_name(architecture))
    if known is None:
        return None
    model_type = getattr(transformers, known[0]).config_class.model_type
    return str(model_type) if _is_known(model_type) else None


def _numbers(value: object, path: str = "") -> Iterator[tuple[str, int]]:
    """All integers of the config, in lists too, by the keys that lead to them."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, path)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield path, value
