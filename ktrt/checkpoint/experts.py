"""Finds the routed experts of a model in its checkpoint, and reads them one by one: dequantised, or
in codes as shipped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ktrt.checkpoint.codes import GROUPS, why_not_split
from ktrt.checkpoint.convert import Conversions
from ktrt.checkpoint.names import WeightNames, WeightTarget
from ktrt.checkpoint.stored import FLOAT_DTYPES
from ktrt.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

    from ktrt.checkpoint.codes import Codes
    from ktrt.checkpoint.folder import Checkpoint
    from ktrt.experts.spec import ExpertsSpec, Projection


class ExpertWeights:
    """Finds the experts of one layer in a checkpoint and reads them one by one."""

    def __init__(
        self, checkpoint: Checkpoint, spec: ExpertsSpec, sources: Mapping[WeightTarget, str]
    ) -> None:
        self._checkpoint = checkpoint
        self._spec = spec
        self._sources = sources
        self._format: tuple[str | None, str] | None = None
        used = set()
        self._check_count()
        wanted = {target: (sources.get(target), shape) for target, shape in self._biases().items()}
        for expert in range(spec.num_experts):
            wanted |= self._pieces(expert)
        for target, (name, shape) in wanted.items():
            used.add(self._check(target, name, shape))
        if surplus := sorted(set(sources.values()) - used):
            raise CheckpointError(
                f"{checkpoint.file(surplus[0])}: {surplus[0]} ({len(surplus)} such) repeats "
                f"weights of {spec.path} that another tensor holds; expected each once."
            )

    def _check_count(self) -> None:
        """Refuses a wrong number of experts before anything loops over it."""
        single = {target.expert for target in self._sources if target.expert is not None}
        if single and len(single) < self._spec.num_experts:
            missing = next(e for e in range(self._spec.num_experts) if e not in single)
            raise CheckpointError(
                f"{self._checkpoint.folder}: {self._spec.path}: no tensor of expert {missing}; "
                f"found {len(single)}, expected all of {self._spec.num_experts} experts by "
                "config.json."
            )

    def _pieces(self, expert: int) -> dict[WeightTarget, tuple[str | None, tuple[int, ...]]]:
        """Returns the tensors of one expert: target → (name on disk or None, expected shape)."""
        spec = self._spec
        pieces: dict[WeightTarget, tuple[str | None, tuple[int, ...]]] = {}
        for parameter, (rows, columns) in spec.parameters.items():
            path = f"{spec.path}.{parameter}"
            fused = WeightTarget(path)
            if fused in self._sources:
                pieces[fused] = (self._sources[fused], spec.stored_shape(parameter))
                continue
            # A projection for each tensor, or one tensor for all.
            counts = sorted({1, len(spec.held_by(parameter))}, reverse=True)
            count = next(
                (n for n in counts if WeightTarget(path, expert, 0, n) in self._sources), counts[0]
            )
            for piece in range(count):
                target = WeightTarget(path, expert, piece, count)
                pieces[target] = (self._sources.get(target), (rows // count, columns))
        return pieces

    def _biases(self) -> dict[WeightTarget, tuple[int, ...]]:
        """Returns the targets of all experts' biases, with their shapes."""
        spec = self._spec
        return {
            WeightTarget(f"{spec.path}.{name}"): (spec.num_experts, size)
            for name, size in spec.biases.items()
        }

    def _check(self, target: WeightTarget, name: str | None, shape: tuple[int, ...]) -> str:
        if name is None:
            what = ("gate", "up")[target.piece] if target.pieces == 2 else "weights"
            whose = "" if target.expert is None else f", expert {target.expert} ({what})"
            raise CheckpointError(
                f"{self._checkpoint.folder}: no tensor for {target.name}{whose}; found "
                f"{len(self._sources)} tensors of this layer's experts, expected all of "
                f"{self._spec.num_experts} experts."
            )
        found, dtype = self._checkpoint.shape(name), self._checkpoint.dtype(name)
        file = self._checkpoint.file(name)
        if dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{file}: {name} has dtype {dtype}, expected one of {', '.join(FLOAT_DTYPES)}, or "
                "FP8 (F8_E4M3), INT4 or MXFP4 with their scales, which are not there. Download the "
                "folder again if they should be, or use the BF16 checkpoint."
            )
        if found != shape:
            raise CheckpointError(
                f"{file}: {name} has shape {list(found)}, expected {list(shape)} by config.json."
            )
        return name

    def modules(self) -> dict[tuple[int, Projection], str]:
        """Returns (expert, projection) → module name on disk, if one tensor is one projection."""
        found: dict[tuple[int, Projection], str] = {}
        for target, name in self._sources.items():
            held = self._spec.held_by(target.name.rpartition(".")[2])
            if target.expert is not None and target.pieces == len(held):
                found[target.expert, held[target.piece]] = name.removesuffix(".weight")
        return found

    def biases(self) -> dict[str, torch.Tensor]:
        """Returns all experts' biases in float32: gate (if any) and up [num_experts,
        intermediate_size], down [num_experts, hidden_size]; empty without biases."""
        if not self._spec.has_bias:
            return {}
        first, down = (self._checkpoint.read(self._sources[target]) for target in self._biases())
        biases = {**self._spec.split(first, dim=1), "down": down}
        return {p: bias.float().contiguous() for p, bias in biases.items()}

    def where(self, expert: int) -> str:
        """Returns an expert's files and its layer, for messages."""
        names = [name for name, _ in self._pieces(expert).values() if name is not None]
        files = sorted({str(self._checkpoint.file(name)) for name in names})
        return f"{', '.join(files)}: {self._spec.path}"

    def read(self, expert: int) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Returns gate (None if there is none), up [intermediate_size, hidden_size] and down
        [hidden_size, intermediate_size], each with contiguous rows."""
        tensors = []
        for target, (name, _) in self._pieces(expert).items():
            assert name is not None  # checked on construction
            if target.expert is not None:
                tensors.append(self._checkpoint.read(name))
                continue
            matrix = self._checkpoint.read_row(name, expert)
            tensors.append((matrix.T if self._spec.is_transposed else matrix).contiguous())
        down = tensors.pop()
        if len(tensors) == 2:
            return tensors[0], tensors[1], down
        parts = self._spec.split(tensors[0], dim=0)
        return parts.get("gate"), parts["up"], down

    @property
    def is_quantized(self) -> bool:
        """Whether any expert's tensor is dequantised on reading."""
        return any(map(self._checkpoint.is_quantized, self._sources.values()))

    @property
    def coded(self) -> str | None:
        """The engine's weight format that takes the codes of all experts; None if none does."""
        return self._find_format()[0]

    @property
    def why_not_coded(self) -> str:
        """The reason if ``coded`` is None, for messages."""
        return self._find_format()[1]

    def _find_format(self) -> tuple[str | None, str]:
        if self._format is None:
            self._format = self._common_format()
        return self._format

    def _common_format(self) -> tuple[str | None, str]:
        """Returns the format that all tensors have, and the reason if there is none. INT4 of
        several groups has the smallest, which the scales of the others are repeated for."""
        checkpoint, found = self._checkpoint, dict[str, str]()
        for expert in range(self._spec.num_experts):
            for target, (name, _) in self._pieces(expert).items():
                assert name is not None  # checked on construction
                stored = checkpoint.tensor(name)
                if stored.coded is None:
                    return None, f"{name}: {stored.why_not_coded}"
                flips = self._flips(target, name)
                if flips and not stored.whole_blocks:
                    return None, f"{name}: its rows are the model's columns"
                is_first = not target.name.endswith(".down_proj") and target.pieces == 1
                whole = flips or stored.whole_blocks
                if is_first and (why := why_not_split(stored.coded, self._spec, whole=whole)):
                    return None, f"{name}: {why}"
                found.setdefault(stored.coded, name)
        if len(found) > 1 and not all(each.startswith("int4_g") for each in found):
            (one, first), (other, second) = list(found.items())[:2]
            return None, f"{first} is {one}, but {second} is {other}"
        return min(found, key=lambda each: GROUPS.get(each, 0)), ""

    def _flips(self, target: WeightTarget, name: str) -> bool:
        """Returns whether the tensor's codes are of the transposed matrices."""
        transposed = self._spec.is_transposed and target.expert is None
        return self._checkpoint.tensor(name).transposed != transposed

    def read_codes(self, expert: int) -> tuple[Codes | None, Codes, Codes]:
        """Returns gate (None if there is none), up and down as shipped. Only if ``coded``."""
        weight_format = self.coded
        assert weight_format is not None, self.why_not_coded
        tensors = []
        for target, (name, _) in self._pieces(expert).items():
            assert name is not None  # checked on construction
            row = expert if target.expert is None else None
            codes = self._checkpoint.read_codes(name, row)
            codes = codes.flipped() if self._flips(target, name) else codes
            tensors.append(codes.regrouped(weight_format))
        down = tensors.pop()
        if len(tensors) == 2:
            return tensors[0], tensors[1], down
        parts = tensors[0].split(self._spec)
        return parts.get("gate"), parts["up"], down


def holds_experts(checkpoint: Checkpoint, names: WeightNames, specs: Iterable[ExpertsSpec]) -> bool:
    """Returns whether any tensor belongs to the experts."""
    paths = {spec.path for spec in specs}
    return any(names.target(name).name.rpartition(".")[0] in paths for name in checkpoint.names())


def find_expert_weights(
    checkpoint: Checkpoint, names: WeightNames, specs: Iterable[ExpertsSpec]
) -> dict[str, ExpertWeights]:
    """Finds the weights of each experts module; returns them by path.

    Raises ``CheckpointError`` with the tensor, the finding and the expectation if a tensor of any
    expert is absent, double, surplus, or of another shape or dtype.
    """
    by_path: dict[str, tuple[ExpertsSpec, dict[WeightTarget, str]]] = {
        spec.path: (spec, {}) for spec in specs
    }
    parameters = {spec.path: {*spec.parameters, *spec.biases} for spec, _ in by_path.values()}
    targets = [(name, names.target(name)) for name in checkpoint.names()]
    conversions = Conversions(names.model)
    for name, target in targets:
        path, _, parameter = target.name.rpartition(".")
        if target.changed and parameter in parameters.get(path, ()):
            conversions.add(*names.conversion(name), name)
    targets += [
        (parameter, WeightTarget(parameter)) for parameter in checkpoint.convert(conversions)
    ]
    for name, target in targets:
        path, _, parameter = target.name.rpartition(".")
        if target.changed or parameter not in parameters.get(path, ()):
            continue
        spec, sources = by_path[path]
        if target in sources:
            raise CheckpointError(
                f"{checkpoint.folder}: {name} and {sources[target]} are the same weights "
                f"({target.name}); expected one of them."
            )
        if target.expert is not None and target.expert >= spec.num_experts:
            raise CheckpointError(
                f"{checkpoint.file(name)}: {name} belongs to expert {target.expert}, but "
                f"config.json says {spec.num_experts} experts."
            )
        sources[target] = name
    return {
        path: ExpertWeights(checkpoint, spec, sources) for path, (spec, sources) in by_path.items()
    }
