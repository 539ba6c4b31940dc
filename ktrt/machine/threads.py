"""How many threads the engine runs: the user's setting, else the cores, within limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class ThreadCount:
    """``count`` threads run. ``setting`` is the setting that decides (``kt_num_threads`` or
    ``OMP_NUM_THREADS``) and ``wanted`` its value; None: no setting does, and ``default`` run."""

    count: int
    default: int
    wanted: int | None
    setting: str


def count_threads(
    kt_num_threads: int | None,
    environment: Mapping[str, str],
    *,
    cores: int,
    allowed: int,
    quota: float | None,
) -> ThreadCount:
    """kt_num_threads, else OMP_NUM_THREADS, else one thread per core within the quota; at most the
    ``allowed`` CPUs. ``cores``: physical ones among these; ``quota``: of the cgroup, in CPUs."""
    default = threads_within(cores, quota)
    wanted, setting = kt_num_threads, "kt_num_threads"
    if wanted is None and (wanted := omp_threads(environment)) is not None:
        setting = "OMP_NUM_THREADS"
    return ThreadCount(min(wanted or default, allowed), default, wanted, setting)


def threads_within(cores: int, quota: float | None) -> int:
    """``cores``, but no more than whole CPUs of a quota: with more threads the kernel stops all of
    them for the rest of every period."""
    return cores if quota is None else max(1, min(cores, int(quota)))


def omp_threads(environment: Mapping[str, str]) -> int | None:
    """The first level of OMP_NUM_THREADS ("8" or "8,2"); None if unset or not a positive number."""
    first = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else None
