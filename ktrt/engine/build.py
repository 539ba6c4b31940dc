"""Builds the compiled engine from the user's settings, and says what it will run on."""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import TYPE_CHECKING

import torch

from ktrt import _core
from ktrt.engine import Engine
from ktrt.engine.formats import BACKENDS
from ktrt.machine.facts import cpu_quota, threads_within

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ktrt._core import WeightFormatName
    from ktrt.config import ExpertArgs

logger = logging.getLogger(__name__)

# Tokens of one engine call; longer inputs go in slices. It sizes the scratch memory.
MAX_QLEN = 1024


def build_engine(experts: ExpertArgs) -> Engine:
    """The thread pool for one model, with log lines for every setting that was not taken as is."""
    _notice_missing_kt_kernel()
    num_threads = _num_threads(experts.kt_num_threads, os.environ)
    _limit_torch(os.environ)
    if affinity := os.environ.get("KMP_AFFINITY"):
        logger.info(
            "KMP_AFFINITY=%s is left to OpenMP; ktrt's threads are pinned one per core, in order",
            affinity,
        )
    nodes = _nodes(num_threads) if experts.kt_tp_enabled else None
    engine = Engine(num_threads=num_threads, max_qlen=MAX_QLEN, nodes=nodes)
    logger.info("%s", _kernel_line(experts.kt_backend, num_threads))
    return engine


def num_threads(experts: ExpertArgs) -> int:
    """How many threads ``build_engine`` would start."""
    return _num_threads(experts.kt_num_threads, os.environ)


def weight_format_of(kt_backend: str) -> WeightFormatName:
    """The engine's weight format for a kt_backend."""
    return BACKENDS[kt_backend].name


def _kernel_line(kt_backend: str, num_threads: int) -> str:
    row = BACKENDS[kt_backend]
    kernel = _core.kernels()[row.kernel_family]
    what = f"{row.name.upper()} experts run on {kernel} kernels, {num_threads} threads"
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
    """The CPUs of each NUMA node to shard the experts over; None to keep experts whole."""
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


def _num_threads(wanted: int | None, environ: Mapping[str, str]) -> int:
    """kt_num_threads, else OMP_NUM_THREADS, else the physical cores this process may use, or fewer
    where its cgroup has a quota."""
    quota, source = cpu_quota()
    allowed = len(os.sched_getaffinity(0))
    name = "kt_num_threads"
    if wanted is None:
        name, wanted = "OMP_NUM_THREADS", _omp_threads(environ.get("OMP_NUM_THREADS", ""))
    if wanted is None:
        cores = _core.num_cores()
        if (threads := threads_within(cores, quota)) < cores:
            logger.info("%d threads on %d cores: %s grants %g CPUs", threads, cores, source, quota)
        return threads
    if quota is not None and min(wanted, allowed) > max(1, quota):
        logger.warning(
            "%s %d is more than the %g CPUs that %s grants: the kernel will stop all threads for a "
            "part of every period. Unset it, or set it to %d",
            name, wanted, quota, source, threads_within(allowed, quota),
        )  # fmt: skip
    if wanted > allowed:
        logger.info(
            "%s %d: this process may use %d CPUs; %d threads run", name, wanted, allowed, allowed
        )
    return min(wanted, allowed)


def _limit_torch(environ: Mapping[str, str]) -> None:
    """Torch counts CPUs and knows of no quota; OMP_NUM_THREADS is the user's word to it."""
    quota, _ = cpu_quota()
    if quota is None or environ.get("OMP_NUM_THREADS"):
        return
    now = torch.get_num_threads()
    if (threads := threads_within(now, quota)) < now:
        torch.set_num_threads(threads)


def _omp_threads(value: str) -> int | None:
    """The first level of OMP_NUM_THREADS ("8" or "8,2"); None if unset or not a positive number."""
    first = value.partition(",")[0].strip()
    if first.isdecimal() and int(first) > 0:
        return int(first)
    if value:
        logger.info("OMP_NUM_THREADS=%s is not a positive number; it is ignored", value)
    return None
