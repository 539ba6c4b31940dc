"""What transformers loads where a checkpoint is quantised: everything but the routed experts,
dequantised to the compute dtype."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from ktrt.checkpoint import Checkpoint
    from ktrt.checkpoint_names import WeightNames


class _Site(Protocol):
    @property
    def path(self) -> str: ...


def dequantized_source(
    skeleton: nn.Module,
    specs: Iterable[_Site],
    checkpoint: Checkpoint,
    names: WeightNames,
    infer_dtype: str,
) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that stand for the folder: config without quantisation,
    generation config, dtype, and the tensors (those of ``specs`` left out).

    transformers' own dequantisation reads FP8 only where its blocks divide the matrix, and does the
    experts too.
    """
    model: Any = skeleton
    config = copy.deepcopy(model.config)
    dtype = getattr(torch, infer_dtype) if infer_dtype != "auto" else _config_dtype(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return {
        "pretrained_model_name_or_path": None,
        "config": config,
        "state_dict": _tensors(model, {spec.path for spec in specs}, checkpoint, names, dtype),
        "dtype": dtype,
        "generation_config": _generation_config(checkpoint),
    }


def _tensors(
    model: Any, paths: set[str], checkpoint: Checkpoint, names: WeightNames, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    ignored = model._keys_to_ignore_on_load_unexpected or []
    parameters = set(model.state_dict())
    state = {}
    for name in checkpoint.names():
        target = names.target(name).name
        if target in parameters and target.rpartition(".")[0] not in paths:
            tensor = checkpoint.read(name)
            state[name] = tensor.to(dtype) if checkpoint.is_quantized(name) else tensor
        elif target not in parameters and not any(re.search(p, target) for p in ignored):
            # For transformers to report, without reading it: it may be as large as the experts.
            state[name] = torch.empty(0)
    return state


def _config_dtype(config: Any) -> torch.dtype:
    for part in (config, config.get_text_config()):
        if isinstance(dtype := getattr(part, "dtype", None), torch.dtype):
            return dtype
    return torch.bfloat16


def _generation_config(checkpoint: Checkpoint) -> Any:
    from transformers import GenerationConfig

    if (checkpoint.folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(checkpoint.folder, local_files_only=True)
    return None
