"""Compares a folder's tensors with the model. Each tensor must be a parameter of right kind and
shape, or be left out for a known reason; otherwise the folder is refused."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from ktrt.checkpoint.stored import FLOAT_DTYPES
from ktrt.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

    from ktrt.checkpoint.config import ModelConfig
    from ktrt.checkpoint.folder import Checkpoint
    from ktrt.checkpoint.names import WeightNames, WeightTarget

logger = logging.getLogger(__name__)

_FLOATS = (*FLOAT_DTYPES, "F64")
_INTEGERS = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")
_LAYER = re.compile(r"(?P<prefix>^|.*?\.)layers\.(?P<layer>\d+)\.(?P<inner>.+)")
# Only layers that predict further tokens join two inputs.
_JOINS = re.compile(r"^(eh_proj|enorm|hnorm|shared_head\.|embed_tokens\.)|(^|\.)mtp")
_DIRECT = re.compile(r"\w+\.weight")
_PREDICTS = re.compile(r"nextn|mtp")
_COUNT = re.compile(r"layers|modules|predict")
# Buffers of older releases, which transformers ignores for every class.
_OLD_BUFFERS = {
    "rotary_emb.inv_freq": r"rotary_emb\.inv_freq",
    "position_ids": r"(^|\.)position_ids$",
}


def deepest_layer(checkpoint: Checkpoint) -> int:
    """Returns the largest number in the tensors' names, a bound for the number of layers."""
    numbers = {word for name in checkpoint.names() for word in name.split(".") if word.isdecimal()}
    return max(map(int, numbers), default=0)


def check_contents(checkpoint: Checkpoint, names: WeightNames, config: ModelConfig) -> None:
    """Checks every tensor against its parameter; logs the tensors left out on purpose.

    Raises ``CheckpointError`` with the tensor's name if the model has no such parameter, or one of
    another shape or kind of numbers.
    """
    model: Any = names.model
    parameters: Mapping[str, torch.Tensor] = model.state_dict()
    strange = []
    for name in checkpoint.names():
        target = names.target(name)
        if (parameter := parameters.get(target.name)) is not None:
            _check_kind(checkpoint, name, parameter)
            _check_shape(checkpoint, name, target, parameter)
        else:
            strange.append((name, target.name))
    left_out = ignored_by(model)
    strange = [(n, t) for n, t in strange if not (left_out and left_out.search(t))]
    shapes = {target: checkpoint.shape(name) for name, target in strange}
    further = _further_layers(shapes, parameters, config)
    # Single experts count as one parameter.
    unknown = sorted({t for _, t in strange if t not in further})
    if unknown:
        raise CheckpointError(
            f"{checkpoint.folder}: {len(unknown)} unexpected keys for {type(model).__name__}: "
            f"{', '.join(unknown[:5])}{', …' if len(unknown) > 5 else ''}. "
            "The folder is incomplete or its config.json is of another model."
        )
    if further:
        logger.info(
            "Left out: %d tensors of layers that predict further tokens (%s …)",
            len(further), min(further),
        )  # fmt: skip


def ignored_by(model: nn.Module) -> re.Pattern[str] | None:
    """Returns a pattern of the names that ``from_pretrained`` ignores for this class."""
    patterns = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])
    buffers = [name for name, _ in model.named_buffers()]
    patterns += [
        pattern
        for end, pattern in _OLD_BUFFERS.items()
        if any(name.endswith(end) for name in buffers)
    ]
    return re.compile("|".join(f"({pattern})" for pattern in patterns)) if patterns else None


def _check_kind(checkpoint: Checkpoint, name: str, parameter: torch.Tensor) -> None:
    dtype = checkpoint.dtype(name)
    expected: tuple[str, ...] = _FLOATS
    if not parameter.dtype.is_floating_point:
        expected = ("BOOL", "U8") if str(parameter.dtype) == "torch.bool" else _INTEGERS
    if dtype not in expected:
        advice = "The file is damaged, or of another model: download or copy it again."
        if dtype.startswith(("F8", "F4")):
            advice = "FP8 needs scales in the same folder, which are missing here."
        raise CheckpointError(
            f"{checkpoint.file(name)}: {name} has dtype {dtype}, expected one of "
            f"{', '.join(expected)} for {parameter.dtype} {list(parameter.shape)}. {advice}"
        )


def _check_shape(
    checkpoint: Checkpoint, name: str, target: WeightTarget, parameter: torch.Tensor
) -> None:
    plain = target.expert is None and not target.changed
    if plain and checkpoint.shape(name) != tuple(parameter.shape):
        raise CheckpointError(
            f"{checkpoint.file(name)}: {name} has shape {list(checkpoint.shape(name))}, expected "
            f"{list(parameter.shape)} by config.json."
        )


def _further_layers(
    strange: Mapping[str, tuple[int, ...]], parameters: Mapping[str, Any], config: ModelConfig
) -> set[str]:
    """Returns the names, among those without a parameter, of layers that predict further tokens.

    Such a layer comes after the last one and joins an embedding and a hidden state by an extra
    matrix [H, 2H]; an ordinary layer of a deeper model has none.
    """
    ordinary: dict[str, set[str]] = defaultdict(set)
    last: dict[str, int] = defaultdict(lambda: -1)
    for name in parameters:
        if match := _LAYER.fullmatch(name):
            ordinary[match["prefix"]].add(match["inner"])
            last[match["prefix"]] = max(last[match["prefix"]], int(match["layer"]))
    layers: dict[tuple[str, int], set[str]] = defaultdict(set)
    found = set()
    for name in strange:
        match = _LAYER.fullmatch(name)
        if match and match["prefix"] in ordinary:
            layers[match["prefix"], int(match["layer"])].add(name)
        elif re.match(r"(\w+\.)*?mtp(\w*)\.", name):
            found.add(name)
    announced = _announced(config)
    for (prefix, layer), names in layers.items():
        inner = {name.removeprefix(f"{prefix}layers.{layer}."): strange[name] for name in names}
        own = {name: shape for name, shape in inner.items() if name not in ordinary[prefix]}
        after = layer - last[prefix]
        joins = any(map(_JOINS.search, own))
        if after > 0 and (joins or (after <= announced and any(map(_is_join, own.items())))):
            found |= names
    return found


def _is_join(tensor: tuple[str, tuple[int, ...]]) -> bool:
    """Returns whether the tensor is a matrix [H, 2H] directly in the layer."""
    name, shape = tensor
    return bool(_DIRECT.fullmatch(name)) and len(shape) == 2 and shape[1] == 2 * shape[0]


def _announced(config: ModelConfig) -> int:
    """Returns config.json's number of layers that predict further tokens."""
    configs = [config.values, *(v for v in config.values.values() if isinstance(v, dict))]
    counts = [
        value
        for each in configs
        for key, value in each.items()
        if _PREDICTS.search(key) and _COUNT.search(key) and isinstance(value, int)
    ]
    return max(counts, default=0)
