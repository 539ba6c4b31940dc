"""Streaming experts to a GPU: pinned host memory, a copy stream, and a ring of buffers.

Pieces of a few experts are copied ahead of the computation, over the end of a layer into the next
one, so that copies never wait for the GPU while a buffer of the ring is free.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ktrt.experts.gpu.source import LayerSource

logger = logging.getLogger(__name__)

# Large enough for copies at full rate, small enough that unpacking needs little more memory.
PIECE_BYTES = 160 << 20
# Unpacked, a piece takes at most this many times PIECE_BYTES: packed INT8 and FP8 fill a buffer,
# MXFP4, which unpacking makes 3.8 times as large, half of one.
UNPACKED = 2
# One is computed, the others are on their way: they bridge the attention between two layers.
RING_SLOTS = 4
_ALIGNMENT = 256
_PAGE = 4096

Copy = tuple[torch.Tensor, torch.Tensor]  # target on the device, source on the host


class Lane(Protocol):
    """Copies to one device during its computations. Events are the lane's own."""

    device: torch.device

    def copy(self, copies: Sequence[Copy], after: Any, /) -> Any:
        """Starts the copies once ``after`` has passed; returns the event of their end."""

    def wait(self, event: Any) -> None:
        """Later computations wait for the event."""

    def mark(self) -> Any:
        """The event of all computations so far."""

    def close(self) -> None:
        """Waits for all copies."""


class WorkLane(Lane, Protocol):
    """Also computes what it has copied."""

    def run(self, work: Callable[[], None], after: Any, /) -> Any:
        """Has ``work`` issue copies and computations, which begin once ``after`` has passed;
        returns the event of their end."""

    def done(self, event: Any, /) -> bool:
        """Whether the event has passed."""


class HostLane:
    """Copies at once: for a device without streams."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def copy(self, copies: Sequence[Copy], _after: Any, /) -> Any:
        for target, source in copies:
            target.copy_(source)

    def wait(self, event: Any) -> None: ...
    def mark(self) -> Any: ...
    def run(self, work: Callable[[], None], _after: Any, /) -> Any:
        work()

    def done(self, _event: Any, /) -> bool:
        return True

    def close(self) -> None: ...


class CudaLane:
    """A copy stream. Sources that are not pinned go through a pinned bounce buffer."""

    _BOUNCE_BYTES = 32 << 20

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._bounces: list[tuple[torch.Tensor, torch.cuda.Event]] = []

    def copy(self, copies: Sequence[Copy], after: Any, /) -> Any:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(after)
            for target, source in copies:
                if source.is_pinned():
                    target.copy_(source, non_blocking=True)
                else:
                    self._bounce(target.view(-1), source.reshape(-1))
            return self._stream.record_event()

    def _bounce(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if not self._bounces:
            self._make_bounces()
        pieces = zip(
            target.split(self._BOUNCE_BYTES), source.split(self._BOUNCE_BYTES), strict=True
        )
        for to, of in pieces:
            buffer, left = self._bounces[0]
            self._bounces.reverse()
            left.synchronize()
            buffer[: len(of)].copy_(of)
            to.copy_(buffer[: len(of)], non_blocking=True)
            left.record(self._stream)

    @torch.inference_mode(mode=False)
    def _make_bounces(self) -> None:
        for _ in range(2):
            buffer = torch.empty(self._BOUNCE_BYTES, dtype=torch.uint8, pin_memory=True)
            self._bounces.append((buffer, _event()))

    def wait(self, event: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def mark(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event()

    def run(self, work: Callable[[], None], after: Any, /) -> Any:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(after)
            work()
            return self._stream.record_event()

    def done(self, event: Any, /) -> bool:
        return bool(event.query())

    def close(self) -> None:
        self._stream.synchronize()


def _event() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event()
    return event


def make_lane(device: torch.device) -> WorkLane:
    return CudaLane(device) if device.type == "cuda" else HostLane(device)


class Pinning:
    """Memory of the engine that the GPU may read directly, registered with the CUDA runtime."""

    def __init__(
        self, register: Callable[[int, int], bool], unregister: Callable[[int], None]
    ) -> None:
        self._register, self._unregister = register, unregister
        self._regions: dict[tuple[int, int], object] = {}
        self.failed_bytes = 0

    def update(self, memories: Sequence[Any]) -> None:
        """Registers exactly these (``PackedMemory``): others that were are released first."""
        wanted = _regions(memories)
        for region in [each for each in self._regions if each not in wanted]:
            self._unregister(region[0])
            del self._regions[region]  # only now may its memory go
        self.failed_bytes = 0
        for region, owners in wanted.items():
            if region in self._regions:
                continue
            if self._register(*region):
                # Held until released: the engine must not free registered memory.
                self._regions[region] = owners
            else:
                self.failed_bytes += region[1]

    @property
    def nbytes(self) -> int:
        """Bytes that are registered."""
        return sum(size for _, size in self._regions)

    @property
    def active(self) -> bool:
        """Whether memory is registered, or was to be."""
        return bool(self._regions) or self.failed_bytes > 0

    def close(self) -> None:
        """Releases everything."""
        self.update([])


def _regions(memories: Sequence[Any]) -> dict[tuple[int, int], list[Any]]:
    """(address, bytes) of whole pages, each page once, and the memories inside."""
    regions: dict[tuple[int, int], list[Any]] = {}
    first, end, owners = 0, 0, []
    for memory in sorted(memories, key=lambda each: each.address):
        start = memory.address // _PAGE * _PAGE
        stop = -(-(memory.address + memory.nbytes) // _PAGE) * _PAGE
        if start >= end:
            first, end, owners = start, stop, [memory]
        else:  # it begins on a page of the one before
            del regions[first, end - first]
            end, owners = max(end, stop), [*owners, memory]
        regions[first, end - first] = owners
    return regions


def make_pinning(device: torch.device) -> Pinning:
    """Registers with the CUDA runtime; does nothing where the device is not a GPU."""
    if device.type != "cuda":
        return Pinning(lambda _address, _nbytes: True, lambda _address: None)
    runtime: Any = torch.cuda.cudart()

    def register(address: int, nbytes: int) -> bool:
        portable = 1
        if int(runtime.cudaHostRegister(address, nbytes, portable)) == 0:
            return True
        # The runtime keeps the error for the next call that asks.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=device).add_(1)
        return False

    return Pinning(register, lambda address: runtime.cudaHostUnregister(address))


@dataclass
class _Slot:
    memory: torch.Tensor
    free: Any  # event: what was computed from it is done
    ready: Any = None  # event: its copy is done


@dataclass(frozen=True)
class _Piece:
    layer: int
    experts: tuple[int, ...]


@dataclass
class _Filled:
    piece: _Piece
    slot: _Slot
    arrays: dict[str, torch.Tensor]


class ExpertStream:
    """The experts of all layers, piece by piece, in the order of a forward."""

    def __init__(
        self,
        sources: Sequence[LayerSource],
        lane: Lane,
        *,
        piece_bytes: int = PIECE_BYTES,
        slots: int = RING_SLOTS,
    ) -> None:
        """``piece_bytes``: of one buffer; at least one expert goes into it."""
        self._sources = sources
        self._lane = lane
        self._piece_bytes = piece_bytes
        self._slots = slots
        self._skipped: list[frozenset[int]] = [frozenset()] * len(sources)
        self._ring: list[_Slot] = []
        self._free: deque[_Slot] = deque()
        self._filled: deque[_Filled] = deque()
        self._coming: deque[_Piece] = deque()

    @property
    def nbytes(self) -> int:
        """Device memory of the whole ring."""
        return self._slots * self._slot_bytes()

    @property
    def unpacked_bytes(self) -> int:
        """Device memory of the largest piece, unpacked."""
        return max(self._piece_experts(s) * s.resident_bytes() for s in self._sources)

    def skip(self, layer: int, experts: Sequence[int]) -> None:
        """These experts of a layer are not streamed: the device has them."""
        self._skipped[layer] = frozenset(experts)
        ahead = [*(filled.piece for filled in self._filled), *self._coming]
        if any(piece.layer == layer for piece in ahead):
            self.reset()

    def reset(self) -> None:
        """Forgets what was copied ahead: call it when weights or LoRA have changed, never inside
        ``pieces``."""
        self._filled.clear()
        self._coming.clear()
        if self._ring and self._ring[0].memory.numel() != self._slot_bytes():
            self._lane.close()  # copies into the old buffers may be under way
            self._ring.clear()
        # Whatever an interrupted forward still computes from a buffer comes before the next copy.
        now = self._lane.mark()
        for slot in self._ring:
            slot.free = now
        self._free = deque(self._ring)

    def start(self, layer: int) -> None:
        """Copies ahead from the first piece of ``layer`` on, unless that is under way."""
        ahead = [filled.piece for filled in self._filled] + list(self._coming)
        pieces = self._pieces(layer)
        if ahead[: len(pieces)] != pieces:
            self.reset()
            self._coming.extend(pieces)
        self._fill(layer)

    def pieces(self, layer: int) -> Iterator[tuple[Sequence[int], dict[str, torch.Tensor]]]:
        """(expert ids, their arrays as ``LayerSource.bank`` takes them) of one layer. What is
        computed from a piece must have been issued before the next one is asked for."""
        self.start(layer)
        for piece in self._pieces(layer):
            filled = self._filled.popleft()
            assert filled.piece == piece, "the ring is out of step"
            self._lane.wait(filled.slot.ready)
            yield piece.experts, filled.arrays
            filled.slot.free = self._lane.mark()
            self._free.append(filled.slot)
            self._fill(layer)

    def close_ring(self) -> None:
        """Waits for copies and frees the buffers, until the next forward needs them."""
        self._lane.close()
        self._filled.clear()
        self._coming.clear()
        self._free.clear()
        self._ring.clear()

    def close(self) -> None:
        """Waits for copies and frees the ring; views of host memory are dropped."""
        self.close_ring()
        self._sources = []

    def _fill(self, layer: int) -> None:
        """Starts copies into all free buffers: of ``layer``, then of its successor."""
        if not self._ring:
            self._make_ring()
        ahead = self._coming or [filled.piece for filled in self._filled]
        following = layer + 1
        if (not ahead or ahead[-1].layer == layer) and following < len(self._sources):
            self._coming.extend(self._pieces(following))
        while self._free and self._coming:
            self._filled.append(self._copy(self._coming.popleft(), self._free.popleft()))

    def _copy(self, piece: _Piece, slot: _Slot) -> _Filled:
        arrays, copies, offset = {}, [], 0
        for name, source in self._sources[piece.layer].arrays.items():
            size = len(piece.experts) * source.shape[1]
            target = slot.memory[offset : offset + size].view(len(piece.experts), -1)
            arrays[name] = target
            offset += _aligned(size)
            for first, run in _runs(piece.experts):
                copies.append((target[first : first + len(run)], source[run.start : run.stop]))
        slot.ready = self._lane.copy(copies, slot.free)
        return _Filled(piece, slot, arrays)

    def _pieces(self, layer: int) -> list[_Piece]:
        source = self._sources[layer]
        count = self._piece_experts(source)
        experts = [e for e in range(source.num_experts) if e not in self._skipped[layer]]
        starts = range(0, len(experts), count)
        return [_Piece(layer, tuple(experts[at : at + count])) for at in starts]

    def _piece_experts(self, source: LayerSource) -> int:
        size = max(source.expert_bytes, -(-source.resident_bytes() // UNPACKED))
        return min(source.num_experts, max(1, self._piece_bytes // size))

    def _slot_bytes(self) -> int:
        """The largest piece of any layer."""
        sizes = []
        for source in self._sources:
            count = self._piece_experts(source)
            sizes.append(sum(_aligned(count * a.shape[1]) for a in source.arrays.values()))
        return max(sizes)

    @torch.inference_mode(mode=False)  # later forwards may run without it
    def _make_ring(self) -> None:
        for _ in range(self._slots):
            memory = torch.empty(self._slot_bytes(), dtype=torch.uint8, device=self._lane.device)
            self._ring.append(_Slot(memory, self._lane.mark()))
        self._free.extend(self._ring)


def _aligned(size: int) -> int:
    return (size + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


def _runs(experts: Sequence[int]) -> Iterator[tuple[int, range]]:
    """(index of the first, ids) of every run of consecutive ids."""
    first = 0
    for index in range(1, len(experts) + 1):
        if index == len(experts) or experts[index] != experts[index - 1] + 1:
            yield first, range(experts[first], experts[index - 1] + 1)
            first = index
