"""ktrt.doctor: what it reads of the system, the settings it would change, and its output."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import save_adapter, save_model
from transformers import AutoConfig, AutoModelForCausalLM

from ktrt.config import ExpertArgs
from ktrt.doctor import __main__ as doctor
from ktrt.doctor.advice import Advice, advise
from ktrt.engine import Engine, probes
from ktrt.engine.formats import format_named
from ktrt.experts import find_experts, new_layer
from ktrt.kv.size import KvSize
from ktrt.loading.inventory import (
    ATTENTION,
    EXPERT_LORA,
    EXPERTS,
    HEAD,
    LORA,
    MLP,
    Inventory,
    Row,
    planned_inventory,
)
from ktrt.loading.work import ModelWork
from ktrt.machine.facts import (
    HugePages,
    MachineFacts,
    cpu_quota,
    read_facts,
    try_huge_pages,
)
from ktrt.machine.memory import Limit

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "examples/demo/chat.yaml"
CPUINFO = """processor : 0
model name : A CPU of 2026
flags : fpu avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_vnni avx512_bf16 {more}

processor : 1
model name : A CPU of 2026
"""


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, "utf-8")
    return root


def facts_of(
    root: Path, isa: str = "avx512", environment: dict[str, str] | None = None
) -> MachineFacts:
    return read_facts(
        isa=isa, detected_isa=isa, nodes=[[0, 1]], cores=2, environment=environment or {},
        root=root, huge_pages=HugePages("madvise", True, True),
    )  # fmt: skip


def test_facts_of_a_faked_system(tmp_path: Path) -> None:
    files = {
        "proc/cpuinfo": CPUINFO.format(more="amx_tile amx_int8 amx_bf16"),
        "proc/meminfo": "MemTotal: 64000000 kB\nMemAvailable: 50000000 kB\n",
        "proc/self/cgroup": "0::/a/b\n",
        "proc/sys/kernel/osrelease": "6.18.1\n",
        "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
        "sys/fs/cgroup/a/b/cpuset.cpus.effective": "0-1\n",
        "sys/fs/cgroup/a/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/a/memory.max": "8000000000\n",
        "sys/fs/cgroup/a/memory.current": "1000000000\n",
        "sys/devices/system/cpu/cpu0/cache/index3/size": "32768K\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
    }
    facts = facts_of(write(tmp_path, files), environment={"KTRT_ISA": "avx512", "HOME": "/root"})
    assert facts.cpu == "A CPU of 2026"
    assert facts.cpus == 2
    assert facts.memory == 64_000_000 * 1024
    assert facts.ram == Limit(7_000_000_000, "cgroup memory.max 8.0 GB")
    assert (facts.cpu_quota, facts.quota_from) == (1.5, "/sys/fs/cgroup/a/cpu.max")
    assert facts.cpuset == "0-1"
    assert facts.l3_bytes == 32 << 20
    assert facts.governor == "powersave"
    assert facts.kernel == "6.18.1"
    assert facts.environment == {"KTRT_ISA": "avx512"}
    assert facts.amx_denied
    assert facts.threads().default == 1


def test_facts_of_an_empty_system(tmp_path: Path) -> None:
    """Containers hide much."""
    facts = facts_of(tmp_path)
    assert (facts.cpu, facts.cpus, facts.cpu_quota, facts.cpuset) == ("unknown", 0, None, "")
    assert not facts.amx_denied
    assert facts.threads().default == 2


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3.0),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
    ],
)
def test_quota_of_a_container_whose_path_is_the_hosts(
    tmp_path: Path, files: dict[str, str], quota: float | None
) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/docker/1234\n", **files})
    assert cpu_quota(root)[0] == quota


def test_quota_of_cgroup_v1(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:cpu,cpuacct:/x\n1:memory:/x\n",
        "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "50000\n",
        "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
    }
    assert cpu_quota(write(tmp_path, files)) == (
        0.5,
        "/sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us",
    )


def test_huge_pages_are_tried_here() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text("utf-8")
    pages = try_huge_pages()
    assert f"[{pages.setting}]" in setting
    if pages.setting == "never":
        assert not pages.on_fault


GOOD = MachineFacts(
    cpu="A CPU", flags=("avx2",), isa="avx512", detected_isa="avx512", cpus=16, allowed=16, cores=8,
    nodes=(tuple(range(16)),), cpu_quota=None, quota_from="", cpuset="0-15", governor="",
    l3_bytes=32 << 20, huge_pages=HugePages("madvise", True, True), memory=64 << 30,
    ram=Limit(32 << 30, "MemAvailable"), kernel="6.12", environment={},
)  # fmt: skip
AMX = ("amx_tile", "amx_int8", "amx_bf16")


def test_nothing_to_change() -> None:
    assert advise(GOOD) == []
    assert advise(GOOD, ExpertArgs("AMXInt8", 8), fits=["AMXBF16", "AMXInt8"]) == []


@pytest.mark.parametrize(
    ("changes", "experts", "level", "setting"),
    [
        ({"isa": "avx2", "environment": {"KTRT_ISA": "avx2"}}, None, "fix", "unset KTRT_ISA"),
        ({"flags": AMX}, None, "fix", "let the process use AMX"),
        ({"isa": "portable", "detected_isa": "portable"}, None, "fix", "run on a CPU with AVX2"),
        (
            {"cpu_quota": 2.5, "quota_from": "/x"},
            ExpertArgs(kt_num_threads=4),
            "fix",
            "kt_num_threads: 2, or raise the",
        ),
        ({"cpu_quota": 2.5, "quota_from": "/x"}, None, "", ""),
        ({"cpu_quota": 4.0}, ExpertArgs(kt_num_threads=4), "", ""),
        ({}, ExpertArgs(kt_num_threads=20), "consider", "kt_num_threads: 8"),
        ({}, ExpertArgs(kt_num_threads=12), "consider", "kt_num_threads: 8"),
        ({}, ExpertArgs(kt_num_threads=3), "consider", "kt_num_threads: 8"),
        ({"environment": {"OMP_NUM_THREADS": "4,2"}}, None, "consider", "OMP_NUM_THREADS: 8"),
        ({"allowed": 8, "cpuset": "0-7"}, None, "consider", "a cpuset of all 16 CPUs"),
        ({"governor": "powersave"}, None, "consider", "cpupower frequency-set"),
        ({"huge_pages": HugePages("never", False, False)}, None, "fix", "echo madvise"),
        ({"huge_pages": HugePages("never", False, True)}, None, "consider", "echo madvise"),
        ({"environment": {"OMP_WAIT_POLICY": "ACTIVE"}}, None, "fix", "unset OMP_WAIT_POLICY"),
        ({"environment": {"OMP_WAIT_POLICY": "PASSIVE"}}, None, "", ""),
        ({}, ExpertArgs(kt_tp_enabled=True), "consider", "kt_tp_enabled: false"),
        ({"nodes": ((0, 1), (2, 3))}, ExpertArgs(), "consider", "kt_tp_enabled: true"),
        ({"nodes": ((0, 1), (2, 3))}, ExpertArgs(kt_tp_enabled=True), "", ""),
    ],
)
def test_what_to_change(
    changes: dict[str, object], experts: ExpertArgs | None, level: str, setting: str
) -> None:
    found = advise(replace(GOOD, **changes), experts)  # type: ignore[arg-type]
    assert [(each.level, each.setting[: len(setting)]) for each in found] == (
        [(level, setting)] if level else []
    )
    assert all(each.reason for each in found)


def test_the_threads_that_are_measured_follow_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    limited = replace(GOOD, cpu_quota=2.5, quota_from="/x")
    assert (GOOD.threads().count, limited.threads().count, limited.threads(6).count) == (8, 2, 6)
    named = replace(limited, environment={"OMP_NUM_THREADS": "20,2"})
    assert named.threads().count == 16
    asked: list[int] = []

    def bandwidth(threads: int) -> float:
        asked.append(threads)
        return 1e9

    def peaks(threads: int) -> list[probes.ArithmeticPeak]:
        asked.append(threads)
        return []

    monkeypatch.setattr(probes, "machine_facts", lambda _: limited)
    monkeypatch.setattr(probes, "read_bandwidth", bandwidth)
    monkeypatch.setattr(probes, "arithmetic_peaks", peaks)
    monkeypatch.setattr(probes, "has_nvidia_gpu", lambda: False)
    assert doctor.examine(argparse.Namespace(config=None, overrides=[]), {})["threads"] == 2
    assert asked == [2, 2]


def test_backend_by_memory_and_gain() -> None:
    def settings(running: str, stored: str = "AMXBF16", **known: object) -> list[Advice]:
        return advise(GOOD, ExpertArgs(), running=running, stored=stored, **known)  # type: ignore[arg-type]

    (short,) = settings("AMXBF16", fits=["AMXInt8"], excess="9 GB more RAM needed")
    assert (short.level, short.setting) == ("fix", "kt_backend: AMXInt8")
    assert "9 GB more RAM needed" in short.reason
    (none,) = settings("AMXInt4", fits=[], excess="9 GB more RAM needed")
    assert none.setting == "a smaller model, or more memory"
    both = ["AMXBF16", "AMXInt8"]
    (faster,) = settings("AMXBF16", fits=both, speeds={"AMXBF16": 10, "AMXInt8": 16})
    assert (faster.level, faster.setting) == ("consider", "kt_backend: AMXInt8")
    assert "1.6 times as fast" in faster.reason
    assert settings("AMXBF16", fits=both, speeds={"AMXBF16": 10, "AMXInt8": 11}) == []
    (exact,) = settings("AMXInt4", fits=["AMXInt8", "AMXInt4"])
    assert exact.setting == "kt_backend: AMXInt8"
    (four,) = settings("AMXInt4", fits=["RAWINT4", "AMXInt4"])
    assert four.setting == "kt_backend: RAWINT4"
    assert "every 32 columns" in four.reason


def test_the_checkpoints_own_format_is_advised() -> None:
    fits = ["FP8", "AMXBF16", "AMXInt8", "RAWINT4", "AMXInt4"]
    speeds = {"FP8": 20.0, "AMXBF16": 10.0, "AMXInt8": 20.0}

    def advised(running: str, **known: Any) -> Advice:
        known = {"fits": fits, "speeds": speeds, "stored": "FP8", **known}
        (found,) = advise(GOOD, ExpertArgs(), running=running, **known)
        return found

    assert advised("AMXBF16").setting == "kt_backend: auto"
    assert "up to 2.0 times as fast" in advised("AMXBF16").reason
    assert "a second time" in advised("AMXInt8").reason
    assert advised("AMXBF16", excess="9 GB").setting == "kt_backend: auto"
    assert advised("FP8", fits=fits[3:], excess="9 GB").setting == "kt_backend: RAWINT4"
    assert advise(GOOD, ExpertArgs(), running="FP8", stored="FP8", fits=fits, speeds=speeds) == []


def test_a_gpu_that_torch_does_not_see() -> None:
    (found,) = advise(GOOD, cuda_missing=True)
    assert (found.level, "CUDA" in found.setting) == ("fix", True)
    hidden = replace(GOOD, environment={"CUDA_VISIBLE_DEVICES": ""})
    (found,) = advise(hidden, cuda_missing=True)
    assert (found.level, found.setting) == ("consider", "CUDA_VISIBLE_DEVICES=0")


def test_urgent_advice_comes_first() -> None:
    facts = replace(GOOD, governor="powersave", huge_pages=HugePages("never", False, False))
    assert [each.level for each in advise(facts)] == ["fix", "consider"]


def test_rates_of_this_machine() -> None:
    rate = probes.read_bandwidth(1, passes=2)
    assert 1e8 < rate < 1e13
    peaks = {peak.name: peak for peak in probes.arithmetic_peaks(1, seconds=0.01)}
    assert all(1e8 < peak.one_thread < 1e14 for peak in peaks.values())
    found = probes.peak_of(format_named("bf16"), list(peaks.values()))
    assert (found is None) == (not peaks)


def tiny_work(model_type: str, folder: Path) -> tuple[ModelWork, torch.nn.Module]:
    """The work of a tiny model whose experts have twice as many bytes as weights."""
    save_model(folder, model_type, 96)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype=torch.bfloat16
        )
    specs = find_experts(skeleton)
    engine = Engine(num_threads=1, max_qlen=8)
    layers = {spec.path: new_layer(engine, spec, "bf16") for spec in specs}
    return ModelWork(planned_inventory(skeleton, specs, {"AMXBF16": layers})), skeleton


@pytest.mark.parametrize("model_type", ["deepseek_v2", "qwen3_moe", "granitemoe"])
def test_work_counts_every_weight_once(tmp_path: Path, model_type: str) -> None:
    """All weights but the embeddings (unless they are the head), and the routed experts that act on
    one token."""
    work, skeleton = tiny_work(model_type, tmp_path / model_type)
    total = sum(weight.numel() for weight in skeleton.parameters())
    model = skeleton
    embeddings = model.get_input_embeddings().weight  # type: ignore[operator]
    tied = model.get_output_embeddings().weight is embeddings  # type: ignore[operator]
    inventory, experts = work.inventory, work.inventory.experts["AMXBF16"]
    others = inventory.values(ATTENTION, MLP, HEAD)
    held = experts.values * 16 / 4  # top 4 of 16
    assert others + held + (0 if tied else embeddings.numel()) == total
    assert inventory.values(HEAD) == embeddings.numel()
    assert experts.share == 4 / 16
    # transformers may keep routers in float32.
    assert 2 <= inventory.read(ATTENTION, MLP, HEAD) / others < 2.05
    assert inventory.values(ATTENTION) > 0
    assert inventory.values(MLP) > 0


WORK = ModelWork(
    Inventory(
        (
            Row(EXPERT_LORA, "bfloat16", held=800, read=100, values=50),
            Row(LORA, "float32", held=80, read=80, values=20),
            Row(ATTENTION, "bfloat16", held=600, read=600, values=300),
            Row(HEAD, "bfloat16", held=400, read=400, values=200),
            Row(MLP, "bfloat16", held=200, read=200, values=100),
        ),
        {
            "AMXBF16": Row(EXPERTS, "bf16", held=16000, read=2000, values=1000, share=0.125),
            "AMXInt8": Row(EXPERTS, "int8", held=8400, read=1040, values=1000, share=0.125),
        },
        kv=KvSize(others=4),
    )
)


def test_bytes_and_times_by_hand() -> None:
    parts = WORK.bytes_by_part("AMXInt8", context=100)
    assert parts["routed experts"] == 1040
    assert parts["LoRA of the experts"] == 100
    assert parts["LoRA elsewhere"] == 80
    assert parts["KV cache of 100 tokens"] == 400
    assert WORK.decode_seconds("AMXBF16", 100.0) == pytest.approx((2000 + 100 + 1200 + 80) / 100)
    assert WORK.decode_seconds("AMXBF16", 100.0, 1000.0) == pytest.approx(21 + 1.28)
    # One token reads its own experts; many read all of them.
    slow_memory = WORK.prefill_seconds("AMXBF16", 1, 1.0, math.inf, None)
    assert slow_memory == pytest.approx(2000)
    assert WORK.prefill_seconds("AMXBF16", 10**6, 1.0, math.inf, None) == pytest.approx(16000)
    slow_arithmetic = WORK.prefill_seconds("AMXBF16", 10, math.inf, 1.0, 1.0)
    assert slow_arithmetic == pytest.approx(2 * 10 * 1050 + 2 * (10 * 420 + 200))


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "KTRT_"))}
    return subprocess.run(
        [sys.executable, "-m", "ktrt.doctor", *arguments], cwd=ROOT, env=clean | environment,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_without_a_configuration() -> None:
    result = run("--json")
    assert result.returncode in (0, 1), result.stderr
    report = json.loads(result.stdout)
    assert report["model"] is None
    assert report["read_bandwidth"] > 1e8
    assert {"machine", "threads", "arithmetic", "gpu", "advice"} <= set(report)
    assert report["machine"]["cores"] >= 1


def test_torch_is_not_loaded_for_the_machine_alone() -> None:
    code = (
        "import sys; from ktrt.doctor import __main__ as doctor; from ktrt.engine import probes;"
        "probes.has_nvidia_gpu = lambda: False;"
        "doctor.main(['--json']); print('torch' in sys.modules, file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.stderr.strip() == "False"


def test_the_demo_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    code = doctor.main([str(DEMO), "kt_backend=AMXInt8"])
    out = capsys.readouterr().out
    assert code in (0, 1)
    for text in (
        "memory reads",
        "routed experts",
        "LoRA of the experts",
        "AMXInt8",
        "prompt of 512",
    ):
        assert text in out
    assert "DOES NOT FIT" not in out


def test_what_must_be_fixed_sets_the_exit_code() -> None:
    result = run(OMP_WAIT_POLICY="active")
    assert result.returncode == 1
    assert "FIX" in result.stdout
    assert "OMP_WAIT_POLICY=active" in result.stdout


def test_a_model_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_model(tmp_path / "model", "deepseek_v2", 96)
    adapter = save_adapter(tmp_path / "adapter", folder, "a")
    monkeypatch.setattr("ktrt.loading.memory.ram_limit", lambda *_: Limit(1000, "a small box"))
    config = tmp_path / "config.yaml"
    config.write_text(f"model_name_or_path: {folder}\nadapter_name_or_path: {adapter}\n", "utf-8")
    assert doctor.main([str(config), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    (fix,) = [each for each in report["advice"] if "does not fit" in each["reason"]]
    assert "a small box" in fix["reason"]
    assert report["model"]["fits"] == {}


def test_a_configuration_that_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["/nowhere/config.yaml"]) == 2
    assert "error:" in capsys.readouterr().err
