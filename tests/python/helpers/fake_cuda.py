"""Python interface of the stand-in for the CUDA driver (tests/cpp/cuda/fake_cuda.cc)."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import torch

SOURCES = sorted((Path(__file__).resolve().parents[2] / "cpp" / "cuda").glob("fake_cuda*.cc"))


def build(folder: Path) -> Path | None:
    """Compiles the stand-in into ``folder``; None without a C++ compiler."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    library = folder / "fake_cuda.so"
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread"]
    sources = [str(source) for source in SOURCES]
    subprocess.run([compiler, *flags, *sources, "-o", str(library)], check=True, timeout=300)
    return library


class FakeCuda:
    """Streams, device arrays and graphs of the stand-in; handles and addresses are integers."""

    def __init__(self, library: Path) -> None:
        self.path = str(library)
        self._library = ctypes.CDLL(self.path)
        self._library.fake_cuda_make_current(1)

    def reset(self) -> int:
        """Resets the stand-in; returns the number of streams that were still waiting."""
        return int(self._library.fake_cuda_reset())

    def set(self, name: str, value: int) -> None:
        self._library.fake_cuda_set(name.encode(), value)

    def set_delay(self, microseconds: int) -> None:
        self._library.fake_cuda_set_delay(microseconds)

    def make_current(self, current: bool) -> None:
        self._library.fake_cuda_make_current(int(current))

    def pinned_blocks(self) -> int:
        return int(self._library.fake_cuda_pinned_blocks())

    def _call(self, function: str, *arguments: object) -> int:
        result = int(getattr(self._library, function)(*arguments))
        if result not in (0, 600):
            raise RuntimeError(f"{function}: {result}")
        return result

    def _new(self, function: str, *arguments: object) -> int:
        handle = ctypes.c_void_p()
        self._call(function, ctypes.byref(handle), *arguments)
        return handle.value or 0

    def stream(self) -> int:
        return self._new("cuStreamCreate", 0)

    def drained(self, stream: int) -> bool:
        return self._call("cuStreamQuery", ctypes.c_void_p(stream)) == 0

    def upload(self, tensor: torch.Tensor) -> int:
        """Copies to the device; returns the address."""
        nbytes = ctypes.c_size_t(tensor.numel() * tensor.element_size())
        address = self._new("cuMemAlloc_v2", nbytes)
        source = ctypes.c_void_p(tensor.contiguous().data_ptr())
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), source, nbytes)
        return address

    def download(self, address: int, like: torch.Tensor) -> torch.Tensor:
        result = torch.empty(like.shape, dtype=like.dtype)
        nbytes = ctypes.c_size_t(result.numel() * result.element_size())
        target = ctypes.c_void_p(result.data_ptr())
        self._call("cuMemcpyDtoH_v2", target, ctypes.c_uint64(address), nbytes)
        return result

    def begin_capture(self, stream: int) -> None:
        self._call("cuStreamBeginCapture_v2", ctypes.c_void_p(stream), 0)

    def end_capture(self, stream: int) -> int:
        graph = ctypes.c_void_p()
        self._call("cuStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
        return self._new("cuGraphInstantiateWithFlags", graph, ctypes.c_ulonglong(0))

    def launch(self, graph: int, stream: int) -> None:
        self._call("cuGraphLaunch", ctypes.c_void_p(graph), ctypes.c_void_p(stream))
