"""The hand-off to a CUDA stream as Python sees it, with a stand-in for the driver.

tests/cpp/cuda has the states and errors one by one.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers import fake_cuda
from helpers.fake_cuda import FakeCuda

from ktrt import _core

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[3]
E, K, H, INTERMEDIATE, QLEN = 4, 2, 64, 32, 5
MECHANISMS = ["stream_memory_ops", "host_functions"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = fake_cuda.build(tmp_path_factory.mktemp("fake_cuda"))
    if library is None:
        pytest.skip("no C++ compiler for the stand-in")
    return library


@pytest.fixture
def cuda(library: Path) -> Iterator[FakeCuda]:
    cuda = FakeCuda(library)
    yield cuda
    gc.collect()
    assert cuda.reset() == 0, "a stream was left waiting"


def make_layer(engine: _core.Engine, seed: int = 0, experts: int = E) -> _core.MoeLayer:
    layer = _core.MoeLayer(
        engine,
        num_experts=E,
        top_k=K,
        hidden_size=H,
        intermediate_size=INTERMEDIATE,
        weight_format="bf16",
    )
    generator = torch.Generator().manual_seed(seed)
    for e in range(experts):
        gate, up = torch.randn(2, INTERMEDIATE, H, generator=generator) / 8
        layer.load_expert(e, gate, up, torch.randn(H, INTERMEDIATE, generator=generator) / 6)
    return layer


class Case:
    """Two layers, each with the same input, and what they make of it when called directly."""

    def __init__(
        self, cuda: FakeCuda, mechanism: Any = "auto", timeout: float = 30.0, experts: int = E
    ) -> None:
        self.cuda = cuda
        self.engine = _core.Engine(num_threads=1, max_qlen=16)
        self.layers = [make_layer(self.engine, 0), make_layer(self.engine, 1, experts)]
        self.handoff = _core.GpuHandoff(
            self.engine, timeout=timeout, driver=cuda.path, mechanism=mechanism
        )
        self.slots = [
            self.handoff.add_slot(layer, tokens=QLEN, top_k=K, dtype="float32", name=f"mlp.{i}")
            for i, layer in enumerate(self.layers)
        ]
        generator = torch.Generator().manual_seed(7)
        self.hidden = torch.randn(QLEN, H, generator=generator)
        self.ids = torch.rand(QLEN, E, generator=generator).argsort(1)[:, :K].contiguous()
        self.weights = torch.rand(QLEN, K, generator=generator)
        self.stream = cuda.stream()
        self.inputs = [cuda.upload(t) for t in (self.hidden, self.ids, self.weights)]
        self.outs = [cuda.upload(torch.zeros(QLEN, H)) for _ in self.layers]

    def enqueue(self) -> None:
        for slot, out in zip(self.slots, self.outs, strict=True):
            self.handoff.submit(slot, self.stream, *self.inputs)
            self.handoff.wait(slot, self.stream, out)

    def capture(self) -> int:
        self.cuda.begin_capture(self.stream)
        self.enqueue()
        return self.cuda.end_capture(self.stream)

    def synchronize(self) -> None:
        self.handoff.synchronize(self.stream)

    def results(self) -> list[torch.Tensor]:
        return [self.cuda.download(out, self.hidden) for out in self.outs]

    def expected(self) -> list[torch.Tensor]:
        outs = [torch.empty(QLEN, H) for _ in self.layers]
        for layer, out in zip(self.layers, outs, strict=True):
            layer.forward(self.hidden, self.ids, self.weights, out)
        return outs

    def assert_right(self) -> None:
        for result, expected in zip(self.results(), self.expected(), strict=True):
            assert torch.equal(result, expected)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_eager_and_captured_give_the_bits_of_forward(cuda: FakeCuda, mechanism: str) -> None:
    case = Case(cuda, mechanism)
    assert case.handoff.mechanism == mechanism
    case.enqueue()
    case.synchronize()
    case.assert_right()
    graph = case.capture()
    for _ in range(50):
        case.handoff.expect(case.slots)
        cuda.launch(graph, case.stream)
        case.synchronize()
    case.assert_right()
    case.handoff.close()
    assert case.handoff.closed
    assert case.handoff.pinned_bytes == 0
    with pytest.raises(RuntimeError, match="the hand-off is closed"):
        case.enqueue()


def test_host_functions_where_the_device_lacks_memory_operations(cuda: FakeCuda) -> None:
    cuda.set("memory_ops_in_capture", 0)
    assert Case(cuda).handoff.mechanism == "host_functions"
    with pytest.raises(RuntimeError, match="no stream memory operations"):
        Case(cuda, "stream_memory_ops")


def test_wrong_arguments(cuda: FakeCuda) -> None:
    case = Case(cuda)
    layer, add = case.layers[0], case.handoff.add_slot
    with pytest.raises(ValueError, match=r"tokens is 17, expected 1 to max_qlen \(16\)"):
        add(layer, tokens=17, top_k=K, dtype="float32")
    with pytest.raises(ValueError, match=r"top_k is 3, expected 1 to the layer's \(2\)"):
        add(layer, tokens=1, top_k=3, dtype="float32")
    with pytest.raises(ValueError, match="dtype is 'float64', expected 'float32'"):
        add(layer, tokens=1, top_k=K, dtype="float64")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="belongs to another engine"):
        add(make_layer(_core.Engine(num_threads=1)), tokens=1, top_k=K, dtype="float32")
    with pytest.raises(ValueError, match="slot is 2, expected 0 to 1"):
        case.handoff.expect([2])
    with pytest.raises(ValueError, match="found a null pointer"):
        case.handoff.submit(0, case.stream, 0, *case.inputs[1:])
    with pytest.raises(ValueError, match=r"timeout is -1 s"):
        Case(cuda, timeout=-1)
    with pytest.raises(ValueError, match=r"timeout is nan s"):
        Case(cuda, timeout=float("nan"))
    with pytest.raises(ValueError, match="mechanism is 'events', expected 'auto'"):
        Case(cuda, "events")
    with pytest.raises(TypeError):
        case.handoff.submit(0, case.stream, case.hidden, 1, 1)  # type: ignore[arg-type]


def test_no_driver() -> None:
    engine = _core.Engine(num_threads=1)
    with pytest.raises(RuntimeError, match="the CUDA driver /no/libcuda.so cannot be opened"):
        _core.GpuHandoff(engine, driver="/no/libcuda.so")


def test_old_driver_and_no_context(cuda: FakeCuda) -> None:
    engine = _core.Engine(num_threads=1)
    cuda.set("version", 11040)
    with pytest.raises(RuntimeError, match=r"supports CUDA 11\.4, at least 12\.0 is needed"):
        _core.GpuHandoff(engine, driver=cuda.path)
    cuda.set("version", 13000)
    cuda.make_current(False)
    with pytest.raises(RuntimeError, match="no current CUDA context: use the device first"):
        _core.GpuHandoff(engine, driver=cuda.path)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_failed_forward_is_raised_by_synchronize(cuda: FakeCuda, mechanism: str) -> None:
    case = Case(cuda, mechanism, experts=E - 1)
    graph = case.capture()
    for _ in range(2):
        case.handoff.expect(case.slots)
        cuda.launch(graph, case.stream)
        message = r"slot 1 \(mlp\.1, 5 tokens\): expert 3 has not been loaded"
        with pytest.raises(RuntimeError, match=message):
            case.synchronize()
        case.synchronize()
    zeros = torch.zeros(INTERMEDIATE, H)
    case.layers[1].load_expert(3, zeros, zeros, zeros.t().contiguous())
    case.handoff.expect(case.slots)
    cuda.launch(graph, case.stream)
    case.synchronize()
    case.assert_right()


def test_a_stream_that_does_not_move_raises_timeout_error(cuda: FakeCuda) -> None:
    case = Case(cuda, timeout=0.3)
    cuda.set_delay(700_000)
    case.enqueue()
    with pytest.raises(TimeoutError, match=r"no slot has moved for 0\.3 s"):
        case.synchronize()
    cuda.set_delay(0)
    while not cuda.drained(case.stream):
        time.sleep(0.01)
    with pytest.raises(TimeoutError):  # once more, now that the stream has drained
        case.synchronize()
    case.enqueue()
    case.synchronize()
    case.assert_right()


def test_ctrl_c_during_synchronize(cuda: FakeCuda) -> None:
    case = Case(cuda)
    cuda.set_delay(20_000)
    for _ in range(2):
        case.enqueue()
    timer = threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        case.synchronize()
    timer.join()
    assert cuda.drained(case.stream)
    cuda.set_delay(0)
    case.enqueue()
    case.synchronize()
    case.assert_right()


def test_synchronize_releases_the_gil(cuda: FakeCuda) -> None:
    case = Case(cuda)
    cuda.set_delay(20_000)
    case.enqueue()
    ticks = 0
    done = threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.wait(0.005):
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    case.synchronize()
    done.set()
    thread.join()
    assert ticks > 5


def test_layers_and_engines_may_go_first(cuda: FakeCuda) -> None:
    case = Case(cuda)
    expected = case.expected()
    case.layers.clear()
    gc.collect()
    case.enqueue()
    case.synchronize()
    for result, wanted in zip(case.results(), expected, strict=True):
        assert torch.equal(result, wanted)
    case.engine.close()
    case.enqueue()
    with pytest.raises(RuntimeError, match=r"slot 0 \(mlp\.0, 5 tokens\): the engine is closed"):
        case.synchronize()


def test_a_collected_handoff_frees_its_memory(cuda: FakeCuda) -> None:
    case = Case(cuda)
    cuda.set_delay(2000)
    for _ in range(5):
        case.enqueue()
    assert cuda.pinned_blocks() > 0
    del case
    gc.collect()
    assert cuda.pinned_blocks() == 0


IN_A_PROCESS = """
import os, sys
from pathlib import Path
from experts.test_gpu_handoff import Case
from helpers.fake_cuda import FakeCuda
cuda = FakeCuda(Path(sys.argv[1]))
case = Case(cuda)
case.cycle = case  # nobody collects it
case.enqueue(); case.synchronize(); case.assert_right()
"""
ENDS = {
    "pending work": "cuda.set_delay(20000); case.enqueue(); case.enqueue()",
    "an exception": "case.enqueue(); raise SystemExit(0)",
    "no wait": "case.handoff.submit(0, case.stream, *case.inputs)",
    "never started": "case.handoff.expect([0, 1])",
    "fork": """
child = os.fork()
if child == 0:
    try:
        case.enqueue()
    except RuntimeError as error:
        sys.exit(0 if "made this one by fork" in str(error) else 3)
    sys.exit(4)
case.enqueue()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
case.synchronize(); case.assert_right()
""",
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())
def test_the_process_ends(library: Path, end: str) -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'python'}"}
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS + end, str(library)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
