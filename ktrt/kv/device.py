"""A GPU's memory for keys, values and states: addresses for all slots and positions at once, which
never move, and memory for what is written, in granules of 2 MB.

A slot's positions follow one another, of all heads, and of keys and values next to each other, so
that granules are filled before others are taken: a layer of latents (1,152 bytes a token) takes one
for 1,820 tokens.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

import torch

from ktrt.errors import KtrtError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ktrt.engine.device_region import DeviceRegion
    from ktrt.kv.memory import Region

logger = logging.getLogger(__name__)

DRIVER = "libcuda.so.1"
# Positions begin at multiples of it: what the widest loads of attention's kernels need.
_ALIGNMENT = 16


def has_device_memory(device: torch.device, driver: str = DRIVER) -> bool:
    """Whether the GPU's driver has addresses without memory; if not, logs why."""
    try:
        with torch.cuda.device(device):
            torch.zeros(1, device=device)  # makes the context
            region = new_region(1, driver)
            region.commit(0, 1)
            bytes_of(region, device)[:1].zero_()
    except (RuntimeError, KtrtError) as error:
        logger.info("Keys and values move on the GPU as they grow: %s", error)
        return False
    return True


def new_region(size: int, driver: str) -> DeviceRegion:
    """Returns addresses for ``size`` bytes on the current device. ``RuntimeError``: why not."""
    # Here: only where there is a GPU.
    from ktrt.engine.device_region import DeviceRegion

    return DeviceRegion(size, driver=driver)


def fits(size: int, driver: str) -> bool:
    """Whether ``size`` bytes of addresses can be reserved."""
    try:
        new_region(size, driver)
    except RuntimeError:
        return False
    return True


def bytes_of(region: DeviceRegion, device: torch.device) -> torch.Tensor:
    """Returns a region's bytes on ``device``, uint8 [bytes], most of which have no memory. The
    first of them must: torch asks whose address it is."""
    with torch.inference_mode(False):
        # Without the device torch would copy them to the CPU.
        found = torch.as_tensor(region, device=device)
    if found.data_ptr() != region.address:
        raise KtrtError(f"torch has copied the memory of {device} that it should have looked at")
    return found


class DeviceRows:
    """Memory [slots, capacity] of rows of ``row`` bytes; of each slot the first ones have some."""

    def __init__(
        self, slots: int, capacity: int, row: int, device: torch.device, driver: str
    ) -> None:
        """``KtrtError``: there is no room for that many addresses."""
        self.row, self._capacity = _up(row, _ALIGNMENT), capacity
        try:
            self.granule = new_region(1, driver).granularity
            self.slot_stride = _up(capacity * self.row, self.granule)
            self._region = new_region(slots * self.slot_stride, driver)
            self._region.commit(0, 1)
        except RuntimeError as error:
            raise KtrtError(
                f"no addresses on the GPU for a layer's keys and values of {slots} slots of "
                f"{capacity} tokens, {slots * capacity * self.row / 1e9:.1f} GB ({error})"
            ) from error
        self.bytes = bytes_of(self._region, device)
        # Bytes from the slot's begin on that have memory, which was zeroed.
        self._ends = [0] * slots

    def commit(self, slot: int, end: int) -> int:
        """Gives the first ``end`` rows of a slot memory; returns how many have some: where all do,
        more than there can be. ``KtrtError``: there is none left."""
        held, wanted = self._ends[slot], _up(end * self.row, self.granule)
        if wanted > held:
            first = slot * self.slot_stride
            self._commit(first + held, first + wanted)
            self.bytes[first + held : first + wanted].zero_()
            self._ends[slot] = held = wanted
        return held // self.row if held < self._capacity * self.row else sys.maxsize

    def _commit(self, first: int, end: int) -> None:
        try:
            self._region.commit(first, end)
        except RuntimeError:
            # torch keeps memory that nobody uses.
            torch.cuda.empty_cache()
            try:
                self._region.commit(first, end)
            except RuntimeError as error:
                raise KtrtError(
                    f"the GPU has no memory left for keys and values ({error}): shorten the "
                    "conversation, or close others"
                ) from error

    def release(self, slot: int, end: int) -> None:
        """Gives the memory of a slot back that its first ``end`` rows do not need, and zeroes the
        rest of the last granule."""
        first, held = slot * self.slot_stride, self._ends[slot]
        kept = min(_up(end * self.row, self.granule), held)
        if kept < held:
            self._ends[slot] = kept
            self._region.decommit(first + kept, first + held)
        self.bytes[first + min(end * self.row, kept) : first + kept].zero_()

    def bytes_for(self, rows: int) -> int:
        """Returns the memory that a slot of ``rows`` takes."""
        return _up(rows * self.row, self.granule)


class DeviceArray:
    """One of the arrays in the rows: ``tensor`` [slots, heads, capacity, size]."""

    def __init__(self, rows: DeviceRows, shape: Sequence[int], like: torch.Tensor, at: int) -> None:
        """``at``: bytes of a row before it."""
        slots, heads, capacity, size = shape
        item = like.element_size()
        self._rows, self._share = rows, _row_bytes(shape, like) / rows.row
        strides = rows.slot_stride // item, size, rows.row // item, 1
        with torch.inference_mode(False):
            flat = rows.bytes.view(like.dtype)
            self.tensor = flat.as_strided((slots, heads, capacity, size), strides, at // item)

    def commit(self, slot: int, end: int) -> int:
        return self._rows.commit(slot, end)

    def clear(self, slot: int, start: int, _end: int) -> None:
        """Gives the memory after the granule of ``start`` back: after ``end`` nothing is stored."""
        self._rows.release(slot, start)

    def bytes_of(self, tokens: int) -> int:
        """Returns the array's share of the memory."""
        return int(self._rows.bytes_for(tokens) * self._share)


def device_arrays(
    shapes: Sequence[Sequence[int]], likes: Sequence[torch.Tensor], driver: str
) -> list[Region]:
    """Returns arrays [slots, heads, capacity, size] of the dtypes of ``likes``, for the same slots
    and positions, next to each other in the same rows."""
    slots, _, capacity, _ = shapes[0]
    places, row = [], 0
    for shape, like in zip(shapes, likes, strict=True):
        places.append(row)
        row += _row_bytes(shape, like)
    rows = DeviceRows(slots, capacity, row, likes[0].device, driver)
    return [
        DeviceArray(rows, shape, like, at)
        for shape, like, at in zip(shapes, likes, places, strict=True)
    ]


def _row_bytes(shape: Sequence[int], like: torch.Tensor) -> int:
    return _up(shape[1] * shape[3] * like.element_size(), _ALIGNMENT)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
