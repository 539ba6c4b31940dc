"""The plain model of a folder on the meta device: which class of transformers it is, and whether
ktrt can chat with it."""

from __future__ import annotations

import inspect
import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ktrt.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)

# Where transformers registers classes that generate text. The first that fits is taken, so that a
# multimodal model with a class for its text alone is loaded as that.
_AUTO_CLASSES = ("CausalLM", "ImageTextToText", "MultimodalLM")
# quantization_config.quant_method of the formats that ktrt dequantises while reading.
_QUANT_METHODS = ("fp8", "mxfp4")


@dataclass(frozen=True)
class Skeleton:
    """``model``: transformers' own class on the meta device, experts not replaced. ``trust``: the
    folder's own code may run. ``weight_block_size``: rows and columns of one FP8 scale."""

    model: nn.Module
    trust: bool
    weight_block_size: tuple[int, int]


def build_skeleton(folder: Path, trust_remote_code: bool) -> Skeleton:
    """Raises ``CheckpointError`` for a folder that is no model, a config that transformers refuses,
    a model type without a class that continues text, and a quantisation that is not read."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    file = folder / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        model_type = raw["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} cannot be read or names no model_type ({error!r}): not a model folder."
        ) from error
    block = _weight_block_size(file, raw.get("quantization_config") or {})
    trust = trust_remote_code and model_type not in CONFIG_MAPPING
    if trust_remote_code and not trust:
        logger.info(
            "trust_remote_code is ignored: transformers has its own code for %s", model_type
        )
    # The library checks configurations with exceptions of its own, derived from nothing else.
    refusals = (StrictDataclassError, OSError, ValueError, ImportError, KeyError, TypeError)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust, local_files_only=True)
        auto_class = _auto_class(file, config, trust)
        with torch.device("meta"):
            model = auto_class.from_config(config, trust_remote_code=trust)
    except refusals as error:
        raise CheckpointError(
            f"{folder}: transformers cannot build a model of type {model_type}: {error}"
        ) from error
    _check_continues_text(file, model)
    return Skeleton(model, trust, block)


def _weight_block_size(file: Path, quantization: dict[str, Any]) -> tuple[int, int]:
    method = quantization.get("quant_method")
    if quantization and method not in _QUANT_METHODS:
        raise CheckpointError(
            f"{file}: the weights are quantised (quant_method {method}); ktrt reads "
            f"{' and '.join(_QUANT_METHODS)}. Use the BF16 checkpoint."
        )
    rows, columns = quantization.get("weight_block_size") or (128, 128)
    return int(rows), int(columns)


def _auto_class(file: Path, config: Any, trust: bool) -> Any:
    import transformers

    for name in _AUTO_CLASSES:
        # MultimodalLM is younger than the oldest transformers that ktrt works with.
        auto_class: Any = getattr(transformers, f"AutoModelFor{name}", None)
        if auto_class is None or not (trust or type(config) in auto_class._model_mapping):
            continue
        if trust or _takes_whole_folder(config, auto_class._model_mapping[type(config)]):
            return auto_class
    raise CheckpointError(
        f"{file}: transformers has no class that generates text for model type "
        f"{config.model_type}; ktrt is for language models."
    )


def _takes_whole_folder(config: Any, model_class: Any) -> bool:
    """Whether the class knows all tensors of a folder with this config: not so one for the text of
    a multimodal model that does not say which names belong to the rest."""
    if config.get_text_config() is config:
        return True
    ignored = getattr(model_class, "_keys_to_ignore_on_load_unexpected", None) or []
    architectures = getattr(config, "architectures", None) or [model_class.__name__]
    return model_class.__name__ in architectures or any("vis" in pattern for pattern in ignored)


def _check_continues_text(file: Path, model: nn.Module) -> None:
    """Some registered classes are several models in one, or do not write from left to right."""
    arguments = inspect.signature(type(model).forward).parameters
    reason = ""
    if type(model).forward is nn.Module.forward:
        reason = "is several models in one and has no forward of its own"
    elif "decoder_input_ids" in arguments:
        reason = "takes decoder_input_ids: it does not continue its input token by token"
    if reason:
        raise CheckpointError(
            f"{file}: {type(model).__name__} {reason}; ktrt's chat cannot run it."
        )
