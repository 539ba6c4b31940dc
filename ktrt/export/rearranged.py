"""Merges into tensors that transformers rearranges while loading: stacks with the last dimensions
swapped, several modules in one, …

Where each number of the parameters comes from is found by rearranging the numbers' positions with
transformers' own conversion, so that no conversion has to be known, nor reversed.
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
    """The tensors that one conversion turns into ``parameters``; ``dtypes``: what each, by name, is
    to be written in. They are in memory from the first ``take`` to the last."""

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
        """The merged tensor, rounded once; each can be taken once."""
        if self._merged is None:
            self._merged = self._merge()
        return rounded(name, self._merged.pop(name), self._dtypes[name])

    def _merge(self) -> dict[str, torch.Tensor]:
        shapes = {name: self._checkpoint.shape(name) for name in self._dtypes}
        sizes = [prod(shape) for shape in shapes.values()]
        # In the dtype of the file where that is the one to be written, to save memory.
        same = {self._checkpoint.dtype(name) for name in shapes} | set(self._dtypes.values())
        values = [self._checkpoint.read(name).reshape(-1) for name in shapes]
        numbers = torch.cat(values if len(same) == 1 else [value.float() for value in values])
        del values
        for parameter, positions in self._positions(shapes, sizes).items():
            if self._changes.touches(parameter):
                self._add(parameter, positions, numbers)
        return {
            name: piece.view(shape)
            for (name, shape), piece in zip(shapes.items(), numbers.split(sizes), strict=True)
        }

    def _positions(
        self, shapes: Mapping[str, tuple[int, ...]], sizes: list[int]
    ) -> dict[str, torch.Tensor]:
        """For each parameter, which of the numbers, one source after the other, it is made of."""
        total = sum(sizes)
        dtype = torch.int32 if total < 2**31 else torch.int64
        pieces = torch.arange(total, dtype=dtype).split(sizes)
        sources = {
            name: piece.view(shape)
            for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
        }
        made = self._conversions.rearrange(self._parameters, sources)
        seen = torch.zeros(total, dtype=torch.bool)
        for positions in made.values():
            if positions.dtype == dtype:
                seen[positions.reshape(-1)] = True
        if int(seen.sum()) != total or sum(p.numel() for p in made.values()) != total:
            first = next(iter(shapes))
            raise CheckpointError(
                f"{self._checkpoint.file(first)}: transformers makes {self._parameters[0]} of "
                f"{first} ({len(shapes)} such) not by rearranging its numbers alone, so that the "
                "adapter cannot be merged into it."
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
                    f"{list(merged.shape)}; the checkpoint holds it rearranged, which fixes its "
                    "size: the adapter cannot be merged."
                )
            numbers[positions] = merged.to(numbers.dtype)
            return
        for expert in range(spec.num_experts):
            delta = self._changes.expert_delta(path, leaf, expert)
            if delta is not None:
                at = positions[expert].T if spec.is_transposed else positions[expert]
                numbers[at] = (numbers[at].float() + delta).to(numbers.dtype)
