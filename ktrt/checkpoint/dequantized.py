"""Gives transformers the tensors of everything except the routed experts, as ktrt reads them.

So a single reader decides which files and tensors count, and dequantises. transformers' own
dequantisation reads FP8 only if its blocks divide the matrix, includes the experts, and believes a
config.json whose quantisation the tensors no longer have.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ktrt.checkpoint.stored import TORCH_DTYPES
from ktrt.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from torch import nn

    from ktrt.checkpoint.folder import Checkpoint
    from ktrt.checkpoint.names import WeightNames


class _Site(Protocol):
    @property
    def path(self) -> str: ...


def weight_source(
    skeleton: nn.Module,
    specs: Iterable[_Site],
    checkpoint: Checkpoint,
    names: WeightNames,
    infer_dtype: str,
    left_out: Container[str] = (),
) -> dict[str, Any]:
    """Returns arguments of ``from_pretrained`` in place of the folder: config, generation config,
    dtype, and the parameters of ``skeleton`` without the experts of ``specs`` and without the
    tensors ``left_out``."""
    model: Any = skeleton
    config = copy.deepcopy(model.config)
    specs = list(specs)
    wanted = _wanted(model, {spec.path for spec in specs}, checkpoint, names)
    dtype = dtype_of_weights(skeleton, specs, checkpoint, names, infer_dtype)
    return {
        "pretrained_model_name_or_path": None,
        "config": config,
        "state_dict": {
            name: _read(checkpoint, name, dtype) for name in wanted if name not in left_out
        },
        "dtype": dtype,
        "generation_config": _generation_config(checkpoint),
    }


def dtype_of_weights(
    skeleton: nn.Module,
    specs: Iterable[_Site],
    checkpoint: Checkpoint,
    names: WeightNames,
    infer_dtype: str,
) -> torch.dtype:
    """Returns the dtype that everything except the routed experts is loaded in."""
    if infer_dtype != "auto":
        found: torch.dtype = getattr(torch, infer_dtype)
        return found
    model: Any = skeleton
    wanted = _wanted(model, {spec.path for spec in specs}, checkpoint, names)
    return _dtype(model.config, checkpoint, wanted)


def _wanted(model: Any, paths: set[str], checkpoint: Checkpoint, names: WeightNames) -> list[str]:
    """Returns the names of the tensors of parameters outside ``paths``."""
    parameters = set(model.state_dict())
    targets = [(name, names.target(name).name) for name in checkpoint.names()]
    return [n for n, t in targets if t in parameters and t.rpartition(".")[0] not in paths]


def _read(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> torch.Tensor:
    """Returns a view of the mapped file; a dequantised tensor in ``dtype``, since float32 would
    take twice the memory until the last tensor is read."""
    tensor = checkpoint.read(name)
    return tensor.to(dtype) if checkpoint.is_quantized(name) else tensor


def _dtype(config: Any, checkpoint: Checkpoint, names: list[str]) -> torch.dtype:
    """Returns config.json's dtype, else the first float tensor's, like transformers' ``auto``."""
    for each in (config, config.get_text_config()):
        if isinstance(dtype := getattr(each, "dtype", None), torch.dtype):
            return dtype
    plain = (checkpoint.dtype(name) for name in names if not checkpoint.is_quantized(name))
    return next((TORCH_DTYPES[dtype] for dtype in plain if dtype in TORCH_DTYPES), torch.bfloat16)


def _generation_config(checkpoint: Checkpoint) -> Any:
    from transformers import GenerationConfig

    file = checkpoint.folder / "generation_config.json"
    # Without the file transformers takes its keys from config.json.
    older = {} if file.is_file() else {"config_file_name": "config.json"}
    try:
        return GenerationConfig.from_pretrained(
            checkpoint.folder, local_files_only=True, _from_model_config=bool(older), **older
        )
    except Exception as error:  # raised for values that nobody has checked
        named = checkpoint.folder / older.get("config_file_name", file.name)
        raise CheckpointError(
            f"{named}: transformers cannot read the generation settings: {type(error).__name__}: "
            f"{error}. Correct or remove them."
        ) from error
