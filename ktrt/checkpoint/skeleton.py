"""Builds the plain model of a folder on the meta device: finds transformers' class for it and
refuses classes that ktrt cannot chat with."""

from __future__ import annotations

import copy
import inspect
import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ktrt.checkpoint.config import (
    AUTO_CLASSES,
    check_sizes,
    is_class,
    read_model_config,
)
from ktrt.errors import CheckpointError, KtrtError
from ktrt.utils.json_files import shown

if TYPE_CHECKING:
    from pathlib import Path

    from ktrt.checkpoint.config import ModelConfig

logger = logging.getLogger(__name__)

# huggingface_hub's message for a missing file of auto_map; its address cannot be opened.
_LACKS_FILE = re.compile(r"does not appear to have a file named ([\w./-]+\.py)")


@dataclass(frozen=True)
class Skeleton:
    """``model``: transformers' own class on the meta device, with its experts. ``trust``: the
    folder's code may run. ``config``: the content of config.json."""

    model: nn.Module
    trust: bool
    config: ModelConfig


def build_skeleton(
    folder: Path,
    trust_remote_code: bool,
    config: ModelConfig | None = None,
    deepest: int | None = None,
) -> Skeleton:
    """Builds the folder's model. ``config``: the folder's, if already read. ``deepest``: the
    largest layer number in its tensors' names.

    Raises ``CheckpointError`` for a folder that is no model, a config that transformers refuses,
    and a model type without a class that continues text.
    """
    config = config or read_model_config(folder)
    check_sizes(config, deepest)
    trust = trust_remote_code and not config.known
    if trust_remote_code and not trust:
        logger.info(
            "trust_remote_code is ignored: transformers has its own code for %s", config.model_type
        )
    if not config.known and not trust:
        raise CheckpointError(_unknown(config))
    built: Any = None
    try:
        built = _library_config(config, trust)
        auto_class = _auto_class(config, built, trust)
        with torch.device("meta"):
            model = auto_class.from_config(built, trust_remote_code=trust)
    except KtrtError:
        raise
    # Config and model classes of 200 families get unchecked values here.
    except Exception as error:
        raise CheckpointError(_cannot_build(config, built, error)) from error
    _check_continues_text(config, model)
    return Skeleton(model, trust, config)


def _library_config(config: ModelConfig, trust: bool) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    folder = config.file.parent
    if trust:
        return AutoConfig.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    # The config class changes its argument.
    values = copy.deepcopy(config.values)
    return CONFIG_MAPPING[config.model_type].from_dict(values, name_or_path=str(folder))


def _unknown(config: ModelConfig) -> str:
    from transformers import __version__

    does = "update transformers, or use a model that it has a class for"
    if config.own_code:
        does = (
            "the folder brings Python code (auto_map), which trust_remote_code: true runs; ktrt "
            "can chat with it only if that code runs its experts through transformers' experts "
            f"interface. Otherwise {does}"
        )
    return (
        f"{config.file}: transformers {__version__} has no class for {config.describe()}, so ktrt "
        f"cannot run this model: {does}."
    )


def _cannot_build(config: ModelConfig, built: Any, error: Exception) -> str:
    """Returns the library's message, and the keys that may be the cause."""
    text = str(error).strip() or "no message"
    if missing := _LACKS_FILE.search(text):
        return (
            f"{config.file}: auto_map names {missing[1]}, which the folder lacks. Download the "
            "folder again with its Python files."
        )
    where = "a model" if built is not None else "the configuration"
    reason = f"{config.file}: transformers cannot build {where} of type {config.model_type}"
    suspects = [] if isinstance(error, ImportError) else _suspects(config)
    hint = f" Unlike the default: {'; '.join(suspects)}." if suspects else ""
    return f"{reason}: {type(error).__name__}: {text}.{hint}"


def _suspects(config: ModelConfig) -> list[str]:
    """Lists keys whose value has another type than the config class's default."""
    from transformers import CONFIG_MAPPING

    if not config.known:
        return []
    try:
        defaults = CONFIG_MAPPING[config.model_type]().to_dict()
    except Exception:  # noqa: BLE001 (some config classes cannot be built without arguments)
        return []
    found = []
    for values, usual in [(config.values, defaults)] + [
        (value, defaults[key])
        for key, value in config.values.items()
        if isinstance(value, dict) and isinstance(defaults.get(key), dict)
    ]:
        for key, value in values.items():
            default = usual.get(key)
            if default is not None and not _alike(value, default):
                found.append((value is None, f"{key} is {shown(value)}, usually {shown(default)}"))
    # null often means that a component is left out: the others come first.
    return [text for _, text in sorted(found, key=lambda each: each[0])][:3]


def _alike(value: object, default: object) -> bool:
    if isinstance(value, bool) or isinstance(default, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    numbers = (int, float)
    if isinstance(value, numbers) and isinstance(default, numbers):
        return value >= 0 or default < 0
    return type(value) is type(default)


def _auto_class(config: ModelConfig, built: Any, trust: bool) -> Any:
    import transformers

    for name in AUTO_CLASSES:
        # The oldest supported transformers lacks MultimodalLM.
        auto_class: Any = getattr(transformers, f"AutoModelFor{name}", None)
        if auto_class is None or not (trust or type(built) in auto_class._model_mapping):
            continue
        if trust or _takes_whole_folder(config, built, auto_class._model_mapping[type(built)]):
            return auto_class
    raise CheckpointError(
        f"{config.file}: transformers {transformers.__version__} has no class that generates text "
        f"for {config.describe()}; ktrt cannot run this model. Update transformers, or use a model "
        "that it has a class for."
    )


def _takes_whole_folder(config: ModelConfig, built: Any, model_class: Any) -> bool:
    """Returns whether the class knows all tensors of a folder with this config. A text class of a
    multimodal model may not say which names to ignore."""
    if built.get_text_config() is built or is_class(model_class.__name__, config.architectures):
        return True
    ignored = getattr(model_class, "_keys_to_ignore_on_load_unexpected", None) or []
    # The class of the whole model takes the whole config, the text class the text config.
    whole = getattr(model_class, "config_class", None) is type(built)
    return whole or any("vis" in pattern for pattern in ignored)


def _check_continues_text(config: ModelConfig, model: nn.Module) -> None:
    """Refuses registered classes that hold several models, or do not write from left to right."""
    arguments = inspect.signature(type(model).forward).parameters
    reason = ""
    if type(model).forward is nn.Module.forward:
        reason = "is several models in one and has no forward"
    elif "decoder_input_ids" in arguments:
        reason = "takes decoder_input_ids: it does not continue its input token by token"
    if reason:
        raise CheckpointError(
            f"{config.file}: {type(model).__name__} {reason}; ktrt's chat cannot run it."
        )
