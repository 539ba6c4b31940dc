"""CPU stand-ins for torch.cuda's streams and graphs, and for the compiled hand-off.

The main stream runs at once, like CPU tensors. A side stream holds its work until somebody waits
for it; a result that nobody waited for reads as NaN. A graph replays the Python callable.
"""

from __future__ import annotations

import ctypes
import logging
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch

from ktrt._core import GpuHandoff
from ktrt.experts import HandOff
from ktrt.generate.graphs import DecodeGraphs, NoHandOff

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from helpers.fake_cuda import FakeCuda

    from ktrt._core import Engine, MoeLayer
    from ktrt.generate.graphs import GraphMaker


@dataclass
class FakeEvent:
    stream: FakeStream
    position: int


@dataclass
class FakeStream:
    cuda_stream: int
    work: list[Callable[[], None]] = field(default_factory=list)
    done: int = 0

    def record_event(self) -> FakeEvent:
        return FakeEvent(self, len(self.work))

    def wait_event(self, event: FakeEvent) -> None:
        event.stream.run(event.position)

    def wait_stream(self, stream: FakeStream) -> None:
        self.wait_event(stream.record_event())

    def run(self, until: int) -> None:
        while self.done < until:
            self.done += 1
            self.work[self.done - 1]()


class FakeTorchCuda:
    """Stand-in for the functions of torch.cuda that the hand-off uses."""

    def __init__(self) -> None:
        self.streams: list[FakeStream] = []
        self.main = self.Stream(None)

    def Stream(self, _device: object) -> FakeStream:  # noqa: N802
        self.streams.append(FakeStream(len(self.streams)))
        return self.streams[-1]

    def current_stream(self, _device: object) -> FakeStream:
        return self.main


def array(pointer: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Returns the tensor at an address."""
    count = torch.Size(shape).numel()
    data = (ctypes.c_byte * (count * dtype.itemsize)).from_address(pointer)
    return torch.frombuffer(data, dtype=dtype, count=count).view(shape)


class FakeCore:
    """Stand-in for ktrt._core.GpuHandoff on CPU memory: checks the order of calls and computes at
    once, but shows a result only when the side stream reaches it."""

    def __init__(self, cuda: FakeTorchCuda) -> None:
        self.cuda = cuda
        self.capturing = self.closed = False
        self.slots: list[tuple[MoeLayer, int, int, torch.dtype]] = []
        self.with_adapters: list[bool] = []
        self.expected: list[int] = []
        self.results: dict[int, torch.Tensor] = {}
        self.log: list[str] = []
        self.ids = torch.empty(0)
        self.fail: Exception | None = None
        self.error: Exception | None = None

    def add_slot(
        self, layer: MoeLayer, *, tokens: int, top_k: int, dtype: str, name: str, adapters: bool
    ) -> int:
        assert not self.capturing
        self.with_adapters.append(adapters)
        self.slots.append((layer, tokens, top_k, getattr(torch, dtype)))
        return len(self.slots) - 1

    def expect(self, slots: Sequence[int]) -> None:
        assert not self.expected
        self.expected = list(slots)

    def submit(
        self, slot: int, stream: int, states: int, ids: int, weights: int, adapters: int
    ) -> None:
        assert stream == self.cuda.main.cuda_stream
        layer, tokens, top_k, dtype = self.slots[slot]
        assert bool(adapters) == self.with_adapters[slot]
        if self.expected:
            assert slot == self.expected.pop(0), "a replay out of order"
        self.log.append("submit")
        self.ids = array(ids, (tokens, top_k), torch.int64).clone()
        if self.fail is not None:
            self.error, self.fail = self.fail, None
        out = torch.zeros(tokens, layer.hidden_size, dtype=dtype)
        if self.error is None:
            layer.forward(
                array(states, (tokens, layer.hidden_size), dtype),
                array(ids, (tokens, top_k), torch.int64),
                array(weights, (tokens, top_k), torch.float32),
                out,
                array(adapters, (tokens,), torch.int32) if adapters else None,
            )
        self.results[slot] = out

    def wait(self, slot: int, stream: int, out: int) -> None:
        dtype = self.slots[slot][3]
        result = self.results[slot]
        target = array(out, tuple(result.shape), dtype).fill_(torch.nan)

        def copy() -> None:
            self.log.append("joined")
            del self.results[slot]
            target.copy_(result)

        self.cuda.streams[stream].work.append(copy)

    def synchronize(self, stream: int) -> None:
        assert stream == self.cuda.main.cuda_stream
        assert not self.capturing
        self.expected = []
        error, self.error = self.error, None
        if error is not None:
            raise error

    def close(self) -> None:
        self.closed = True


class FakeGraphs:
    """Replays by calling again: the memory is the same, so equal inputs give equal results."""

    what = "CUDA graph"
    failure_level = logging.WARNING
    captures_compute = False

    def __init__(self, core: FakeCore | None = None) -> None:
        self.core = core
        self.captures = self.replays = 0
        self.fail: BaseException | None = None
        self.usable = True
        self.proven = False

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        if self.fail is not None:
            raise self.fail
        self.captures += 1
        if self.core is not None:
            self.core.capturing = True
        try:
            step()
        finally:
            if self.core is not None:
                self.core.capturing = False

        def replay() -> None:
            self.replays += 1
            step()

        return replay

    def clear(self) -> None:
        pass


def dense_graphs(model: Any, maker: GraphMaker | None = None) -> Callable[..., DecodeGraphs]:
    """Returns a KvCache's argument for decoding a model without experts by graphs (default: fake
    ones)."""
    made: GraphMaker = maker or FakeGraphs()
    return partial(DecodeGraphs, model, handoff=NoHandOff(), maker=made)


def fake_hand_off(max_qlen: int) -> tuple[HandOff, FakeCore]:
    """Returns a hand-off for CPU tensors, and its core."""
    cuda = FakeTorchCuda()
    core = FakeCore(cuda)
    return HandOff(cast("GpuHandoff", core), torch.device("cpu"), max_qlen, cuda), core


class DriverCore:
    """The real ktrt._core.GpuHandoff on the stand-in driver, for CPU tensors, which are copied to
    and from the driver's device arrays."""

    def __init__(self, engine: Engine, driver: FakeCuda, cuda: FakeTorchCuda) -> None:
        self.driver, self.cuda, self.stream = driver, cuda, driver.stream()
        self.core = GpuHandoff(engine, driver=driver.path, timeout=20)
        self.expect, self.close = self.core.expect, self.core.close
        self.slots: dict[int, tuple[MoeLayer, int, int, torch.dtype]] = {}
        self.device: list[int] = []

    def add_slot(
        self, layer: MoeLayer, *, tokens: int, top_k: int, dtype: Any, name: str, adapters: bool
    ) -> int:
        slot = self.core.add_slot(
            layer, tokens=tokens, top_k=top_k, dtype=dtype, name=name, adapters=adapters
        )
        self.slots[slot] = (layer, tokens, top_k, getattr(torch, dtype))
        return slot

    def submit(
        self, slot: int, _stream: int, states: int, ids: int, weights: int, adapters: int
    ) -> None:
        layer, tokens, top_k, dtype = self.slots[slot]
        arrays = [
            array(states, (tokens, layer.hidden_size), dtype),
            array(ids, (tokens, top_k), torch.int64),
            array(weights, (tokens, top_k), torch.float32),
        ]
        if adapters:
            arrays.append(array(adapters, (tokens,), torch.int32))
        self.core.submit(slot, self.stream, *(self.driver.upload(each) for each in arrays))

    def wait(self, slot: int, stream: int, out: int) -> None:
        layer, tokens, _, dtype = self.slots[slot]
        target = array(out, (tokens, layer.hidden_size), dtype).fill_(torch.nan)
        device = self.driver.upload(target)
        self.core.wait(slot, self.stream, device)

        def copy() -> None:
            while not self.driver.drained(self.stream):
                time.sleep(0)
            target.copy_(self.driver.download(device, target))

        self.cuda.streams[stream].work.append(copy)

    def synchronize(self, _stream: int) -> None:
        self.core.synchronize(self.stream)
