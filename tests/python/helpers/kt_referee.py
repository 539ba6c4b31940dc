"""Runs kt_kernel 0.7.2 as a referee: what it makes of the same weights and tokens.

kt_kernel gives no access to its packed buffers. With ``save`` it writes those of INT8 and INT4 to
``.kt`` files; BF16 has no files, so the buffers are looked up in the memory of the process that
packed them. Every run is a process of its own: kt_kernel leaks weights, shares scratch memory
between its objects and ends the process on errors. Started as a program, this file is that process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Iterator

Format = Literal["bf16", "int8", "int4"]
Arrays = dict[str, NDArray[Any]]

# Builds of kt_kernel that use the packed layout (its AVX2 build does not), best first.
_VARIANTS = {
    "avx512_bf16": "avx512_bf16",
    "avx512_vnni": "avx512_vnni",
    "avx512_base": "avx512bw",
}
_PROJECTIONS = ("gate", "up", "down")


def why_unavailable() -> str | None:
    """The reason why kt_kernel cannot be asked here; None if it can."""
    if importlib.util.find_spec("kt_kernel") is None:
        return "kt_kernel is not installed (it has wheels for Python 3.11 and 3.12)"
    if _variant() is None:
        return "kt_kernel uses the packed layout on processors with AVX-512 only"
    return None


def _variant() -> str | None:
    flags = set(Path("/proc/cpuinfo").read_text("utf-8").partition("flags")[2].split())
    return next((name for name, flag in _VARIANTS.items() if flag in flags), None)


def referee(folder: Path, weight_format: Format, arrays: Arrays) -> Arrays:
    """What kt_kernel makes of ``arrays``, in a new process.

    ``arrays``: gate, up [E, I, H] and down [E, H, I] as bfloat16 bit patterns (uint16); hidden
    [qlen, H] the same; ids [qlen, k] int64; weights [qlen, k] float32. Returned: ``out`` [qlen, H]
    bfloat16 bits and, per projection p and expert e, ``p_e`` the packed bytes (for BF16 one row per
    candidate found in memory) and for INT8 and INT4 ``p_e_scale`` float32.
    """
    np.savez(folder / "in.npz", **arrays)  # type: ignore[arg-type]
    command = [sys.executable, __file__, str(folder), weight_format]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        raise AssertionError(f"kt_kernel ended with {done.returncode}:\n{done.stderr[-2000:]}")
    with np.load(folder / "out.npz") as result:
        return dict(result)


def _extension() -> Any:
    """The compiled module alone: the package around it would want more than this needs."""
    spec = importlib.util.find_spec("kt_kernel")
    assert spec is not None
    assert spec.origin is not None
    (library,) = Path(spec.origin).parent.glob(f"_kt_kernel_ext_{_variant()}.*.so")
    extension = importlib.util.spec_from_file_location("kt_kernel_ext", library)
    assert extension is not None
    assert extension.loader is not None
    module = importlib.util.module_from_spec(extension)
    extension.loader.exec_module(module)
    return module


def _pointer(array: NDArray[Any]) -> int:
    return int(array.ctypes.data)


class _Layer:
    """One MoE layer in kt_kernel, with the arrays it points to."""

    def __init__(self, folder: Path, weight_format: Format, arrays: Arrays) -> None:
        kt = _extension()
        self.arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        experts, intermediate, hidden = arrays["gate"].shape
        pool = kt.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [1]
        self.cpu = kt.CPUInfer(pool)
        config = kt.moe.MOEConfig(experts, arrays["ids"].shape[1], hidden, intermediate)
        config.pool, config.max_len, config.layer_idx = self.cpu.backend_, 64, 0
        config.path, config.save, config.load = str(folder), weight_format != "bf16", False
        config.gate_proj = _pointer(self.arrays["gate"])
        config.up_proj = _pointer(self.arrays["up"])
        config.down_proj = _pointer(self.arrays["down"])
        kind = {"bf16": "AMXBF16_MOE", "int8": "AMXInt8_MOE", "int4": "AMXInt4_MOE"}[weight_format]
        self.moe = getattr(kt.moe, kind)(config)
        self.identity = np.arange(experts, dtype=np.int64)
        self.cpu.submit(self.moe.load_weights_task(_pointer(self.identity)))
        self.cpu.sync()

    def forward(self) -> NDArray[np.uint16]:
        hidden, ids, weights = (self.arrays[name] for name in ("hidden", "ids", "weights"))
        out = np.zeros_like(hidden)
        qlen = np.array([len(hidden)], np.int32)
        task = self.moe.forward_task(
            _pointer(qlen),
            ids.shape[1],
            _pointer(ids),
            _pointer(weights),
            _pointer(hidden),
            _pointer(out),
            False,
        )
        self.cpu.submit(task)
        self.cpu.sync()
        return out


def _saved(folder: Path, name: str) -> tuple[NDArray[np.uint8], Any]:
    (codes,) = folder.rglob(f"{name}_*Byte_quant_.kt")
    (scale,) = folder.rglob(f"{name}_*Byte_scale_.kt")
    return np.fromfile(codes, np.uint8), np.fromfile(scale, np.float32)


def _writable_memory() -> Iterator[tuple[int, bytes]]:
    with open("/proc/self/mem", "rb", 0) as memory:  # noqa: PTH123 (unbuffered)
        for line in Path("/proc/self/maps").read_text("utf-8").splitlines():
            first, last = (int(end, 16) for end in line.split()[0].split("-"))
            if " rw-p " not in line or "[stack]" in line:
                continue
            try:
                memory.seek(first)
                yield first, memory.read(last - first)
            except OSError:
                continue


def _found_in_memory(matrix: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """Blocks as large as the matrix that begin as its packed form does, one per row.

    That form begins with the values 0 and 1 of rows 0 … 15, in 64 bytes at a multiple of 64.
    """
    start = np.ascontiguousarray(matrix[:16, :2]).tobytes()
    found = []
    for base, block in _writable_memory():
        position = block.find(start)
        while position >= 0:
            candidate = block[position : position + matrix.nbytes]
            if (base + position) % 64 == 0 and len(candidate) == matrix.nbytes:
                found.append(np.frombuffer(candidate, np.uint8))
            position = block.find(start, position + 1)
    return np.stack(found) if found else np.empty((0, matrix.nbytes), np.uint8)


def main(folder: Path, weight_format: Format) -> None:
    os.dup2(2, 1)  # kt_kernel prints
    with np.load(folder / "in.npz") as loaded:
        arrays = dict(loaded)
    layer = _Layer(folder, weight_format, arrays)
    result: Arrays = {"out": layer.forward()}
    for projection in _PROJECTIONS:
        for expert, matrix in enumerate(arrays[projection]):
            name = f"{projection}_{expert}"
            if weight_format == "bf16":
                result[name] = _found_in_memory(matrix)
            else:
                saved = _saved(folder, f"{weight_format.upper()}_{name}")
                result[name], result[f"{name}_scale"] = saved
    np.savez(folder / "out.npz", **result)  # type: ignore[arg-type]
    print(json.dumps({"candidates": {k: len(v) for k, v in result.items()}}), file=sys.stderr)
    os._exit(0)  # its destructors do not always return


if __name__ == "__main__":
    (given,) = [each for each in get_args(Format) if each == sys.argv[2]]
    main(Path(sys.argv[1]), given)
