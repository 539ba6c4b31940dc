"""Edges of the compiled module: a wrong call raises an exception and never crashes."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ktrt import _core
from ktrt.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
CLASSES = [value for value in vars(_core).values() if isinstance(value, type)]
LAYER: dict[str, Any] = {
    "num_experts": 2, "top_k": 1, "hidden_size": 64, "intermediate_size": 32,
    "weight_format": "bf16",
}  # fmt: skip


def engine() -> _core.Engine:
    return _core.Engine(num_threads=1, max_qlen=8)


def members(cls: type) -> list[Any]:
    found = [getattr(cls, name) for name in vars(cls) if not name.startswith("_")]
    return [each for each in found if callable(each) or isinstance(each, property)]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_an_object_that_was_never_initialised_has_no_members(cls: Any) -> None:
    calls: list[Any] = []
    for member in members(cls):
        if isinstance(member, property):
            calls.append(member.fget)
            if member.fset is not None:
                calls.append(lambda owner, change=member.fset: change(owner, True))
        else:
            calls.append(member)
    for call in calls:
        for owner in (cls.__new__(cls), None):
            with pytest.raises((TypeError, RuntimeError)):
                call(owner)


def test_an_uninitialised_object_is_no_argument() -> None:
    empty = _core.Engine.__new__(_core.Engine)
    with pytest.raises((TypeError, RuntimeError)):
        _core.MoeLayer(empty, **LAYER)
    with pytest.raises(TypeError, match="never initialised"):
        _core.ReadProbe(64).seconds(empty)
    with pytest.raises(BufferError):
        memoryview(_core.PackedMemory.__new__(_core.PackedMemory))  # type: ignore[arg-type]

    class Impatient(_core.Engine):
        def __init__(self) -> None:
            self.close()  # before there is an engine

    with pytest.raises(TypeError, match="never initialised"):
        Impatient()


def test_none_is_no_engine() -> None:
    weight, nothing = torch.zeros(32, 64, dtype=torch.bfloat16), None
    makers: list[Any] = [
        lambda: _core.MoeLayer(nothing, **LAYER),  # type: ignore[arg-type]
        lambda: _core.DenseLinear(nothing, weight),  # type: ignore[arg-type]
        lambda: _core.PackedLinear(nothing, weight),  # type: ignore[arg-type]
        lambda: _core.TokenAttention(
            nothing, heads=1, groups=1, key_size=32, value_size=32, scaling=1.0  # type: ignore[arg-type]
        ),
        lambda: _core.LatentAttention(nothing, weight, weight, heads=1, rope=1, scaling=1.0),  # type: ignore[arg-type]
        lambda: _core.GpuHandoff(nothing),  # type: ignore[arg-type]
        lambda: _core.ReadProbe(64).seconds(nothing),  # type: ignore[arg-type]
    ]  # fmt: skip
    for make in makers:
        with pytest.raises(TypeError):
            make()


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_objects_are_neither_copied_nor_pickled(cls: Any) -> None:
    owner = cls.__new__(cls)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match=f"{cls.__name__} holds threads or memory"):
            pickle.dumps(owner, protocol)
    for make in (copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="neither copied nor pickled"):
            make(owner)
    other = _core.Engine if cls is not _core.Engine else _core.MoeLayer
    with pytest.raises(TypeError, match="__class__"):
        owner.__class__ = other


def test_sizes_beyond_any_memory() -> None:
    for size in (2**64 - 1, 2**64 - 64, 2**63, 2**48):
        with pytest.raises(ValueError, match="does not fit into the addresses"):
            _core.ReadProbe(size)
    with pytest.raises(ValueError, match="max_qlen 2147483647 times top_k 1"):
        _core.MoeLayer(_core.Engine(num_threads=1, max_qlen=2**31 - 1), **LAYER)
    with pytest.raises(ValueError, match="nodes names CPU 2147483647"):
        _core.Engine(num_threads=1, nodes=[[2**31 - 1]])
    with pytest.raises(ValueError, match="nodes names CPU -5"):
        _core.Engine(num_threads=1, nodes=[[-5]])


def bf16(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


COUNTS = [2**62, 2**63 - 1, 2**47, -(2**62), -1]


@pytest.mark.parametrize("kind", [_core.DenseLinear, _core.PackedLinear])
@pytest.mark.parametrize("count", COUNTS)
def test_counts_that_no_array_has(kind: Any, count: int) -> None:
    # 2^62 elements are 2^63 bytes; times 96 outputs they are 0 in 64 bits.
    linear = kind(engine(), bf16(96, 64))
    x, out = bf16(2, 64), bf16(2, 96)
    for counts in ((count, 192), (128, count), (count, count)):
        with pytest.raises(ValueError, match=r"x has|out has"):
            linear.forward(x.data_ptr(), counts[0], out.data_ptr(), counts[1])
    norm = _core.RmsNorm(torch.ones(64), 1e-6, rounds_twice=True)
    for counts in ((count, 128), (128, count)):
        with pytest.raises(ValueError, match=r"x has|out has"):
            norm.forward(x.data_ptr(), counts[0], 2, 64, out.data_ptr(), counts[1])
    with pytest.raises(ValueError, match=r"elements|none below 0"):
        _core.HeadArray(x.data_ptr(), count, 64)


def test_tokens_that_are_nowhere() -> None:
    """With tokens 0 elements apart, any number of them lies in a small array."""
    attention = _core.TokenAttention(
        engine(), heads=1, groups=1, key_size=32, value_size=32, scaling=1.0
    )
    memory = bf16(64)
    array = _core.HeadArray(memory.data_ptr(), 64, 0)
    with pytest.raises(ValueError, match="keys has 64 elements, .* expected room for"):
        attention.forward(array, None, array, None, array, 0, 2**62, array)
    rows = _core.HeadArray(memory.data_ptr(), 64, 0, 32)
    with pytest.raises(ValueError, match="mask has"):
        attention.forward(rows, None, rows, None, rows, 0, 2, rows, memory.data_ptr(), 2**62)


def test_rows_that_are_nowhere() -> None:
    attention = _core.TokenAttention(
        engine(), heads=1, groups=1, key_size=32, value_size=32, scaling=1.0
    )
    memory, places = bf16(64), torch.ones(2, dtype=torch.int64)
    address = places.data_ptr()
    arrays = (_core.HeadArray(memory.data_ptr(), 64, 32, 32, slot_stride=32),) * 4
    for wrong in ((address, address, 0, 2, 1), (address, address, 2, 2, 0)):
        with pytest.raises(ValueError, match="expected at least 1"):
            _core.SlotRows(*wrong)
    with pytest.raises(ValueError, match="slots is no multiple of 8"):
        _core.SlotRows(address + 4, address, 2, 2, 1)
    for count, capacity in ((2**62, 1), (2, 2**62), (2, 2)):
        with pytest.raises(ValueError, match="keys has 64 elements, slots 32"):
            attention.forward_rows(*arrays, _core.SlotRows(address, address, 2, count, capacity))
    rows = _core.SlotRows(address, address, 2, 2, 1)
    attention.forward_rows(*arrays, rows)
    places[1] = 2**40
    with pytest.raises(ValueError, match=r"slots\[1\] is 1099511627776, expected 0 to 1"):
        attention.forward_rows(*arrays, rows)


def test_numbers_that_are_none() -> None:
    nan = float("nan")
    with pytest.raises(ValueError, match="eps is nan"):
        _core.RmsNorm(torch.ones(4), nan, rounds_twice=True)
    with pytest.raises(ValueError, match="seconds is nan"):
        _core.arithmetic_rate("avx2", nan)
    with pytest.raises(ValueError, match="alpha nan"):
        _core.MoeLayer(engine(), **LAYER, alpha=nan)
    with pytest.raises(ValueError, match="timeout is nan"):
        _core.GpuHandoff(engine(), timeout=nan)


def test_a_wrong_isa_names_the_right_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTRT_ISA", "avx10")
    for call in (_core.isa, _core.kernels, _core.arithmetic_loops, engine):
        with pytest.raises(ConfigError, match="KTRT_ISA=avx10 is not known.* set it to portable"):
            call()


def in_a_process(code: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=timeout,
    )  # fmt: skip


FORKS = """
    import gc, os, sys, threading, time
    import torch
    from ktrt import _core
    torch.set_num_threads(1)
    engine = _core.Engine(num_threads=2, max_qlen=64)
    layer = _core.MoeLayer(engine, num_experts=2, top_k=1, hidden_size=512, intermediate_size=512,
                           weight_format="bf16")
    for expert in range(2):
        layer.load_expert(expert, *[torch.zeros(512, 512)] * 3)
    linear = _core.DenseLinear(engine, torch.zeros(4096, 4096, dtype=torch.bfloat16))
    packed = _core.PackedLinear(engine, torch.zeros(512, 512, dtype=torch.bfloat16))
    x, out = torch.zeros(64, 512), torch.zeros(64, 512)
    ids, weights = torch.zeros(64, 1, dtype=torch.int64), torch.ones(64, 1)
    stop = False
    def decode():
        while not stop:
            layer.forward(x, ids, weights, out)
    thread = threading.Thread(target=decode)
    thread.start()
    calls = {
        name: getattr(owner, name)
        for owner in (layer, linear, packed)
        for name in ("last_kernels", "packed_parts")
        if hasattr(owner, name)
    } | {
        "forward": lambda: layer.forward(x, ids, weights, out),
        "packed_bytes": lambda: layer.packed_bytes,
        "activate_loras": lambda: layer.activate_loras([], []),
        "image_bytes": lambda: layer.image_bytes,
        "unusual_form": lambda: layer.unusual_form,
        "active_loras": lambda: layer.active_loras,
        "loras": lambda: layer.loras,
        "lora_view": lambda: layer.lora_view(0),
        "workspace_bytes": lambda: engine.workspace_bytes,
        "dense forward": lambda: linear.forward(0, 0, 0, 0) or linear.activate_loras([], []),
        "probe": lambda: _core.ReadProbe(64).seconds(engine),
        "new layer": lambda: _core.MoeLayer(engine, num_experts=1, top_k=1, hidden_size=32,
                                            intermediate_size=32, weight_format="bf16"),
    }
    children = []
    for i in range(6):
        time.sleep(0.01)
        child = os.fork()
        if child == 0:
            for name, call in calls.items():
                try:
                    call()
                except RuntimeError as error:
                    assert "fork" in str(error), (name, error)
                else:
                    os._exit(3)
            assert engine.closed
            engine.close()
            if i % 2:
                del layer, linear, packed, engine, calls
                gc.collect()
                os._exit(0)
            # What the interpreter does at its end, without the thread that the child lacks.
            stop = True
            sys.exit(0)
        children.append(child)
    for child in children:
        deadline = time.monotonic() + 20
        while (status := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, 9)
                sys.exit("a child hangs")
            time.sleep(0.01)
        assert status[1] == 0, status
    stop = True
    thread.join()
    layer.forward(x, ids, weights, out)
    assert not engine.closed
    engine.close()
"""


def test_a_fork_while_a_thread_decodes() -> None:
    """The child gets an exception from every call, may close, and ends."""
    done = in_a_process(FORKS)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_forward_needs_little_stack() -> None:
    """256 KB, the stack of threads in many programs. in_features above 2,048 is split along k."""
    done = in_a_process("""
        import threading
        import torch
        from ktrt import _core
        torch.set_num_threads(1)
        engine = _core.Engine(num_threads=1, max_qlen=64)
        layers = []
        for form in ("bf16", "int8", "int4"):
            layers.append(_core.MoeLayer(engine, num_experts=1, top_k=1, hidden_size=256,
                                         intermediate_size=256, weight_format=form))
            layers[-1].load_expert(0, *[torch.zeros(256, 256)] * 3)
        wide = torch.zeros(64, 8192, dtype=torch.bfloat16)
        linears = [_core.DenseLinear(engine, wide), _core.PackedLinear(engine, wide)]
        x, out = torch.zeros(64, 256), torch.zeros(64, 256)
        ids, weights = torch.zeros(64, 1, dtype=torch.int64), torch.ones(64, 1)
        rows = torch.zeros(400, 8192, dtype=torch.bfloat16)
        result = torch.zeros(400, 64, dtype=torch.bfloat16)
        ran = []
        def forward():
            for layer in layers:
                layer.forward(x, ids, weights, out)
            for linear in linears:
                linear.forward(rows.data_ptr(), rows.numel(), result.data_ptr(), result.numel())
            ran.append(1)
        threading.stack_size(256 << 10)
        thread = threading.Thread(target=forward)
        thread.start()
        thread.join()
        assert ran
    """)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])


def test_numpy_arrays_of_any_stride() -> None:
    """Arrays need not be compact."""
    layer = _core.MoeLayer(engine(), **LAYER)
    gate, down = np.zeros((32, 64), np.float32), np.zeros((64, 32), np.float32)
    for expert in range(2):
        layer.load_expert(expert, gate, gate, down)
    x = np.lib.stride_tricks.as_strided(np.ones(64, np.float32), (8, 64), (0, 4))
    out = np.full((8, 64), 7.0, np.float32)
    layer.forward(x, np.zeros((8, 1), np.int64), np.ones((8, 1), np.float32), out)
    assert not out.any()
