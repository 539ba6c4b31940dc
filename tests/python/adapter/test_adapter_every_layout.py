"""The same adapter in every layout: the same engine inputs, the same logits as the merge."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from generate.test_logits import (
    Case,
    check_against_reference,
    errors,
    make_case,
    median,
    run,
    save_peft_adapter,
)
from helpers.adapter_layouts import (
    WRITERS,
    Adapter,
    random_adapter,
    read_b,
    write_a,
    write_c_bare,
)
from helpers.tiny_models import base_of, read_folder, save_model, token_ids, write_adapter

from ktrt.adapter import AdapterPlan, BaseModel, plan_adapter
from ktrt.adapter.internal import engine_arguments, engine_numel, is_shared

if TYPE_CHECKING:
    from collections.abc import Iterator

DEMO = Path(__file__).parents[3] / "examples" / "demo"
MODELS = ("deepseek_v2", "qwen3_moe", "mixtral", "demo")
# The model that loads and runs each layout too: equal inputs of engine and torch give equal logits.
WITH_LOGITS = "deepseek_v2"
# Layouts that can express sharing among experts.
SHARING = ("c", "c bare", "stacked", "gate_up", "mixed")


@pytest.fixture(scope="module", autouse=True)
def _one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Models:
    """Models, bases and cases, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._bases: dict[str, BaseModel] = {}
        self._adapters: dict[tuple[str, bool], tuple[Adapter, Path]] = {}
        self._cases: dict[tuple[str, bool], tuple[Case, torch.Tensor]] = {}
        self._plans: dict[tuple[str, bool], AdapterPlan] = {}

    def path(self, name: str) -> Path:
        if name == "demo":
            return DEMO / "model"
        folder = self.folder / name
        return folder if folder.exists() else save_model(folder, name, 96)

    def base(self, name: str) -> BaseModel:
        if name not in self._bases:
            self._bases[name] = base_of(self.path(name))
        return self._bases[name]

    def adapter(self, name: str, *, shared: bool) -> tuple[Adapter, Path]:
        """Returns an adapter and its layout a."""
        if (name, shared) not in self._adapters:
            adapter = random_adapter(self.path(name), sharing="outer" if shared else "nothing")
            folder = write_a(self.folder / f"{name}-{shared}", adapter)
            self._adapters[name, shared] = adapter, folder
        return self._adapters[name, shared]

    def case(self, name: str, *, shared: bool) -> tuple[Case, torch.Tensor]:
        """Returns the adapter's layout a with the merge's logits, and ktrt's logits."""
        if (name, shared) not in self._cases:
            _, folder = self.adapter(name, shared=shared)
            case = make_case(self.folder / "merged", self.path(name), folder, token_ids(2, 60))
            self._cases[name, shared] = case, run(case, "AMXBF16", "auto")
        return self._cases[name, shared]

    def plan_of_a(self, name: str, *, shared: bool) -> AdapterPlan:
        if (name, shared) not in self._plans:
            _, folder = self.adapter(name, shared=shared)
            self._plans[name, shared] = plan(folder, self.base(name))
        return self._plans[name, shared]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("every_layout"))


def plan(folder: Path, base: BaseModel, **yaml: Any) -> AdapterPlan:
    return plan_adapter(folder, base, **({"lora_rank": None, "lora_alpha": None} | yaml))


def assert_same(found: AdapterPlan, expected: AdapterPlan) -> None:
    """Asserts that the inputs of engine and torch are bit-equal."""
    assert set(found.experts) == set(expected.experts)
    for path in expected.experts:
        ours, theirs = found.engine_arguments(path), expected.engine_arguments(path)
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            other = ours[name]
            if value is None or other is None:
                assert other is value, name
            else:
                assert other.dtype == value.dtype
                assert torch.equal(other, value), (path, name)
    assert found.side.scales == expected.side.scales
    assert torch_values(found).keys() == torch_values(expected).keys()
    for place, matrix in torch_values(expected).items():
        assert torch.equal(torch_values(found)[place].float(), matrix.float()), place
    assert found.extra.keys() == expected.extra.keys()


def torch_values(found: AdapterPlan) -> dict[tuple[str, str], torch.Tensor]:
    return {(name, tensor.part): tensor.value for name, tensor in found.side.tensors()}


@pytest.mark.parametrize("shared", [False, True], ids=["by expert", "shared outer"])
@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("name", MODELS)
def test_same_engine_inputs_and_logits(
    models: Models, tmp_path: Path, name: str, layout: str, shared: bool
) -> None:
    adapter, _ = models.adapter(name, shared=shared)
    folder = WRITERS[layout](tmp_path, adapter)
    found, plain = plan(folder, models.base(name)), models.plan_of_a(name, shared=shared)
    assert_same(found, plain)
    assert found.audit.found == len(found.files.tensors)
    for path, lora in found.experts.items():
        stored_once = shared and layout in SHARING
        assert is_shared(lora["gate"].a) == is_shared(lora["down"].b) == stored_once
        scaled = engine_arguments(lora)["down_b"]
        assert scaled is not None
        assert is_shared(scaled) == stored_once
        assert engine_numel(lora) == engine_numel(plain.experts[path])
    if name == WITH_LOGITS:
        case, expected = models.case(name, shared=shared)
        assert torch.equal(run(replace(case, adapter=folder), "AMXBF16", "auto"), expected)


@pytest.mark.parametrize("shared", [
    # Experts' own LoRA is test_logits.py's, on every instruction set.
    pytest.param(False, id="by expert", marks=pytest.mark.long),
    pytest.param(True, id="shared outer", marks=pytest.mark.end_to_end),
])  # fmt: skip
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_merge(models: Models, name: str, shared: bool) -> None:
    case, _ = models.case(name, shared=shared)
    check_against_reference(case)
    base = run(replace(case, adapter=None), "AMXBF16", "auto")
    assert median(errors(base, case.reference)) >= 0.3, "the adapter must matter"


def test_one_matrix_for_all_on_both_sides(models: Models, tmp_path: Path) -> None:
    """Megatron-Bridge writes this for wholly shared adapters."""
    adapter = random_adapter(models.path("qwen3_moe"), sharing="all")
    base = models.base("qwen3_moe")
    expected = plan(write_a(tmp_path / "a", adapter), base)
    for layout in SHARING:
        found = plan(WRITERS[layout](tmp_path / layout, adapter), base)
        assert_same(found, expected)
        pairs = [pair for lora in found.experts.values() for pair in lora.values()]
        assert all(is_shared(each) for pair in pairs for each in (pair.a, pair.b))


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_pefts_adapter_in_every_other_layout(models: Models, tmp_path: Path, name: str) -> None:
    """PEFT's own layout b gives the same plan as the other layouts of the same numbers. Our writer
    of layout b, the reference for the others, equals PEFT."""
    model, base = models.path(name), models.base(name)
    targets = {
        "target_modules": ["q_proj", "o_proj"],
        "target_parameters": [
            "experts.gate_up_proj",
            "experts.down_proj",
            "mlp.gate_proj.weight",
            "mlp.up_proj.weight",
            "mlp.down_proj.weight",
        ],
    }
    expected = plan(save_peft_adapter(tmp_path / "peft", model, targets), base)
    tensors, config = read_folder(tmp_path / "peft")
    adapter = read_b(tensors, config, like=random_adapter(model))
    # Layout c of the real writer is bfloat16.
    for layout in WRITERS.keys() - {"c"}:
        folder = WRITERS[layout](tmp_path / layout, adapter)
        assert_same(plan(folder, base), expected)
    written, _ = read_folder(tmp_path / "b")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v2", "mixtral"])
def test_pefts_conversion_of_layout_a(models: Models, tmp_path: Path, name: str) -> None:
    """Stock PEFT on transformers 5 converts LoRA on single experts to LoRA on parameters: A of gate
    and up concatenated, B block-diagonal, rank and alpha doubled. ΔW stays, the matrices do not. It
    loses LoRA on dense and shared MLPs, so there is none here."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, base = models.path(name), models.base(name)
    adapter = random_adapter(model)
    adapter.others = {module: pair for module, pair in adapter.others.items() if "attn" in module}
    write_a(tmp_path / "a", adapter)
    # PEFT refuses dropout on parameters.
    config = json.dumps(adapter.config(lora_dropout=0.0))
    (tmp_path / "a" / "adapter_config.json").write_text(config, "utf-8")
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    PeftModel.from_pretrained(plain, tmp_path / "a").save_pretrained(tmp_path / "b")
    tensors, converted = read_folder(tmp_path / "b")
    assert any(key.endswith("experts.base_layer.lora_A.weight") for key in tensors)
    assert set(converted["rank_pattern"].values()) == {2 * adapter.rank}
    found = plan(tmp_path / "b", base)
    for layer, loras in adapter.experts.items():
        others = found.experts[f"model.layers.{layer}.mlp.experts"]
        for projection, (a, b) in loras.items():
            ours = others[projection].scaled_b() @ others[projection].a
            assert torch.allclose(ours, b @ a * adapter.alpha / adapter.rank, rtol=0, atol=1e-5)
    case = make_case(tmp_path / "merged", model, tmp_path / "a", token_ids(2, 60))
    here = replace(case, adapter=tmp_path / "b")
    assert median(errors(run(here, "AMXBF16", "float32"), case.reference)) <= 0.01


def test_rslora_and_patterns_in_layouts_that_name_experts(models: Models, tmp_path: Path) -> None:
    """Rank and alpha of single experts, and rsLoRA: equal through the names of a, a', d and f."""
    model, base = models.path("deepseek_v2"), models.base("deepseek_v2")
    adapter = random_adapter(model, use_rslora=True)
    pattern = {
        "rank_pattern": {r"experts\.[0-4]\.up_proj": 3},
        "alpha_pattern": {r"experts\.7\.down_proj": 40, "kv_b_proj": 3},
    }
    plans = {}
    for layout in ("a", "a'", "d", "f"):
        folder = WRITERS[layout](tmp_path / layout, adapter)
        tensors, config = read_folder(folder)
        for key, value in tensors.items():
            if re.search(r"experts\.[0-4]\.up_proj", key.replace(".orig_module", "")):
                shorter = value[:3] if "lora_A" in key else value[:, :3]
                tensors[key] = shorter.contiguous()
        plans[layout] = plan(write_adapter(folder, tensors, config | pattern), base)
        assert_same(plans[layout], plans["a"])
    lora, _ = plans["a"].experts.values()
    assert not lora["up"].b[:5, :, 3].any()
    assert lora["up"].b[5:, :, 3].any()
    assert lora["up"].scaling.tolist() == pytest.approx([8 / 3**0.5] * 5 + [8 / 2] * 11)
    assert lora["down"].scaling.tolist() == pytest.approx([4.0] * 7 + [40 / 2] + [4.0] * 8)


def test_fused_lora_is_scaled_by_alpha_over_r(models: Models, tmp_path: Path) -> None:
    """KTransformers trains the experts at alpha / r while PEFT trains the rest with rsLoRA."""
    model, base = models.path("qwen3_moe"), models.base("qwen3_moe")
    folder = write_c_bare(tmp_path, random_adapter(model))
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    config["use_rslora"] = True
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    found = plan(folder, base)
    assert {float(lora["up"].scaling[0]) for lora in found.experts.values()} == {8 / 4}
    assert {scale.scaling for scale in found.side.scales.values()} == {8 / 2}
