"""Reads expert weights packed by kt_kernel 0.7.2: ``.kt`` trees and converted safetensors folders.

Codes and scales are used unchanged; only tiles move to their places in the engine's memory. A file
set for n NUMA nodes has n parts: each holds 1/n of the rows of gate and up, and 1/n of the columns
of down with separate scales. The engine keeps down in n slices, on any machine, so that results
match the files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ktrt.checkpoint.folder import INDEX_NAME, SINGLE_NAME, Checkpoint
from ktrt.engine.formats import FORMATS, format_named, is_quantized
from ktrt.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from ktrt.experts.spec import ExpertsSpec, Projection

# The projections in the files.
PROJECTIONS: tuple[Projection, ...] = ("gate", "up", "down")
# (codes uint8 [bytes], scales float32 [rows]) of each part.
Shards = list[tuple[Any, Any]]

# kt_kernel writes files of quantised experts only.
FILE_FORMATS = tuple(each for each in FORMATS if is_quantized(each))
_TREE_FILE = re.compile(
    r"_layer_(\d+)/_numa_(\d+)/(INT\d)_(gate|up|down)_(\d+)_(\d+)Byte_(quant|scale)_\.kt"
)
_TENSOR = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.(\d+)\.numa\.(\d+)\.(weight|scale)")


@dataclass(frozen=True)
class _Key:
    layer: int
    part: int
    projection: str
    expert: int
    kind: str  # codes or scales


@dataclass(frozen=True)
class _Array:
    where: str
    file: Path
    size: int  # bytes
    read: Callable[[], Any]


class KtWeights:
    """The files of one folder, with all sizes checked; ``parts``: their number of NUMA nodes."""

    def __init__(self, folder: Path, specs: Sequence[ExpertsSpec], weight_format: str) -> None:
        """Raises ``CheckpointError`` with file and size if files are absent, not in
        ``weight_format``, or do not fit ``specs``."""
        self._folder = folder
        self._arrays = _find(folder)
        self.parts = 1 + max(key.part for key in self._arrays)
        self._format = format_named(weight_format)
        if self._format not in FILE_FORMATS:
            raise CheckpointError(
                f"kt_weight_path {folder}: kt_kernel has files of "
                f"{', '.join(each.name for each in FILE_FORMATS)} experts only; expected "
                f"kt_backend {' or '.join(each.kt_backend for each in FILE_FORMATS)}, found "
                f"{weight_format} experts."
            )
        for spec in specs:
            self._check(spec)

    @property
    def files(self) -> list[Path]:
        """The files whose pages may be released, with symbolic links resolved."""
        found = {array.file for array in self._arrays.values()}
        return sorted(path.resolve() for path in found) if len(found) < len(self._arrays) else []

    def read(self, spec: ExpertsSpec, expert: int) -> tuple[Shards, Shards, Shards]:
        """Returns gate, up and down of one expert, each as a list of parts."""
        gate, up, down = (
            [
                (self._array(spec, part, p, expert, "codes").read(),
                 self._array(spec, part, p, expert, "scales").read())
                for part in range(self.parts)
            ]
            for p in PROJECTIONS
        )  # fmt: skip
        return gate, up, down

    def _array(
        self, spec: ExpertsSpec, part: int, projection: str, expert: int, kind: str
    ) -> _Array:
        array = self._arrays.get(_Key(spec.layer, part, projection, expert, kind))
        if array is None:
            raise CheckpointError(
                f"kt_weight_path {self._folder}: no {kind} of layer {spec.layer}, part {part}, "
                f"{projection} of expert {expert}; expected all of {spec.num_experts} experts in "
                f"{self.parts} parts. The files are incomplete, or belong to another model."
            )
        return array

    def _check(self, spec: ExpertsSpec) -> None:
        if spec.intermediate_size % (32 * self.parts):
            raise CheckpointError(
                f"kt_weight_path {self._folder}: files for {self.parts} NUMA nodes do not fit the "
                f"intermediate size {spec.intermediate_size} of {spec.path}."
            )
        local = spec.intermediate_size // self.parts
        for projection in PROJECTIONS:
            rows = spec.hidden_size if projection == "down" else local
            codes = spec.hidden_size * local * self._format.bits // 8
            for part in range(self.parts):
                for expert in range(spec.num_experts):
                    for kind, size in (("codes", codes), ("scales", 4 * rows)):
                        array = self._array(spec, part, projection, expert, kind)
                        if array.size != size:
                            raise CheckpointError(self._wrong_size(spec, array, kind, size))

    def _wrong_size(self, spec: ExpertsSpec, array: _Array, kind: str, expected: int) -> str:
        weights = spec.hidden_size * spec.intermediate_size // self.parts
        other = [each for each in FILE_FORMATS if array.size == weights * each.bits // 8]
        hint = "The files are of another model, or damaged."
        if kind == "codes" and other:
            hint = f"The files hold {other[0].name} experts: set kt_backend: {other[0].kt_backend}."
        return (
            f"kt_weight_path: {array.where} has {array.size} bytes, expected {expected} for "
            f"{self._format.name} {kind} of {spec.path}. {hint}"
        )


def _find(folder: Path) -> dict[_Key, _Array]:
    if any(folder.glob("_layer_*")):
        arrays = dict(_tree(folder))
    elif (folder / INDEX_NAME).is_file() or (folder / SINGLE_NAME).is_file():
        arrays = dict(_converted(folder))
    else:
        arrays = {}
    if not arrays:
        raise CheckpointError(
            f"kt_weight_path {folder} holds neither kt_kernel's .kt tree (_layer_0/_numa_0/…) nor "
            f"its converted safetensors ({INDEX_NAME} with blk.0.ffn_gate_exps.…)."
        )
    return arrays


def _tree(folder: Path) -> Iterable[tuple[_Key, _Array]]:
    for path in folder.glob("_layer_*/_numa_*/*.kt"):
        match = _TREE_FILE.fullmatch(path.relative_to(folder).as_posix())
        if match is None:
            continue
        layer, part, _, projection, expert, size, what = match.groups()
        found = path.stat().st_size
        if found != int(size):
            raise CheckpointError(
                f"{path} has {found} bytes, expected {size} by its name: it is incomplete."
            )
        codes = what == "quant"
        key = _Key(int(layer), int(part), projection, int(expert), "codes" if codes else "scales")
        yield key, _Array(str(path), path, found, _file_reader(path, codes=codes))


def _file_reader(path: Path, *, codes: bool) -> Callable[[], Any]:
    dtype = np.uint8 if codes else np.float32
    # Copy on write, since the engine does not take a read-only array; nobody writes.
    return lambda: np.memmap(path, dtype, mode="c")


def _converted(folder: Path) -> Iterable[tuple[_Key, _Array]]:
    checkpoint = Checkpoint(folder)
    for name in checkpoint.names():
        match = _TENSOR.fullmatch(name)
        if match is None:
            continue
        layer, projection, expert, part, what = match.groups()
        codes, dtype = what == "weight", checkpoint.dtype(name)
        if dtype not in (("I8", "U8") if codes else ("F32",)):
            raise CheckpointError(
                f"{checkpoint.file(name)}: {name} has dtype {dtype}, expected "
                f"{'I8' if codes else 'F32'} as kt_kernel's converter writes it."
            )
        count = int(np.prod(checkpoint.shape(name)))
        key = _Key(int(layer), int(part), projection, int(expert), "codes" if codes else "scales")
        where = f"{checkpoint.file(name)}: {name}"
        yield key, _Array(
            where, checkpoint.file(name), count * (1 if codes else 4),
            _tensor_reader(checkpoint, name, codes=codes),
        )  # fmt: skip


def _tensor_reader(checkpoint: Checkpoint, name: str, *, codes: bool) -> Callable[[], Any]:
    def read() -> torch.Tensor:
        tensor = checkpoint.read(name).flatten()
        return tensor.view(torch.uint8) if codes else tensor

    return read
