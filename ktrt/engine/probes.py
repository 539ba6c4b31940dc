"""Measures this machine: memory read bandwidth, arithmetic per instruction set, GPU and bus."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ktrt import _core
from ktrt.engine.formats import is_quantized
from ktrt.engine.threads import thread_count
from ktrt.machine.facts import MachineFacts, read_facts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ktrt._core import WeightFormat

_LEAST_PROBE = 256 << 20
# Several times the caches, but not all of the memory.
_L3_TIMES = 4
_MOST_PROBE = 4 << 30
_GPU_BYTES = 256 << 20
_GPU_REPEATS = 8
_SLICES = 5


@dataclass(frozen=True)
class ArithmeticPeak:
    """Multiplications and additions per second of one instruction on registers; ``operands`` is
    float32, bf16 or int8."""

    name: str
    instruction: str
    operands: str
    one_thread: float
    all_threads: float


@dataclass(frozen=True)
class GpuRates:
    """Bytes per second of the GPU's memory, and of the bus with page-locked memory."""

    name: str
    memory: int
    free: int
    read: float
    to_gpu: float
    from_gpu: float


def machine_facts(environment: Mapping[str, str], root: Path = Path("/")) -> MachineFacts:
    """Returns the facts that need no measurement."""
    return read_facts(
        isa=_core.isa(),
        detected_isa=_core.detected_isa(),
        nodes=_core.numa_cpus(),
        cores=_core.num_cores(),
        environment=environment,
        root=root,
        bf16=_core.bf16_arithmetic(),
    )


class BandwidthProbe:
    """Reads a block of uncached memory on a pool of threads like an engine's."""

    def __init__(self, threads: int, nbytes: int = _LEAST_PROBE) -> None:
        """Raises ``MemoryError`` if there is no room for ``nbytes``."""
        self._engine = _core.Engine(num_threads=threads, max_qlen=1)
        self._probe = _core.ReadProbe(nbytes)
        self.rate()  # the first pass makes the kernel allocate the pages

    def rate(self) -> float:
        """Returns the bytes per second of one pass."""
        return self._probe.nbytes / self._probe.seconds(self._engine)

    def close(self) -> None:
        """Stops the threads."""
        self._engine.close()


def read_bandwidth(threads: int | None = None, *, passes: int = 7) -> float:
    """Returns the bytes per second that ``threads`` pool threads (default: an engine's) read from
    memory: the best of ``passes`` over a block several times as large as the caches."""
    probe = BandwidthProbe(threads or thread_count().count, _probe_bytes())
    try:
        return max(probe.rate() for _ in range(passes))
    finally:
        probe.close()


def _probe_bytes() -> int:
    facts = machine_facts({})
    wanted = max(_LEAST_PROBE, _L3_TIMES * facts.l3_bytes * len(facts.nodes))
    return max(64 << 20, min(wanted, _MOST_PROBE, facts.ram.free // 4))


def arithmetic_peaks(threads: int | None = None, *, seconds: float = 0.1) -> list[ArithmeticPeak]:
    """Measures every instruction set that this process may use, older ones first: on one pinned
    thread, and on ``threads`` (default: an engine's) at once."""
    cpus = [cpu for node in _core.numa_cpus() for cpu in node]
    cpus = cpus[: threads or thread_count().count]
    found = []
    for name, instruction, operands in _core.arithmetic_loops():
        one = _rate_on(cpus[:1], name, seconds)
        every = _rate_on(cpus, name, seconds) if len(cpus) > 1 else one
        found.append(ArithmeticPeak(name, instruction, operands, one, every))
    return found


def _rate_on(cpus: list[int], name: str, seconds: float) -> float:
    """Returns the best rate of several slices of time, since other programs disturb some."""
    barrier = threading.Barrier(len(cpus))

    def run(cpu: int) -> list[float]:
        os.sched_setaffinity(0, {cpu})  # this thread only
        found = []
        for _ in range(_SLICES):
            barrier.wait()
            found.append(_core.arithmetic_rate(name, seconds / _SLICES))
        return found

    with ThreadPoolExecutor(len(cpus)) as pool:
        slices = list(pool.map(run, cpus))
    return max(map(sum, zip(*slices, strict=True)))


# The engine's kernel → the loop whose peak bounds it. AVX2 multiplies two-byte integers, twice as
# many as its float32 loop: near enough for a bound on old machines.
_LOOPS = {
    "bf16": {
        "amx": "amx_bf16", "avx512_bf16": "avx512_bf16", "avx512": "avx512", "avx2": "avx2",
    },
    "int8": {
        "amx": "amx_int8", "avx512_vnni_bf16": "avx512_vnni", "avx512_vnni": "avx512_vnni",
        "avx_vnni": "avx_vnni", "avx_vnni_evex": "avx_vnni_evex", "avx2": "avx2",
    },
}  # fmt: skip


def peak_of(weight_format: WeightFormat, peaks: list[ArithmeticPeak]) -> ArithmeticPeak | None:
    """Returns the peak that bounds the engine's GEMM of a weight format on this machine; None on a
    CPU without AVX2."""
    kernel = _core.kernels()[weight_format.kernel_family]
    loop = _LOOPS["int8" if is_quantized(weight_format) else "bf16"].get(kernel)
    return next((peak for peak in peaks if peak.name == loop), None)


def has_nvidia_gpu(root: Path = Path("/")) -> bool:
    """Returns whether an NVIDIA driver is loaded; does not import torch."""
    return (root / "proc/driver/nvidia/version").exists() or (root / "dev/nvidiactl").exists()


def gpu_rates() -> GpuRates | None:
    """Measures the GPU; returns None where torch finds none."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    host = torch.empty(_GPU_BYTES, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(_GPU_BYTES, dtype=torch.uint8, device="cuda")
    words = device.view(torch.int32)
    return GpuRates(
        torch.cuda.get_device_name(),
        total,
        free,
        read=_gpu_rate(lambda: words.amax()),
        to_gpu=_gpu_rate(lambda: device.copy_(host, non_blocking=True)),
        from_gpu=_gpu_rate(lambda: host.copy_(device, non_blocking=True)),
    )


def _gpu_rate(action: Callable[[], object]) -> float:
    """Returns the bytes per second of an action on _GPU_BYTES: the best of four runs of several
    repeats."""
    import torch

    best = float("inf")
    for _ in range(4):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(_GPU_REPEATS):
            action()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return _GPU_BYTES * _GPU_REPEATS / best
