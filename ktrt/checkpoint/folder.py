"""Reads a Hugging Face model folder lazily: names, shapes, and one tensor at a time.

File format: safetensors (https://github.com/huggingface/safetensors), one file or shards with an
index (``ktrt.checkpoint.files``). Quantised tensors are read as plain ones.
``ktrt.checkpoint.names`` maps tensors to parameters, ``ktrt.checkpoint.experts`` finds experts.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ktrt.checkpoint.files import INDEX_NAME, SINGLE_NAME, find_weights
from ktrt.checkpoint.formats import decoded, is_dequantized
from ktrt.checkpoint.int4 import Int4Tensor
from ktrt.checkpoint.quantization import Quantization
from ktrt.checkpoint.stored import PlainTensor, StoredTensor
from ktrt.errors import CheckpointError
from ktrt.folders.schemes import refusal, unread_scheme

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import torch

    from ktrt.checkpoint.codes import Codes
    from ktrt.checkpoint.convert import Conversions

logger = logging.getLogger(__name__)

__all__ = ["INDEX_NAME", "SINGLE_NAME", "Checkpoint"]

_UNCLAIMED = Quantization()


class Checkpoint:
    """The tensors of one model folder, memory-mapped and read on demand.

    A quantised tensor and its scales are one tensor here, in float32; ``stored`` holds the tensors
    on disk. ``quantization`` has config.json's claims, ``chosen`` the file in its
    transformers_weights. Leaves out tensors of a shard that the index does not name and, with
    ``experts_elsewhere``, routed experts in an unsupported quantisation.

    Raises ``CheckpointError`` for a folder without safetensors, a missing or damaged shard, an
    index that names a tensor its shard lacks, scales that do not fit, and unsupported
    quantisations.
    """

    def __init__(
        self,
        folder: Path,
        quantization: Quantization = _UNCLAIMED,
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
        self.stored: Mapping[str, StoredTensor] = stored
        try:
            self._tensors = decoded(stored, quantization)
        except CheckpointError:
            if not experts_elsewhere:
                raise
            others = {name: t for name, t in stored.items() if ".experts." not in name}
            self._tensors = decoded(others, quantization)
        self._tell_of_rounding()

    def _tell_of_rounding(self) -> None:
        rounded = (t for t in self._tensors.values() if isinstance(t, Int4Tensor) and t.coded)
        if first := next((tensor for tensor in rounded if tensor.rounds_scales), None):
            logger.info(
                "%s: INT4 scales are stored in %s; packed as INT4 they are kept in BF16: one "
                "rounding, at most 0.4 %% of a weight, as of weights dequantised to BF16",
                self.folder, first.scale_dtype,
            )  # fmt: skip

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

    def tensor(self, name: str) -> StoredTensor:
        """Returns the tensor itself."""
        return self._tensors[name]

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
