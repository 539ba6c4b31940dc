"""Holds a folder's tensors against the model: each is a parameter of right kind and shape, or is
left out for a reason that is known, or the folder is refused."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from ktrt.checkpoint.formats import FLOAT_DTYPES
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
# A layer that predicts further tokens joins two inputs, which no ordinary layer does.
_JOINS = re.compile(r"^(eh_proj|enorm|hnorm|shared_head\.|embed_tokens\.)|(^|\.)mtp")
_DIRECT = re.compile(r"\w+\.weight")
_PREDICTS = re.compile(r"nextn|mtp")
_COUNT = re.compile(r"layers|modules|predict")
# What transformers leaves out for every class: buffers that older releases saved.
_OLD_BUFFERS = {
    "rotary_emb.inv_freq": r"rotary_emb\.inv_freq",
    "position_ids": r"(^|\.)position_ids$",
}


def deepest_layer(checkpoint: Checkpoint) -> int:
    """The largest number in the tensors' names: no model of these tensors has more layers."""
    numbers = {word for name in checkpoint.names() for word in name.split(".") if word.isdecimal()}
    return max(map(int, numbers), default=0)


def check_contents(checkpoint: Checkpoint, names: WeightNames, config: ModelConfig) -> None:
    """Raises ``CheckpointError`` naming the tensor for one that the model has no place for, or one
    of another shape or kind of numbers than its parameter; says what is left out on purpose."""
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
    # Experts by themselves are one parameter here.
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
    """The parameter names that transformers' class leaves out, as ``from_pretrained`` does."""
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
            advice = "FP8 is read with its scales beside it, which are missing here."
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
    """Of names (with shapes) without a parameter, the ones of layers after the last that predict
    further tokens.

    Such a layer joins an embedding and a hidden state, by a matrix of its own [H, 2H]; an ordinary
    layer of a deeper model does not.
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
    """Whether it is a matrix [H, 2H] that belongs to the layer itself."""
    name, shape = tensor
    return bool(_DIRECT.fullmatch(name)) and len(shape) == 2 and shape[1] == 2 * shape[0]


def _announced(config: ModelConfig) -> int:
    """How many layers that predict further tokens config.json announces."""
    parts = [config.values, *(v for v in config.values.values() if isinstance(v, dict))]
    counts = [
        value
        for part in parts
        for key, value in part.items()
        if _PREDICTS.search(key) and _COUNT.search(key) and isinstance(value, int)
    ]
    return max(counts, default=0)
