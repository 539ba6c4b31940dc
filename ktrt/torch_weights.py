"""The weights of a model but its routed experts': loaded by transformers, checked by ktrt."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ktrt.dequantized import dequantized_source
from ktrt.errors import CheckpointError
from ktrt.generation_file import check_generation_config
from ktrt.moe import experts_replaced

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn

    from ktrt.checkpoint import Checkpoint
    from ktrt.checkpoint_names import WeightNames
    from ktrt.moe import ExpertsSpec
    from ktrt.prepare import BaseCheckpoint


def load_without_experts(base: BaseCheckpoint, infer_dtype: str, device: torch.device) -> nn.Module:
    """All weights but the routed experts', which are never materialised in torch, on ``device``.
    ``CheckpointError``: missing or left-over tensors, wrong shapes."""
    skeleton, checkpoint, specs = base.built.model, base.experts.checkpoint, base.experts.specs
    check_generation_config(checkpoint.folder)
    model_class: Any = type(skeleton)
    parameters = r"(gate_up_proj|up_proj|down_proj)(_bias)?"
    experts = [rf"^{path}\.{parameters}$" for path in _escaped(specs)]
    if checkpoint.is_quantized():
        source = dequantized_source(skeleton, specs, checkpoint, base.names, infer_dtype)
    else:
        dtype = "auto" if infer_dtype == "auto" else getattr(torch, infer_dtype)
        source = {"pretrained_model_name_or_path": checkpoint.folder, "dtype": dtype}
    try:
        with experts_replaced({s.class_name for s in specs}), _unexpected(model_class, experts):
            model, info = model_class.from_pretrained(
                **source,
                device_map={"": str(device)} if device.type != "cpu" else None,
                trust_remote_code=base.built.trust,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{checkpoint.folder}: {_wrong_shapes(skeleton, checkpoint, base.names) or error}"
        ) from error
    for what in ("missing_keys", "unexpected_keys"):
        if keys := sorted(info[what]):
            raise CheckpointError(
                f"{checkpoint.folder}: {len(keys)} {what.replace('_', ' ')} for "
                f"{model_class.__name__}: {', '.join(keys[:5])}{', …' if len(keys) > 5 else ''}. "
                "The folder is incomplete or its config.json is of another model."
            )
    loaded: nn.Module = model
    return loaded


def _escaped(specs: Iterable[ExpertsSpec]) -> list[str]:
    return [spec.path.replace(".", r"\.") for spec in specs]


@contextmanager
def _unexpected(model_class: Any, patterns: list[str]) -> Iterator[None]:
    """transformers loads in silence: these keys are expected to find no parameter, and a report on
    others would come before the error that says the same."""
    from transformers.utils import logging as library

    before, bars = model_class._keys_to_ignore_on_load_unexpected, library.is_progress_bar_enabled()
    level = library.get_verbosity()
    model_class._keys_to_ignore_on_load_unexpected = [*(before or []), *patterns]
    library.set_verbosity_error()
    if not sys.stderr.isatty():
        library.disable_progress_bar()
    try:
        yield
    finally:
        model_class._keys_to_ignore_on_load_unexpected = before
        library.set_verbosity(level)
        if bars:
            library.enable_progress_bar()


def _wrong_shapes(skeleton: nn.Module, checkpoint: Checkpoint, names: WeightNames) -> str:
    """The tensors whose shape is not their parameter's; empty if there are none."""
    wrong = []
    parameters = skeleton.state_dict()
    for name in checkpoint.names():
        target = names.target(name)
        plain = target.expert is None and not target.changed
        parameter = parameters.get(target.name) if plain else None
        if parameter is not None and checkpoint.shape(name) != tuple(parameter.shape):
            wrong.append(
                f"{name} has shape {list(checkpoint.shape(name))}, expected "
                f"{list(parameter.shape)} by config.json"
            )
    return "; ".join(wrong[:5])
