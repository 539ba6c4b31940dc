"""The compiled module as Python sees it; C++ tests and test_golden_packing see to its numbers."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from helpers.loras import apply_lora, apply_no_lora

from ktrt import _core

ROOT = Path(__file__).resolve().parents[3]
E, K, H, INTERMEDIATE = 6, 2, 160, 96
WeightFormat = Literal["bf16", "int8", "int4"]
LEVELS = ["portable", "avx2", "avx_vnni", "avx512", "amx"]


def tensors(qlen: int = 5) -> dict[str, torch.Tensor]:
    """Arguments of a forward."""
    generator = torch.Generator().manual_seed(qlen)
    return {
        "hidden_states": torch.randn(qlen, H, generator=generator),
        "expert_ids": torch.rand(qlen, E, generator=generator).argsort(1)[:, :K],
        "routing_weights": torch.rand(qlen, K, generator=generator),
        "out": torch.empty(qlen, H),
    }


def load(layer: _core.MoeLayer) -> None:
    generator = torch.Generator().manual_seed(0)
    for e in range(layer.num_experts):
        gate, up = torch.randn(2, layer.intermediate_size, layer.hidden_size, generator=generator)
        down = torch.randn(layer.hidden_size, layer.intermediate_size, generator=generator)
        layer.load_expert(e, gate / 12, up / 12, down / 10)


def make_layer(
    engine: _core.Engine | None = None, weight_format: WeightFormat = "bf16", **sizes: Any
) -> _core.MoeLayer:
    layer = _core.MoeLayer(
        engine or _core.Engine(num_threads=1, max_qlen=64),
        **{
            "num_experts": E,
            "top_k": K,
            "hidden_size": H,
            "intermediate_size": INTERMEDIATE,
            **sizes,
        },
        weight_format=weight_format,
    )
    load(layer)
    return layer


def run(layer: _core.MoeLayer, qlen: int = 5) -> torch.Tensor:
    arguments = tensors(qlen)
    layer.forward(**arguments)
    return arguments["out"]


@pytest.fixture(scope="module")
def layer() -> _core.MoeLayer:
    return make_layer()


# Arguments


def test_torch_and_numpy_are_the_same(layer: _core.MoeLayer) -> None:
    arrays = {name: tensor.numpy().copy() for name, tensor in tensors().items()}
    layer.forward(**arrays)
    assert np.array_equal(arrays["out"], run(layer).numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_dtypes(layer: _core.MoeLayer, dtype: torch.dtype, ids: torch.dtype) -> None:
    arguments = tensors()
    arguments["hidden_states"] = arguments["hidden_states"].bfloat16().clamp(-4, 4).to(dtype)
    arguments["expert_ids"] = arguments["expert_ids"].to(ids)
    arguments["out"] = arguments["out"].to(dtype)
    layer.forward(**arguments)
    exact = tensors()
    exact["hidden_states"] = arguments["hidden_states"].float()
    layer.forward(**exact)
    assert torch.equal(arguments["out"], exact["out"].to(dtype))


def test_rows_may_be_apart(layer: _core.MoeLayer) -> None:
    expected = run(layer)
    arguments = tensors()
    wide = torch.full((5, H + 9), 7.0)
    wide[:, :H] = arguments["hidden_states"]
    out = torch.full((5, H + 9), 7.0)
    layer.forward(wide[:, :H], arguments["expert_ids"], arguments["routing_weights"], out[:, :H])
    assert torch.equal(out[:, :H], expected)
    assert (out[:, H:] == 7).all()
    backwards = arguments["hidden_states"].numpy()[::-1].copy()[::-1]  # a negative stride
    layer.forward(
        backwards, arguments["expert_ids"], arguments["routing_weights"], arguments["out"]
    )
    assert torch.equal(arguments["out"], expected)


def spoiled(name: str, value: Any) -> dict[str, Any]:
    return {**tensors(), name: value}


X = tensors()
WRONG = {
    "not an array": ("hidden_states", [1.0], "hidden_states is a list, expected a torch.Tensor"),
    "None": ("expert_ids", None, "expert_ids is a NoneType"),
    "float64": ("hidden_states", X["hidden_states"].double(), "hidden_states has an unsupported"),
    "complex": ("out", X["out"].to(torch.complex64), "out has an unsupported dtype"),
    "float ids": ("expert_ids", X["expert_ids"].float(), "expert_ids is float32, expected int32"),
    "int16 ids": ("expert_ids", X["expert_ids"].short(), "expert_ids has an unsupported dtype"),
    "int weights": ("routing_weights", X["expert_ids"], "routing_weights is int64, expected float"),
    "other out dtype": ("out", X["out"].half(), "out is float16, expected the dtype of hidden"),
    "columns": ("hidden_states", X["hidden_states"][:, 1:], "hidden_states has shape [5, 159]"),
    "rows": ("out", X["out"][:4], "out has shape [4, 160], expected [5, 160]"),
    "one row of ids": ("expert_ids", X["expert_ids"][:1], "expert_ids has shape [1, 2]"),
    "slots": ("expert_ids", X["expert_ids"].repeat(1, 2), "expert_ids has 4 slots, at most top_k"),
    "vector": ("hidden_states", X["hidden_states"][0], "hidden_states has shape [160]"),
    "scalar": ("out", torch.tensor(1.0), "out has 0 dimensions, expected 1 to 3"),
    "4 dimensions": ("out", torch.empty(1, 1, 5, H), "out has 4 dimensions, expected 1 to 3"),
    "transposed": ("hidden_states", torch.empty(H, 5).t(), "is not contiguous in its last"),
    "strided": ("out", torch.empty(5, 2 * H)[:, ::2], "out is not contiguous in its last"),
    "misaligned": (
        "hidden_states",
        np.frombuffer(bytearray(5 * H * 4 + 1), np.uint8)[1:].view(np.float32).reshape(5, H),
        "hidden_states does not start at a multiple of its element size",
    ),
    "broadcast out": ("out", torch.empty(1, H).expand(5, H), "out has overlapping rows"),
}


@pytest.mark.parametrize(("name", "value", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments_are_named(
    layer: _core.MoeLayer, name: str, value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        layer.forward(**spoiled(name, value))
    assert message in str(error.value)


class OnADevice:
    """An array that reports data on another device, as a CUDA tensor does."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array

    def __dlpack__(self) -> object:
        import ctypes

        capsule = self.array.__dlpack__()
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        # DLTensor begins with the data pointer and the device type; 2 is CUDA.
        tensor = get(capsule, b"dltensor")
        ctypes.c_int32.from_address(tensor + ctypes.sizeof(ctypes.c_void_p)).value = 2
        return capsule


def test_arrays_on_a_device_are_refused(layer: _core.MoeLayer) -> None:
    with pytest.raises(ValueError, match=r"hidden_states is not in CPU memory"):
        layer.forward(**spoiled("hidden_states", OnADevice(np.zeros((5, H), np.float32))))


def test_what_an_array_refuses_itself_is_passed_on(layer: _core.MoeLayer) -> None:
    with pytest.raises(BufferError):
        layer.forward(**spoiled("hidden_states", torch.zeros(5, H, requires_grad=True)))


def test_arguments_are_not_kept() -> None:
    layer = make_layer()
    arguments = {name: tensor.numpy().copy() for name, tensor in tensors().items()}
    before = {name: sys.getrefcount(array) for name, array in arguments.items()}
    for _ in range(3):
        layer.forward(**arguments)
    with pytest.raises(ValueError, match="out"):
        layer.forward(**{**arguments, "out": arguments["out"][:1]})
    assert {name: sys.getrefcount(array) for name, array in arguments.items()} == before


def test_lora_arguments(layer: _core.MoeLayer) -> None:
    layer = make_layer()
    base = run(layer)
    a, b = torch.randn(E, 4, H) / 12, torch.randn(E, INTERMEDIATE, 4)
    layer.load_lora(0, gate_a=a, gate_b=b, up_b=b)
    assert torch.equal(run(layer), base)
    layer.activate_loras([0], [1.0])
    assert not torch.equal(run(layer), base)
    layer.activate_loras([], [])
    assert torch.equal(run(layer), base)
    layer.activate_loras([0], [1.0])
    assert not torch.equal(run(layer), base)
    layer.load_lora(0)
    assert torch.equal(run(layer), base)
    with pytest.raises(ValueError, match=r"down_b has shape .* expected \[6, 160, 4\]"):
        layer.load_lora(0, down_a=torch.zeros(E, 4, INTERMEDIATE), down_b=b)
    with pytest.raises(ValueError, match=r"gate_b is bfloat16, expected float32"):
        layer.load_lora(0, gate_a=a, gate_b=b.bfloat16())
    with pytest.raises(TypeError):
        layer.load_lora(0, a, b)  # type: ignore[call-arg]


def test_a_forked_process_is_told_that_the_threads_are_gone(layer: _core.MoeLayer) -> None:
    """It would wait for them forever."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            run(layer)
        except RuntimeError as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        assert "threads do not exist in this fork" in pipe.read()
    assert os.waitpid(child, 0)[1] == 0


def test_constructors_check_their_arguments() -> None:
    with pytest.raises(ValueError, match="num_threads is 0"):
        _core.Engine(num_threads=0)
    with pytest.raises(ValueError, match="max_qlen is 0"):
        _core.Engine(num_threads=1, max_qlen=0)
    with pytest.raises(ValueError, match="100000 threads"):
        _core.Engine(num_threads=100_000)
    with pytest.raises(ValueError, match="weight_format is 'fp4'"):
        _core.MoeLayer(
            _core.Engine(num_threads=1),
            num_experts=1,
            top_k=1,
            hidden_size=32,
            intermediate_size=32,
            weight_format="fp4",  # type: ignore[arg-type]
        )
    with pytest.raises(ValueError, match=r"top_k is 7, expected 1 to num_experts \(6\)"):
        make_layer(top_k=7)
    with pytest.raises(ValueError, match="projection is 'gates'"):
        make_layer().packed_codes(0, "gates")  # type: ignore[arg-type]


def test_properties() -> None:
    engine = _core.Engine(num_threads=1, max_qlen=33)
    layer = make_layer(engine, "int8")
    sizes = (layer.num_experts, layer.top_k, layer.hidden_size, layer.intermediate_size)
    assert sizes == (E, K, H, INTERMEDIATE)
    assert layer.weight_format == "int8"
    assert (engine.num_threads, engine.max_qlen, engine.parts) == (1, 33, 1)
    # Codes [96, 192 (padded)] twice and [160, 128], and a float32 scale per row.
    assert layer.packed_bytes == E * (2 * 96 * 192 + 160 * 128 + 4 * (2 * 96 + 160))
    # INT4: the same, half a byte each and padded to 256 and 128.
    assert make_layer(engine, "int4").packed_bytes == E * (96 * 256 + 80 * 128 + 4 * (192 + 160))


# Threads, processes, closing


@pytest.mark.parametrize("weight_format", ["bf16", "int8", "int4"])
def test_bits_do_not_depend_on_threads_or_nodes(weight_format: WeightFormat) -> None:
    cpus = [cpu for node in _core.numa_cpus() for cpu in node]
    expected = run(make_layer(_core.Engine(num_threads=1), weight_format), 64)
    engines = [_core.Engine(num_threads=2, nodes=[cpus[:1] * 2])]  # one CPU is enough for the test
    engines.append(_core.Engine(num_threads=2, nodes=[cpus[:1], cpus[-1:]]))
    if len(cpus) > 1:
        engines.append(_core.Engine(num_threads=2))
    for engine in engines:
        assert torch.equal(run(make_layer(engine, weight_format), 64), expected)
        engine.close()


def progress_of_a_thread_during(work: Any) -> float:
    """Returns 1 minus the longest pause of another Python thread, as a share of the time."""
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    work()
    end = time.perf_counter()
    stop.set()
    thread.join()
    inside = [start, *(t for t in ticks if start < t < end), end]
    return 1 - max(b - a for a, b in itertools.pairwise(inside)) / (end - start)


def test_forward_and_load_release_the_gil() -> None:
    layer = make_layer(
        _core.Engine(num_threads=1, max_qlen=512),
        num_experts=1,
        top_k=1,
        hidden_size=2048,
        intermediate_size=2048,
    )
    hidden, out = torch.randn(512, 2048), torch.empty(512, 2048)
    ids, weights = torch.zeros(512, 1, dtype=torch.int64), torch.ones(512, 1)
    weight = torch.randn(2048, 2048)
    lora = torch.randn(1, 256, 2048)
    calls = {
        "forward": lambda: layer.forward(hidden, ids, weights, out),
        "load_expert": lambda: layer.load_expert(0, weight, weight, weight),
        "load_lora": lambda: layer.load_lora(0, gate_a=lora, gate_b=lora.mT.contiguous()),
    }
    for name, call in calls.items():
        # If the call held the GIL, the other thread would pause for the whole call: 0.
        best = max(progress_of_a_thread_during(call) for _ in range(5))
        assert best > 0.3, f"{name} stops the other threads"


def test_forwards_of_several_python_threads() -> None:
    engine = _core.Engine(num_threads=1, max_qlen=64)
    layers = [make_layer(engine), make_layer(engine, "int8")]
    expected = [run(layer, 20) for layer in layers]
    wrong: list[int] = []

    def work(index: int) -> None:
        outs = [run(layers[index % 2], 20) for _ in range(50)]
        wrong.extend(index for out in outs if not torch.equal(out, expected[index % 2]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_closed_engine_refuses_everything() -> None:
    engine = _core.Engine(num_threads=1)
    layer = make_layer(engine)
    assert not engine.closed
    assert layer.packed_bytes > 0
    engine.close()
    engine.close()
    assert engine.closed
    assert layer.packed_bytes == 0
    calls = [
        lambda: run(layer),
        lambda: load(layer),
        lambda: layer.load_lora(0),
        lambda: layer.activate_loras([], []),
        lambda: layer.packed_codes(0, "gate"),
        lambda: layer.packed_scales(0, "gate"),
        lambda: make_layer(engine),
        lambda: _core.ReadProbe(1 << 20).seconds(engine),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="the engine is closed"):
            call()


def test_a_layer_keeps_its_engine_alive() -> None:
    layer = make_layer(_core.Engine(num_threads=2, nodes=[[0, 0]]))
    assert torch.isfinite(run(layer)).all()


def test_read_probe() -> None:
    engine = _core.Engine(num_threads=1)
    probe = _core.ReadProbe(nbytes=1 << 22)
    assert probe.nbytes == 1 << 22
    assert 0 < probe.seconds(engine) < 60
    with pytest.raises(ValueError, match="0 bytes"):
        _core.ReadProbe(nbytes=0)


# The ISA level


IN_A_PROCESS = """
import json, numpy as np
from ktrt import _core
outs = []
for weight_format in ("bf16", "int8", "int4"):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    layer = _core.MoeLayer(_core.Engine(num_threads=1), num_experts=1, top_k=1, hidden_size=160,
                           intermediate_size=96, weight_format=weight_format)
    layer.load_expert(0, normal(96, 160) / 12, normal(96, 160) / 12, normal(160, 96) / 10)
    out = np.empty((9, 160), np.float32)
    layer.forward(normal(9, 160), np.zeros((9, 1), np.int64), np.ones((9, 1), np.float32), out)
    outs.append(out.tolist())
print(json.dumps([_core.isa(), _core.detected_isa(), _core.kernels(), outs]))
"""


def in_a_process(level: str | None) -> subprocess.CompletedProcess[str]:
    """Levels, kernels and results of a process started with KTRT_ISA=level."""
    environment = {k: v for k, v in os.environ.items() if k != "KTRT_ISA"}
    if level is not None:
        environment["KTRT_ISA"] = level
    command = [sys.executable, "-c", IN_A_PROCESS]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def test_isa_levels() -> None:
    isa, detected, kernels, expected = json.loads(in_a_process(None).stdout)
    assert isa == detected == _core.detected_isa()
    assert kernels
    for level in LEVELS[: LEVELS.index(detected) + 1]:
        done = in_a_process(level)
        if level == "avx_vnni" and done.returncode != 0:
            assert "KTRT_ISA=avx_vnni is not on this machine" in done.stderr
            continue
        assert done.returncode == 0, done.stderr
        isa, _, kernels, outs = json.loads(done.stdout)
        assert isa == level
        below = tuple(LEVELS[: LEVELS.index(level) + 1])
        assert all(name.startswith(below) for name in kernels.values())
        for out, reference in zip(outs, expected, strict=True):
            np.testing.assert_allclose(out, reference, rtol=0.01, atol=0.01)
    for level in LEVELS[LEVELS.index(detected) + 1 :]:
        done = in_a_process(level)
        assert done.returncode != 0
        assert f"ConfigError: KTRT_ISA={level} is above what this machine has" in done.stderr
    assert "ConfigError: KTRT_ISA=mmx is not known" in in_a_process("mmx").stderr


def test_last_kernels() -> None:
    layer = make_layer(weight_format="int8")
    assert layer.last_kernels() == {}
    run(layer)
    base = layer.last_kernels()
    assert set(base) <= {"gemm", "gemm_few_rows", "elementwise"}
    assert base["elementwise"] == _core.kernels()["elementwise"]
    apply_lora(layer, gate_a=torch.zeros(E, 1, H), gate_b=torch.zeros(E, INTERMEDIATE, 1))
    run(layer)
    gemms = base.keys() & {"gemm", "gemm_few_rows"}
    shrinks = [name.replace("gemm", "lora_shrink") for name in gemms]
    kernels = _core.kernels()
    assert layer.last_kernels() == {**base, **{name: kernels[name] for name in shrinks}}


# The packed memory


def test_packed_memory_is_what_the_copies_say() -> None:
    engine, layer = make_packed_layer()
    (part,) = layer.packed_parts()
    assert part.scales is not None
    codes, scales = (memoryview(each) for each in (part.codes, part.scales))  # type: ignore[arg-type]
    assert codes.readonly
    assert (codes.nbytes, part.codes.address % 4096) == (part.codes.nbytes, 0)
    assert codes.nbytes == 3 * part.expert_code_bytes
    assert scales.nbytes == 3 * part.expert_scales * 4
    for expert in range(3):
        for name in PROJECTIONS:
            matrix = getattr(part, name)
            expected = layer.packed_codes(expert, name)
            start = expert * part.expert_code_bytes + matrix.code_offset
            assert codes[start : start + len(expected)] == expected
            expected = layer.packed_scales(expert, name)
            start = 4 * (expert * part.expert_scales + matrix.scale_offset)
            assert scales[start : start + len(expected)] == expected
    before = bytes(codes)
    engine.close()
    assert bytes(codes) == before
    with pytest.raises(RuntimeError, match="closed"):
        layer.packed_parts()


def test_lora_views_and_their_version() -> None:
    engine, layer = make_packed_layer()
    assert (layer.loras, layer.lora_version) == ([], 0)
    with pytest.raises(ValueError, match="there is no LoRA 0; 0 are held"):
        layer.lora_view(0)
    apply_lora(layer, gate_a=torch.ones(3, 5, 96), gate_b=torch.ones(3, 40, 5))
    assert (layer.loras, layer.lora_version) == ([0], 2)
    lora = layer.lora_view(0)
    assert (lora.gate.ranks, lora.gate.rows, lora.gate.first_rank) == (6, 64, 0)
    assert (lora.input.ranks, lora.input.columns) == (16, 96)
    assert lora.input.a is not None
    assert lora.input.a.nbytes == 3 * 16 * 96 * 2
    assert (lora.up.b, lora.down.b, lora.intermediate.a) == (None, None, None)
    apply_no_lora(layer)
    assert (layer.loras, layer.lora_version) == ([0], 3)
    layer.unload_lora(0)
    assert (layer.loras, layer.lora_version) == ([], 4)
    view = memoryview(cast("Any", lora.input.a))
    engine.close()
    assert view[:2] == torch.ones(1, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()


PROJECTIONS: tuple[Literal["gate", "up", "down"], ...] = ("gate", "up", "down")


def make_packed_layer() -> tuple[_core.Engine, _core.MoeLayer]:
    engine = _core.Engine(num_threads=1)
    layer = _core.MoeLayer(
        engine,
        num_experts=3,
        top_k=1,
        hidden_size=96,
        intermediate_size=40,
        weight_format="int8",
    )
    for expert in range(3):
        up, down = torch.randn(40, 96), torch.randn(96, 40)
        layer.load_expert(expert, up, 2 * up, down)
    return engine, layer


# The stub


def parameters_of_stub(node: ast.FunctionDef) -> list[tuple[str, bool, bool]]:
    """(name, keyword only, has a default) of each parameter but self."""
    a = node.args
    optional = [None] * (len(a.args) - len(a.defaults)) + list(a.defaults)
    positional = [(p.arg, False, d is not None) for p, d in zip(a.args, optional, strict=True)]
    keywords = [
        (p.arg, True, d is not None) for p, d in zip(a.kwonlyargs, a.kw_defaults, strict=True)
    ]
    return [p for p in positional + keywords if p[0] != "self"]


def parameters_of_module(function: Any) -> list[tuple[str, bool, bool]]:
    """The same, from the first line that pybind11 writes into each docstring."""
    line = function.__doc__.splitlines()[0]
    arguments = ast.parse(f"def f{line[line.index('(') : line.rindex(')') + 1]}: ...").body[0]
    assert isinstance(arguments, ast.FunctionDef)
    return parameters_of_stub(arguments)


def test_the_stub_has_the_signatures_of_the_module() -> None:
    tree = ast.parse((ROOT / "ktrt" / "_core.pyi").read_text("utf-8"))
    seen = set()
    for node in [tree, *tree.body]:
        if not isinstance(node, ast.Module | ast.ClassDef):
            continue
        owner: Any = _core if isinstance(node, ast.Module) else getattr(_core, node.name)
        for function in [f for f in node.body if isinstance(f, ast.FunctionDef)]:
            actual = inspect.getattr_static(owner, function.name)
            if isinstance(actual, staticmethod):
                actual = actual.__func__
            name = f"{owner.__name__}.{function.name}"
            seen.add(name)
            decorators = [ast.unparse(d) for d in function.decorator_list]
            is_property = "property" in decorators or f"{function.name}.setter" in decorators
            assert isinstance(actual, property) == is_property, name
            if not is_property:
                assert parameters_of_stub(function) == parameters_of_module(actual), name
    assert {"MoeLayer.forward", "Engine.__init__", "ktrt._core.kernels"} <= seen
