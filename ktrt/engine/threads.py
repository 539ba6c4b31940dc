"""The engine's thread count on this machine. Importing it needs no torch."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from ktrt import _core
from ktrt.machine.facts import cpu_quota
from ktrt.machine.threads import ThreadCount, count_threads, omp_threads, threads_within

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = logging.getLogger(__name__)


def num_threads(
    kt_num_threads: int | None = None, environment: Mapping[str, str] = os.environ
) -> int:
    """Returns the number of threads that an engine starts; a log line explains a number that is
    neither the cores' nor the user's."""
    chosen = thread_count(kt_num_threads, environment)
    given = environment.get("OMP_NUM_THREADS")
    if kt_num_threads is None and given and omp_threads(environment) is None:
        logger.info("OMP_NUM_THREADS=%s is not a positive number; it is ignored", given)
    quota, source = cpu_quota()
    if chosen.wanted is None:
        if chosen.default < (cores := _core.num_cores()):
            logger.info(
                "%d threads on %d cores: %s grants %g CPUs", chosen.count, cores, source, quota
            )
        return chosen.count
    if quota is not None and chosen.count > max(1, quota):
        logger.warning(
            "%s %d is more than the %g CPUs that %s grants: the kernel will stop all threads for a "
            "part of every period. Unset it, or set it to %d",
            chosen.setting, chosen.wanted, quota, source, threads_within(_allowed(), quota),
        )  # fmt: skip
    if chosen.wanted > chosen.count:
        logger.info(
            "%s %d: this process may use %d CPUs; %d threads run",
            chosen.setting, chosen.wanted, chosen.count, chosen.count,
        )  # fmt: skip
    return chosen.count


def thread_count(
    kt_num_threads: int | None = None, environment: Mapping[str, str] = os.environ
) -> ThreadCount:
    """Returns the same number with the setting that decided, without log lines."""
    return count_threads(
        kt_num_threads, environment,
        cores=_core.num_cores(), allowed=_allowed(), quota=cpu_quota()[0],
    )  # fmt: skip


def _allowed() -> int:
    return len(os.sched_getaffinity(0))
