"""Reads a Hugging Face model folder lazily: names, shapes, and one tensor at a time.

File format: safetensors (https://github.com/huggingface/safetensors), one file or shards with an
index (``ktrt.checkpoint.files``). Quantised tensors are read as plain ones.
``ktrt.checkpoint.names`` maps tensors to parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ktrt.checkpoint.codes import GROUPS, why_not_split
from ktrt.checkpoint.convert import Conversions
from ktrt.checkpoint.files import INDEX_NAME, SINGLE_NAME, find_weights
from ktrt.checkpoint.formats import decoded, is_dequantized
from ktrt.checkpoint.names import WeightNames, WeightTarget
from ktrt.checkpoint.stored import FLOAT_DTYPES, PlainTensor, StoredTensor
from ktrt.errors import CheckpointError
from ktrt.folders.schemes import refusal, unread_scheme

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import torch

    from ktrt.checkpoint.codes import Codes
    from ktrt.experts.spec import ExpertsSpec, Projection

__all__ = ["INDEX_NAME", "SINGLE_NAME", "Checkpoint", "ExpertWeights"]


class Checkpoint:
    """The tensors of one model folder, memory-mapped and read on demand.

    A quantised tensor and its scales are one tensor here, in float32. ``weight_block_size`` is
    FP8's, ``chosen`` the file in config.json's transformers_weights. Leaves out tensors of a shard
    that the index does not name and, with ``experts_elsewhere``, routed experts in an unsupported
    quantisation.

    Raises ``CheckpointError`` for a folder without safetensors, a missing or damaged shard, an
    index that names a tensor its shard lacks, scales that do not fit, and unsupported
    quantisations.
    """

    def __init__(
        self,
        folder: Path,
        weight_block_size: tuple[int, int] = (128, 128),
        chosen: str | None = None,
        *,
        experts_elsewhere: bool = False,
    ) -> None:
        self.folder = folder
        self.files = find_weights(folder, chosen)
        self._handles: dict[Path, Any] = {}
        if self.files.weight_map is None:
            files = dict.fromkeys(self._open(self.files.main).keys(), self.files.main)
        else:
            files = self.files.weight_map
            self._check_shards(files, self.files.main)
        stored: dict[str, StoredTensor] = {
            name: PlainTensor(path, self._open(path), name) for name, path in files.items()
        }
        if experts_elsewhere and unread_scheme(stored):
            stored = {name: t for name, t in stored.items() if ".experts." not in name}
        if found := unread_scheme(stored):
            name = found[1]
            raise CheckpointError(refusal(stored[name].file, *found, stored[name]))
        self._tensors = decoded(stored, weight_block_size)

    def _check_shards(self, files: Mapping[str, Path], index: Path) -> None:
        held = {path: set(self._open(path).keys()) for path in set(files.values())}
        for name, path in files.items():
            if name not in held[path]:
                raise CheckpointError(
                    f"{path} does not hold {name}, as {index.name} says. The folder mixes files of "
                    "two checkpoints or is incomplete; download or copy it again."
                )

    def _open(self, path: Path) -> Any:
        if path not in self._handles:
            try:
                # safetensors reports "No such file" for any file that it cannot open.
                path.open("rb").close()
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
            try:
                self._handles[path] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path} is not a complete safetensors file ({error}; {path.stat().st_size} "
                    "bytes). Download or copy it again."
                ) from error
        return self._handles[path]

    def names(self) -> Iterable[str]:
        """Returns the names of all tensors."""
        return self._tensors.keys()

    def file(self, name: str) -> Path:
        """Returns the file that holds the tensor."""
        return self._tensors[name].file

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape, from the file's header."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        """Returns the dtype in safetensors' words, e.g. ``BF16``; ``F32`` for a dequantised
        tensor."""
        return self._tensors[name].dtype

    def read(self, name: str) -> torch.Tensor:
        """Returns the whole tensor, a view of the mapped file where possible."""
        return self._tensors[name].read()

    def read_row(self, name: str, row: int) -> torch.Tensor:
        """Returns ``tensor[row]`` without reading the other rows."""
        return self._tensors[name].read_row(row)

    def is_quantized(self, name: str | None = None) -> bool:
        """Returns whether this tensor (None: any tensor) is dequantised on reading."""
        if name is not None:
            return is_dequantized(self._tensors[name])
        return any(map(is_dequantized, self._tensors.values()))

    def coded(self, name: str) -> str | None:
        """Returns the engine's weight format that takes the tensor's codes; None if none does."""
        return self._tensors[name].coded

    def why_not_coded(self, name: str) -> str:
        """Returns the reason if ``coded`` is None, for messages."""
        return self._tensors[name].why_not_coded

    def is_transposed(self, name: str) -> bool:
        """Returns whether ``read`` returns the transposes of what ``read_codes`` does."""
        return self._tensors[name].transposed

    def read_codes(self, name: str, row: int | None = None) -> Codes:
        """Returns the matrix, or matrix ``row`` of a stack, as shipped. Only if ``coded``."""
        return self._tensors[name].read_codes(row)

    def convert(self, conversions: Conversions) -> dict[str, list[str]]:
        """Adds the parameters that transformers converts this folder's tensors to, under their
        names in the model; returns the names of each one's sources."""
        made = {}
        for parameter, tensor, sources in conversions.tensors(self._tensors.copy()):
            self._tensors[parameter] = tensor
            made[parameter] = sources
        return made


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
        if found != shape:
            raise CheckpointError(
                f"{file}: {name} has shape {list(found)}, expected {list(shape)} by config.json."
            )
        if dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{file}: {name} has dtype {dtype}, expected one of {', '.join(FLOAT_DTYPES)}, or "
                "FP8 (F8_E4M3) or MXFP4 with their scales. Use the BF16 checkpoint."
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
                each = checkpoint.coded(name)
                if each is None:
                    return None, f"{name}: {checkpoint.why_not_coded(name)}"
                stacked = target.expert is None
                if stacked and checkpoint.is_transposed(name) != self._spec.is_transposed:
                    return None, f"{name}: its rows are the model's columns"
                is_first = not target.name.endswith(".down_proj") and target.pieces == 1
                if is_first and (why := why_not_split(each, self._spec)):
                    return None, f"{name}: {why}"
                found.setdefault(each, name)
        if len(found) > 1 and not all(each.startswith("int4_g") for each in found):
            (one, first), (other, second) = list(found.items())[:2]
            return None, f"{first} is {one}, but {second} is {other}"
        return min(found, key=lambda each: GROUPS.get(each, 0)), ""

    def read_codes(self, expert: int) -> tuple[Codes | None, Codes, Codes]:
        """Returns gate (None if there is none), up and down as shipped. Only if ``coded``."""
        weight_format = self.coded
        assert weight_format is not None, self.why_not_coded
        tensors = []
        for target, (name, _) in self._pieces(expert).items():
            assert name is not None  # checked on construction
            row = expert if target.expert is None else None
            tensors.append(self._checkpoint.read_codes(name, row).regrouped(weight_format))
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
