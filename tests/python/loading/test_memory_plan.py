"""The memory plan: its numbers match a run, and a model that cannot fit is refused beforehand."""

from __future__ import annotations

import json
import logging
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import save_adapter, save_model
from transformers import AutoConfig, AutoModelForCausalLM

import ktrt.loading.model
from ktrt.chat.__main__ import main
from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.errors import ConfigError
from ktrt.experts import find_experts
from ktrt.kv.size import KvSize, kv_size
from ktrt.loading.memory import MIN_CONTEXT, Item, MemoryPlan, check_addresses
from ktrt.loading.model import load_model
from ktrt.loading.plan import plan_memory
from ktrt.machine.memory import Limit, address_limit, ram_limit

ROOT = Path(__file__).resolve().parents[3]
GB = 10**9


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, "utf-8")
    return root


MEMINFO = "MemTotal: 64000000 kB\nMemAvailable:   50000000 kB\n"


def test_machine_without_cgroups(tmp_path: Path) -> None:
    limit = ram_limit(write(tmp_path, {"proc/meminfo": MEMINFO}))
    assert limit == Limit(50_000_000 * 1024, "MemAvailable")


def test_cgroup_v2_and_its_parents(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
        "sys/fs/cgroup/a/memory.max": f"{8 * GB}\n",
        "sys/fs/cgroup/a/memory.current": f"{3 * GB}\n",
        "sys/fs/cgroup/a/memory.stat": f"anon {GB}\ninactive_file {2 * GB}\n",
    }
    limit = ram_limit(write(tmp_path, files))
    assert limit.free == 7 * GB
    assert "memory.max 8.0 GB" in limit.what


def test_cgroup_v2_whose_path_is_the_hosts(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/docker/12345\n",
        "sys/fs/cgroup/memory.max": f"{4 * GB}\n",
        "sys/fs/cgroup/memory.current": f"{GB}\n",
    }
    assert ram_limit(write(tmp_path, files)).free == 3 * GB


def test_cgroup_v1(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/x\n0::/\n",
        "sys/fs/cgroup/memory/x/memory.limit_in_bytes": f"{6 * GB}\n",
        "sys/fs/cgroup/memory/x/memory.usage_in_bytes": f"{5 * GB}\n",
        "sys/fs/cgroup/memory/x/memory.stat": f"total_inactive_file {GB}\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    }
    assert ram_limit(write(tmp_path, files)).free == 2 * GB


def test_no_address_limit_here() -> None:
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
    assert address_limit() is None


PLAN = MemoryPlan(
    items=(Item("experts", ram=30 * GB), Item("others", ram=2 * GB), Item("Python", ram=GB)),
    kv_size=KvSize(others=10**5),
    max_context=100_000,
    on_gpu=False,
    already=GB,
    other_formats={"AMXBF16": 30 * GB, "AMXInt8": 15 * GB},
    mapped_files=32 * GB,
    ram=Limit(64 * GB, "MemAvailable"),
    gpu=None,
    addresses=None,
)


def test_everything_fits(caplog: pytest.LogCaptureFixture) -> None:
    PLAN.check()
    assert not caplog.messages
    assert PLAN.fitting_context() == 100_000
    assert "whole context of 100000 tokens" in PLAN.table()


def test_a_shorter_context_fits(caplog: pytest.LogCaptureFixture) -> None:
    plan = replace(PLAN, ram=Limit(37 * GB, "MemAvailable"))
    assert plan.fitting_context() == 50_000
    plan.check()
    assert "Conversations of up to 50000 tokens fit, the model's context is 100000" in caplog.text


def test_what_would_fit_is_said() -> None:
    plan = replace(PLAN, ram=Limit(20 * GB, "cgroup memory.max 21.0 GB"))
    with pytest.raises(ConfigError) as caught:
        plan.check()
    message = str(caught.value)
    assert "32.20 GB more RAM needed, 20.00 GB free (cgroup memory.max 21.0 GB)" in message
    assert "kt_backend: AMXInt8 (experts 15.00 GB, 30000 tokens)" in message
    with pytest.raises(ConfigError, match="No weight format of ktrt makes it fit"):
        replace(PLAN, ram=Limit(2 * GB, "MemAvailable")).check()


def test_gpu_and_addresses_bound_too() -> None:
    on_gpu = replace(
        PLAN, items=(Item("experts", ram=GB), Item("others", gpu=GB)), on_gpu=True,
        gpu=Limit(2 * GB, "a GPU"),
    )  # fmt: skip
    assert on_gpu.fitting_context() == 10_000
    with pytest.raises(ConfigError, match="GPU memory needed"):
        replace(on_gpu, gpu=Limit(GB, "a GPU")).check()
    with pytest.raises(ConfigError, match="64.20 GB more address space needed"):
        replace(PLAN, addresses=Limit(64 * GB, "ulimit -v 5")).check()


def test_the_kv_budget_is_a_share_of_what_is_left() -> None:
    # 64 GB free, 33 GB in all, of which the process holds 1.
    assert PLAN.kv_budget() == int(0.9 * (64 - 32) * GB)
    bounded = replace(PLAN, addresses=Limit(70 * GB, "ulimit -v 5"))
    assert bounded.kv_budget() == int(0.9 * (70 - 32 - 32) * GB)
    assert replace(PLAN, ram=Limit(20 * GB, "MemAvailable")).kv_budget() == 0
    on_gpu = replace(
        PLAN, items=(Item("experts", ram=GB), Item("others", gpu=GB)), on_gpu=True,
        gpu=Limit(3 * GB, "a GPU"),
    )  # fmt: skip
    assert on_gpu.kv_budget() == int(0.9 * 2 * GB)
    assert PLAN.as_dict()["kv_budget"] == PLAN.kv_budget()
    assert PLAN.as_dict()["kv_token_bytes"] == 10**5


def test_pages_of_a_slot() -> None:
    size = KvSize(((2, 24), (1, 1024)), others=3)
    assert size.token_bytes == 2 * 24 + 1024 + 3
    assert size.slot_bytes(0, 4096) == 0
    # 170 positions of 24 bytes fit into a page, four of 1024.
    assert size.slot_bytes(1, 4096) == 2 * 4096 + 4096 + 3
    assert size.slot_bytes(171, 4096) == 2 * 2 * 4096 + 43 * 4096 + 171 * 3


def test_kv_cache_per_token() -> None:
    # DeepSeek-V2 caches the compressed latent: 48 + 16 values in each of 3 layers, in bfloat16.
    # The others keep keys and values of every head.
    sizes = {"deepseek_v2": 3 * (48 + 16) * 2, "qwen3_moe": 3 * 2 * 2 * 40 * 2}
    for family, expected in sizes.items():
        config = _config(family)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        paths = [spec.path for spec in find_experts(model)]
        assert kv_size(model, paths, None).token_bytes == expected
        assert kv_size(model, paths, torch.float32).token_bytes == 2 * expected


def _config(family: str) -> AutoConfig:
    from helpers.tiny_models import _COMMON, _FAMILIES

    values = {**_COMMON, **_FAMILIES[family]}
    values = {k: 96 if v == "I" else v for k, v in values.items()}
    config: AutoConfig = AutoConfig.for_model(family, **values)
    return config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """0.2 GB of experts."""
    return save_model(
        tmp_path_factory.mktemp("large"), "deepseek_v2", 512,
        hidden_size=512, n_routed_experts=64, vocab_size=4096,
    )  # fmt: skip


def test_refused_before_a_weight_is_read(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def never(*_args: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(ktrt.loading.model, "load_without_experts", never)
    small = Limit(100 << 20, "cgroup memory.max 0.1 GB")
    monkeypatch.setattr("ktrt.loading.memory.ram_limit", lambda *_: small)
    with pytest.raises(ConfigError, match=r"cgroup memory\.max 0\.1 GB"):
        load_model(ModelArgs(model), AdapterArgs(), ExpertArgs(kt_num_threads=1))


def test_a_link_to_nothing_beside_the_weights_counts_for_nothing(
    model: Path, tmp_path: Path
) -> None:
    size = check_addresses(model)
    for file in model.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "model-00001-of-00002.safetensors").symlink_to(tmp_path / "blob")
    assert check_addresses(tmp_path) == size


def test_items_are_those_of_the_model(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapter = save_adapter(model.parent / f"{model.name}-adapter", model, "a")
    with caplog.at_level(logging.INFO):
        plan = plan_memory(ModelArgs(model), AdapterArgs(adapter), ExpertArgs(kt_num_threads=1))
    items = {item.name: item.ram for item in plan.items}
    experts = 2 * 64 * 3 * 512 * 512 * 2
    assert items["routed experts, packed (AMXBF16)"] == experts
    assert experts / 2 < plan.other_formats["AMXInt8"] < experts * 0.53
    total = (model / "model.safetensors").stat().st_size
    assert items["other weights"] == pytest.approx(total - experts, rel=0.02)
    assert items["LoRA of the experts"] > 0
    assert items["LoRA elsewhere"] > 0
    assert plan.max_context == 512 < MIN_CONTEXT


def test_a_start_from_the_cache_needs_no_source(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KTRT_CACHE")
    args = ExpertArgs(kt_num_threads=1, ktrt_cache_dir=tmp_path)

    def items(quantization_bit: int | None = None) -> dict[str, int]:
        given = ModelArgs(model, quantization_bit=quantization_bit)
        plan = plan_memory(given, AdapterArgs(), args)
        return {item.name: item.ram for item in plan.items}

    name, layer = "sources while packing", 64 * 3 * 512 * 512 * 2
    before = items()
    # Weights that are read later take the same room; buffers, counted with them, are made at once.
    assert before[name] == pytest.approx(layer - before["other weights"], rel=0.01)
    load_model(ModelArgs(model), AdapterArgs(), args).close()
    assert name not in items()
    # The linear layers' BF16 pages are there until all of them are packed.
    packed = items(8)
    replaced = packed["other weights"] + packed[name]
    assert packed[name] > packed["linear layers in INT8"]
    assert replaced == before["other weights"]


def configured(model: Path) -> str:
    """Adds a tokenizer to the model; returns a configuration for it."""
    tokenizer = ROOT / "examples/demo/model"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        target = model / name
        if not target.exists():
            target.symlink_to(tokenizer / name)
    config = model.parent / f"{model.name}.yaml"
    config.write_text(f"model_name_or_path: {model}\nkt_num_threads: 1\n", "utf-8")
    return str(config)


def chat(model: Path, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    code = (
        # ru_maxrss would be at least what this process holds: it is inherited.
        "import sys; from ktrt.chat.__main__ import main; code = main(sys.argv[1:]);"
        "status = dict(line.split(':') for line in open('/proc/self/status'));"
        "print(int(status['VmHWM'].split()[0]) * 1024, file=sys.stderr);"
        "sys.exit(code)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, configured(model), *arguments],
        cwd=ROOT, input=text, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
def test_the_plan_is_what_a_run_takes(model: Path) -> None:
    planned = chat(model, "--plan", "--json")
    assert planned.returncode == 0
    plan = json.loads(planned.stdout)
    assert plan["fits"]
    run = chat(model, "-q", "template=default", "max_new_tokens=2", text="hi\n")
    assert run.returncode == 0, run.stderr
    peak = int(run.stderr.split()[-1])
    assert plan["total"]["ram"] == pytest.approx(peak, rel=0.08)


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [pytest.param(100, marks=pytest.mark.long), 700])
def test_ulimit_v_is_respected(model: Path, megabytes: int) -> None:
    """Where not even the files can be mapped, and where they can, but the experts have no room."""
    code = (
        "import resource, sys;"
        "import ktrt.loading.model, transformers.models.deepseek_v2.modeling_deepseek_v2;"
        "size = int(open('/proc/self/statm').read().split()[0]) * 4096;"
        "size += int(sys.argv.pop()) * 10**6;"
        "resource.setrlimit(resource.RLIMIT_AS, (size, size));"
        "from ktrt.chat.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, configured(model), "template=default", str(megabytes)],
        cwd=ROOT, input="", capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "This does not fit" in done.stderr
    assert "more address space needed" in done.stderr
    assert "ulimit -v" in done.stderr
    assert "Traceback" not in done.stderr


def test_plan_as_a_table(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([configured(model), "--plan", "-q"]) == 0
    shown = capsys.readouterr().out
    assert "routed experts, packed (AMXBF16)" in shown
    assert "It fits, with the model's whole context of 512 tokens." in shown
