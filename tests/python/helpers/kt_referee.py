"""Runs kt_kernel 0.7.2 as a referee on the same weights and tokens.

kt_kernel gives no access to its packed buffers. With ``save`` it writes INT8's and INT4's to
``.kt`` files. BF16 has no files, so the buffers are looked up in the memory of the packing process.
Every run is a separate process: kt_kernel leaks weights, shares scratch memory between its objects
and ends the process on errors. Started as a program, this file is that process.
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
    """Returns the reason why kt_kernel cannot run here; None if it can."""
    if importlib.util.find_spec("kt_kernel") is None:
        return "kt_kernel is not installed (it has wheels for Python 3.11 and 3.12)"
    if _variant() is None:
        return "kt_kernel uses the packed layout on processors with AVX-512 only"
    return None


def _variant() -> str | None:
    flags = set(Path("/proc/cpuinfo").read_text("utf-8").partition("flags")[2].split())
    return next((name for name, flag in _VARIANTS.items() if flag in flags), None)


def referee(folder: Path, weight_format: Format, arrays: Arrays, parts: int = 1) -> Arrays:
    """Runs kt_kernel on ``arrays`` in a new process, as if for ``parts`` NUMA nodes.

    ``arrays``: gate, up [E, I, H] and down [E, H, I] as bfloat16 bit patterns (uint16); hidden
    [qlen, H] likewise; ids [qlen, k] int64; weights [qlen, k] float32. Returns ``out`` [qlen, H]
    in bfloat16 bits; with one part also, per projection p and expert e, the packed bytes ``p_e``
    (for BF16 one row per candidate found in memory) and for INT8 and INT4 the float32
    ``p_e_scale``. The ``.kt`` files of INT8 and INT4 stay in ``folder``.
    """
    np.savez(folder / "in.npz", **arrays)  # type: ignore[arg-type]
    command = [sys.executable, __file__, str(folder), weight_format, str(parts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        raise AssertionError(f"kt_kernel ended with {done.returncode}:\n{done.stderr[-2000:]}")
    with np.load(folder / "out.npz") as result:
        return dict(result)


def _extension() -> Any:
    """Returns the compiled module only: the package around it has further dependencies."""
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

    def __init__(self, folder: Path, weight_format: Format, arrays: Arrays, parts: int) -> None:
        kt = _extension()
        self.arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        experts, intermediate, hidden = arrays["gate"].shape
        pool = kt.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map = parts, [0] * parts
        pool.subpool_thread_count = [1] * parts
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
    """Returns blocks of the matrix's size with the beginning of its packed form, one per row.

    The packed form begins with the values 0 and 1 of rows 0 … 15, in 64 bytes at a multiple of 64.
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


def main(folder: Path, weight_format: Format, parts: int) -> None:
    os.dup2(2, 1)  # kt_kernel prints
    with np.load(folder / "in.npz") as loaded:
        arrays = dict(loaded)
    layer = _Layer(folder, weight_format, arrays, parts)
    result: Arrays = {"out": layer.forward()}
    for projection in _PROJECTIONS if parts == 1 else ():
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
    main(Path(sys.argv[1]), given, int(sys.argv[3]))
