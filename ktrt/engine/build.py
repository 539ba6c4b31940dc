"""Builds the compiled engine from the user's settings, and logs the kernels that it will run."""

from __future__ import annotations

import importlib.util
import logging
import os
import weakref
from typing import TYPE_CHECKING, Any

import torch

from ktrt import _core
from ktrt.engine import Engine
from ktrt.engine.formats import AUTO, PLAIN, format_named, formats_of
from ktrt.engine.threads import num_threads
from ktrt.engine.torch_threads import torch_limit
from ktrt.machine.facts import cpu_quota
from ktrt.machine.threads import threads_within

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from ktrt.config import ExpertArgs

logger = logging.getLogger(__name__)

# Most tokens of one engine call; longer inputs go in slices. It sizes the scratch memory.
MAX_QLEN = 1024


class _ModelEngine(Engine):
    """Keeps torch within the CPU quota as well, until it is closed."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._lift = weakref.finalize(self, _hold_torch_to_quota())
        self._lift.atexit = False

    def close(self) -> None:
        super().close()
        self._lift()


def build_engine(experts: ExpertArgs, weight_formats: Collection[str] = ()) -> Engine:
    """Returns the engine of one model, whose layers are in ``weight_formats`` (none: in the one of
    ``kt_backend``). Log lines name the settings that could not be followed."""
    _notice_missing_kt_kernel()
    threads = num_threads(experts.kt_num_threads)
    if affinity := os.environ.get("KMP_AFFINITY"):
        logger.info(
            "KMP_AFFINITY=%s is left to OpenMP; ktrt's threads are pinned one per core, in order",
            affinity,
        )
    nodes = _nodes(threads) if experts.kt_tp_enabled else None
    engine = _ModelEngine(
        num_threads=threads, max_qlen=MAX_QLEN, nodes=nodes, fixed_kernels=experts.kt_fixed_kernels
    )
    backend = experts.kt_backend
    if not weight_formats:
        weight_formats = [PLAIN if backend == AUTO else formats_of(backend)[0].name]
    for name in sorted(set(weight_formats)):
        logger.info("%s", _kernel_line(backend, name, threads))
    return engine


def _hold_torch_to_quota() -> Callable[[], None]:
    """Lowers torch's threads, which follow the number of CPUs, to the quota; returns the undo.
    OMP_NUM_THREADS is the user's decision and stays."""
    quota, _ = cpu_quota()
    if quota is None or os.environ.get("OMP_NUM_THREADS"):
        return lambda: None
    return torch_limit.hold(threads_within(torch.get_num_threads(), quota))


def _kernel_line(kt_backend: str, name: str, num_threads: int) -> str:
    weight_format = format_named(name)
    kernel = _core.kernels()[weight_format.kernel_family]
    what = f"{weight_format.name.upper()} experts run on {kernel} kernels, {num_threads} threads"
    if kernel.startswith("amx"):
        return f"kt_backend {kt_backend}: {what}"
    limit = "no AMX on this CPU" if _core.detected_isa() != "amx" else f"KTRT_ISA={_core.isa()}"
    return f"kt_backend {kt_backend}: {limit}; {what}"


def _notice_missing_kt_kernel() -> None:
    if importlib.util.find_spec("kt_kernel") is None:
        logger.info(
            "kt_kernel not found: the chat does not need it, only comparisons with it do "
            "(pip install kt-kernel)"
        )


def _nodes(num_threads: int) -> list[list[int]] | None:
    """Returns the CPUs of each NUMA node to shard experts over; None to keep experts whole."""
    nodes = _core.numa_cpus()
    if len(nodes) == 1:
        logger.info("kt_tp_enabled: there is one NUMA node, so the experts are kept whole")
    elif not len(nodes) <= num_threads <= len(nodes) * min(map(len, nodes)):
        # The engine gives every node the same number of threads, within one.
        logger.info(
            "kt_tp_enabled: %d threads cannot be spread evenly over %d NUMA nodes, so the experts "
            "are kept whole",
            num_threads, len(nodes),
        )  # fmt: skip
    else:
        logger.info("kt_tp_enabled: every expert is sharded over %d NUMA nodes", len(nodes))
        return nodes
    return None
