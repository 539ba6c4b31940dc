"""Types adapter_config.json; refuses keys that change results and that ktrt does not compute."""

from __future__ import annotations

import functools
import math
import re
from typing import TYPE_CHECKING, Any, Literal

from ktrt.errors import AdapterError
from ktrt.utils.json_files import JsonObject, shown, typed

if TYPE_CHECKING:
    from pathlib import Path

Packing = Literal["grouped_by_expert", "rank_major"]

# Keys without influence on names and numbers in inference. The configurations of initialisations
# apply only if init_lora_weights names them.
_NEUTRAL = {
    "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "loftq_config",
    "lora_dropout", "lora_ga_config", "megatron_core", "qalora_group_size", "revision",
    "runtime_config", "task_type",
}  # fmt: skip
# Initialisations that leave the base weights unchanged. The others (PiSSA, OLoRA, CorDA, LoftQ,
# LoRA-GA, …) subtract the initial B·A from the base, so the adapter alone does not suffice.
_PLAIN_INIT = (True, False, None, "gaussian", "eva", "orthogonal")
_LARGEST_NUMBER = 1e30  # far below float32's limit


class ConfigFile(JsonObject):
    """The keys of adapter_config.json that ktrt reads. ``positive`` checks the numbers."""

    peft_type: str | None = None
    peft_version: str | None = None
    r: Any = None
    lora_alpha: Any = None
    rank_pattern: dict[str, Any] | None = None
    alpha_pattern: dict[str, Any] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    lora_bias: bool | None = None
    fan_in_fan_out: bool | None = None
    ensure_weight_tying: bool | None = None
    bias: Literal["none", "all", "lora_only"] | None = None
    init_lora_weights: bool | str | None = None
    auto_mapping: dict[str, Any] | None = None
    lora_B_layout: Packing | None = None  # noqa: N815 (the key's own spelling)
    trainable_token_indices: Any = None
    modules_to_save: list[str] | None = None
    target_modules: str | list[str] | None = None
    target_parameters: list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_pattern: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None


def read_config(file: Path, content: object) -> ConfigFile:
    """Types ``content`` (of ``file``). Raises ``AdapterError`` with the key for a value of another
    type, another kind of adapter, and an option that changes results and is not computed."""
    config = typed(content, ConfigFile, str(file), AdapterError)
    if config.peft_type != "LORA":
        raise AdapterError(
            f"{file}: peft_type is {shown(config.peft_type)}; only LORA adapters can be applied."
        )
    if config.init_lora_weights not in _PLAIN_INIT:
        raise AdapterError(
            f"{file}: init_lora_weights is {shown(config.init_lora_weights)}, which changed the "
            "base weights before training. Convert it to an ordinary LoRA with PEFT first "
            "(save_pretrained with path_initial_model_for_weight_conversion)."
        )
    _refuse_other_options(file, config.model_extra or {})
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = getattr(config, key)
        # Lists of targets hold names; layers_pattern holds one expression or several.
        for each in value if key == "layers_pattern" and isinstance(value, list) else [value]:
            if isinstance(each, str):
                check_expression(file, key, each, each)
    return config


def _refuse_other_options(file: Path, others: dict[str, Any]) -> None:
    """Refuses unread keys unless they are neutral, empty, or have PEFT's default: a new PEFT writes
    new keys into every adapter."""
    defaults = _peft_defaults()
    for name, value in others.items():
        if name in _NEUTRAL or not value or (name in defaults and value == defaults[name]):
            continue
        raise AdapterError(
            f"{file}: {name} is {shown(value)}; ktrt does not compute this option, so the adapter "
            "could act differently from how it was trained."
        )


@functools.cache
def _peft_defaults() -> dict[str, Any]:
    """Returns the defaults of the installed PEFT."""
    from peft import LoraConfig

    defaults: dict[str, Any] = LoraConfig().to_dict()
    return defaults


def positive(file: Path, name: str, value: Any, kind: type) -> Any:
    """Converts to a positive number of ``kind``. Raises ``AdapterError`` with file and key."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(_as_float(value)) or value <= 0:
        raise AdapterError(f"{file}: {name} is {shown(value)}, expected a positive number.")
    if kind is int and value != int(value):
        raise AdapterError(f"{file}: {name} is {shown(value)}, expected a whole number.")
    if value > _LARGEST_NUMBER:
        raise AdapterError(f"{file}: {name} is {shown(value)}, too large to be right.")
    return kind(value)


def _as_float(value: float) -> float:
    """Converts to a float; JSON's integers have no upper bound."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def pattern(file: Path, key: str, content: dict[str, Any] | None, kind: type) -> dict[str, Any]:
    """Checks rank_pattern or alpha_pattern: regular expression → number."""
    for name in content or {}:
        check_expression(file, key, name, rf"(.*\.)?({name})$")
    return {
        name: positive(file, f"{key}[{name!r}]", value, kind)
        for name, value in (content or {}).items()
    }


def check_expression(file: Path, key: str, written: str, compiled: str) -> None:
    """Raises ``AdapterError`` unless Python compiles PEFT's form of an expression."""
    try:
        re.compile(compiled)
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterError(
            f"{file}: {key} has {shown(written)}, which is no regular expression ({error})."
        ) from error
