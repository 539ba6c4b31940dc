"""Loads a model's weights except the routed experts: by transformers, with ktrt's checks."""

from __future__ import annotations

import functools
import re
import sys
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ktrt.checkpoint.dequantized import weight_source
from ktrt.checkpoint.generation_config import check_generation_config
from ktrt.errors import CheckpointError, KtrtError
from ktrt.experts import experts_replaced
from ktrt.layers.coded import coded_linears, put_coded
from ktrt.loading.coded_linears import coded_tensors
from ktrt.utils.patches import Patches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import nn

    from ktrt.checkpoint.codes import Codes
    from ktrt.loading.plan import BaseCheckpoint


def load_without_experts(base: BaseCheckpoint, infer_dtype: str, device: torch.device) -> nn.Module:
    """Loads the model onto ``device`` without its routed experts, which torch never materialises.
    ``CheckpointError``: missing or left-over tensors, wrong shapes."""
    skeleton, checkpoint, specs = base.built.model, base.experts.checkpoint, base.experts.specs
    check_generation_config(checkpoint.folder)
    model_class: Any = type(skeleton)
    experts = [
        rf"^{re.escape(spec.path)}\.({'|'.join(spec.parameters)})(_bias)?$" for spec in specs
    ]
    coded = coded_tensors(skeleton, specs, checkpoint, base.names, infer_dtype)
    source = weight_source(
        skeleton, specs, checkpoint, base.names, infer_dtype, set(coded.values())
    )
    readers = {path: partial(checkpoint.read_codes, name) for path, name in coded.items()}
    try:
        with (
            experts_replaced({s.class_name for s in specs}),
            _unexpected(model_class, experts),
            _coded(model_class, readers, source["dtype"]),
        ):
            model, info = model_class.from_pretrained(
                **source,
                device_map={"": str(device)} if device.type != "cpu" else None,
                local_files_only=True,
                output_loading_info=True,
            )
    # Any error may come from config.json's values; only memory is not the folder's fault.
    except Exception as error:
        if isinstance(error, (KtrtError, MemoryError, torch.OutOfMemoryError)):
            raise
        raise CheckpointError(
            f"{checkpoint.folder}: transformers cannot load {model_class.__name__}: "
            f"{type(error).__name__}: {error}. The folder is damaged, or its config.json is of "
            "another model."
        ) from error
    for what in ("missing_keys", "unexpected_keys"):
        if keys := sorted(info[what]):
            raise CheckpointError(
                f"{checkpoint.folder}: {len(keys)} {what.replace('_', ' ')} for "
                f"{model_class.__name__}: {', '.join(keys[:5])}{', …' if len(keys) > 5 else ''}. "
                "The folder is incomplete or its config.json is of another model."
            )
    loaded: nn.Module = model
    for path, linear in coded_linears(loaded):
        linear.origin = f"{checkpoint.file(coded[path])}: {coded[path]}"
        if device.type != "cpu":
            linear.place(device)
    return loaded


@contextmanager
def _coded(
    model_class: Any, readers: Mapping[str, Callable[[], Codes]], dtype: torch.dtype
) -> Iterator[None]:
    """Within the block, models of the class are built with these layers coded, so that transformers
    neither expects nor makes their weights."""
    original = model_class.__init__

    def build(model: Any, *args: Any, **kwargs: Any) -> None:
        original(model, *args, **kwargs)
        put_coded(model, readers, dtype)

    with Patches() as patches:
        if readers:
            patches.set(model_class, "__init__", functools.wraps(original)(build))
        yield


@contextmanager
def _unexpected(model_class: Any, patterns: list[str]) -> Iterator[None]:
    """Silences transformers: these keys are expected to have no parameter, and its report on others
    would repeat ktrt's error."""
    from transformers.utils import logging as library

    name = "_keys_to_ignore_on_load_unexpected"
    with Patches() as patches:
        patches.set(model_class, name, [*(getattr(model_class, name) or []), *patterns])
        patches.add(partial(library.set_verbosity, library.get_verbosity()))
        library.set_verbosity_error()
        if library.is_progress_bar_enabled() and not sys.stderr.isatty():
            patches.add(library.enable_progress_bar)
            library.disable_progress_bar()
        yield
