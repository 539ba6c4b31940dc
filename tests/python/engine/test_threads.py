"""One thread count, which follows a container's CPU quota, and one module that sets torch's."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import pytest
import torch

from ktrt import _core
from ktrt.config import ExpertArgs
from ktrt.engine import build, probes, threads, torch_threads
from ktrt.engine.build import build_engine
from ktrt.engine.torch_threads import TorchLimit

ROOT = Path(__file__).resolve().parents[3]
QUOTA_FILE = "/sys/fs/cgroup/cpu.max"


class Machine:
    """A machine of ``cores`` cores, with a CPU quota, and torch's thread count on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cores: int, quota: float | None) -> None:
        self.torch_threads = cores
        found = (quota, QUOTA_FILE if quota is not None else "")
        monkeypatch.setattr(threads, "cpu_quota", lambda: found)
        monkeypatch.setattr(build, "cpu_quota", lambda: found)
        monkeypatch.setattr(_core, "num_cores", lambda: cores)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        monkeypatch.setattr(torch, "get_num_threads", lambda: self.torch_threads)
        monkeypatch.setattr(torch, "set_num_threads", self.set_threads)

    def set_threads(self, count: int) -> None:
        self.torch_threads = count


@pytest.fixture(autouse=True)
def _environment(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(build, "torch_limit", TorchLimit())


@pytest.mark.parametrize(
    ("quota", "expected"), [(1.5, 1), (0.2, 1), (2.9, 2), (64.0, 8), (None, 8)]
)
def test_threads_follow_the_quota_of_a_container(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    quota: float | None,
    expected: int,
) -> None:
    Machine(monkeypatch, 8, quota)
    assert threads.num_threads() == expected
    line = f"{expected} threads on 8 cores: {QUOTA_FILE} grants {quota} CPUs"
    assert caplog.messages == ([line] if expected < 8 else [])
    assert threads.thread_count().count == expected


def test_more_threads_than_the_quota_are_the_users_wish(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Machine(monkeypatch, 8, 1.5)
    assert threads.num_threads(4) == 4
    assert f"is more than the 1.5 CPUs that {QUOTA_FILE} grants" in caplog.messages[0]
    assert caplog.messages[0].endswith("set it to 1")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads.num_threads() == 2
    assert caplog.messages[1].startswith("OMP_NUM_THREADS 2 is more than")
    assert threads.num_threads(1) == 1
    assert len(caplog.messages) == 2


def test_probes_run_as_many_threads_as_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Probe:
        def __init__(self, count: int, _nbytes: int) -> None:
            asked.append(count)

        def rate(self) -> float:
            return 1.0

        def close(self) -> None:
            pass

    Machine(monkeypatch, 8, 2.5)
    monkeypatch.setattr(probes, "BandwidthProbe", Probe)
    probes.read_bandwidth(passes=1)
    probes.read_bandwidth(5, passes=1)
    assert asked == [2, 5]


def build_one() -> _core.Engine:
    return build_engine(ExpertArgs(kt_num_threads=1))


def test_torch_keeps_to_the_quota_until_the_last_engine_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine(monkeypatch, 8, 2.5)
    first, second = build_one(), build_one()
    assert machine.torch_threads == 2
    first.close()
    first.close()
    assert machine.torch_threads == 2
    second.close()
    assert machine.torch_threads == 8
    build_one()  # nobody keeps it
    assert machine.torch_threads == 8


def test_torch_threads_that_the_user_sets_meanwhile_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 8, 2.5)
    engine = build_one()
    torch.set_num_threads(3)
    engine.close()
    assert machine.torch_threads == 3


@pytest.mark.parametrize("quota", [None, 16.0])
def test_without_a_quota_below_the_cores_torch_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, quota: float | None
) -> None:
    Machine(monkeypatch, 8, quota)
    monkeypatch.setattr(torch_threads, "set_torch_threads", None)
    build_one().close()


def test_omp_num_threads_is_the_users_word_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 8, 2.5)
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    engine = build_one()
    assert machine.torch_threads == 8
    engine.close()


def test_one_module_sets_torchs_threads() -> None:
    setters = {
        str(path.relative_to(ROOT))
        for folder in ("ktrt", "bench")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"\bset_num_(interop_)?threads\(", path.read_text("utf-8"))
    }
    assert setters == {"ktrt/engine/torch_threads.py"}
