"""Resolves adapter_config.json like PEFT: rank, alpha and scaling of each module."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ktrt.adapter.files.config import pattern, positive, read_config
from ktrt.errors import AdapterError

if TYPE_CHECKING:
    from ktrt.adapter.files.config import ConfigFile, Packing
    from ktrt.adapter.tensors import AdapterFiles

# Arguments for PEFT's own matching of targets.
_TARGETING = (
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
    "target_parameters",
)  # fmt: skip


# Exceptions of PEFT's matching for meaningless values of the right type.
_PEFT_ERRORS = (re.error, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class LoraScale:
    """Rank and alpha of one module, and the factor of B·A."""

    rank: int
    alpha: float
    scaling: float


class LoraSettings:
    """adapter_config.json of a LoRA adapter.

    Raises ``AdapterError`` for another kind of adapter and for options that would change results
    and are not computed.
    """

    def __init__(self, files: AdapterFiles) -> None:
        self.file = files.folder / "adapter_config.json"
        config = read_config(self.file, files.config)
        self.rank: int = positive(self.file, "r", config.r, int)
        self.alpha: float = positive(self.file, "lora_alpha", config.lora_alpha, float)
        self.rank_pattern = pattern(self.file, "rank_pattern", config.rank_pattern, int)
        self.alpha_pattern = pattern(self.file, "alpha_pattern", config.alpha_pattern, float)
        self.use_rslora = bool(config.use_rslora)
        self.use_dora = bool(config.use_dora)
        self.lora_bias = bool(config.lora_bias)
        self.ensure_weight_tying = bool(config.ensure_weight_tying)
        self.modules_to_save = config.modules_to_save or []
        self.bias: str = config.bias or "none"
        self.target_modules = config.target_modules
        self.target_parameters = config.target_parameters or []
        self.token_indices: object = config.trainable_token_indices
        self.peft_version = config.peft_version
        self.lora_b_layout: Packing | None = config.lora_B_layout
        # PEFT always writes auto_mapping; Unsloth replaces PEFT's null there. NeMo Automodel writes
        # few keys, and an additional file.
        self.is_unsloth = bool((config.auto_mapping or {}).get("unsloth_fixed"))
        known = "auto_mapping" in files.config
        known = known or (files.folder / "automodel_peft_config.json").exists()
        self.packs_as_peft = known and not self.is_unsloth
        self.packing_option: Packing | None = None
        # Assumptions about the adapter, for reports.
        self.notes: list[str] = []
        self._peft_config = self._targeting_config(config)

    def _targeting_config(self, config: ConfigFile) -> Any:
        from peft import LoraConfig

        try:
            return LoraConfig(**{name: getattr(config, name) for name in _TARGETING})
        except (TypeError, ValueError) as error:
            raise AdapterError(f"{self.file}: PEFT refuses this configuration: {error}") from error

    def scale(self, module: str) -> LoraScale:
        """Returns rank, alpha and scaling of a module or parameter. PEFT's pattern rule: the first
        key that matches ``(.*\\.)?(key)$``. The scaling is alpha/r, or alpha/√r with rsLoRA."""
        from peft.utils.other import get_pattern_key

        rank = self.rank_pattern.get(get_pattern_key(self.rank_pattern, module), self.rank)
        alpha = self.alpha_pattern.get(get_pattern_key(self.alpha_pattern, module), self.alpha)
        return LoraScale(rank, alpha, alpha / (math.sqrt(rank) if self.use_rslora else rank))

    def targets_module(self, module: str) -> bool:
        """Returns whether the configuration puts LoRA on the Linear of this name."""
        from peft.tuners.tuners_utils import check_target_module_exists

        if not self.target_modules:
            return False
        if self.targets_all_linear:
            return not module.endswith("lm_head")
        try:
            return bool(check_target_module_exists(self._peft_config, module))
        except _PEFT_ERRORS as error:
            raise AdapterError(
                f"{self.file}: PEFT cannot match target_modules {self.target_modules!r}, "
                f"exclude_modules or layers_to_transform: {error}"
            ) from error

    def saves_module(self, module: str) -> bool:
        """Returns whether ``modules_to_save`` names this module, by the end of its name like
        PEFT."""
        return module.endswith(tuple(self.modules_to_save))

    @property
    def targets_all_linear(self) -> bool:
        """Whether target_modules is PEFT's shorthand for every Linear except the output layer."""
        targets = self.target_modules
        return isinstance(targets, str) and targets.lower() == "all-linear"

    def targets_parameter(self, name: str) -> bool:
        """Returns whether ``target_parameters`` names this parameter, exactly or by a suffix."""
        return any(name == t or name.endswith(f".{t}") for t in self.target_parameters)

    def check_against_yaml(self, lora_rank: int | None, lora_alpha: float | None) -> None:
        """Raises ``AdapterError`` if the user's lora_rank or lora_alpha contradicts the
        adapter's."""
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
