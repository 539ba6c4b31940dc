"""Plans the output for every tensor of a checkpoint: the same bytes, or the merge."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from ktrt.checkpoint.convert import Conversions
from ktrt.errors import AdapterError
from ktrt.export.rearranged import RearrangedTensors
from ktrt.export.rounding import FLOATS, merged, rounded
from ktrt.export.shards import OutputTensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from ktrt.checkpoint.folder import Checkpoint
    from ktrt.checkpoint.names import WeightNames, WeightTarget
    from ktrt.experts import ExpertsSpec
    from ktrt.export.changes import Changes


@dataclass(frozen=True)
class Dtypes:
    """The dtypes of the output. ``main``, the dtype of most numbers of the source, becomes
    ``wanted``; the few tensors of other dtypes (routers' biases, for example) keep theirs.
    ``keeps_codes``: quantised tensors that the adapter does not change stay as they are."""

    main: str
    wanted: str
    keeps_codes: bool = True

    def of(self, checkpoint: Checkpoint, name: str) -> str:
        """Returns the dtype to write the tensor in."""
        dtype = checkpoint.dtype(name)
        return self.wanted if checkpoint.is_quantized(name) or dtype == self.main else dtype


def main_dtype(checkpoint: Checkpoint) -> str:
    """Returns the float dtype of most numbers; quantised ones count as BF16."""
    sizes = dict.fromkeys(FLOATS, 0)
    for name in checkpoint.names():
        dtype = "BF16" if checkpoint.is_quantized(name) else checkpoint.dtype(name)
        if dtype in sizes:
            sizes[dtype] += prod(checkpoint.shape(name))
    return max(sizes, key=lambda dtype: (sizes[dtype], dtype))


class TensorPlan:
    """Plans the output for the tensors of ``checkpoint``, as its files hold them, unconverted.

    ``without_experts`` leaves out the routed experts. Raises ``AdapterError`` for a change of a
    tensor whose numbers are no floats.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        names: WeightNames,
        specs: Sequence[ExpertsSpec],
        changes: Changes,
        dtypes: Dtypes,
        *,
        without_experts: bool = False,
    ) -> None:
        self._checkpoint, self._names = checkpoint, names
        self._specs = {spec.path: spec for spec in specs}
        self._changes, self._dtypes = changes, dtypes
        self._without_experts = without_experts
        self._targets = {name: names.target(name) for name in checkpoint.names()}
        self._rearranged = self._find_rearranged()
        self._kept = self._find_kept() if dtypes.keeps_codes else {}

    def by_file(self) -> dict[str, list[OutputTensor]]:
        """Returns the tensors to write, by the name of their file in the source."""
        found: dict[str, list[OutputTensor]] = {}
        for name, target in self._targets.items():
            if self._without_experts and self._spec(target) is not None:
                continue
            if name in self._kept:
                for part in self._kept[name]:
                    file = self._checkpoint.stored[part].file.name
                    found.setdefault(file, []).append(self._as_stored(part))
                continue
            tensors = found.setdefault(self._checkpoint.file(name).name, [])
            tensors.append(self._tensor(name, target))
            tensors.extend(self._untied_twins(name, target))
        return found

    @property
    def kept(self) -> int:
        """Returns how many quantised tensors stay as they are."""
        return len(self._kept)

    def dequantized(self) -> list[str]:
        """Returns the names of tensors written plain that are quantised in the source, on disk and
        in the model."""
        names = [n for n in self._targets if self._is_coded(n) and n not in self._kept]
        return [each for name in names for each in (name, self._targets[name].name)]

    def unties(self) -> bool:
        """Returns whether the adapter unties parameters that are tied in the source."""
        return any(self._changes.unties(target.name) for target in self._targets.values())

    def _spec(self, target: WeightTarget) -> ExpertsSpec | None:
        return self._specs.get(target.name.rpartition(".")[0])

    def _is_coded(self, name: str) -> bool:
        """Returns whether the tensor is written and quantised in the source."""
        left_out = self._without_experts and self._spec(self._targets[name]) is not None
        return self._checkpoint.is_quantized(name) and not left_out

    def _is_changed(self, name: str) -> bool:
        target = self._targets[name]
        plain = not target.changed and self._changes.touches(target.name)
        return plain or name in self._rearranged

    def _find_kept(self) -> dict[str, list[str]]:
        """Returns unchanged quantised tensors and their parts on disk. A layer's experts are all
        quantised or all plain: everything that loads them has one module for them."""
        coded = [name for name in self._targets if self._is_coded(name)]
        paths = {name: self._targets[name].name.rpartition(".")[0] for name in self._targets}
        plain = {paths[name] for name in coded if self._is_changed(name)}
        kept: dict[str, list[str]] = {}
        for name in coded:
            whole = paths[name] in self._specs and paths[name] in plain
            if not whole and not self._is_changed(name):
                kept[name] = []
        for part in self._checkpoint.stored:
            if (name := self._whole(part)) in kept:
                kept[name].append(part)
        return kept

    def _whole(self, part: str) -> str:
        """Returns the name of the tensor that a tensor on disk is part of."""
        if part in self._targets:
            return part
        longer = (name for name in (part[:i] for i, c in enumerate(part) if c == "_"))
        own = next((name for name in longer if name in self._targets), None)
        return own or f"{part.rpartition('.')[0]}.weight"

    def _as_stored(self, part: str) -> OutputTensor:
        stored = self._checkpoint.stored[part]
        return OutputTensor(part, stored.dtype, stored.shape, lambda: [stored.read()])

    def _find_rearranged(self) -> dict[str, RearrangedTensors]:
        """Returns source name → its group, for tensors that transformers rearranges into
        parameters, at least one of them changed."""
        conversions = Conversions(self._names.model)
        members: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for name, target in self._targets.items():
            if target.changed and not (self._without_experts and self._spec(target) is not None):
                converter, pattern, parameters = self._names.conversion(name)
                conversions.add(converter, pattern, parameters, name)
                members[parameters].append(name)
        found = {}
        for parameters, names in members.items():
            if any(map(self._changes.touches, parameters)):
                dtypes = {name: self._dtypes.of(self._checkpoint, name) for name in names}
                group = RearrangedTensors(
                    self._checkpoint, conversions, parameters, dtypes, self._changes, self._specs
                )
                found.update(dict.fromkeys(names, group))
        return found

    def _tensor(self, name: str, target: WeightTarget) -> OutputTensor:
        checkpoint = self._checkpoint
        shape, dtype = checkpoint.shape(name), self._dtypes.of(checkpoint, name)
        group, changed = self._rearranged.get(name), self._is_changed(name)
        if changed and group is None and self._spec(target) is None:
            shape = self._changes.shape(target.name, shape)
        if changed and dtype not in FLOATS:
            raise AdapterError(
                f"{checkpoint.file(name)}: {name} has dtype {dtype}, but the adapter changes it: "
                f"expected one of {', '.join(FLOATS)}."
            )

        def blocks() -> Iterator[torch.Tensor]:
            if group is not None:
                yield group.take(name)
            elif changed:
                yield from (rounded(name, block, dtype) for block in self._merged(name, target))
            elif dtype != checkpoint.dtype(name):
                yield from (rounded(name, block, dtype) for block in self._rows(name))
            else:
                yield checkpoint.read(name)

        return OutputTensor(name, dtype, shape, blocks, changed)

    def _rows(self, name: str) -> Iterator[torch.Tensor]:
        """Yields the tensor; of stacked experts one at a time."""
        shape = self._checkpoint.shape(name)
        if len(shape) < 3:
            yield self._checkpoint.read(name)
        else:
            yield from (self._checkpoint.read_row(name, row) for row in range(shape[0]))

    def _merged(self, name: str, target: WeightTarget) -> Iterator[torch.Tensor]:
        changes, spec = self._changes, self._spec(target)
        path, _, leaf = target.name.rpartition(".")
        if spec is None:
            yield changes.apply(target.name, self._checkpoint.read(name))
        elif target.expert is not None:
            delta = changes.expert_delta(path, leaf, target.expert, target.piece, target.pieces)
            yield merged(self._checkpoint.read(name), delta)
        else:
            for expert, matrix in enumerate(self._rows(name)):
                delta = changes.expert_delta(path, leaf, expert)
                if delta is not None and spec.is_transposed:
                    delta = delta.T
                yield merged(matrix, delta)

    def _untied_twins(self, name: str, target: WeightTarget) -> list[OutputTensor]:
        """Returns tensors that the source lacks because they were tied to this one."""
        if target.changed or not self._changes.unties(target.name):
            return []
        stored = {each.name for each in self._targets.values()}
        twins = self._changes.twins(target.name)
        if target.name != next(twin for twin in twins if twin in stored):
            return []
        shape, dtype = self._checkpoint.shape(name), self._dtypes.of(self._checkpoint, name)

        def tensor(twin: str) -> OutputTensor:
            def blocks() -> Iterator[torch.Tensor]:
                yield rounded(twin, self._changes.apply(twin, self._checkpoint.read(name)), dtype)

            return OutputTensor(twin, dtype, self._changes.shape(twin, shape), blocks, changed=True)

        return [tensor(twin) for twin in twins if twin not in stored]
