"""Loading: what the log says, what is refused before a weight is read, what the model is."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import (
    NUM_EXPERTS,
    read_folder,
    save_adapter,
    save_model,
    token_ids,
    weight_shapes,
    write_adapter,
)
from safetensors.torch import load_file, save_file

import ktrt.loading.model
from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.engine.build import build_engine
from ktrt.errors import AdapterError, CheckpointError
from ktrt.experts import KTExperts
from ktrt.loading.model import LoadedModel, load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder / "base", "deepseek_v2", 96)
    save_adapter(folder / "a", folder / "base", "a")
    save_adapter(folder / "b", folder / "base", "b")
    return folder


@pytest.fixture
def base(folder: Path, tmp_path: Path) -> Path:
    """A copy of the base to damage."""
    return Path(shutil.copytree(folder / "base", tmp_path / "base"))


def load(base: Path, adapter: Path | None = None, **model: Any) -> LoadedModel:
    return load_model(ModelArgs(base, **model), AdapterArgs(adapter), ExpertArgs(kt_num_threads=1))


def edit_config(base: Path, **changes: Any) -> None:
    file = base / "config.json"
    config = json.loads(file.read_text("utf-8")) | changes
    file.write_text(json.dumps(config), encoding="utf-8")


def edit_weights(base: Path, **changes: torch.Tensor | None) -> None:
    file = base / "model.safetensors"
    tensors: dict[str, torch.Tensor | None] = {**load_file(file), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, file)


def test_model_is_ready_to_run(folder: Path) -> None:
    loaded = load(folder / "base", folder / "a")
    experts = [m for m in loaded.model.modules() if isinstance(m, KTExperts)]
    assert len(experts) == 2
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    # Routed experts are not torch's; routers and shared experts are.
    names = [name for name, _ in loaded.model.named_parameters()]
    assert not [name for name in names if ".mlp.experts." in name]
    assert [name for name in names if "shared_experts" in name]
    output = loaded.model.generate(  # type: ignore[operator]
        token_ids(1, 5), max_new_tokens=3, do_sample=False, eos_token_id=None
    )
    assert output.shape == (1, 8)
    loaded.close()
    loaded.close()
    with pytest.raises(RuntimeError):
        loaded.model(token_ids(1, 2))


@pytest.mark.parametrize(
    ("infer_dtype", "dtype"),
    [
        ("auto", torch.bfloat16),
        ("float16", torch.float16),
        ("bfloat16", torch.bfloat16),
        ("float32", torch.float32),
    ],
)
def test_infer_dtype_is_that_of_everything_but_the_experts(
    folder: Path, infer_dtype: str, dtype: torch.dtype
) -> None:
    loaded = load(folder / "base", infer_dtype=infer_dtype)
    # But for what transformers keeps in float32 (from 5.24 on the routers).
    kept: Any = getattr(loaded.model, "_keep_in_fp32_modules_strict", None) or ()
    found = {n: p.dtype for n, p in loaded.model.named_parameters()}
    assert {t for n, t in found.items() if not any(part in n for part in kept)} == {dtype}
    assert set(found.values()) <= {dtype, torch.float32}
    assert not any(p.requires_grad for p in loaded.model.parameters())
    with torch.no_grad():
        assert loaded.model(token_ids(1, 4)).logits.isfinite().all()
    loaded.close()


def test_log_lines_that_users_look_for(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        load(folder / "base", folder / "b").close()
    adapter = re.escape(str(folder / "b"))
    for pattern in (
        "Loading model with KTransformers MoE backend",
        r"Packed 32 experts of 2 layers: \d+\.\d\d GB in \d+\.\d s \(\d+\.\d\d GB/s\)",
        r"KT mode: Loading .* LoRA.*Original targets: \[.*'q_proj'.*\], Filtered: \[.*'q_proj'.*\]",
        rf"Loading MoE LoRA from {adapter}/adapter_model\.safetensors",
        rf"Loaded MoE LoRA into 2 KT wrappers from {adapter}",
        rf"Loaded adapter\(s\): {adapter}",
        r"trainable params: 0 \|\| all params: [\d,]+ \|\| trainable%: 0\.0000",
    ):
        assert any(re.fullmatch(pattern, m) for m in caplog.messages), pattern
    table = next(m for m in caplog.messages if m.startswith("Adapter audit"))
    assert re.search(r"tensors found (\d+) = .* not applied 0$", table)


def test_all_params_counts_experts_and_adapter(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        load(folder / "base", folder / "a").close()
    shapes = list(weight_shapes(folder / "base").values())
    shapes += [tuple(t.shape) for t in read_folder(folder / "a")[0].values()]
    total = sum(torch.Size(shape).numel() for shape in shapes)
    assert any(f"all params: {total:,} ||" in message for message in caplog.messages)


def debug_block(caplog: pytest.LogCaptureFixture) -> list[str]:
    (block,) = (r.getMessage() for r in caplog.records if r.name == "ktrt.debug")
    return block.splitlines()


def test_debug_block_is_true(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        load(folder / "base", folder / "a").close()
    lines = debug_block(caplog)
    assert lines[1] == "DEBUG: Model structure after loading"
    assert "KT wrappers count: 2" in lines
    assert "KT MoE LoRA layers: [1, 2]" in lines
    tensors, _ = read_folder(folder / "a")
    outside = {
        key.replace(".weight", ".default.weight"): value.shape
        for key, value in tensors.items()
        if ".mlp.experts." not in key
    }
    assert f"LoRA parameters count: {len(outside)}" in lines
    for key, shape in outside.items():
        assert f"  {key}: {shape}" in lines
    config = next(line for line in lines if line.startswith("PEFT config: "))
    targets = re.search(r"target_modules=\{(.*?)\}", config)
    assert targets is not None
    assert "'q_proj'" in targets[1]
    assert "'shared_experts.gate_proj'" in targets[1]
    assert "'gate_proj'" not in targets[1]
    with caplog.at_level(logging.INFO):
        caplog.clear()
        load(folder / "base", folder / "a").close()
    short, start = debug_block(caplog), lines.index("LoRA parameters:") + 1
    more = f"  … {len(outside) - 2} more; -v shows all"
    # The order in a set of target modules differs from load to load.
    assert short[:-2] == [*lines[: start + 2], more, ""]
    assert short[-2].startswith("PEFT config: {'default'")


def test_debug_block_of_a_base_model(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        loaded = load(folder / "base")
    lines = debug_block(caplog)
    assert "KT MoE LoRA layers: []" in lines
    assert "LoRA parameters count: 0" in lines
    assert "PEFT config: {}" in lines
    assert loaded.audit.found == 0
    loaded.close()


def test_library_is_silent_and_left_as_it_was(
    folder: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import DeepseekV2ForCausalLM
    from transformers.utils import logging as library

    before = DeepseekV2ForCausalLM._keys_to_ignore_on_load_unexpected
    verbosity = library.get_verbosity()
    load(folder / "base", folder / "a").close()
    assert not caplog.messages
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert DeepseekV2ForCausalLM._keys_to_ignore_on_load_unexpected == before
    assert library.get_verbosity() == verbosity
    assert library.is_progress_bar_enabled()


def test_two_models_at_once_and_one_after_another(folder: Path) -> None:
    ids = token_ids(1, 20)
    with torch.no_grad():
        first = load(folder / "base", folder / "a")
        expected = first.model(ids).logits
        second = load(folder / "base")
        other = second.model(ids).logits
        assert not torch.equal(expected, other)
        assert torch.equal(first.model(ids).logits, expected)
        first.close()
        assert torch.equal(second.model(ids).logits, other)
        second.close()


def test_native_code_runs_although_remote_code_is_trusted(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = "raise ImportError('is_torch_fx_available')"
    (base / "modeling_deepseek.py").write_text(broken, encoding="utf-8")
    (base / "configuration_deepseek.py").write_text(broken, encoding="utf-8")
    auto_map = {
        "AutoConfig": "configuration_deepseek.DeepseekV2Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM",
    }
    edit_config(base, auto_map=auto_map)
    with caplog.at_level(logging.INFO):
        loaded = load(base, trust_remote_code=True)
    assert type(loaded.model).__module__.startswith("transformers.models.deepseek_v2")
    assert any("trust_remote_code is ignored" in message for message in caplog.messages)
    loaded.close()


def test_unknown_model_type_without_trust(base: Path) -> None:
    edit_config(base, model_type="something_new", architectures=["SomethingNewForCausalLM"])
    with pytest.raises(CheckpointError, match="something_new"):
        load(base)


def test_tied_embeddings(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "qwen3_moe", 96, tie_word_embeddings=True)
    assert "lm_head.weight" not in weight_shapes(base)
    loaded = load(base)
    assert loaded.model.get_parameter("lm_head.weight") is loaded.model.get_parameter(
        "model.embed_tokens.weight"
    )
    loaded.close()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model.norm.weight", None, "1 missing keys .*model.norm.weight"),
        ("model.layers.0.extra.weight", torch.zeros(3), "1 unexpected keys .*layers.0.extra"),
        (
            "model.layers.1.mlp.experts.2.gate_proj.bias",
            torch.zeros(96),
            "unexpected .*2.gate_proj",
        ),
        ("lm_head.weight", torch.zeros(8, 8), r"lm_head.* shape \[8, 8\], expected \[384, 160\]"),
        ("model.layers.2.mlp.experts.15.up_proj.weight", None, "expert 15"),
    ],
)
def test_incomplete_or_foreign_weights(
    base: Path, name: str, value: torch.Tensor | None, words: str
) -> None:
    edit_weights(base, **{name: value})
    with pytest.raises(CheckpointError, match=words):
        load(base)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_routed_experts": 8}, "belongs to expert 10, but config.json says 8 experts"),
        ({"moe_intermediate_size": 64}, r"shape \[96, 160\], expected \[64, 160\]"),
        ({"hidden_act": "mish"}, r"its activation \(Mish.* is none of the engine's"),
        ({"model_type": "llama"}, "no routed experts"),
        ({"num_attention_heads": "four"}, "cannot build the configuration.*num_attention_heads"),
    ],
)
def test_config_that_does_not_fit(base: Path, changes: dict[str, Any], words: str) -> None:
    edit_config(base, **changes)
    with pytest.raises(CheckpointError, match=words):
        load(base)


def test_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is an empty folder"):
        load(tmp_path)


def test_wrong_adapter_is_refused_before_weights_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_args: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(ktrt.loading.model, "load_without_experts", never)
    other = save_model(tmp_path / "other", "deepseek_v2", 112)
    adapter = save_adapter(tmp_path / "adapter", other, "a")
    with pytest.raises(AdapterError, match=r"shape \[8, 112\], expected \[rank, 96\]"):
        load(folder / "base", adapter)


def test_adapter_without_routed_experts(folder: Path, tmp_path: Path) -> None:
    tensors, config = read_folder(folder / "a")
    attention = {k: v for k, v in tensors.items() if "self_attn" in k}
    config["target_modules"] = [t for t in config["target_modules"] if "gate" not in t]
    config["target_modules"] = ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    loaded = load(folder / "base", write_adapter(tmp_path, attention, config))
    assert loaded.audit.applied_peft == len(attention)
    assert loaded.audit.applied_experts == 0
    loaded.close()


def test_engine_is_closed_when_loading_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build_engine(ExpertArgs(kt_num_threads=1))
    monkeypatch.setattr("ktrt.loading.plan.build_engine", lambda *_: engine)
    monkeypatch.setattr(ktrt.loading.model, "_apply_adapter", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load(folder / "base", folder / "a")
    assert engine.closed


def test_audit_rows_name_every_tensor(folder: Path) -> None:
    loaded = load(folder / "base", folder / "a")
    tensors, _ = read_folder(folder / "a")
    assert {row.tensor for row in loaded.audit.rows} == set(tensors)
    assert loaded.audit.applied_experts == 2 * NUM_EXPERTS * 3 * 2
    assert loaded.audit.not_applied == 0
    row = next(r for r in loaded.audit.rows if ".2.mlp.experts.7.up_proj.lora_B" in r.tensor)
    assert row.acts_on == "model.layers.2.mlp.experts.7.up_proj"
    assert (row.layer, row.part, row.rank, row.scaling) == (2, "lora_B", 8, 2.0)
    loaded.close()
