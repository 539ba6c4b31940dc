"""Any writer's names and packing give the same numbers, here and in ``--verify``."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

import pytest
import torch
from adapter.test_adapter_every_layout import assert_same, plan
from helpers.adapter_layouts import (
    Adapter,
    random_adapter,
    write_a,
    write_b,
    write_c,
    write_manifest,
)
from helpers.adapter_names import INDEX, PLAIN, RENAMES, WRITERS, change, write_shards
from helpers.tiny_models import base_of, read_folder, save_model, write_adapter
from safetensors.torch import save_file

from ktrt.audit.report import report
from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.errors import AdapterError
from ktrt.loading.plan import plan_memory

if TYPE_CHECKING:
    from pathlib import Path

    from ktrt.adapter import BaseModel

MODEL = "adapter_model.safetensors"


class Subject:
    """A tiny model, its base, and an adapter in layout a."""

    def __init__(self, folder: Path, family: str, sharing: str = "nothing") -> None:
        experts = {
            "deepseek_v2": {"n_routed_experts": 4},
            "qwen3_moe": {"num_experts": 4},
        }
        self.model = save_model(
            folder / "model", family, 24, hidden_size=56, head_dim=16, num_experts_per_tok=2,
            **experts[family],
        )  # fmt: skip
        self.base: BaseModel = base_of(self.model)
        self.adapter: Adapter = random_adapter(self.model, sharing=sharing)  # type: ignore[arg-type]
        self.expected = plan(write_a(folder / "a", self.adapter), self.base)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(tmp_path_factory.mktemp("names"), "deepseek_v2")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(tmp_path_factory.mktemp("shared"), "qwen3_moe", "outer")


@pytest.mark.parametrize("layout", ["a", "b"])
@pytest.mark.parametrize("rename", RENAMES)
def test_names_of_wrappers(subject: Subject, tmp_path: Path, rename: str, layout: str) -> None:
    writer = {"a": write_a, "b": write_b}[layout]
    folder = change(writer(tmp_path, subject.adapter), RENAMES[rename], **PLAIN)
    found = plan(folder, subject.base)
    assert_same(found, subject.expected)
    assert found.audit.found == len(read_folder(folder)[0])


@pytest.mark.parametrize("writer", WRITERS)
def test_other_writers(subject: Subject, shared: Subject, tmp_path: Path, writer: str) -> None:
    for each, name in ((subject, "own"), (shared, "shared")):
        found = plan(WRITERS[writer](tmp_path / name, each.adapter), each.base)
        assert_same(found, each.expected)


def test_tinkers_configuration_says_more_than_was_trained(
    shared: Subject, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It says all-linear although only attention or only the MLPs were trained. A file with a kind
    of module in only some layers still counts as cut short."""
    folder = WRITERS["tinker"](tmp_path, shared.adapter)
    tensors, config = read_folder(folder)
    mlps = {key: value for key, value in tensors.items() if ".attn." not in key}
    found = plan(write_adapter(folder, mlps, config), shared.base).experts
    assert found.keys() == shared.expected.experts.keys()
    assert "model.layers.0.self_attn.q_proj and 11 others" in caplog.text
    cut = {key: value for key, value in tensors.items() if "layers.1.attn.o_proj" not in key}
    with pytest.raises(AdapterError, match="no LoRA for model.layers.1.self_attn.o_proj"):
        plan(write_adapter(folder, cut, config), shared.base)


def test_patterns_are_for_the_names_of_training(subject: Subject, tmp_path: Path) -> None:
    """alpha_pattern has whole names: the file's, not the base's."""
    name = "model.language_model.layers.0.self_attn.o_proj"
    folder = change(
        write_a(tmp_path, subject.adapter), RENAMES["multimodal class"],
        alpha_pattern={f"^{name}": 40, r".*language_model.*experts\.3\.up_proj": 80},
    )  # fmt: skip
    found = plan(folder, subject.base)
    assert found.side.scales["model.layers.0.self_attn.o_proj"].scaling == 10
    assert found.side.scales["model.layers.1.self_attn.o_proj"].scaling == 2
    scaling = found.experts["model.layers.1.mlp.experts"]["up"].scaling
    assert scaling.tolist() == [2, 2, 2, 20]


def test_two_adapters_in_one_file(subject: Subject, tmp_path: Path) -> None:
    tensors, config = read_folder(write_a(tmp_path, subject.adapter))
    both = {
        key.replace(".weight", f".{name}.weight"): value.clone()
        for name in ("sft", "dpo") for key, value in tensors.items()
    }  # fmt: skip
    with pytest.raises(AdapterError, match=r"several adapters \(dpo, sft\)"):
        plan(write_adapter(tmp_path, both, config), subject.base)


def test_tensors_that_were_not_gathered(
    subject: Subject, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """DeepSpeed ZeRO-3 saves these. Nothing warns of zeros: there are no numbers."""
    tensors, config = read_folder(write_a(tmp_path, subject.adapter))
    empty = {key: torch.empty(0) for key in tensors}
    with pytest.raises(AdapterError, match=r"has shape \[0\].*ZeRO-3"):
        plan(write_adapter(tmp_path, empty, config), subject.base)
    assert not caplog.messages


def test_vision_towers_are_named_and_left_out(
    subject: Subject, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors, config = read_folder(write_a(tmp_path, subject.adapter))
    more = {
        "base_model.model.model.visual.patch_embed.proj.lora_A.weight": torch.ones(4, 3, 2, 14, 14),
        "base_model.model.model.visual.patch_embed.proj.lora_B.weight": torch.ones(8, 4, 1, 1, 1),
        "base_model.model.vision_tower.encoder.layers.0.q_proj.lora_A.weight": torch.ones(4, 8),
        "base_model.model.multi_modal_projector.linear.weight": torch.ones(4, 8),
    }
    found = plan(write_adapter(tmp_path, tensors | more, config), subject.base)
    assert_same(found, subject.expected)
    (message,) = caplog.messages
    assert f"no text reaches the targets of 4 of {len(tensors) + 4} tensors" in message
    assert {row.tensor for row in found.audit.rows if row.status == "no effect"} == set(more)
    assert found.audit.no_effect == 4
    with pytest.raises(AdapterError, match="no text reaches the targets of all 4 tensors"):
        plan(write_adapter(tmp_path, more, config), subject.base)


@pytest.mark.parametrize("layer", ["mtp.layers.0", "model.mtp.0", "model.mtp_layers.0.block"])
def test_layers_that_predict_further_tokens_are_left_out(
    subject: Subject, tmp_path: Path, caplog: pytest.LogCaptureFixture, layer: str
) -> None:
    tensors, config = read_folder(write_a(tmp_path, subject.adapter))
    more = {
        f"base_model.model.{layer}.{module}.lora_{half}.weight": torch.ones(4, 4)
        for module in ("self_attn.q_proj", "mlp.experts.0.up_proj", "mlp.experts")
        for half in "AB"
    }
    found = plan(write_adapter(tmp_path, tensors | more, config), subject.base)
    assert_same(found, subject.expected)
    assert f"no text reaches the targets of 6 of {len(tensors) + 6} tensors" in caplog.text
    assert {row.tensor for row in found.audit.rows if row.status == "no effect"} == set(more)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("model.layers.3.self_attn.q_proj", ["it has layers 0 to 2", "another base model"]),
        ("model.layers.0.self_attn.qkv_proj", ["a model class with fused projections"]),
        ("decoder.layers.0.self_attention.linear_qkv", ["Megatron's names"]),
        ("model.layers.0.linear_attn.in_proj_q", ["Tinker's raw names"]),
        ("model.layers.0.self_attn.query", ["layers.0.self_attn holds", "o_proj"]),
        ("network.block.0.query", ["Names of the base look like model.layers.0"]),
    ],
)
def test_why_a_name_is_not_known(
    subject: Subject, tmp_path: Path, module: str, words: list[str]
) -> None:
    tensors, config = read_folder(write_a(tmp_path, subject.adapter))
    key = f"base_model.model.{module}.lora_A.weight"
    folder = write_adapter(tmp_path, tensors | {key: torch.ones(4, 56)}, config)
    with pytest.raises(AdapterError) as error:
        plan(folder, subject.base)
    assert all(word in str(error.value) for word in [key, *words]), error.value
    assert ("another base" in str(error.value)) == ("another base model" in words)


def test_files_in_the_folder(
    subject: Subject, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Reads pickles of any name, a subfolder, a byte order mark; ignores stale files."""
    folder = write_a(tmp_path / "x", subject.adapter)
    tensors, config = read_folder(folder)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8-sig")
    assert_same(plan(folder, subject.base), subject.expected)
    (folder / "inner").mkdir()
    (folder / MODEL).rename(folder / "inner" / MODEL)
    assert_same(plan(folder, subject.base), subject.expected)
    assert "reads the ones in inner" in caplog.text
    torch.save(tensors, folder / "adapter_model.pt")
    assert_same(plan(folder, subject.base), subject.expected)
    torch.save({"x": torch.ones(1)}, folder / "adapter_model.bin")
    (folder / "inner" / MODEL).rename(folder / MODEL)
    caplog.clear()
    assert_same(plan(folder, subject.base), subject.expected)
    assert "is read, adapter_model.bin, adapter_model.pt ignored" in caplog.text


def test_shards_that_do_not_fit_together(subject: Subject, tmp_path: Path) -> None:
    folder = write_shards(tmp_path, subject.adapter)
    second = folder / "adapter_model-00002-of-00003.safetensors"
    held = second.read_bytes()
    second.unlink()
    with pytest.raises(AdapterError, match=r"00002-of-00003.safetensors is missing \(1 of 3"):
        plan(folder, subject.base)
    (folder / INDEX).rename(folder / "index")
    with pytest.raises(AdapterError, match=r"1 of 3 shards by the shards' names"):
        plan(folder, subject.base)
    (folder / "index").rename(folder / INDEX)
    second.write_bytes(held)
    save_file({"x": torch.ones(1)}, second)
    with pytest.raises(AdapterError, match="two adapters, or is incomplete"):
        plan(folder, subject.base)
    (folder / INDEX).write_text('{"weight_map": {"x": "../x"}}', encoding="utf-8")
    with pytest.raises(AdapterError, match=r"names '\.\./x'"):
        plan(folder, subject.base)


def test_another_format_than_in_training_is_said(
    shared: Subject, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A KTransformers manifest names the experts' format during training."""
    adapter = random_adapter(shared.model)
    folder = write_manifest(write_c(tmp_path, adapter), adapter, expert_weight_format="INT8")
    model, args = ModelArgs(shared.model), AdapterArgs(folder)
    plan_memory(model, args, ExpertArgs(kt_backend="AMXInt8", kt_num_threads=1))
    assert not caplog.messages
    plan_memory(model, args, ExpertArgs(kt_backend="AMXBF16", kt_num_threads=1))
    assert "was trained on experts in INT8, and they run in BF16 here" in caplog.text


def test_one_shard_of_an_fsdp_run_is_called_out(
    subject: Subject, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """If 7 of 8 rows of every lora_B are exactly zero, the chat warns and the audit shows it."""
    tensors, config = read_folder(write_a(tmp_path, subject.adapter))
    for key, value in tensors.items():
        if ".lora_B." in key:
            value[len(value) // 8 :] = 0
    with caplog.at_level(logging.WARNING):
        found = plan(write_adapter(tmp_path, tensors, config), subject.base)
    count = sum(".lora_B." in key for key in tensors)
    assert f"most rows of {count} of {count} lora_B tensors are exactly zero" in caplog.text
    assert sum(row.zero_rows > 0 for row in found.audit.rows) == count
    assert not any(row.zero_rows for row in subject.expected.audit.rows)
    lines = "\n".join(map(str, report(subject.model, found.audit, [])))
    assert "mostly zero: " in lines
    assert "one shard of several" in lines
