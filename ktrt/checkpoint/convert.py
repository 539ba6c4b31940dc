"""Converts expert parameters that are stored in another order than the model's, with transformers'
own conversion, one parameter at a time."""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ktrt.checkpoint.stored import (
    TORCH_DTYPES,
    ConvertedTensor,
    StoredTensor,
    TransposedTensor,
)
from ktrt.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

# gate_up_proj (or up_proj) and down_proj.
_GROUPS_OF_A_LAYER = 2


@dataclass
class Group:
    """Sources of one conversion, each (pattern, name), and its ``targets``."""

    converter: Any
    targets: tuple[str, ...]
    sources: list[tuple[str, str]] = field(default_factory=list)


class Conversions:
    """Groups of stored tensors, and the parameters that transformers' code converts them to.

    ``model`` is the plain model on the meta device: some conversions need its shapes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._groups: dict[tuple[str, ...], Group] = {}
        # Stacked experts are large: only the current layer's are kept.
        self._made: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}

    def add(self, converter: Any, pattern: str, targets: tuple[str, ...], name: str) -> None:
        """Adds the stored tensor ``name``, which matches ``pattern``, to a conversion."""
        group = self._groups.setdefault(targets, Group(converter, targets))
        group.sources.append((pattern, name))

    def tensors(
        self, stored: dict[str, StoredTensor]
    ) -> Iterator[tuple[str, StoredTensor, list[str]]]:
        """Yields (parameter, tensor, names of its sources) of every converted parameter.

        Raises ``CheckpointError`` if transformers cannot convert tensors of these shapes, or if
        their quantisation is unknown.
        """
        for targets, group in self._groups.items():
            names = [name for _, name in group.sources]
            first = stored[names[0]]
            for name in names:
                if stored[name].dtype not in TORCH_DTYPES:
                    raise CheckpointError(
                        f"{stored[name].file}: {name} has dtype {stored[name].dtype}, expected one "
                        f"of {', '.join(TORCH_DTYPES)}."
                    )
            shapes = self._convert(group, lambda name: _on_meta(stored[name]), str(first.file))
            for target in targets:

                def read(target: str = target, group: Group = group) -> torch.Tensor:
                    return self._read(group, stored)[target]

                shape = shapes[target].shape
                made = ConvertedTensor(first.file, first.dtype, shape, read)
                yield target, _with_codes(made, group, first), names

    def rearrange(
        self, targets: tuple[str, ...], values: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Converts ``values``, one for each source, to ``targets``.

        Raises ``CheckpointError`` if transformers cannot convert them.
        """
        return self._convert(self._groups[targets], lambda name: values[name], targets[0])

    def _read(self, group: Group, stored: dict[str, StoredTensor]) -> dict[str, torch.Tensor]:
        if group.targets not in self._made:
            if len(self._made) == _GROUPS_OF_A_LAYER:
                self._made.clear()
            file = str(stored[group.sources[0][1]].file)
            self._made[group.targets] = self._convert(group, lambda name: stored[name].read(), file)
        return self._made[group.targets]

    def _convert(self, group: Group, load: Any, file: str) -> dict[str, torch.Tensor]:
        from transformers.core_model_loading import dot_natural_key

        converter = copy.deepcopy(group.converter)
        collected: dict[str, list[torch.Tensor]] = defaultdict(list)
        for pattern, name in sorted(group.sources, key=lambda pair: dot_natural_key(pair[1])):
            collected[pattern].append(load(name))
        converter.collected_tensors = collected
        try:
            made = converter.convert(group.targets[0], model=self._model, config=self._model.config)
        except (ValueError, RuntimeError, KeyError, IndexError) as error:
            names = sorted(name for _, name in group.sources)
            raise CheckpointError(
                f"{file}: transformers cannot make {group.targets[0]} of {names[0]} "
                f"({len(names)} such): {error}. The folder is incomplete, or its config.json is of "
                "another model."
            ) from error
        result = {}
        for target, value in made.items():
            result[target] = value[0] if isinstance(value, list) else value
        if missing := set(group.targets) - set(result):
            raise CheckpointError(f"{file}: transformers' conversion did not make {missing}.")
        return result


def _on_meta(tensor: StoredTensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=TORCH_DTYPES[tensor.dtype], device="meta")


def _with_codes(made: ConvertedTensor, group: Group, source: StoredTensor) -> StoredTensor:
    """Returns ``made``, with the codes of its ``source`` if the conversion only swaps the last two
    dimensions of one quantised stack."""
    from transformers.core_model_loading import Transpose

    operations = group.converter.operations
    if source.coded is None or len(group.sources) != 1 or len(operations) != 1:
        return made
    (swap,) = operations
    if not isinstance(swap, Transpose) or {swap.dim0 % 3, swap.dim1 % 3} != {1, 2}:
        return made
    # With check_dims transformers leaves a stack that has the model's shape already.
    if swap.check_dims and source.shape == made.shape:
        return source
    return TransposedTensor(source, made)
