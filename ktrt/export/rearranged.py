"""Merges into tensors that transformers rearranges while loading: stacks with swapped last
dimensions, several modules in one tensor, …

transformers' own conversion is applied to the numbers' positions, which tells the origin of each
number of a parameter. So no conversion has to be known or reversed.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch

from ktrt.errors import CheckpointError
from ktrt.export.rounding import rounded

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ktrt.checkpoint.convert import Conversions
    from ktrt.checkpoint.folder import Checkpoint
    from ktrt.experts import ExpertsSpec
    from ktrt.export.changes import Changes


class RearrangedTensors:
    """The sources of one conversion to ``parameters``; ``dtypes``: source name → dtype to write.
    They are in memory from the first ``take`` to the last."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        conversions: Conversions,
        parameters: tuple[str, ...],
        dtypes: Mapping[str, str],
        changes: Changes,
        specs: Mapping[str, ExpertsSpec],
    ) -> None:
        self._checkpoint, self._conversions = checkpoint, conversions
        self._parameters, self._dtypes = parameters, dtypes
        self._changes, self._specs = changes, specs
        self._merged: dict[str, torch.Tensor] | None = None

    def take(self, name: str) -> torch.Tensor:
        """Returns the merged tensor, rounded once; each can be taken once."""
        if self._merged is None:
            self._merged = self._merge()
        return rounded(name, self._merged.pop(name), self._dtypes[name])

    def _merge(self) -> dict[str, torch.Tensor]:
        shapes = {name: self._checkpoint.shape(name) for name in self._dtypes}
        sizes = [prod(shape) for shape in shapes.values()]
        # In the file's dtype if it is also the dtype to write, to save memory.
        same = {self._checkpoint.dtype(name) for name in shapes} | set(self._dtypes.values())
        values = [self._checkpoint.read(name).reshape(-1) for name in shapes]
        numbers = torch.cat(values if len(same) == 1 else [value.float() for value in values])
        del values
        for parameter, positions in self._positions(shapes, sizes).items():
            if self._changes.touches(parameter):
                self._add(parameter, positions, numbers)
        return {
            name: values.view(shape)
            for (name, shape), values in zip(shapes.items(), numbers.split(sizes), strict=True)
        }

    def _positions(
        self, shapes: Mapping[str, tuple[int, ...]], sizes: list[int]
    ) -> dict[str, torch.Tensor]:
        """Returns, for each parameter, the positions of its numbers in the joined sources."""
        total = sum(sizes)
        dtype = torch.int32 if total < 2**31 else torch.int64
        ranges = torch.arange(total, dtype=dtype).split(sizes)
        sources = {
            name: positions.view(shape)
            for (name, shape), positions in zip(shapes.items(), ranges, strict=True)
        }
        made = self._conversions.rearrange(self._parameters, sources)
        seen = torch.zeros(total, dtype=torch.bool)
        for positions in made.values():
            if positions.dtype == dtype:
                seen[positions.reshape(-1)] = True
        if int(seen.sum()) != total or sum(p.numel() for p in made.values()) != total:
            first = next(iter(shapes))
            raise CheckpointError(
                f"{self._checkpoint.file(first)}: transformers does not only rearrange {first} "
                f"({len(shapes)} such) to make {self._parameters[0]}, so the adapter cannot be "
                "merged into it."
            )
        return made

    def _add(self, parameter: str, positions: torch.Tensor, numbers: torch.Tensor) -> None:
        path, _, leaf = parameter.rpartition(".")
        spec = self._specs.get(path)
        if spec is None:
            merged = self._changes.apply(parameter, numbers[positions])
            if merged.shape != positions.shape:
                raise CheckpointError(
                    f"{parameter} would change from {list(positions.shape)} to "
                    f"{list(merged.shape)}; the checkpoint stores it rearranged, which fixes its "
                    "size: the adapter cannot be merged."
                )
            numbers[positions] = merged.to(numbers.dtype)
            return
        for expert in range(spec.num_experts):
            delta = self._changes.expert_delta(path, leaf, expert)
            if delta is not None:
                at = positions[expert].T if spec.is_transposed else positions[expert]
                numbers[at] = (numbers[at].float() + delta).to(numbers.dtype)
