"""Engine settings: thread counts, and what the log says about each."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys

import pytest

import ktrt.engine
from ktrt import _core
from ktrt.config import ExpertArgs
from ktrt.engine.build import build_engine
from ktrt.errors import KtrtError

CPUS = len(os.sched_getaffinity(0))


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("KMP_AFFINITY", raising=False)


def threads(**settings: int) -> int:
    engine = build_engine(ExpertArgs(**settings))  # type: ignore[arg-type]
    try:
        return engine.num_threads
    finally:
        engine.close()


def test_yaml_wins_over_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads(kt_num_threads=1) == 1


@pytest.mark.parametrize("value", ["1", "1,4", " 1 "])
def test_environment_counts_without_yaml(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert threads() == 1


def test_default_is_the_cores_of_the_process() -> None:
    assert 1 <= threads() <= CPUS


def test_one_cpu_allowed_means_one_thread() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert threads() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_more_than_allowed_is_clamped_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    assert threads(kt_num_threads=CPUS + 58) == CPUS
    lines = [m for m in caplog.messages if m.startswith("kt_num_threads")]
    assert lines == [
        f"kt_num_threads {CPUS + 58}: this process may use {CPUS} CPUs; {CPUS} threads run"
    ]


@pytest.mark.parametrize("value", ["many", "0", "-3"])
def test_bad_environment_is_named_and_ignored(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: str
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert threads() >= 1
    assert any(f"OMP_NUM_THREADS={value}" in message for message in caplog.messages)


def test_ignored_settings_are_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("KMP_AFFINITY", "granularity=fine,compact,1,0")
    build_engine(ExpertArgs(kt_num_threads=1)).close()
    assert any("KMP_AFFINITY=granularity=fine,compact,1,0" in m for m in caplog.messages)


@pytest.mark.parametrize(
    ("nodes", "threads", "parts", "words"),
    [
        ([[0]], 1, 1, "one NUMA node"),
        ([[0], [1]], 1, 1, "1 threads cannot be spread evenly over 2 NUMA nodes"),
        pytest.param(
            [[0], [1]], 2, 2, "sharded over 2 NUMA nodes",
            marks=pytest.mark.skipif(CPUS < 2, reason="needs two CPUs"),
        ),
    ],
)  # fmt: skip
def test_experts_are_sharded_over_numa_nodes(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    nodes: list[list[int]],
    threads: int,
    parts: int,
    words: str,
) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    pinned = [[allowed[cpu] for cpu in node] for node in nodes if node[0] < CPUS]
    monkeypatch.setattr(_core, "numa_cpus", lambda: pinned if len(pinned) == len(nodes) else nodes)
    engine = build_engine(ExpertArgs(kt_num_threads=threads, kt_tp_enabled=True))
    assert engine.parts == parts
    engine.close()
    assert any(m.startswith("kt_tp_enabled") and words in m for m in caplog.messages)


@pytest.mark.parametrize(
    ("backend", "family"), [("AMXBF16", "bf16"), ("AMXInt8", "int8"), ("AMXInt4", "int4")]
)
def test_one_line_says_which_kernels_run(
    caplog: pytest.LogCaptureFixture, backend: str, family: str
) -> None:
    build_engine(ExpertArgs(kt_backend=backend, kt_num_threads=1)).close()  # type: ignore[arg-type]
    (line,) = [m for m in caplog.messages if m.startswith("kt_backend")]
    kernel = _core.kernels()[f"gemm_{family}"]
    assert f"{family.upper()} experts run on {kernel} kernels, 1 threads" in line
    assert ("no AMX on this CPU" in line) == (_core.detected_isa() != "amx")


@pytest.mark.parametrize("found", [True, False])
def test_kt_kernel_is_looked_for_but_not_imported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, found: bool
) -> None:
    spec = importlib.util.find_spec("json") if found else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    threads(kt_num_threads=1)
    notices = [m for m in caplog.messages if "kt_kernel not found" in m]
    assert len(notices) == (0 if found else 1)
    assert found or "pip install kt-kernel" in notices[0]
    assert "kt_kernel" not in sys.modules


def test_other_version_of_the_compiled_module_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "__version__", "0.0.0")
    with pytest.raises(KtrtError, match=r"_core is version 0\.0\.0.*pip install \."):
        importlib.reload(ktrt.engine)


def test_missing_compiled_module_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ktrt._core", None)
    monkeypatch.delattr(ktrt, "_core")
    with pytest.raises(KtrtError, match=r"pip install \."):
        importlib.reload(ktrt.engine)


@pytest.mark.parametrize("fixed", [False, True])
def test_fixed_kernels_reach_the_engine(fixed: bool) -> None:
    engine = build_engine(ExpertArgs(kt_num_threads=1, kt_fixed_kernels=fixed))
    assert engine.fixed_kernels is (fixed or _core.isa() != "amx")
    engine.close()
