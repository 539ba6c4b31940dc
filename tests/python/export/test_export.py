"""A merged checkpoint: plain transformers gives the logits of base and adapter. Its tensors equal
the source's, except the adapter's targets, which change by the formula."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from adapter.test_adapter_torch_side import ATTENTION, ktrt_logits, save_trained
from checkpoint.test_checkpoint_formats import random_bytes, random_fp8
from checkpoint.test_families import SUPPORTED
from helpers.family_adapters import RANK, write_stacked
from helpers.family_models import Family, random_model
from helpers.forks import KTRT
from helpers.merge import load_weights, merge
from helpers.rounded_experts import experts_of, random_lora, use_rounded_experts
from helpers.tiny_models import (
    LoraPlan,
    read_folder,
    save_adapter,
    save_model,
    token_ids,
    write_adapter,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ktrt.checkpoint.folder import Checkpoint
from ktrt.config import AdapterArgs, ModelArgs
from ktrt.errors import AdapterError, CheckpointError, ConfigError
from ktrt.export.__main__ import main
from ktrt.export.changes import Changes
from ktrt.export.checkpoint import merge_checkpoint
from ktrt.export.shards import write_shard
from ktrt.loading.plan import base_of_adapters, open_adapter, open_base

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ktrt.export.checkpoint import DtypeName, Summary

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "examples" / "demo"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def _one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def export(model: Path, adapter: Path | None, out: Path, dtype: DtypeName | None = None) -> Summary:
    base = open_base(ModelArgs(model))
    return merge_checkpoint(
        base, open_adapter(AdapterArgs(adapter), base_of_adapters(base)), out, dtype
    )


def library_logits(folder: Path, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Returns plain transformers' logits; it must find every tensor and no other."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        found: torch.Tensor = model.eval()(
            input_ids=token_ids(2, 40) if ids is None else ids
        ).logits
    return found


def error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Returns the median over positions of ‖Δ‖/‖reference‖."""
    relative = (found - reference).norm(dim=-1) / reference.norm(dim=-1)
    return float(relative.median())


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found |= {n: tuple(tensors.get_slice(n).get_shape()) for n in tensors.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("layout", ["a", "b"])
@pytest.mark.parametrize("family", ["deepseek_v2", "qwen3_moe", "mixtral"])
def test_merge_is_the_formula(family: str, layout: Any, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", family, 96)
    adapter = save_adapter(tmp_path / "adapter", model, layout, LoraPlan(use_rslora=True))
    summary = export(model, adapter, tmp_path / "f32", "float32")
    assert summary.adapter_tensors == len(read_folder(adapter)[0])
    assert shapes(tmp_path / "f32") == shapes(model)

    expected = load_weights(model)
    merge(expected, adapter)
    base, merged = load_weights(model), load_weights(tmp_path / "f32")
    for name, weight in expected.items():
        assert torch.allclose(merged[name], weight, rtol=1e-5, atol=1e-6), name
    changed = [name for name in base if not torch.equal(base[name], merged[name])]
    assert len(changed) == summary.merged
    assert sorted(changed) == sorted(n for n in base if not torch.equal(base[n], expected[n]))

    # Rounded once, from the same sums.
    export(model, adapter, tmp_path / "bf16")
    stored = load_file(tmp_path / "bf16" / "model.safetensors")
    assert all(torch.equal(stored[name], merged[name].bfloat16()) for name in base)

    reference, _ = ktrt_logits(model, adapter)
    assert error(library_logits(tmp_path / "f32"), reference) <= 0.01
    assert error(library_logits(model), reference) > 0.05, "the adapter must matter"


# Fused; transposed and interleaved; transposed; without gate; rearranged by transformers.
FORMS = {"granitemoe", "gpt_oss", "aria_text", "nemotron_h", "qwen3_vl_moe", "ernie4_5_vl_moe"}


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f.model_type in FORMS else pytest.mark.slow) for f in SUPPORTED],
    ids=str,
)
def test_every_form_of_experts_on_disk(family: Family, tmp_path: Path) -> None:
    """The reference adds B·A to the outputs of the library's experts."""
    if family.folder == "inkling" and family.model_type == "inkling_mm_model":
        pytest.importorskip("scipy", reason="transformers' vision tower of Inkling needs scipy")
    model: Any = random_model(family)
    model.save_pretrained(tmp_path / "model")
    generator = torch.Generator().manual_seed(2)
    loras = {
        path: random_lora(module, RANK, True, generator)
        for path, module in experts_of(model).items()
    }
    adapter = write_stacked(tmp_path / "b", experts_of(model), loras)
    summary = export(tmp_path / "model", adapter, tmp_path / "out", "float32")
    assert summary.adapter_tensors == 4 * len(loras)
    assert shapes(tmp_path / "out") == shapes(tmp_path / "model")

    ids = torch.randint(2, 100, (2, 24), generator=generator)
    use_rounded_experts(model, loras, "none")
    with torch.no_grad():
        reference = model(input_ids=ids).logits
        use_rounded_experts(model, {}, "none")
        base = model(input_ids=ids).logits
        merged = type(model).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
        found = merged(input_ids=ids).logits
    assert error(found, reference) < 1e-4
    assert error(base, reference) > 0.02, "the adapter must matter"


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tied")
    return save_model(folder, "qwen3_moe", 96, attention_bias=True, tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("options", "unties"),
    [
        ({"target_modules": ATTENTION, "use_rslora": True, "rank_pattern": {"k_proj": 2}}, False),
        ({"target_modules": ATTENTION, "use_dora": True}, False),
        ({"target_modules": ["q_proj", "k_proj"], "lora_bias": True}, False),
        ({"target_modules": ["q_proj"], "bias": "all"}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}, False),
        ({"target_modules": ["q_proj", "lm_head"]}, True),
    ],
    ids=str,
)
def test_outside_the_experts_it_is_pefts_merge(
    tied: Path, tmp_path: Path, options: dict[str, Any], unties: bool
) -> None:
    """``unties``: the output layer is no longer tied to the embeddings."""
    reference = save_trained(tmp_path / "adapter", tied, **options)
    export(tied, tmp_path / "adapter", tmp_path / "out", "float32")
    assert error(library_logits(tmp_path / "out"), reference) < 1e-4
    new = set(shapes(tmp_path / "out")) - set(shapes(tied))
    assert new == ({"lm_head.weight"} if unties else set())
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert config["tie_word_embeddings"] is not unties


def test_embedding_lora_unties_the_output_layer(tied: Path, tmp_path: Path) -> None:
    reference = save_trained(
        tmp_path / "adapter", tied, target_modules=["embed_tokens", "q_proj"],
        exclude_modules=["lm_head"],
    )  # fmt: skip
    tensors, config = read_folder(tmp_path / "adapter")
    kept = {key: value for key, value in tensors.items() if ".lora_" in key}
    export(tied, write_adapter(tmp_path / "adapter", kept, config), tmp_path / "out", "float32")
    assert error(library_logits(tmp_path / "out"), reference) < 1e-4
    assert "lm_head.weight" in shapes(tmp_path / "out")


def test_router_lora(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "deepseek_v2", 96)
    key = "base_model.model.model.layers.1.mlp.gate.lora_"
    tensors = {
        f"{key}A.weight": torch.randn(4, 160) / 12, f"{key}B.weight": torch.randn(16, 4)
    }  # fmt: skip
    adapter = write_adapter(
        tmp_path / "adapter", tensors,
        {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_parameters": ["1.mlp.gate.weight"]},
    )  # fmt: skip
    summary = export(model, adapter, tmp_path / "out", "float32")
    name = "model.layers.1.mlp.gate.weight"
    delta = 2 * tensors[f"{key}B.weight"] @ tensors[f"{key}A.weight"]
    merged, base = load_weights(tmp_path / "out"), load_weights(model)
    assert torch.allclose(merged[name], base[name] + delta, atol=1e-6)
    assert summary.merged == 1


def test_a_lora_bias_needs_a_bias(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "qwen3_moe", 96)
    save_trained(tmp_path / "adapter", model, target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(AdapterError, match=r"q_proj has a LoRA bias .* cannot be merged"):
        export(model, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_and_side_files(tmp_path: Path) -> None:
    model = save_model(tmp_path / "one", "deepseek_v2", 96)
    sharded = tmp_path / "model"
    library: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    library.save_pretrained(sharded, max_shard_size="300KB")
    (sharded / "tokenizer.json").write_text("{}", "utf-8")
    (sharded / "chat_template.jinja").write_text("…", "utf-8")
    (sharded / "README.md").write_text("of the base", "utf-8")
    (sharded / "pytorch_model.bin").write_bytes(b"no")
    (sharded / "additional_chat_templates").mkdir()
    (sharded / "additional_chat_templates" / "tools.jinja").write_text("t", "utf-8")
    adapter = save_adapter(tmp_path / "adapter", model, "a")
    summary = export(sharded, adapter, tmp_path / "out")
    out = tmp_path / "out"
    index = json.loads((out / "model.safetensors.index.json").read_text("utf-8"))
    source = json.loads((sharded / "model.safetensors.index.json").read_text("utf-8"))
    assert index["weight_map"] == source["weight_map"]
    assert index["metadata"]["total_size"] == source["metadata"]["total_size"] == summary.bytes
    assert summary.files == len(set(source["weight_map"].values())) > 3
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert names == {
        *source["weight_map"].values(), "model.safetensors.index.json", "config.json",
        "generation_config.json", "tokenizer.json", "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
    }  # fmt: skip
    assert (out / "config.json").read_text("utf-8") == (sharded / "config.json").read_text("utf-8")
    export(model, adapter, tmp_path / "whole")
    assert torch.equal(library_logits(out), library_logits(tmp_path / "whole"))


def test_without_adapter_nothing_changes(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "mixtral", 96)
    assert export(model, None, tmp_path / "out").merged == 0
    base, out = (load_file(f / "model.safetensors") for f in (model, tmp_path / "out"))
    assert all(torch.equal(base[name], out[name]) for name in base)


def test_fp8_becomes_bf16(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "deepseek_v2", 96)
    adapter = save_adapter(tmp_path / "adapter", model, "a")
    tensors = load_file(model / "model.safetensors")
    names = [name for name, w in tensors.items() if w.ndim == 2 and "_proj" in name]
    for name in names:
        tensors[name] = random_fp8(*tensors[name].shape)
        n, k = (-(-size // 128) for size in tensors[name].shape)
        tensors[f"{name}_scale_inv"] = torch.rand(n, k) / 16
    save_file(tensors, model / "model.safetensors")
    config = json.loads((model / "config.json").read_text("utf-8"))
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (model / "config.json").write_text(json.dumps(config), "utf-8")

    export(model, adapter, tmp_path / "f32", "float32")
    export(model, adapter, tmp_path / "out")
    assert "quantization_config" not in json.loads(
        (tmp_path / "out/config.json").read_text("utf-8")
    )
    checkpoint, merged = Checkpoint(model), load_file(tmp_path / "out/model.safetensors")
    weights = {name: checkpoint.read(name).float() for name in checkpoint.names()}
    merge(weights, adapter)
    assert set(merged) == set(weights)
    for name, weight in weights.items():
        assert merged[name].dtype == torch.bfloat16
        assert torch.allclose(merged[name].float(), weight, rtol=2**-8, atol=1e-5), name
    reference, _ = ktrt_logits(model, adapter)
    assert error(library_logits(tmp_path / "f32"), reference) <= 0.01


def test_mxfp4_becomes_bf16(tmp_path: Path) -> None:
    model: Any = random_model(
        Family("gpt_oss", "gpt_oss", "GptOssForCausalLM"),
        changes={"hidden_size": 128, "intermediate_size": 64, "vocab_size": 384},
    )
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, size_in, size_out = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = random_bytes(experts, size_out, size_in // 32, 16)
        tensors[f"{name}_scales"] = random_bytes(
            experts, size_out, size_in // 32, low=119, high=122
        )
    save_file(tensors, file)
    config = json.loads((tmp_path / "model/config.json").read_text("utf-8"))
    config |= {"quantization_config": {"quant_method": "mxfp4"}, "dtype": "bfloat16"}
    (tmp_path / "model/config.json").write_text(json.dumps(config), "utf-8")
    loras = {
        path: random_lora(module, RANK, True, torch.Generator().manual_seed(2))
        for path, module in experts_of(model).items()
    }
    adapter = write_stacked(tmp_path / "b", experts_of(model), loras)
    export(tmp_path / "model", adapter, tmp_path / "f32", "float32")
    export(tmp_path / "model", adapter, tmp_path / "out")
    merged, base = load_file(tmp_path / "out/model.safetensors"), Checkpoint(tmp_path / "model")
    for path, lora in loras.items():
        a, b = lora["down"]
        delta = (b @ a).transpose(1, 2)
        expected = base.read(f"{path}.down_proj") + delta
        assert torch.allclose(merged[f"{path}.down_proj"].float(), expected, rtol=2**-8, atol=1e-5)
        gate_up = torch.stack([lora[p][1] @ lora[p][0] for p in ("gate", "up")], 2).flatten(1, 2)
        expected = base.read(f"{path}.gate_up_proj") + gate_up.transpose(1, 2)
        assert torch.allclose(
            merged[f"{path}.gate_up_proj"].float(), expected, rtol=2**-8, atol=1e-5
        )
    assert {w.dtype for w in merged.values()} == {torch.bfloat16}
    reference, _ = ktrt_logits(tmp_path / "model", adapter)
    assert error(library_logits(tmp_path / "f32"), reference) <= 0.02


def test_an_unused_tensor_stops_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path / "model", "deepseek_v2", 96)
    adapter = save_adapter(tmp_path / "adapter", model, "a")
    touches = Changes.touches
    for lost in ("model.layers.1.self_attn.q_proj.weight", "model.layers.2.mlp.experts.down_proj"):
        monkeypatch.setattr(
            Changes, "touches", lambda self, name, lost=lost: name != lost and touches(self, name)
        )
        with pytest.raises(AdapterError, match="was merged into 0 tensors"):
            export(model, adapter, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model"]


def test_a_tensor_merged_twice_stops_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path / "model", "mixtral", 96)
    adapter = save_adapter(tmp_path / "adapter", model, "a")
    delta = Changes.expert_delta

    def twice(self: Changes, *args: Any) -> Any:
        delta(self, *args)
        return delta(self, *args)

    monkeypatch.setattr(Changes, "expert_delta", twice)
    with pytest.raises(AdapterError, match=r"gate of expert 0 was merged into 2|down of expert 0"):
        export(model, adapter, tmp_path / "out")


def test_float16_must_hold_the_values(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "mixtral", 96)
    export(model, None, tmp_path / "fine", "float16")
    assert {w.dtype for w in load_file(tmp_path / "fine/model.safetensors").values()} == {
        torch.float16
    }
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = 70000
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model.norm.weight has values up to 70144, which"):
        export(model, None, tmp_path / "out", "float16")
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "mixtral", 96)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x", "utf-8")
    (tmp_path / "file").write_text("x", "utf-8")
    with pytest.raises(ConfigError, match="a folder that is not empty"):
        export(model, None, tmp_path / "full")
    with pytest.raises(ConfigError, match="exists and is no folder"):
        export(model, None, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    export(model, None, tmp_path / "link")
    assert (tmp_path / "empty" / "config.json").is_file()


def test_a_full_disk_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path / "model", "mixtral", 96)
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr("ktrt.utils.staging.shutil.disk_usage", lambda _path: usage)
    with pytest.raises(ConfigError, match="GB are free there, the export needs"):
        export(model, None, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path / "model", "mixtral", 96)

    def interrupted(path: Path, tensors: Any, advance: Any) -> None:
        write_shard(path, tensors, advance)
        raise KeyboardInterrupt

    monkeypatch.setattr("ktrt.export.checkpoint.write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(model, None, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


SLOW_EXPORT = """
import sys, time
import ktrt.export.checkpoint as checkpoint
from ktrt.export.__main__ import main
write = checkpoint.write_shard
def slow(path, tensors, advance):
    write(path, tensors, advance)
    print("written", flush=True)
    time.sleep(60)
checkpoint.write_shard = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_process_leaves_no_folder(tmp_path: Path, how: signal.Signals) -> None:
    out = str(tmp_path / "out")
    with KTRT.start(SLOW_EXPORT, str(DEMO / "chat.yaml"), "--out", out) as process:
        assert process.stdout.readline() == "written\n"
        process.send_signal(how)
        code = process.wait(30)
    assert code == (130 if how == signal.SIGINT else -signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    if how == signal.SIGINT:
        assert not list(tmp_path.iterdir())


def test_an_ignored_ctrl_c_stays_ignored(tmp_path: Path) -> None:
    """`export … &` in a script: a shell starts it so that Ctrl-C stops the script alone."""
    code = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{SLOW_EXPORT}"
    out = str(tmp_path / "out")
    with KTRT.start(code, str(DEMO / "chat.yaml"), "--out", out) as process:
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)


PEAK = """
import sys
from pathlib import Path
from ktrt.export.__main__ import main
import ktrt.export.tensors, peft, transformers

def peak():
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

before = peak()
assert main(sys.argv[1:]) == 0
print((peak() - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.long
def test_memory_is_bounded(tmp_path: Path) -> None:
    """Exports a file of 400 MB whose largest tensor has 2 MB: memory is bounded by the bytes read
    between two releases of pages."""
    model = save_model(
        tmp_path / "model", "mixtral", 1024,
        hidden_size=1024, num_hidden_layers=8, num_local_experts=8, head_dim=64,
    )  # fmt: skip
    size = (model / "model.safetensors").stat().st_size / 2**20
    assert size > 380
    adapter = save_adapter(tmp_path / "adapter", model, "a", LoraPlan(rank=2))
    config = tmp_path / "chat.yaml"
    config.write_text(f"model_name_or_path: {model}\nadapter_name_or_path: {adapter}\n", "utf-8")
    command = [sys.executable, "-c", PEAK, str(config), "-q", "--json", "--out"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "out")], capture_output=True, text=True, env=environ, check=True
    )
    assert float(done.stdout.splitlines()[-1]) < 0.6 * size


def test_the_demo_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    out = tmp_path / "out"
    start = time.time()
    config = str(DEMO / "chat.yaml")
    assert main([config, "--out", str(out), "--json", "-q", "--dtype", "float32"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary.pop("seconds") < time.time() - start
    size = sum(tensor.nbytes for tensor in load_file(out / "model.safetensors").values())
    assert summary == {
        "out": str(out), "format": "hf", "dtype": "F32", "files": 1, "tensors": 249, "merged": 227,
        "quantized": 0, "adapter_tensors": 86, "bytes": size,
    }  # fmt: skip
    assert json.loads((out / "config.json").read_text("utf-8"))["dtype"] == "float32"
    reference, _ = ktrt_logits(DEMO / "model", DEMO / "adapter_b")
    assert error(library_logits(out), reference) <= 0.01
    assert main([config, "--out", str(out), "-q"]) == 2
    assert "a folder that is not empty" in capsys.readouterr().err
    override = f"adapter_name_or_path={DEMO / 'adapter_a'},{DEMO / 'adapter_b'}"
    assert main([config, override, "--out", str(tmp_path / "two"), "-q"]) == 2
    assert "one adapter" in capsys.readouterr().err
