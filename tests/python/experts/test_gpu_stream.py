"""The ring of buffers, on a stand-in for streams that runs copies as late as it may."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.expert_layers import LayerCase
from helpers.loras import apply_lora

from ktrt._core import Engine
from ktrt.experts.gpu.source import LayerSource
from ktrt.experts.gpu.stream import (
    CudaLane,
    ExpertStream,
    HostLane,
    Pinning,
    make_pinning,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ktrt._core import MoeLayer
    from ktrt.experts.gpu.stream import Copy

CPU = torch.device("cpu")


class LateLane:
    """Copies happen when they are waited for. Refuses a copy into memory that was read after the
    event that the copy is to follow."""

    device = CPU

    def __init__(self) -> None:
        self.started = 0
        self.copied: list[int] = []  # bytes, in order
        self._queue: list[Sequence[Copy]] = []
        self._done = 0
        self._clock = 0
        self._reads: dict[int, int] = {}

    def copy(self, copies: Sequence[Copy], after: Any, /) -> Any:
        memory = copies[0][0].untyped_storage().data_ptr()
        assert self._reads.get(memory, -1) < after, "copied over what is still being read"
        self._queue.append(copies)
        self.started += 1
        self.copied.append(sum(target.nbytes for target, _ in copies))
        return self.started

    def wait(self, event: Any) -> None:
        while self._done < event:
            for target, source in self._queue[self._done]:
                target.copy_(source)
            self._done += 1

    def mark(self) -> Any:
        self._clock += 1
        return self._clock

    def close(self) -> None:
        self.wait(self.started)

    def read(self, arrays: dict[str, torch.Tensor]) -> None:
        """Computes something from the arrays."""
        for array in arrays.values():
            self._reads[array.untyped_storage().data_ptr()] = self._clock


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(num_threads=1)
    yield engine
    engine.close()


def make_layers(engine: Engine, *, count: int = 3, rank: int = 4) -> list[MoeLayer]:
    cases = [LayerCase(7, 2, 64, 96, ranks=(rank,) * 3, seed=seed) for seed in range(count)]
    return [case.build(engine, "int8") for case in cases]


def make_stream(
    sources: list[LayerSource], lane: LateLane, *, experts: int = 2, slots: int = 3
) -> ExpertStream:
    size = experts * sources[0].expert_bytes
    return ExpertStream(sources, lane, piece_bytes=size, slots=slots)


def consume(stream: ExpertStream, lane: LateLane, source: LayerSource, layer: int) -> list[int]:
    """The experts of a layer in the order they came, their bytes compared."""
    seen: list[int] = []
    for experts, arrays in stream.pieces(layer):
        for name, array in arrays.items():
            assert torch.equal(array, source.arrays[name][list(experts)]), (layer, experts, name)
        lane.read(arrays)
        seen += experts
    return seen


@pytest.mark.parametrize("slots", [1, 2, 3, 9])
@pytest.mark.parametrize("experts", [1, 2, 3, 100])
def test_every_expert_of_every_layer_comes_once(engine: Engine, experts: int, slots: int) -> None:
    sources = [LayerSource(layer) for layer in make_layers(engine)]
    lane = LateLane()
    stream = make_stream(sources, lane, experts=experts, slots=slots)
    for _ in range(2):
        for layer, source in enumerate(sources):
            assert consume(stream, lane, source, layer) == list(range(7))
    assert sum(lane.copied) == 2 * sum(7 * source.expert_bytes for source in sources)


def test_the_ring_is_kept_full_into_the_next_layer(engine: Engine) -> None:
    sources = [LayerSource(layer) for layer in make_layers(engine)]
    lane = LateLane()
    stream = make_stream(sources, lane, experts=2, slots=3)  # four pieces a layer
    started = [lane.started for _ in stream.pieces(0)]
    assert started == [3, 4, 5, 6]
    assert lane.started == 7
    for _ in stream.pieces(2):  # out of order: what was copied ahead is of no use
        pass
    assert lane.started == 7 + 4


def test_an_interrupted_forward_is_forgotten(engine: Engine) -> None:
    sources = [LayerSource(layer) for layer in make_layers(engine)]
    lane = LateLane()
    stream = make_stream(sources, lane)
    pieces = stream.pieces(1)
    lane.read(next(pieces)[1])
    for layer, source in enumerate(sources):
        assert consume(stream, lane, source, layer) == list(range(7))


def test_resident_experts_are_left_out(engine: Engine) -> None:
    sources = [LayerSource(layer) for layer in make_layers(engine)]
    lane = LateLane()
    stream = make_stream(sources, lane, experts=3)
    stream.skip(0, [0, 3, 4])
    stream.skip(1, range(7))
    assert [consume(stream, lane, s, layer) for layer, s in enumerate(sources)] == [
        [1, 2, 5, 6],
        [],
        list(range(7)),
    ]


@pytest.mark.parametrize("rank", [1, 40])
def test_a_changed_lora_is_copied_again(engine: Engine, rank: int) -> None:
    layers = make_layers(engine)
    sources = [LayerSource(layer) for layer in layers]
    lane = LateLane()
    stream = make_stream(sources, lane)
    consume(stream, lane, sources[0], 0)
    for layer, source in zip(layers, sources, strict=True):
        apply_lora(layer, **LayerCase(7, 2, 64, 96, ranks=(rank,) * 3, seed=9).lora)
        source.refresh_lora()
    stream.reset()
    for layer_index, source in enumerate(sources):
        assert consume(stream, lane, source, layer_index) == list(range(7))


def test_layers_of_different_sizes(engine: Engine) -> None:
    cases = [LayerCase(3, 1, 64, 32), LayerCase(5, 1, 64, 160, ranks=(0, 8, 0))]
    sources = [LayerSource(case.build(engine, "bf16")) for case in cases]
    lane = LateLane()
    stream = make_stream(sources, lane, experts=2)
    assert [consume(stream, lane, s, layer) for layer, s in enumerate(sources)] == [
        list(range(3)),
        list(range(5)),
    ]


@pytest.mark.parametrize(("weight_format", "experts"), [("int8", 4), ("fp8", 4), ("mxfp4", 2)])
def test_a_piece_is_bounded_unpacked_too(engine: Engine, weight_format: str, experts: int) -> None:
    """MXFP4 becomes 3.8 times as large on the device; pieces may double."""
    source = LayerSource(LayerCase(6, 2, 128, 128).build(engine, weight_format))
    lane = LateLane()
    stream = make_stream([source], lane, experts=4)
    assert [len(each) for each, _ in stream.pieces(0)] == [experts] * (6 // experts) + [2] * (
        6 % experts > 0
    )
    assert stream.unpacked_bytes == experts * source.resident_bytes()
    assert stream.unpacked_bytes <= 2 * 4 * source.expert_bytes


def test_nothing_is_copied_ahead_after_the_last_layer(engine: Engine) -> None:
    sources = [LayerSource(layer) for layer in make_layers(engine)]
    lane = LateLane()
    stream = make_stream(sources, lane)
    consume(stream, lane, sources[2], 2)
    assert lane.started == 4


def test_host_lane_copies_at_once() -> None:
    source, target = torch.arange(6), torch.zeros(6, dtype=torch.int64)
    HostLane(CPU).copy([(target, source)], None)
    assert torch.equal(source, target)


class Memory:
    def __init__(self, address: int, nbytes: int) -> None:
        self.address, self.nbytes = address, nbytes


PAGE = 4096


def test_pinning_registers_each_region_once_and_releases_all() -> None:
    log: list[tuple[str, int]] = []

    def register(address: int, _nbytes: int) -> bool:
        log.append(("register", address // PAGE))
        return address != 5 * PAGE

    pinning = Pinning(register, lambda address: log.append(("release", address // PAGE)))
    pinning.update([Memory(page * PAGE, PAGE) for page in (1, 3, 5)])
    assert (pinning.nbytes, pinning.failed_bytes, pinning.active) == (2 * PAGE, PAGE, True)
    pinning.update([Memory(PAGE, PAGE), Memory(7 * PAGE, 2 * PAGE)])
    assert log[3:] == [("release", 3), ("register", 7)]
    assert (pinning.nbytes, pinning.failed_bytes) == (3 * PAGE, 0)
    pinning.close()
    assert log[5:] == [("release", 1), ("release", 7)]
    assert not pinning.active


def test_a_page_is_registered_once() -> None:
    log: list[tuple[int, int]] = []

    def register(address: int, nbytes: int) -> bool:
        log.append((address, nbytes))
        return True

    pinning = Pinning(register, lambda _: None)
    pinning.update(
        [Memory(PAGE + 100, 50), Memory(PAGE, 100), Memory(2 * PAGE - 1, 2), Memory(3 * PAGE, 1)]
    )
    assert log == [(PAGE, 2 * PAGE), (3 * PAGE, PAGE)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("pinned", [True, False])
def test_cuda_lane(engine: Engine, monkeypatch: pytest.MonkeyPatch, *, pinned: bool) -> None:
    monkeypatch.setattr(CudaLane, "_BOUNCE_BYTES", 1000)
    device = torch.device("cuda")
    sources = [LayerSource(layer) for layer in make_layers(engine)]
    pinning = make_pinning(device)
    if pinned:
        pinning.update([m for source in sources for m in source.memories.values()])
        assert pinning.failed_bytes == 0
        assert sources[0].arrays["codes0"].is_pinned()
    stream = ExpertStream(sources, CudaLane(device), piece_bytes=2 * sources[0].expert_bytes)
    try:
        for layer, source in enumerate(sources):
            for experts, arrays in stream.pieces(layer):
                for name, array in arrays.items():
                    assert torch.equal(array.cpu(), source.arrays[name][list(experts)])
    finally:
        stream.close()
        pinning.close()
