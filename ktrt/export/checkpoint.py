"""Writes base and adapter as one Hugging Face checkpoint, with the source's tensor names."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ktrt.checkpoint.folder import INDEX_NAME, SINGLE_NAME
from ktrt.engine import release_file_pages
from ktrt.export.changes import Changes
from ktrt.export.quantization import plain_modules
from ktrt.export.shards import write_index, write_shard
from ktrt.export.side_files import (
    copy_side_files,
    copy_words,
    side_files,
    write_config,
)
from ktrt.export.tensors import Dtypes, TensorPlan, main_dtype
from ktrt.loading.plan import open_checkpoint
from ktrt.utils.progress import byte_progress
from ktrt.utils.staging import check_target, staged_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from ktrt.adapter import AdapterPlan
    from ktrt.export.shards import OutputTensor
    from ktrt.loading.plan import BaseCheckpoint

DtypeName = Literal["float32", "float16", "bfloat16"]
DTYPES: dict[DtypeName, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# Pages of files that were read count as this process's memory until they are released.
_RELEASE_BYTES = 128 << 20


@dataclass(frozen=True)
class Summary:
    """Counts of an export: ``tensors`` in ``files`` with ``bytes``, ``merged`` of them changed by
    the adapter's ``adapter_tensors``; ``quantized``: matrices that stay quantised."""

    out: str
    format: str
    dtype: str
    files: int
    tensors: int
    merged: int
    quantized: int
    adapter_tensors: int
    bytes: int
    seconds: float


class Merge:
    """Plans the merge of an adapter into a model folder; reads and writes no weights yet.

    ``dtype``: replaces the source's; quantised tensors become plain. ``without_experts``: leaves
    out the routed experts. ``words``: a folder whose tokenizer files replace the source's.
    """

    def __init__(
        self,
        base: BaseCheckpoint,
        plan: AdapterPlan | None,
        dtype: DtypeName | None = None,
        *,
        without_experts: bool = False,
        words: Path | None = None,
    ) -> None:
        specs, self.source = base.experts.specs, base.experts.checkpoint.folder
        # Opened again: the checkpoint of ``base`` also lists converted parameters.
        checkpoint = open_checkpoint(base.built.config)
        main = main_dtype(checkpoint)
        self.dtype = DTYPES[dtype] if dtype else main
        self.changes = Changes(plan, base.built.model, specs)
        tensors = TensorPlan(
            checkpoint, base.names, specs, self.changes, Dtypes(main, self.dtype, dtype is None),
            without_experts=without_experts,
        )  # fmt: skip
        self.files = tensors.by_file()
        self.quantized = tensors.kept
        self._plain = plain_modules(tensors.dequantized()) if tensors.kept else None
        self._untied, self._words = tensors.unties(), words
        self._vocabulary = self.changes.vocabulary()
        is_plain_now = checkpoint.is_quantized() and not tensors.kept
        self._new_dtype = self.dtype if dtype or is_plain_now else None
        self._sharded = checkpoint.files.sharded
        self._inputs = base.experts.files()

    @property
    def tensor_bytes(self) -> int:
        """Returns the bytes of all tensors."""
        return sum(tensor.nbytes for tensors in self.files.values() for tensor in tensors)

    @property
    def side_bytes(self) -> int:
        """Returns the bytes of the other files."""
        return sum((self.source / path).stat().st_size for path in side_files(self.source))

    def write(self, folder: Path, advance: Callable[[float], None]) -> None:
        """Writes everything into ``folder``."""
        advance = releasing(advance, self._inputs)
        for file, tensors in self.files.items():
            write_shard(folder / (file if self._sharded else SINGLE_NAME), tensors, advance)
        if self._sharded:
            write_index(folder / INDEX_NAME, self.files)
        copy_side_files(self.source, folder)
        if self._words is not None:
            copy_words(self._words, folder)
        write_config(
            self.source, folder,
            dtype=self._new_dtype, untied=self._untied, vocabulary=self._vocabulary,
            plain=self._plain,
        )  # fmt: skip


def merge_checkpoint(
    base: BaseCheckpoint,
    plan: AdapterPlan | None,
    out: Path,
    dtype: DtypeName | None = None,
    words: Path | None = None,
) -> Summary:
    """Writes ``base`` with the merged adapter to the new folder ``out``, which appears when it is
    complete. Sums are computed in float32 and rounded once, to ``dtype`` or the source's dtype.
    Quantised tensors become BF16 if the adapter changes them, otherwise they stay; ``dtype`` makes
    all of them plain. ``words``: see ``Merge``.

    Raises ``AdapterError`` if a tensor of the adapter cannot be merged, ``ConfigError`` if ``out``
    is not empty or the disk is too small.
    """
    start = time.perf_counter()
    check_target(out)
    merge = Merge(base, plan, dtype, words=words)
    size = merge.tensor_bytes
    with staged_folder(out, size + merge.side_bytes) as folder:
        with byte_progress("Merging", size) as advance:
            merge.write(folder, advance)
        used = merge.changes.check_complete()
    return summarise(out, "hf", merge, merge.files, used, start)


def summarise(
    out: Path,
    written: str,
    merge: Merge,
    files: Mapping[str, Sequence[OutputTensor]],
    used: int,
    start: float,
) -> Summary:
    """Counts the written tensors; ``written``: the format, ``used``: tensors of the adapter."""
    tensors = [tensor for each in files.values() for tensor in each]
    return Summary(
        out=str(out),
        format=written,
        dtype=merge.dtype,
        files=len(files),
        tensors=len(tensors),
        merged=sum(tensor.changed for tensor in tensors),
        quantized=merge.quantized,
        adapter_tensors=used,
        bytes=sum(tensor.nbytes for tensor in tensors),
        seconds=time.perf_counter() - start,
    )


def releasing(advance: Callable[[float], None], files: Sequence[Path]) -> Callable[[float], None]:
    """Wraps ``advance`` to release the pages of ``files`` every 128 MiB."""
    pending = 0.0

    def advance_and_release(count: float) -> None:
        nonlocal pending
        pending += count
        if pending >= _RELEASE_BYTES:
            pending = 0.0
            for file in files:
                release_file_pages(str(file))
        advance(count)

    return advance_and_release
