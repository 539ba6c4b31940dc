"""What adapter_config.json says: rank, alpha and scaling of each module, resolved as PEFT does."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ktrt.errors import AdapterError

if TYPE_CHECKING:
    from pathlib import Path

    from ktrt.adapter.read import AdapterFiles

logger = logging.getLogger(__name__)

# Keys that change neither names nor numbers of an adapter that is only run.
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "lora_dropout",
    "megatron_core", "qalora_group_size", "revision", "task_type",
}  # fmt: skip
_READ = {
    "alpha_pattern", "bias", "ensure_weight_tying", "exclude_modules", "init_lora_weights",
    "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_bias", "modules_to_save", "peft_type",
    "peft_version", "r", "rank_pattern", "target_modules", "target_parameters",
    "trainable_token_indices", "use_dora", "use_rslora",
}  # fmt: skip
# Initialisations that leave the base weights as they are; the others (PiSSA, OLoRA, CorDA, LoftQ,
# LoRA-GA, …) subtract the initial B·A from the base, so that the adapter alone is not enough.
_PLAIN_INIT = (True, False, None, "gaussian", "eva")
# PEFT's own arguments that are handed on to find what the config targets.
_TARGETING = (
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
    "target_parameters",
)  # fmt: skip


@dataclass(frozen=True)
class LoraScale:
    """Rank and alpha of one module, and the factor of B·A."""

    rank: int
    alpha: float
    scaling: float


class LoraSettings:
    """adapter_config.json of a LoRA adapter.

    Raises ``AdapterError`` for another kind of adapter and for options that would change the
    result and are not computed here.
    """

    def __init__(self, files: AdapterFiles) -> None:
        self.file = files.folder / "adapter_config.json"
        config = files.config
        _refuse_other_kinds(self.file, config)
        self.rank = _number(self.file, config, "r", int)
        self.alpha = _number(self.file, config, "lora_alpha", float)
        self.rank_pattern: dict[str, int] = _pattern(self.file, config, "rank_pattern", int)
        self.alpha_pattern: dict[str, float] = _pattern(self.file, config, "alpha_pattern", float)
        self.use_rslora = bool(config.get("use_rslora"))
        self.use_dora = bool(config.get("use_dora"))
        self.lora_bias = bool(config.get("lora_bias"))
        self.modules_to_save = _names(self.file, config, "modules_to_save")
        self.bias: str = str(config.get("bias") or "none")
        self.target_modules: str | list[str] | None = config.get("target_modules")
        self.target_parameters = _names(self.file, config, "target_parameters")
        self.token_indices: object = config.get("trainable_token_indices")
        self.peft_version: str | None = config.get("peft_version")
        self._peft_config = self._targeting_config(config)

    def _targeting_config(self, config: dict[str, Any]) -> Any:
        from peft import LoraConfig

        try:
            return LoraConfig(**{name: config.get(name) for name in _TARGETING})
        except (TypeError, ValueError) as error:
            raise AdapterError(f"{self.file}: PEFT refuses this configuration: {error}") from error

    def scale(self, module: str) -> LoraScale:
        """Rank, alpha and scaling of the module or parameter of this name (PEFT's pattern rule:
        the first key that matches ``(.*\\.)?(key)$``; alpha/r, or alpha/√r with rsLoRA)."""
        from peft.utils.other import get_pattern_key

        rank = self.rank_pattern.get(get_pattern_key(self.rank_pattern, module), self.rank)
        alpha = self.alpha_pattern.get(get_pattern_key(self.alpha_pattern, module), self.alpha)
        return LoraScale(rank, alpha, alpha / (math.sqrt(rank) if self.use_rslora else rank))

    def targets_module(self, module: str) -> bool:
        """Whether the configuration puts LoRA on the Linear of this name."""
        from peft.tuners.tuners_utils import check_target_module_exists

        if not self.target_modules:
            return False
        if self.targets_all_linear:
            return not module.endswith("lm_head")
        try:
            return bool(check_target_module_exists(self._peft_config, module))
        except (re.error, TypeError, ValueError, AttributeError) as error:
            raise AdapterError(
                f"{self.file}: PEFT cannot match target_modules {self.target_modules!r}, "
                f"exclude_modules or layers_to_transform: {error}"
            ) from error

    def saves_module(self, module: str) -> bool:
        """Whether ``modules_to_save`` names this module: by the end of its name, as PEFT does."""
        return module.endswith(tuple(self.modules_to_save))

    @property
    def targets_all_linear(self) -> bool:
        """Whether target_modules is PEFT's shorthand for every Linear but the output layer."""
        targets = self.target_modules
        return isinstance(targets, str) and targets.lower() == "all-linear"

    def targets_parameter(self, name: str) -> bool:
        """Whether ``target_parameters`` names this parameter (exactly or by its last parts)."""
        return any(name == t or name.endswith(f".{t}") for t in self.target_parameters)

    def check_against_yaml(self, lora_rank: int | None, lora_alpha: float | None) -> None:
        """``AdapterError`` if the user's lora_rank or lora_alpha contradicts the adapter's."""
        for key, wanted, name, found in (
            ("lora_rank", lora_rank, "r", self.rank),
            ("lora_alpha", lora_alpha, "lora_alpha", self.alpha),
        ):
            if wanted is not None and wanted != found:
                raise AdapterError(
                    f"{key} is {wanted:g} in the configuration, but {self.file} says {name} "
                    f"{found:g}. The adapter was trained with the latter: remove {key} from the "
                    "configuration."
                )


def _refuse_other_kinds(file: Path, config: dict[str, Any]) -> None:
    if (kind := config.get("peft_type")) != "LORA":
        raise AdapterError(f"{file}: peft_type is {kind!r}; only LORA adapters can be applied.")
    if config.get("init_lora_weights", True) not in _PLAIN_INIT:
        raise AdapterError(
            f"{file}: init_lora_weights is {config['init_lora_weights']!r}, which changed the base "
            "weights before training. Convert it to an ordinary LoRA with PEFT first "
            "(save_pretrained with path_initial_model_for_weight_conversion)."
        )
    unknown = {k: v for k, v in config.items() if k not in _NEUTRAL | _READ and v}
    if unknown.get("fan_in_fan_out") is True:
        unknown.pop("fan_in_fan_out")  # only for GPT-2's Conv1D; PEFT ignores it on Linear
    if unknown:
        name, value = next(iter(unknown.items()))
        raise AdapterError(
            f"{file}: {name} is {value!r}; ktrt does not compute this option, so the adapter would "
            "act differently from how it was trained."
        )


def _number(file: Path, config: dict[str, Any], key: str, kind: type) -> Any:
    return _checked(file, key, config.get(key), kind)


def _checked(file: Path, name: str, value: Any, kind: type) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise AdapterError(f"{file}: {name} is {value!r}, expected a positive number.")
    if kind is int and value != int(value):
        raise AdapterError(f"{file}: {name} is {value!r}, expected a whole number.")
    return kind(value)


def _pattern(file: Path, config: dict[str, Any], key: str, kind: type) -> dict[str, Any]:
    """Regular expression → number."""
    pattern = config.get(key) or {}
    if not isinstance(pattern, dict):
        raise AdapterError(f"{file}: {key} is {pattern!r}, expected an object.")
    for name in pattern:
        try:
            re.compile(name)
        except re.error as error:
            raise AdapterError(
                f"{file}: {key} has {name!r}, which is no regular expression ({error})."
            ) from error
    return {
        name: _checked(file, f"{key}[{name!r}]", value, kind) for name, value in pattern.items()
    }


def _names(file: Path, config: dict[str, Any], key: str) -> list[str]:
    value = config.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise AdapterError(f"{file}: {key} is {value!r}, expected a list of names.")
    return value
