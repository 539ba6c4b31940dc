"""Configuration: LLaMA-Factory's YAML keys, checked, as frozen dataclasses.

A leaf of the package that imports neither torch nor transformers. Modules take their own
sub-dataclass (``ModelArgs`` …), never the whole ``Config``.
"""

from ktrt.config.args import (
    AdapterArgs,
    Config,
    ExpertArgs,
    ModelArgs,
    SamplingArgs,
    SamplingOptions,
    SchedulerArgs,
    TemplateArgs,
    override_sampling,
)
from ktrt.config.load import as_overrides, load_config, names_key

__all__ = [
    "AdapterArgs",
    "Config",
    "ExpertArgs",
    "ModelArgs",
    "SamplingArgs",
    "SamplingOptions",
    "SchedulerArgs",
    "TemplateArgs",
    "as_overrides",
    "load_config",
    "names_key",
    "override_sampling",
]
