"""Memory for keys and values: plain tensors, or on the CPU address space for everything, of which
only what is written takes memory; ``device`` has the same for a GPU."""

from __future__ import annotations

import math
import mmap
import sys
from typing import TYPE_CHECKING, Protocol

import torch

from ktrt.errors import KtrtError

if TYPE_CHECKING:
    from collections.abc import Sequence

# Linux's; Python's mmap has no name for it.
_MAP_NORESERVE = 0x4000
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
# In elements of two bytes, a page: any array of that many rows of them is a multiple of pages.
ROWS_OF_PAGES = mmap.PAGESIZE // 2


class Region(Protocol):
    """``tensor`` [slots, heads, capacity, size], zero where nothing was stored."""

    tensor: torch.Tensor

    def commit(self, slot: int, end: int) -> int:
        """Gives the first ``end`` positions of a slot memory, before a forward reads or stores
        them; returns how many have some: where all do, more than there can be."""

    def clear(self, slot: int, start: int, end: int) -> None:
        """Makes positions ``start`` … ``end`` - 1 of a slot zero again."""

    def bytes_of(self, tokens: int) -> int:
        """Returns the memory that a slot takes in which ``tokens`` positions were written."""


class TensorRegion:
    """A plain tensor, all of which takes memory."""

    def __init__(self, shape: Sequence[int], like: torch.Tensor) -> None:
        # Zeros: what is masked is still multiplied by 0, which makes NaN of an arbitrary value. No
        # inference tensors, which could not be changed outside of inference mode.
        with torch.inference_mode(False):
            self.tensor = like.new_zeros(tuple(shape))

    def clear(self, slot: int, start: int, end: int) -> None:
        self.tensor[slot, :, start:end].zero_()

    def commit(self, _slot: int, _end: int) -> int:
        return sys.maxsize

    def bytes_of(self, tokens: int) -> int:
        """Returns the bytes of the positions themselves."""
        _, heads, _, size = self.tensor.shape
        return tokens * heads * size * self.tensor.element_size()


class ReservedRegion:
    """A private anonymous mapping: its addresses never move, and pages that were never written take
    no memory."""

    def __init__(self, shape: Sequence[int], like: torch.Tensor) -> None:
        """``KtrtError``: there is no room for that many addresses."""
        slots, heads, capacity, size = shape
        self._row = size * like.element_size()
        self._head = capacity * self._row
        if self._head % mmap.PAGESIZE:
            raise KtrtError(
                f"a head's {capacity} positions of {self._row} bytes end within a page of "
                f"{mmap.PAGESIZE}: expected a multiple of {ROWS_OF_PAGES} positions"
            )
        self._bytes = slots * heads * self._head
        try:
            self._map = mmap.mmap(-1, self._bytes, flags=_FLAGS)
        except (OSError, ValueError, OverflowError) as error:
            raise KtrtError(
                f"no address space for {self._bytes / 1e9:.1f} GB of keys or values of a layer "
                f"({error}): `ulimit -v` bounds it, or vm.overcommit_memory is 2"
            ) from error
        # Huge pages would commit 2 MiB for a token.
        self._map.madvise(mmap.MADV_NOHUGEPAGE)
        with torch.inference_mode(False):
            flat = torch.frombuffer(self._map, dtype=like.dtype, count=math.prod(shape))
            self.tensor = flat.view(slots, heads, capacity, size)

    def commit(self, _slot: int, _end: int) -> int:
        """Has nothing to do: writing commits pages."""
        return sys.maxsize

    def clear(self, slot: int, start: int, end: int) -> None:
        """Gives whole pages back; zeros written to the rest would commit them."""
        heads = self.tensor.shape[1]
        for head in range(heads):
            base = (slot * heads + head) * self._head
            self._clear(base + start * self._row, base + end * self._row, slot, head)

    def _clear(self, first: int, last: int, slot: int, head: int) -> None:
        page = mmap.PAGESIZE
        # The last page as a whole too: positions after `end` hold nothing.
        inner, end = -(-first // page) * page, -(-last // page) * page
        if inner > first:
            base = (slot * self.tensor.shape[1] + head) * self._head
            rows = slice((first - base) // self._row, -(-(min(inner, last) - base) // self._row))
            self.tensor[slot, head, rows].zero_()
        if end > inner:
            self._map.madvise(mmap.MADV_DONTNEED, inner, end - inner)

    def bytes_of(self, tokens: int) -> int:
        return self.tensor.shape[1] * (-(-tokens * self._row // mmap.PAGESIZE) * mmap.PAGESIZE)


def fits(size: int) -> bool:
    """Whether the process can map ``size`` more bytes, and as many again for everything else."""
    try:
        mmap.mmap(-1, 2 * size, flags=_FLAGS).close()
    except (OSError, ValueError, OverflowError):
        return False
    return True
