"""An adapter in another layout: the engine gets the same bits, and PEFT and kt_kernel read it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from adapter.test_adapter_torch_side import ATTENTION, ktrt_logits, save_trained
from helpers.family_adapters import RANK, write_stacked
from helpers.family_models import Family, random_model
from helpers.forks import KT_KERNEL
from helpers.merge import save_merged
from helpers.rounded_experts import experts_of, random_lora
from helpers.tiny_models import (
    LoraPlan,
    base_of,
    read_folder,
    save_adapter,
    save_model,
    token_ids,
    write_adapter,
)
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ktrt.adapter import AdapterPlan, BaseModel, plan_adapter
from ktrt.adapter.write.adapter import FUSED_NAME, MANIFEST_NAME, Written
from ktrt.adapter.write.adapter import write_adapter as convert
from ktrt.adapter.write.names import alpha_for, shortest_names
from ktrt.errors import AdapterError, KtrtError
from ktrt.export.__main__ import main

DEMO = Path(__file__).parents[3] / "examples" / "demo"
Layout = Literal["a", "b", "c", "f"]
READABLE: tuple[Layout, ...] = ("a", "b", "f")
FAMILIES = ("deepseek_v2", "qwen3_moe", "mixtral")
Models = dict[str, tuple[Path, BaseModel]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    found = {}
    for family in FAMILIES:
        folder = save_model(tmp_path_factory.mktemp(family), family, 96)
        found[family] = (folder, base_of(folder))
    return found


def plan(folder: Path, base: BaseModel) -> AdapterPlan:
    return plan_adapter(folder, base, lora_rank=None, lora_alpha=None)


def same_engine_arguments(found: AdapterPlan, expected: AdapterPlan, base: BaseModel) -> bool:
    for site in base.experts:
        one, other = found.engine_arguments(site.path), expected.engine_arguments(site.path)
        if set(one) != set(other):
            return False
        for name, value in one.items():
            wanted = other[name]
            if value is None or wanted is None:
                if value is not wanted:
                    return False
            elif not torch.equal(value, wanted):
                return False
    return True


def same_side(found: AdapterPlan, expected: AdapterPlan) -> bool:
    one, other = (
        {(module, t.part): t.value for module, t in p.side.tensors()} for p in (found, expected)
    )
    same = set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)
    return same and found.side.scales == expected.side.scales


def fused_equals(folder: Path, expected: AdapterPlan, base: BaseModel) -> bool:
    """Compares by layout c's own rule: alpha / r of adapter_config.json, nothing else."""
    tensors, config = load_file(folder / FUSED_NAME), read_folder(folder)[1]
    scaling = torch.tensor(config["lora_alpha"] / config["r"], dtype=torch.float32)
    for site in base.experts:
        for projection, lora in expected.experts.get(site.path, {}).items():
            key = f"layers.{site.layer}.experts.{projection}_lora"
            rank = lora.a.shape[1]
            a, b = tensors.pop(f"{key}_a").float(), tensors.pop(f"{key}_b").float() * scaling
            if not torch.equal(a[:, :rank], lora.a) or not torch.equal(
                b[..., :rank], lora.scaled_b()
            ):
                return False
            if a[:, rank:].any() or b[..., rank:].any():
                return False
    return not any(value.any() for value in tensors.values())


@pytest.mark.parametrize("rslora", [False, True], ids=["alpha/r", "rslora"])
@pytest.mark.parametrize("source", ["a", "b"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trips(
    models: Models, tmp_path: Path, family: str, source: Layout, rslora: bool
) -> None:
    folder, base = models[family]
    adapter = save_adapter(tmp_path / "x", folder, source, LoraPlan(alpha=12, use_rslora=rslora))  # type: ignore[arg-type]
    expected = plan(adapter, base)
    for layout in ("a", "b", "c", "f"):
        out = tmp_path / layout
        assert convert(plan(adapter, base), base, out, layout).exact
        if layout == "c":
            assert fused_equals(out, expected, base)
            continue
        found = plan(out, base)
        assert same_side(found, expected)
        # Stacked gate and up share one A: if theirs differ, it holds both and B has zeros.
        exact = (source, layout) != ("a", "b")
        assert same_engine_arguments(found, expected, base) == exact
        again = tmp_path / f"{layout}{source}"
        convert(found, base, again, source)
        assert same_engine_arguments(plan(again, base), found, base)
        if source == "b":
            tensors, config = read_folder(again)
            original, old = read_folder(adapter)
            assert set(tensors) == set(original)
            assert all(torch.equal(tensors[key], original[key]) for key in original)
            assert (config["r"], config["lora_alpha"]) == (old["r"], old["lora_alpha"])
            assert not config["rank_pattern"]
            assert not config["alpha_pattern"]


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_gate_and_up_give_the_same_logits(
    models: Models, tmp_path: Path, family: str
) -> None:
    folder, base = models[family]
    adapter = save_adapter(tmp_path / "a", folder, "a", LoraPlan(rank=6))
    convert(plan(adapter, base), base, tmp_path / "b", "b")
    lora, old = (
        plan(f, base).experts["model.layers.1.mlp.experts"] for f in (tmp_path / "b", adapter)
    )
    assert lora["up"].a.shape[1] == 12
    assert torch.equal(lora["up"].b[:, :, 6:], old["up"].b)
    assert not lora["up"].b[:, :, :6].any()
    assert torch.equal(ktrt_logits(folder, tmp_path / "b")[0], ktrt_logits(folder, adapter)[0])


@pytest.mark.parametrize("source", ["a", "b"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_peft_reads_layout_b(
    models: Models, tmp_path: Path, family: str, source: Layout
) -> None:
    """Plain PEFT on plain transformers 5 computes the formula from the written files; its
    conversion for transformers 5 finds nothing to convert."""
    folder, base = models[family]
    adapter = save_adapter(tmp_path / "x", folder, source, LoraPlan(rank=4))  # type: ignore[arg-type]
    convert(plan(adapter, base), base, tmp_path / "b", "b")
    merged = save_merged(tmp_path / "merged", folder, adapter)
    models_of = AutoModelForCausalLM.from_pretrained
    reference = models_of(merged, dtype=torch.float32)
    peft = PeftModel.from_pretrained(models_of(folder, dtype=torch.float32), tmp_path / "b")
    with torch.no_grad():
        expected = reference.eval()(token_ids(2, 40)).logits
        found = peft.eval()(token_ids(2, 40)).logits
    assert (found - expected).norm() / expected.norm() < 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ATTENTION, "use_rslora": True, "rank_pattern": {"k_proj": 2}},
        {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"1.self_attn.v_proj": 3}},
        {"target_modules": ATTENTION, "use_dora": True},
        {"target_modules": ATTENTION, "lora_bias": True},
        {"target_modules": ["q_proj"], "bias": "all"},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": "all-linear"},
    ],
    ids=str,
)
def test_lora_outside_the_experts_is_kept(tmp_path: Path, options: dict[str, Any]) -> None:
    model = save_model(tmp_path / "model", "qwen3_moe", 96, attention_bias=True)
    base = base_of(model)
    save_trained(tmp_path / "x", model, **options)
    expected = plan(tmp_path / "x", base)
    for layout in READABLE:
        convert(plan(tmp_path / "x", base), base, tmp_path / layout, layout)
        found = plan(tmp_path / layout, base)
        assert same_side(found, expected)
        assert same_engine_arguments(found, expected, base)
        assert found.settings.modules_to_save == expected.settings.modules_to_save


def test_forms_of_experts(tmp_path: Path) -> None:
    """Interleaved and transposed rows, fused on disk: layout b equals the source, a and f use
    separate names."""
    for folder, name in (("gpt_oss", "GptOssForCausalLM"), ("nemotron_h", "NemotronHForCausalLM")):
        model: Any = random_model(Family(folder, folder, name))
        model.save_pretrained(tmp_path / folder)
        generator = torch.Generator().manual_seed(2)
        experts = experts_of(model)
        loras = {p: random_lora(m, RANK, True, generator) for p, m in experts.items()}
        adapter = write_stacked(tmp_path / f"{folder}-x", experts, loras)
        base = base_of(tmp_path / folder)
        expected = plan(adapter, base)
        for layout in READABLE:
            out = tmp_path / f"{folder}-{layout}"
            convert(plan(adapter, base), base, out, layout)
            assert same_engine_arguments(plan(out, base), expected, base)
        original, again = (read_folder(f)[0] for f in (adapter, tmp_path / f"{folder}-b"))
        assert all(torch.equal(again[key], value) for key, value in original.items())


def mixed_adapter(folder: Path, model: Path, alphas: dict[str, float]) -> Path:
    """Writes layout a with experts 0 … 3 of rank 4, the others of rank 8."""
    adapter = save_adapter(folder, model, "a", LoraPlan(rank=8, alpha=8))
    tensors, config = read_folder(adapter)
    for key in tensors:
        if any(f".experts.{e}." in key for e in range(4)):
            narrow = tensors[key][:4] if ".lora_A." in key else tensors[key][:, :4]
            tensors[key] = narrow.contiguous()
    config["rank_pattern"] = {r"experts\.[0-3]\.(gate|up|down)_proj": 4}
    config["alpha_pattern"] = {r"experts\.[0-3]\.(gate|up|down)_proj": 4, **alphas}
    return write_adapter(folder, tensors, config)


@pytest.mark.parametrize(
    ("alphas", "exact"),
    [({}, True), ({r"experts\.7\.up_proj": 32}, True), ({r"experts\.7\.up_proj": 5}, False)],
    ids=["one scaling", "a power of two apart", "any scalings"],
)
def test_mixed_ranks_and_scalings(
    models: Models, tmp_path: Path, alphas: dict[str, float], exact: bool
) -> None:
    folder, base = models["deepseek_v2"]
    adapter = mixed_adapter(tmp_path / "x", folder, alphas)
    expected = plan(adapter, base)
    for layout in ("a", "f"):
        assert convert(plan(adapter, base), base, tmp_path / layout, layout).exact
        assert same_engine_arguments(plan(tmp_path / layout, base), expected, base)
    assert convert(plan(adapter, base), base, tmp_path / "c", "c").exact == exact
    assert fused_equals(tmp_path / "c", expected, base)
    written = convert(plan(adapter, base), base, tmp_path / "b", "b")
    assert written.exact == exact
    found = plan(tmp_path / "b", base)
    for path, loras in expected.experts.items():
        for start, projection in ((0, "gate"), (8, "up"), (0, "down")):
            lora, kept = loras[projection], slice(start, start + 8)  # type: ignore[index]
            new = found.experts[path][projection]  # type: ignore[index]
            assert torch.equal(new.scaled_b()[:, :, kept], lora.scaled_b())
            assert torch.equal(new.a[:, kept], lora.a)


def test_some_layers_and_projections_only(models: Models, tmp_path: Path) -> None:
    folder, base = models["deepseek_v2"]
    tensors, config = read_folder(save_adapter(tmp_path / "all", folder, "a"))
    kept = {
        key: value
        for key, value in tensors.items()
        if (".2.mlp.experts." in key and "down_proj" in key)
        or (".1.mlp.experts." in key and "gate_proj" not in key)
    }
    config["target_modules"] = (
        r".*(\.2\.mlp\.experts\.\d+\.down_proj|1\.mlp\.experts.*(up|down)_proj)"
    )
    adapter = write_adapter(tmp_path / "x", kept, config)
    expected = plan(adapter, base)
    for layout in READABLE:
        convert(plan(adapter, base), base, tmp_path / layout, layout)
        found = plan(tmp_path / layout, base)
        second = found.experts["model.layers.2.mlp.experts"]
        assert set(second) == {"down"}
        first = found.experts["model.layers.1.mlp.experts"]
        assert torch.equal(first["up"].b, expected.experts["model.layers.1.mlp.experts"]["up"].b)
        assert ("gate" in first) == (layout == "b")
        if layout == "b":
            assert not first["gate"].b.any()
    convert(plan(adapter, base), base, tmp_path / "c", "c")
    assert fused_equals(tmp_path / "c", expected, base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes_stay(models: Models, tmp_path: Path, dtype: torch.dtype) -> None:
    folder, base = models["mixtral"]
    tensors, config = read_folder(save_adapter(tmp_path / "x", folder, "a"))
    adapter = write_adapter(tmp_path / "x", {k: v.to(dtype) for k, v in tensors.items()}, config)
    for layout in ("a", "b", "c", "f"):
        convert(plan(adapter, base), base, tmp_path / layout, layout)
        side = {t.dtype for t in read_folder(tmp_path / layout)[0].values()}
        assert side == {dtype}
    fused = {t.dtype for t in load_file(tmp_path / "c" / FUSED_NAME).values()}
    assert fused == {torch.bfloat16 if dtype == torch.bfloat16 else torch.float32}


KT_LOADER = """
import json, sys
from types import SimpleNamespace as Some
import torch
from kt_kernel.sft.artifacts import load_kt_adapter_artifacts
from kt_kernel.sft.convert_kt_to_sglang_adapter import convert_kt_to_sglang_adapter
from safetensors import safe_open

folder, out, sizes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
lora = json.loads(open(folder + "/adapter_config.json").read())
experts, hidden, inter, rank = sizes["experts"], sizes["hidden"], sizes["inter"], lora["r"]
shapes = [(rank, hidden), (inter, rank)] * 2 + [(rank, inter), (hidden, rank)]
wrappers = []
for layer in sizes["layers"]:
    parameters = [torch.nn.Parameter(torch.zeros(experts, *s).bfloat16()) for s in shapes]
    wrappers.append(Some(
        layer_idx=layer, _fused_expert_lora_params=parameters, _lora_rank=rank,
        _lora_alpha=lora["lora_alpha"], lora_experts=None, _kt_expert_weight_format="bf16",
        _use_fused_expert_lora=True))
model = torch.nn.Module()
model._kt_wrappers = wrappers
model.config = Some(_name_or_path=lora.get("base_model_name_or_path"))
load_kt_adapter_artifacts(model, folder)
names = ["gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b"]
with safe_open(folder + "/fused_expert_lora.safetensors", framework="pt") as file:
    for wrapper in wrappers:
        for name, parameter in zip(names, wrapper._fused_expert_lora_params):
            stored = file.get_tensor(f"layers.{wrapper.layer_idx}.experts.{name}")
            assert torch.equal(parameter.data, stored) and stored.any(), name
convert_kt_to_sglang_adapter(folder, out, base_model_name_or_path="x")
"""


@pytest.mark.golden
@pytest.mark.skipif(
    importlib.util.find_spec("kt_kernel") is None,
    reason="kt_kernel is not installed (it has wheels for Python 3.11 and 3.12)",
)
@pytest.mark.parametrize("family", FAMILIES)
def test_kt_kernel_itself_reads_layout_c(models: Models, tmp_path: Path, family: str) -> None:
    """Its loader takes manifest, shapes and values; its converter makes the same layout f as
    ktrt."""
    folder, base = models[family]
    tensors, config = read_folder(save_adapter(tmp_path / "x", folder, "a"))
    config["base_model_name_or_path"] = "/models/base"
    narrow = {key: value.bfloat16() for key, value in tensors.items()}
    adapter = write_adapter(tmp_path / "x", narrow, config)
    expected = plan(adapter, base)
    convert(expected, base, tmp_path / "c", "c")
    site = base.experts[0]
    sizes = {
        "experts": site.num_experts, "hidden": site.hidden_size, "inter": site.intermediate_size,
        "layers": [each.layer for each in base.experts],
    }  # fmt: skip
    arguments = [str(tmp_path / "c"), str(tmp_path / "kt-f"), json.dumps(sizes)]
    done = KT_KERNEL.run(KT_LOADER, *arguments, errors_too=True)
    assert done.returncode == 0, done.stdout[-2000:]
    found = plan(tmp_path / "kt-f", base)
    assert same_engine_arguments(found, expected, base)
    convert(plan(adapter, base), base, tmp_path / "f", "f")
    ours, theirs = (read_folder(tmp_path / name)[0] for name in ("f", "kt-f"))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_ktrt_reads_layout_c(models: Models, tmp_path: Path) -> None:
    folder, base = models["deepseek_v2"]
    adapter = save_adapter(tmp_path / "x", folder, "a")
    expected = plan(adapter, base)
    convert(plan(adapter, base), base, tmp_path / "c", "c")
    try:
        found = plan(tmp_path / "c", base)
    except AdapterError as error:
        if "cannot be read yet" not in str(error):
            raise
        pytest.skip("layout c cannot be read yet")
    assert same_engine_arguments(found, expected, base)
    assert same_side(found, expected)


def refused(words: str, folder: Path, base: BaseModel, out: Path, layout: Layout) -> None:
    with pytest.raises(KtrtError, match=words):
        convert(plan(folder, base), base, out, layout)
    assert not out.exists()


def save_trained_attention(folder: Path, model: Path) -> Path:
    tensors, config = read_folder(save_adapter(folder, model, "a"))
    kept = {key: value for key, value in tensors.items() if "q_proj" in key}
    return write_adapter(folder, kept, config | {"target_modules": ["q_proj"]})


def test_adapters_that_a_layout_cannot_hold(models: Models, tmp_path: Path) -> None:
    folder, base = models["deepseek_v2"]
    wide = save_adapter(tmp_path / "wide", folder, "a", LoraPlan(rank=130))
    refused(r"gate_up_proj: the layout needs rank 260", wide, base, tmp_path / "b", "b")
    model: Any = random_model(Family("nemotron_h", "nemotron_h", "NemotronHForCausalLM"))
    model.save_pretrained(tmp_path / "plain")
    experts = experts_of(model)
    loras = {p: random_lora(m, RANK, True, torch.Generator()) for p, m in experts.items()}
    adapter = write_stacked(tmp_path / "x", experts, loras)
    plain = save_trained_attention(tmp_path / "attention", folder)
    refused("no LoRA on routed experts", plain, base, tmp_path / "c", "c")
    refused("experts without gate. Use layout b", adapter, base_of(tmp_path / "plain"),
            tmp_path / "c", "c")  # fmt: skip


def test_a_wrong_result_is_never_kept(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, base = models["deepseek_v2"]
    adapter = save_adapter(tmp_path / "x", folder, "a")
    monkeypatch.setattr("ktrt.adapter.write.experts.alpha_for", lambda s, r, _: 2 * s * r)
    refused("read back from the new layout", adapter, base, tmp_path / "f", "f")


def test_names_and_alphas() -> None:
    names = ["l.0.mlp.gate", "l.0.mlp.experts.1.gate", "l.0.attn.q", "l.1.attn.q"]
    assert shortest_names(names[2:], names[:2]) == ["q"]
    assert shortest_names(names[2:3], names[3:]) == ["0.attn.q"]
    assert shortest_names(names[:1], names[1:]) == ["mlp.gate"]
    assert alpha_for(2.0, 8, False) == 16
    assert alpha_for(float(torch.tensor(16 / 8**0.5)), 8, True) == 16
    assert alpha_for(float(torch.tensor(2.5 / 3)), 3, False) == 2.5
    with pytest.raises(AdapterError, match="no lora_alpha"):
        alpha_for(-1.0, 8, False)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = str(DEMO / "chat.yaml"), tmp_path / "c"
    assert main([config, "--adapter-layout", "c", "--out", str(out), "--json", "-q"]) == 0
    summary = Written(**json.loads(capsys.readouterr().out))
    assert (summary.layout, summary.tensors, summary.source_tensors) == ("c", 94, 86)
    manifest = json.loads((out / MANIFEST_NAME).read_text("utf-8"))
    assert manifest["artifacts"][FUSED_NAME]["tensor_count"] == 24
    assert main([config, "--adapter-layout", "c", "--out", str(out)]) == 2
    assert "not empty" in capsys.readouterr().err
    no_adapter = [config, "adapter_name_or_path=", "--adapter-layout", "a", "--out", str(out)]
    assert main(no_adapter) == 2
    assert "names no adapter" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([config, "--adapter-layout", "a", "--format", "hf", "--out", str(out)])
