"""Writes base and adapter for ``kt_weight_path``: routed experts in kt_kernel's packed format,
everything else as a Hugging Face folder."""

from __future__ import annotations

import time
from itertools import product
from typing import TYPE_CHECKING

import torch

from ktrt.checkpoint.kt_files import FILE_FORMATS, KtWeights
from ktrt.engine.build import build_engine
from ktrt.engine.formats import AUTO, PLAIN, format_named, format_of
from ktrt.errors import ConfigError
from ktrt.experts import new_layer
from ktrt.export.checkpoint import (
    Merge,
    Summary,
    releasing,
    summarise,
)
from ktrt.export.rounding import merged
from ktrt.export.shards import (
    INDEX_NAME,
    OutputTensor,
    write_index,
    write_shard,
)
from ktrt.loading.formats import choose_formats
from ktrt.utils.progress import byte_progress
from ktrt.utils.staging import check_target, staged_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from ktrt.adapter import AdapterPlan
    from ktrt.config import ExpertArgs
    from ktrt.engine import Engine, MoeLayer, WeightFormat
    from ktrt.experts import ExpertsSpec
    from ktrt.experts.spec import Projection
    from ktrt.export.changes import Changes
    from ktrt.loading.plan import BaseCheckpoint

EXPERTS_FOLDER = "experts"


def merge_packed(
    base: BaseCheckpoint,
    plan: AdapterPlan | None,
    out: Path,
    experts: ExpertArgs,
    words: Path | None = None,
) -> Summary:
    """Writes the new folder ``out``: the model without its routed experts; ``out/experts``: the
    experts, merged and packed for ``experts.kt_backend`` and one NUMA node. ``words``: see
    ``Merge``.

    Raises ``ConfigError`` if kt_kernel has no files of this format or these experts; otherwise
    raises the same errors as ``merge_checkpoint``.
    """
    start = time.perf_counter()
    check_target(out)
    weight_format = _check_format(experts, base)
    merge = Merge(base, plan, without_experts=True, words=words)
    engine = build_engine(experts)
    try:
        packer = _Packer(base, merge.changes, engine, weight_format)
        files = packer.files()
        size = merge.tensor_bytes + sum(t.nbytes for each in files.values() for t in each)
        with staged_folder(out, size + merge.side_bytes) as folder:
            inner = folder / EXPERTS_FOLDER
            inner.mkdir()
            with byte_progress("Merging and packing", size) as advance:
                merge.write(folder, advance)
                packer.write(inner, files, advance)
            used = merge.changes.check_complete()
            KtWeights(inner, base.experts.specs, weight_format.name)
    finally:
        engine.close()
    named = {f"{EXPERTS_FOLDER}/{file}": tensors for file, tensors in files.items()}
    return summarise(out, "kt", merge, merge.files | named, used, start)


def _check_format(experts: ExpertArgs, base: BaseCheckpoint) -> WeightFormat:
    own = choose_formats(experts.kt_backend, base.experts).kt_backend
    weight_format = format_named(PLAIN) if own == AUTO else format_of(own)
    if experts.kt_weight_path is not None:
        raise ConfigError(
            "--format kt: kt_weight_path is set; its experts are packed without the adapter. "
            "Remove the key to pack them again from model_name_or_path."
        )
    if weight_format not in FILE_FORMATS:
        raise ConfigError(
            f"--format kt: kt_kernel has no files of {weight_format.name.upper()} experts, only of "
            f"{', '.join(each.name for each in FILE_FORMATS)}; set "
            f"kt_backend={' or '.join(each.kt_backend for each in FILE_FORMATS)}, or use --format "
            f"hf{', which keeps quantised experts as they are' if weight_format.coded else ''}"
        )
    multiple = weight_format.tile_columns
    for spec in base.experts.specs:
        sizes = (spec.hidden_size, spec.intermediate_size)
        if not spec.has_gate or spec.has_bias or any(size % multiple for size in sizes):
            raise ConfigError(
                f"--format kt: {spec.path} (hidden_size {sizes[0]}, intermediate_size {sizes[1]}, "
                f"gate: {spec.has_gate}, biases: {spec.has_bias}) does not fit kt_kernel's "
                f"{weight_format.name.upper()} files, which hold gate, up and down in multiples of "
                f"{multiple}, without biases; use --format hf"
            )
    layers = [spec.layer for spec in base.experts.specs]
    if len(set(layers)) != len(layers):
        raise ConfigError(
            "--format kt: a layer of this model has several experts modules, which kt_kernel's "
            "names cannot tell apart; use --format hf"
        )
    return weight_format


class _Packer:
    """Merges and packs expert by expert; holds one layer at a time, writes one file per layer."""

    def __init__(
        self,
        base: BaseCheckpoint,
        changes: Changes,
        engine: Engine,
        weight_format: WeightFormat,
    ) -> None:
        self._base, self._changes = base, changes
        self._engine, self._format = engine, weight_format.name
        self._bits = weight_format.bits
        self._layers: dict[str, MoeLayer] = {}

    def files(self) -> dict[str, list[OutputTensor]]:
        """Returns the tensors to write, by file."""
        specs = self._base.experts.specs
        return {
            f"model-{i + 1:05}-of-{len(specs):05}.safetensors": list(self._tensors(spec))
            for i, spec in enumerate(specs)
        }

    def write(
        self, folder: Path, files: dict[str, list[OutputTensor]], advance: Callable[[float], None]
    ) -> None:
        """Writes the files and their index."""
        for (file, tensors), spec in zip(files.items(), self._base.experts.specs, strict=True):
            self._layers[spec.path] = self._pack(spec)
            write_shard(folder / file, tensors, advance)
            del self._layers[spec.path]
        write_index(folder / INDEX_NAME, files)

    def _tensors(self, spec: ExpertsSpec) -> Iterator[OutputTensor]:
        for expert, projection in product(range(spec.num_experts), spec.projections):
            columns, rows = spec.features(projection)
            changed = self._changes.touches(f"{spec.path}.{spec.parameter_of(projection)}")
            key = f"blk.{spec.layer}.ffn_{projection}_exps.{expert}.numa.0"
            codes, scales = self._readers(spec.path, expert, projection)
            size = rows * columns * self._bits // 8
            yield OutputTensor(f"{key}.weight", "I8", (size,), codes, changed)
            yield OutputTensor(f"{key}.scale", "F32", (rows,), scales, changed)

    def _readers(
        self, path: str, expert: int, projection: Projection
    ) -> tuple[Callable[[], list[torch.Tensor]], Callable[[], list[torch.Tensor]]]:
        def codes() -> list[torch.Tensor]:
            data = self._layers[path].packed_codes(expert, projection)
            return [torch.frombuffer(bytearray(data), dtype=torch.int8)]

        def scales() -> list[torch.Tensor]:
            data = self._layers[path].packed_scales(expert, projection)
            return [torch.frombuffer(bytearray(data), dtype=torch.float32)]

        return codes, scales

    def _pack(self, spec: ExpertsSpec) -> MoeLayer:
        layer = new_layer(self._engine, spec, self._format)
        # Pages that were read count as this process's memory until they are released.
        release = releasing(lambda _count: None, self._base.experts.files())
        weights, first = self._base.experts.weights[spec.path], spec.first_parameter
        for expert in range(spec.num_experts):
            gate, up, down = weights.read(expert)
            assert gate is not None  # checked with the format
            layer.load_expert(
                expert,
                merged(gate, self._changes.expert_delta(spec.path, first, expert, 0, 2)),
                merged(up, self._changes.expert_delta(spec.path, first, expert, 1, 2)),
                merged(down, self._changes.expert_delta(spec.path, "down_proj", expert)),
            )
            release(gate.nbytes + up.nbytes + down.nbytes)
        return layer
