"""Reads config.json's claims about a folder's quantisation. Copies of a folder often keep them
wrongly, so they only fill in what the tensors cannot tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from ktrt.errors import CheckpointError
from ktrt.utils.json_files import JsonObject, typed

if TYPE_CHECKING:
    from collections.abc import Iterator

_PositiveInt = Annotated[int, Field(gt=0)]
# FP8's block if config.json names none: every published checkpoint has it.
_BLOCK = (128, 128)


class QuantizationKeys(JsonObject):
    """The keys of ``quantization_config`` that are read."""

    quant_method: str | None = None
    weight_block_size: Annotated[list[_PositiveInt], Field(min_length=2, max_length=2)] | None = (
        None
    )
    config_groups: dict[str, Any] | None = None
    group_size: int | None = None
    checkpoint_format: str | None = None


@dataclass(frozen=True)
class Quantization:
    """``method``: the claimed one. ``block``: rows and columns of one FP8 scale. ``group_sizes``:
    columns of one INT4 scale, of any module. ``checkpoint_format``: GPTQ's convention."""

    method: str | None = None
    block: tuple[int, int] = _BLOCK
    group_sizes: tuple[int, ...] = ()
    checkpoint_format: str | None = None


def read_quantization(claim: Any, where: str, advice: str) -> Quantization:
    """Reads one claim. Raises ``CheckpointError`` with the key for a value of the wrong type."""
    keys = typed(claim, QuantizationKeys, where, CheckpointError, advice)
    groups = [keys.group_size, *(weights.get("group_size") for weights in _weights(keys))]
    return Quantization(
        keys.quant_method or "unnamed",
        _block(keys),
        tuple(dict.fromkeys(size for size in groups if size is not None and _is_size(size))),
        keys.checkpoint_format,
    )


def _block(keys: QuantizationKeys) -> tuple[int, int]:
    """Returns the block of one FP8 scale, in DeepSeek-V3's or compressed-tensors' form."""
    if keys.weight_block_size:
        rows, columns = keys.weight_block_size
        return rows, columns
    for weights in _weights(keys):
        block = weights.get("block_structure")
        if isinstance(block, list) and len(block) == 2 and all(map(_is_size, block)):
            return block[0], block[1]
    return _BLOCK


def _weights(keys: QuantizationKeys) -> Iterator[dict[str, Any]]:
    """Yields what compressed-tensors says about the weights of each group of modules."""
    for group in (keys.config_groups or {}).values():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            yield weights


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
