"""Maps tensors on disk to parameters by transformers' own conversion mapping, applied forward to
each name; needs no list of model families."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn


@dataclass(frozen=True)
class WeightTarget:
    """The parameter that a tensor on disk is loaded into, or one expert's slice of it.

    With ``expert``, the tensor is piece ``piece`` of ``pieces`` along the output rows of that
    expert (gate_up_proj from gate and up: two pieces). ``changed``: the library also changes the
    numbers' order (transposes, splits, …).
    """

    name: str
    expert: int | None = None
    piece: int = 0
    pieces: int = 1
    changed: bool = False


class WeightNames:
    """transformers' renamings and conversions for one model, applied forward to single names.

    ``model`` is the plain model on the meta device, with transformers' experts.
    """

    def __init__(self, model: nn.Module) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = get_model_conversion_mapping(model)
        self.model = model
        self._parameters: Mapping[str, Any] = model.state_dict()
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._prefix = str(getattr(model, "base_model_prefix", ""))
        self._targets: dict[str, WeightTarget] = {}

    def target(self, name: str) -> WeightTarget:
        """Returns the parameter that a tensor of this name is loaded into; the renamed name if
        there is no such parameter."""
        if name not in self._targets:
            self._targets[name] = self._find_target(name)
        return self._targets[name]

    def _find_target(self, name: str) -> WeightTarget:
        from transformers.core_model_loading import rename_source_key

        renamed, pattern = rename_source_key(
            name, self._renamings, self._converters, self._prefix, self._parameters
        )
        if renamed not in self._parameters and name in self._parameters:
            return WeightTarget(name)
        if pattern is None or renamed not in self._parameters:
            return WeightTarget(renamed)
        for renaming in self._renamings:
            name, _ = renaming.rename_source_key(name)
        expert = re.search(pattern.replace("*.", r"(?P<expert>\d+)\."), name)
        converter = self._converter(pattern)
        if not expert or "expert" not in expert.groupdict() or not _stacks_experts(converter):
            return WeightTarget(renamed, changed=True)
        return WeightTarget(
            renamed,
            expert=int(expert["expert"]),
            piece=converter.source_patterns.index(pattern),
            pieces=len(converter.source_patterns),
        )

    def conversion(self, name: str) -> tuple[Any, str, tuple[str, ...]]:
        """Returns, for a name whose target is ``changed``: transformers' converter, its pattern
        that matches the name, and all of its target parameters."""
        from transformers.core_model_loading import rename_source_key

        renamed, pattern = rename_source_key(
            name, self._renamings, self._converters, self._prefix, self._parameters
        )
        assert pattern is not None, name
        converter = self._converter(pattern)
        first, *others = converter.target_patterns
        return converter, pattern, (renamed, *(renamed.replace(first, other) for other in others))

    def _converter(self, pattern: str) -> Any:
        return next(c for c in self._converters if pattern in c.source_patterns)


def _stacks_experts(converter: Any) -> bool:
    """Returns whether the conversion only stacks experts [E, …] and joins their rows in order."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    operations = list(converter.operations)
    if len(converter.source_patterns) > 1:
        join = operations.pop()
        if not isinstance(join, Concatenate) or join.dim != 1:
            return False
    return (
        len(operations) == 1
        and isinstance(operations[0], MergeModulelist)
        and not operations[0].dim
    )
