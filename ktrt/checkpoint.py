"""Reads a Hugging Face model folder lazily: names, shapes, and one tensor at a time.

File format: safetensors (https://github.com/huggingface/safetensors), one file or shards with
``model.safetensors.index.json``. Which tensor is which parameter is asked of transformers' own
conversion mapping, forward from each name on disk, so that no model family is listed here.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from safetensors import SafetensorError, safe_open

from ktrt.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import torch
    from torch import nn

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
Projection = Literal["gate", "up", "down"]
_FLOAT_DTYPES = ("F32", "F16", "BF16")


class Checkpoint:
    """The tensors of one model folder, memory-mapped; nothing is read before it is asked for.

    Raises ``CheckpointError`` for a folder without safetensors, a missing or damaged shard, and an
    index that names a tensor its shard lacks.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handles: dict[Path, Any] = {}
        self._files: dict[str, Path] = {}
        index = folder / INDEX_NAME
        if index.is_file():
            self._open_shards(index)
        elif (folder / SINGLE_NAME).is_file():
            self._files = dict.fromkeys(
                self._open(folder / SINGLE_NAME).keys(), folder / SINGLE_NAME
            )
        else:
            raise CheckpointError(_no_safetensors(folder))

    def _open_shards(self, index: Path) -> None:
        for name, file_name in _weight_map(index).items():
            path = self.folder / file_name
            if not path.is_file():
                raise CheckpointError(
                    f"{path} is missing: {index.name} says that it holds {name}. Download or copy "
                    "the model folder again."
                )
            self._files[name] = path
        held = {path: set(self._open(path).keys()) for path in set(self._files.values())}
        for name, path in self._files.items():
            if name not in held[path]:
                raise CheckpointError(
                    f"{path} does not hold {name}, as {index.name} says. The folder mixes files of "
                    "two checkpoints or is incomplete; download or copy it again."
                )

    def _open(self, path: Path) -> Any:
        if path not in self._handles:
            try:
                self._handles[path] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path} is not a complete safetensors file ({error}; {path.stat().st_size} "
                    "bytes). Download or copy it again."
                ) from error
        return self._handles[path]

    def names(self) -> Iterable[str]:
        """The names of all tensors."""
        return self._files.keys()

    def file(self, name: str) -> Path:
        """The file that holds the tensor."""
        return self._files[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape, from the file's header."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The dtype in safetensors' words, e.g. ``BF16``."""
        return str(self._slice(name).get_dtype())

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, a view of the mapped file where possible."""
        tensor: torch.Tensor = self._handles[self._files[name]].get_tensor(name)
        return tensor

    def read_row(self, name: str, row: int) -> torch.Tensor:
        """``tensor[row]``, without reading the other rows."""
        tensor: torch.Tensor = self._slice(name)[row]
        return tensor

    def _slice(self, name: str) -> Any:
        return self._handles[self._files[name]].get_slice(name)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is not a safetensors index ({error!r}).") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is empty; expected tensor names and files.")
    return {str(name): str(file) for name, file in weight_map.items()}


def _no_safetensors(folder: Path) -> str:
    if not any(folder.glob("*.bin")):
        return f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}: not a model folder."
    return (
        f"{folder} holds weights only as .bin (pickle) files; ktrt reads safetensors. Convert once:"
        f' python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}-safetensors')\""
        " and copy the tokenizer files into the new folder."
    )


@dataclass(frozen=True)
class WeightTarget:
    """What one tensor on disk becomes: all of parameter ``name``, or one expert's slice of it.

    With ``expert``, the tensor is piece ``piece`` of ``pieces`` along the output rows of that
    expert (gate_up_proj from gate and up: two pieces). ``changed``: the library also changes the
    numbers' order (transposes, splits, …), so that the tensor is not the parameter as it stands.
    """

    name: str
    expert: int | None = None
    piece: int = 0
    pieces: int = 1
    changed: bool = False


class WeightNames:
    """transformers' renamings and conversions for one model, applied forward to single names.

    ``model`` is the plain model on the meta device, experts not replaced.
    """

    def __init__(self, model: nn.Module) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = get_model_conversion_mapping(model)
        self._parameters: Mapping[str, Any] = model.state_dict()
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._prefix = str(getattr(model, "base_model_prefix", ""))

    def target(self, name: str) -> WeightTarget:
        """The parameter that a tensor of this name is loaded into; for a name that belongs nowhere
        the renamed name."""
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
        converter = next(c for c in self._converters if pattern in c.source_patterns)
        if not expert or "expert" not in expert.groupdict() or not _stacks_experts(converter):
            return WeightTarget(renamed, changed=True)
        return WeightTarget(
            renamed,
            expert=int(expert["expert"]),
            piece=converter.source_patterns.index(pattern),
            pieces=len(converter.source_patterns),
        )


def _stacks_experts(converter: Any) -> bool:
    """Whether the conversion only stacks experts [E, …] and joins their rows, in source order."""
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


class ExpertsShape(Protocol):
    """The part of an experts module's description that its weights must match."""

    @property
    def path(self) -> str: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...


class ExpertWeights:
    """Where the experts of one layer lie in a checkpoint; reads them one by one."""

    def __init__(
        self, checkpoint: Checkpoint, spec: ExpertsShape, sources: Mapping[WeightTarget, str]
    ) -> None:
        self._checkpoint = checkpoint
        self._spec = spec
        self._sources = sources
        used = set()
        for expert in range(spec.num_experts):
            for target, (name, shape) in self._pieces(expert).items():
                self._check(target, name, shape)
                used.add(name)
        if surplus := sorted(set(sources.values()) - used):
            raise CheckpointError(
                f"{checkpoint.file(surplus[0])}: {surplus[0]} ({len(surplus)} such) repeats "
                f"weights of {spec.path} that another tensor holds; expected each once."
            )

    def _pieces(self, expert: int) -> dict[WeightTarget, tuple[str | None, tuple[int, ...]]]:
        """The tensors that make up one expert: target → (name on disk or None, expected shape)."""
        rows, inner = 2 * self._spec.intermediate_size, self._spec.hidden_size
        pieces: dict[WeightTarget, tuple[str | None, tuple[int, ...]]] = {}
        for parameter, pieces_on_disk in (("gate_up_proj", (2, 1)), ("down_proj", (1,))):
            path = f"{self._spec.path}.{parameter}"
            shape = (rows, inner) if parameter == "gate_up_proj" else (inner, rows // 2)
            fused = WeightTarget(path)
            if fused in self._sources:
                pieces[fused] = (self._sources[fused], (self._spec.num_experts, *shape))
                continue
            count = next(
                (n for n in pieces_on_disk if WeightTarget(path, expert, 0, n) in self._sources),
                pieces_on_disk[0],
            )
            for piece in range(count):
                target = WeightTarget(path, expert, piece, count)
                pieces[target] = (self._sources.get(target), (shape[0] // count, shape[1]))
        return pieces

    def _check(self, target: WeightTarget, name: str | None, shape: tuple[int, ...]) -> None:
        if name is None:
            what = ("gate", "up")[target.piece] if target.pieces == 2 else "weights"
            raise CheckpointError(
                f"{self._checkpoint.folder}: no tensor for {target.name}, expert {target.expert} "
                f"({what}); found {len(self._sources)} tensors of this layer's experts, expected "
                f"all of {self._spec.num_experts} experts."
            )
        found, dtype = self._checkpoint.shape(name), self._checkpoint.dtype(name)
        file = self._checkpoint.file(name)
        if found != shape:
            raise CheckpointError(
                f"{file}: {name} has shape {list(found)}, expected {list(shape)} by config.json."
            )
        if dtype not in _FLOAT_DTYPES:
            raise CheckpointError(
                f"{file}: {name} has dtype {dtype}, expected one of {', '.join(_FLOAT_DTYPES)}. "
                "Quantised checkpoints cannot be loaded yet; use the BF16 one."
            )

    def modules(self) -> dict[tuple[int, Projection], str]:
        """(expert, projection) → the module's name on disk, where one tensor is one projection."""
        found: dict[tuple[int, Projection], str] = {}
        rows: tuple[Projection, Projection] = ("gate", "up")
        for target, name in self._sources.items():
            down = target.name.endswith(".down_proj")
            if target.expert is not None and (down or target.pieces == 2):
                found[target.expert, "down" if down else rows[target.piece]] = name.removesuffix(
                    ".weight"
                )
        return found

    def read(self, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """gate, up [intermediate_size, hidden_size] and down [hidden_size, intermediate_size]."""
        tensors = []
        for target, (name, _) in self._pieces(expert).items():
            assert name is not None  # checked on construction
            if target.expert is None:
                tensors.append(self._checkpoint.read_row(name, expert))
            else:
                tensors.append(self._checkpoint.read(name))
        down = tensors.pop()
        gate, up = tensors if len(tensors) == 2 else tensors[0].chunk(2)
        return gate, up, down


def find_expert_weights(
    checkpoint: Checkpoint, names: WeightNames, specs: Iterable[ExpertsShape]
) -> dict[str, ExpertWeights]:
    """For each experts module (by path) where its weights lie.

    Raises ``CheckpointError`` naming the tensor, what was found and what was expected, if one of
    any expert of any layer is absent, double, surplus, or of another shape or dtype.
    """
    by_path: dict[str, tuple[ExpertsShape, dict[WeightTarget, str]]] = {
        spec.path: (spec, {}) for spec in specs
    }
    for name in checkpoint.names():
        target = names.target(name)
        path, _, parameter = target.name.rpartition(".")
        if path not in by_path or parameter not in ("gate_up_proj", "down_proj"):
            continue
        if target.changed:
            raise CheckpointError(
                f"{checkpoint.file(name)}: {name} is stored in an order that transformers changes "
                f"to make {target.name}; ktrt can only read experts stored one by one or stacked."
            )
        spec, sources = by_path[path]
        if target in sources:
            raise CheckpointError(
                f"{checkpoint.folder}: {name} and {sources[target]} are the same weights "
                f"({target.name}); expected one of them."
            )
        if target.expert is not None and target.expert >= spec.num_experts:
            raise CheckpointError(
                f"{checkpoint.file(name)}: {name} is of expert {target.expert}, but config.json "
                f"says {spec.num_experts} experts."
            )
        sources[target] = name
    return {
        path: ExpertWeights(checkpoint, spec, sources) for path, (spec, sources) in by_path.items()
    }
