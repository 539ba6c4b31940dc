"""Finds the linear layers outside the routed experts that keep the checkpoint's codes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ktrt.checkpoint.dequantized import dtype_of_weights
from ktrt.engine.formats import format_named
from ktrt.layers.coded import may_stay_coded

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from ktrt.checkpoint.folder import Checkpoint
    from ktrt.checkpoint.names import WeightNames
    from ktrt.experts import ExpertsSpec


def coded_tensors(
    skeleton: nn.Module,
    specs: Sequence[ExpertsSpec],
    checkpoint: Checkpoint,
    names: WeightNames,
    infer_dtype: str,
) -> dict[str, str]:
    """Returns the tensor's name by the layer's path: whole weights of linear layers, in a model
    that runs in bfloat16."""
    if not checkpoint.is_quantized():
        return {}
    if dtype_of_weights(skeleton, specs, checkpoint, names, infer_dtype) != torch.bfloat16:
        return {}
    found = {}
    for name in checkpoint.names():
        if checkpoint.coded(name) is None:
            continue
        path = names.target(name).name.removesuffix(".weight")
        if _fits(skeleton, path, checkpoint.shape(name)):
            found[path] = name
    return found


def coded_sizes(checkpoint: Checkpoint, tensors: Mapping[str, str]) -> dict[str, tuple[str, int]]:
    """Returns format and packed bytes of these layers, by path."""
    found: dict[str, tuple[str, int]] = {}
    for path, name in tensors.items():
        each = format_named(str(checkpoint.coded(name)))
        rows, columns = checkpoint.shape(name)
        size = each.code_bytes(rows, columns) + each.scale_bytes(rows, columns)
        found[path] = each.name, size
    return found


def dequantised_weights(
    skeleton: nn.Module, checkpoint: Checkpoint, names: WeightNames
) -> set[int]:
    """Returns the ids of the parameters that are no pages of the checkpoint's files, since reading
    dequantises them."""
    parameters = dict(skeleton.named_parameters())
    targets = (names.target(n).name for n in checkpoint.names() if checkpoint.is_quantized(n))
    return {id(parameters[target]) for target in targets if target in parameters}


def _fits(skeleton: Any, path: str, shape: tuple[int, ...]) -> bool:
    try:
        module = skeleton.get_submodule(path)
    except AttributeError:
        return False
    if not may_stay_coded(path, module) or shape != tuple(module.weight.shape):
        return False
    table = skeleton.get_input_embeddings()
    return getattr(table, "weight", None) is not module.weight
