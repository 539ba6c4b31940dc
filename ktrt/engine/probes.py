"""What this machine reaches: memory read bandwidth, arithmetic per instruction set, GPU and bus."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ktrt import _core
from ktrt.engine.threads import thread_count
from ktrt.machine.facts import MachineFacts, read_facts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_LEAST_PROBE = 256 << 20
# A machine's caches, several times over, but not all of its memory.
_L3_TIMES = 4
_MOST_PROBE = 4 << 30
_GPU_BYTES = 256 << 20
_GPU_REPEATS = 8
_SLICES = 5


@dataclass(frozen=True)
class ArithmeticPeak:
    """Multiplications and additions per second of one instruction, in registers; ``operands`` is
    float32, bf16 or int8."""

    name: str
    instruction: str
    operands: str
    one_thread: float
    all_threads: float


@dataclass(frozen=True)
class GpuRates:
    """Bytes per second: of the GPU's memory, and of the bus with page-locked memory."""

    name: str
    memory: int
    free: int
    read: float
    to_gpu: float
    from_gpu: float


def machine_facts(environment: Mapping[str, str], root: Path = Path("/")) -> MachineFacts:
    """What is known without measuring."""
    return read_facts(
        isa=_core.isa(),
        detected_isa=_core.detected_isa(),
        nodes=_core.numa_cpus(),
        cores=_core.num_cores(),
        environment=environment,
        root=root,
    )


class BandwidthProbe:
    """Reads a block of memory that is in no cache, on as many pool threads as an engine has."""

    def __init__(self, threads: int, nbytes: int = _LEAST_PROBE) -> None:
        """``MemoryError`` if there is no room for ``nbytes``."""
        self._engine = _core.Engine(num_threads=threads, max_qlen=1)
        self._probe = _core.ReadProbe(nbytes)
        self.rate()  # the first pass gets the memory from the kernel

    def rate(self) -> float:
        """Bytes per second of one pass."""
        return self._probe.nbytes / self._probe.seconds(self._engine)

    def close(self) -> None:
        """Stops the threads."""
        self._engine.close()


def read_bandwidth(threads: int | None = None, *, passes: int = 7) -> float:
    """Bytes per second that ``threads`` pool threads (default: an engine's) read from memory: the
    best of some passes over several times what the caches hold."""
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
    """Of every instruction set that this process may use, one thread and ``threads`` (default: an
    engine's) at once, pinned; older instruction sets first."""
    cpus = [cpu for node in _core.numa_cpus() for cpu in node]
    cpus = cpus[: threads or thread_count().count]
    found = []
    for name, instruction, operands in _core.arithmetic_loops():
        one = _rate_on(cpus[:1], name, seconds)
        every = _rate_on(cpus, name, seconds) if len(cpus) > 1 else one
        found.append(ArithmeticPeak(name, instruction, operands, one, every))
    return found


def _rate_on(cpus: list[int], name: str, seconds: float) -> float:
    """The best of some slices of time in which all threads run: other programs disturb some."""
    barrier = threading.Barrier(len(cpus))

    def run(cpu: int) -> list[float]:
        os.sched_setaffinity(0, {cpu})  # of this thread
        found = []
        for _ in range(_SLICES):
            barrier.wait()
            found.append(_core.arithmetic_rate(name, seconds / _SLICES))
        return found

    with ThreadPoolExecutor(len(cpus)) as pool:
        slices = list(pool.map(run, cpus))
    return max(map(sum, zip(*slices, strict=True)))


# The kernel's name in the engine → the loop whose peak bounds it. AVX2 multiplies integers of two
# bytes: twice what its float32 loop does, which is near enough for a bound of old machines.
_LOOPS = {
    "bf16": {
        "amx": "amx_bf16", "avx512_bf16": "avx512_bf16", "avx512": "avx512", "avx2": "avx2",
    },
    "int8": {
        "amx": "amx_int8", "avx512_vnni_bf16": "avx512_vnni", "avx512_vnni": "avx512_vnni",
        "avx2": "avx2",
    },
}  # fmt: skip


def peak_of(weight_format: str, peaks: list[ArithmeticPeak]) -> ArithmeticPeak | None:
    """The peak that bounds the engine's GEMM of a weight format (bf16, int8 or int4) on this
    machine; None on a CPU without AVX2."""
    kernel = _core.kernels()[f"gemm_{weight_format}"]
    loop = _LOOPS["bf16" if weight_format == "bf16" else "int8"].get(kernel)
    return next((peak for peak in peaks if peak.name == loop), None)


def has_nvidia_gpu(root: Path = Path("/")) -> bool:
    """Whether the driver is there: known without importing torch."""
    return (root / "proc/driver/nvidia/version").exists() or (root / "dev/nvidiactl").exists()


def gpu_rates() -> GpuRates | None:
    """None where torch finds no GPU."""
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
    """Bytes per second of an action on _GPU_BYTES bytes: several in a row, the best try."""
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
