"""ktrt's logits against transformers in float32 on weights merged by the formula.

The merge (helpers/merge.py) shares no code with ktrt. Measured per position: ‖Δ‖/‖reference‖ over
the vocabulary, 320 positions.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from helpers.merge import save_merged
from helpers.tiny_models import (
    NUM_EXPERTS,
    Layout,
    LoraPlan,
    read_folder,
    save_adapter,
    save_model,
    token_ids,
    weight_shapes,
    write_adapter,
)

from ktrt import _core
from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.experts import KTExperts
from ktrt.loading.model import LoadedModel, load_model

if TYPE_CHECKING:
    from collections.abc import Iterator

# On every instruction set. The rest of this file is about files and torch, not kernels.
on_every_isa = pytest.mark.end_to_end

Backend = Literal["AMXBF16", "AMXInt8", "AMXInt4"]
Dtype = Literal["auto", "float32"]

FAMILIES = ("deepseek_v2", "qwen3_moe", "mixtral")
SIZES = (96, 176)
# Layout b shares A of gate and up, the larger size has tails: neither depends on the other.
SIZES_AND_LAYOUTS = [
    (96, None), (96, "b"), (176, "a"),
    *(pytest.param(*case, marks=pytest.mark.long) for case in ((96, "a"), (176, None), (176, "b"))),
]  # fmt: skip
DEMO = Path(__file__).parents[3] / "examples" / "demo"
# A position this far off chose other experts somewhere, by a tie that rounding decided.
THROWN_OFF = 0.2


@dataclass(frozen=True)
class Case:
    """A base, an adapter or none, the ids to run, and what transformers makes of the merge."""

    model: Path
    adapter: Path | None
    ids: torch.Tensor
    reference: torch.Tensor
    bf16_errors: torch.Tensor


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(ids).logits.float()
    return result


def errors(found: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """‖Δ‖/‖reference‖ of each position."""
    relative: torch.Tensor = (found - reference).norm(dim=-1) / reference.norm(dim=-1)
    return relative.flatten()


def median(values: torch.Tensor) -> float:
    return float(values.median())


def thrown_off(values: torch.Tensor) -> int:
    return int((values > THROWN_OFF).sum())


def merged_logits(
    folder: Path,
    model: Path,
    adapter: Path | None,
    ids: torch.Tensor,
    dtype: torch.dtype,
    *,
    int4_experts: bool = False,
) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    merged = save_merged(folder, model, adapter, dtype, int4_experts=int4_experts)
    loaded = AutoModelForCausalLM.from_pretrained(merged, dtype=dtype)
    return logits(loaded.eval(), ids)


def make_case(folder: Path, model: Path, adapter: Path | None, ids: torch.Tensor) -> Case:
    reference = merged_logits(folder / "f32", model, adapter, ids, torch.float32)
    bf16 = merged_logits(folder / "bf16", model, adapter, ids, torch.bfloat16)
    return Case(model, adapter, ids, reference, errors(bf16, reference))


def load(
    case: Case, backend: Backend, dtype: Dtype = "float32", threads: int | None = None
) -> LoadedModel:
    return load_model(
        ModelArgs(case.model, infer_dtype=dtype),
        AdapterArgs(case.adapter),
        ExpertArgs(kt_backend=backend, kt_num_threads=threads),
    )


def run(case: Case, backend: Backend, dtype: Dtype, threads: int | None = None) -> torch.Tensor:
    loaded = load(case, backend, dtype, threads)
    try:
        return logits(loaded.model, case.ids)
    finally:
        loaded.close()


def check_against_reference(case: Case) -> None:
    """The acceptance of BF16 and INT8, everything but the experts in float32 and by default."""
    bf16 = case.bf16_errors
    exact: dict[Backend, float] = {}
    limits: dict[Backend, float] = {"AMXBF16": 0.01, "AMXInt8": 0.05}
    for backend, limit in limits.items():
        found = errors(run(case, backend, "float32"), case.reference)
        exact[backend] = median(found)
        assert exact[backend] <= limit, backend
        if backend == "AMXBF16":
            assert thrown_off(found) <= thrown_off(bf16) + 1, backend
    found = errors(run(case, "AMXBF16", "auto"), case.reference)
    assert median(found) <= 1.15 * median(bf16)
    assert thrown_off(found) <= allowed_thrown_off(bf16)
    # INT8 adds its own error (that of the float32 run) to that of BF16, independently.
    found = errors(run(case, "AMXInt8", "auto"), case.reference)
    assert median(found) <= 1.15 * (median(bf16) ** 2 + exact["AMXInt8"] ** 2) ** 0.5


def check_int4(case: Case, folder: Path) -> None:
    """INT4 weights are so coarse that float32 is no measure of the engine's own errors, which
    come from INT8 activations: the base's experts are rounded in the reference too."""
    rounded = merged_logits(
        folder, case.model, case.adapter, case.ids, torch.float32, int4_experts=True
    )
    found = run(case, "AMXInt4", "float32")
    assert median(errors(found, rounded)) <= 0.025
    # The rounding is the engine's too.
    assert 0.05 <= median(errors(found, case.reference)) <= 0.3


def allowed_thrown_off(bf16: torch.Tensor) -> float:
    """As many as in transformers' BF16 run: both are counts of rare random events, so three
    standard deviations of their difference more (of sixty cases one or two are beyond two)."""
    count = thrown_off(bf16)
    return count + 3 * math.sqrt(2 * max(count, 1))


@pytest.fixture(scope="module", autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """Models this small only lose by more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Tiny:
    """Tiny models and cases in one folder, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._cases: dict[tuple[str, int, Layout | None], Case] = {}

    def model(self, family: str, size: int) -> Path:
        folder = self.folder / f"{family}-{size}"
        return folder if folder.exists() else save_model(folder, family, size)

    def case(self, family: str, size: int, layout: Layout | None) -> Case:
        key = (family, size, layout)
        if key not in self._cases:
            model = self.model(family, size)
            adapter = self.folder / f"{family}-{size}-{layout}"
            self._cases[key] = self.case_of(
                model, save_adapter(adapter, model, layout) if layout else None
            )
        return self._cases[key]

    def case_of(self, model: Path, adapter: Path | None) -> Case:
        return make_case(self.folder / "merged", model, adapter, token_ids())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


@on_every_isa
@pytest.mark.parametrize(("size", "layout"), SIZES_AND_LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_model_equals_merge(tiny: Tiny, family: str, size: int, layout: Layout | None) -> None:
    check_against_reference(tiny.case(family, size, layout))


@on_every_isa
@pytest.mark.parametrize(("size", "layout"), SIZES_AND_LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_int4_equals_merge_into_rounded_experts(
    tiny: Tiny, family: str, size: int, layout: Layout | None
) -> None:
    check_int4(tiny.case(family, size, layout), tiny.folder / "rounded")


@on_every_isa
@pytest.mark.parametrize(("size", "layout"), [(96, "b"), (176, "a")])
@pytest.mark.parametrize("family", FAMILIES)
def test_left_out_expert_lora_would_be_seen(
    tiny: Tiny, family: str, size: int, layout: Layout
) -> None:
    assert median(errors_without_expert_lora(tiny.case(family, size, layout))) >= 0.5


def errors_without_expert_lora(case: Case) -> torch.Tensor:
    loaded = load(case, "AMXBF16")
    for module in loaded.model.modules():
        if isinstance(module, KTExperts):
            module.layer.activate_loras([], [])
    found = errors(logits(loaded.model, case.ids), case.reference)
    loaded.close()
    return found


@on_every_isa
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
@pytest.mark.parametrize("backend", ["AMXBF16", "AMXInt8", "AMXInt4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_thread_count_changes_no_bit(tiny: Tiny, family: str, backend: Backend) -> None:
    case = tiny.case(family, SIZES[1], "a")
    one, two = (run(case, backend, "auto", threads) for threads in (1, 2))
    assert torch.equal(one, two)


@on_every_isa
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
@pytest.mark.parametrize("backend", ["AMXBF16", "AMXInt8", "AMXInt4"])
def test_numa_shards_change_no_bit(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, backend: Backend
) -> None:
    case = tiny.case("deepseek_v2", SIZES[1], "a")
    whole = run(case, backend, "auto", 2)
    first, second, *_ = sorted(os.sched_getaffinity(0))
    monkeypatch.setattr(_core, "numa_cpus", lambda: [[first], [second]])
    loaded = load_model(
        ModelArgs(case.model),
        AdapterArgs(case.adapter),
        ExpertArgs(kt_backend=backend, kt_num_threads=2, kt_tp_enabled=True),
    )
    assert loaded.engine.parts == 2
    assert torch.equal(logits(loaded.model, case.ids), whole)
    loaded.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_same_adapter_in_both_layouts_gives_the_same_bits(tiny: Tiny, family: str) -> None:
    stacked = tiny.case(family, SIZES[0], "b")
    assert stacked.adapter is not None
    single = unstack(tiny.folder / f"{family}-unstacked", stacked.adapter, stacked.model)
    assert torch.equal(
        run(stacked, "AMXBF16", "auto"), run(replace(stacked, adapter=single), "AMXBF16", "auto")
    )


def unstack(folder: Path, adapter: Path, model: Path) -> Path:
    """The adapter's stacked expert LoRA as one LoRA for each expert (layout b → a)."""
    tensors, config = read_folder(adapter)
    parts = ("gate_proj", "up_proj", "down_proj")
    infix = ".mlp.experts."
    if any(".w1." in name for name in weight_shapes(model)):
        parts, infix = ("w1", "w3", "w2"), ".block_sparse_moe.experts."
    for key in [key for key in tensors if ".experts." in key and ".lora_A." in key]:
        a, b = tensors.pop(key), tensors.pop(key.replace("lora_A", "lora_B"))
        path = key.partition(".mlp.experts.")[0] + infix
        for expert in range(NUM_EXPERTS):
            a_e = a[expert * config["r"] : (expert + 1) * config["r"]]
            b_e = b[:, expert::NUM_EXPERTS]
            rows = b_e.chunk(2) if ".base_layer." in key else [b_e]
            for part, b_part in zip(parts[:2] if len(rows) == 2 else parts[2:], rows, strict=True):
                tensors[f"{path}{expert}.{part}.lora_A.weight"] = a_e.clone()
                tensors[f"{path}{expert}.{part}.lora_B.weight"] = b_part.contiguous()
    del config["target_parameters"]
    config["target_modules"] = sorted({*config["target_modules"], *parts})
    return write_adapter(folder, tensors, config)


@pytest.mark.parametrize(
    "targets",
    [
        pytest.param(
            {"target_modules": ["q_proj", "o_proj"],
             "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
            id="target_parameters",
        ),
        pytest.param(
            {"target_modules": ["q_proj"],
             "target_parameters": ["experts.gate_up_proj", "experts.down_proj",
                                   "mlp.gate_proj.weight", "mlp.down_proj.weight"]},
            id="dense Linears by their weights",
        ),
        pytest.param(
            {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
            id="only gate_up_proj",
        ),
        pytest.param(
            {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
            id="only down_proj",
        ),
        pytest.param(
            {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"],
             "use_rslora": True},
            id="target_modules, converted by PEFT",
        ),
        pytest.param({"target_modules": "all-linear"}, id="all-linear, router too"),
    ],
)  # fmt: skip
def test_adapter_written_by_peft(tiny: Tiny, tmp_path: Path, targets: dict[str, Any]) -> None:
    model = tiny.model("qwen3_moe", SIZES[0])
    case = tiny.case_of(model, save_peft_adapter(tmp_path, model, targets))
    assert median(errors(run(case, "AMXBF16", "float32"), case.reference)) <= 0.01
    base = tiny.case("qwen3_moe", SIZES[0], None)
    assert median(errors(base.reference, case.reference)) >= 0.5, "the adapter must matter"


def save_peft_adapter(folder: Path, model: Path, targets: dict[str, Any]) -> Path:
    """PEFT's own injection and file writer, with random numbers in the place of trained ones."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    plan = LoraPlan(use_rslora=bool(targets.get("use_rslora")))
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    peft = get_peft_model(base, LoraConfig(r=plan.rank, lora_alpha=plan.alpha, **targets))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if ".lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                size = plan.scaling * plan.rank**0.5
                parameter.copy_(noise / (size if "lora_B" in name else noise.shape[1] ** 0.5))
    peft.save_pretrained(folder)
    return folder


def test_rslora_with_rank_and_alpha_patterns(tiny: Tiny, tmp_path: Path) -> None:
    """Mixed ranks inside one layer, and scalings that differ by expert."""
    model = tiny.model("deepseek_v2", SIZES[0])
    adapter = save_adapter(tmp_path, model, "a", LoraPlan(use_rslora=True))
    tensors, config = read_folder(adapter)
    config["rank_pattern"] = {r"experts\.[0-4]\.up_proj": 3, "kv_b_proj": 5}
    config["alpha_pattern"] = {r"experts\.7\.down_proj": 40, "layers.0.mlp.gate_proj": 5}
    for key, value in tensors.items():
        name = key.partition(".lora_")[0]
        for pattern, rank in config["rank_pattern"].items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                tensors[key] = (value[:rank] if "lora_A" in key else value[:, :rank]).contiguous()
    case = tiny.case_of(model, write_adapter(adapter, tensors, config))
    assert median(errors(run(case, "AMXBF16", "float32"), case.reference)) <= 0.01


def test_stacked_experts_on_disk(tiny: Tiny) -> None:
    case = tiny.case("granitemoe", SIZES[0], None)
    assert any(len(shape) == 3 for shape in weight_shapes(case.model).values())
    assert median(errors(run(case, "AMXBF16", "float32"), case.reference)) <= 0.01


def demo_cases() -> list[tuple[str, str | None]]:
    """(model, adapter) of the demo's folders, relative to it; each model alone too."""
    models = sorted(str(p.parent.relative_to(DEMO)) for p in DEMO.rglob("config.json"))
    adapters = sorted(str(p.parent.relative_to(DEMO)) for p in DEMO.rglob("adapter_config.json"))
    return [(model, adapter) for model in models for adapter in (None, *adapters)]


def demo_parameters() -> list[Any]:
    return [
        pytest.param(
            *case,
            marks=[on_every_isa] if case[1] == "adapter_a" else [],
            id="-".join(map(str, case)),
        )
        for case in demo_cases()
    ]


def demo_ids(model: Path) -> torch.Tensor:
    """Ids [8, 80] of exchanges from the demo's corpus (its blocks of Q, B and A lines), in the
    model's own chat format."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids: list[int] = []
    for file in sorted((DEMO / "corpus").glob("*.txt")):
        for block in file.read_text("utf-8").split("\n\n"):
            if found := re.search(r"^Q: (.*)\n(?:B: .*\n)?A: (.*)", block, re.MULTILINE):
                turns = [
                    {"role": role, "content": text}
                    for role, text in zip(("user", "assistant"), found.groups(), strict=True)
                ]
                ids += tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    return torch.tensor(ids[: 8 * 80]).view(8, 80)


@pytest.mark.parametrize(("model", "adapter"), demo_parameters())
def test_demo_equals_merge(tmp_path: Path, model: str, adapter: str | None) -> None:
    path = DEMO / model
    case = make_case(tmp_path, path, DEMO / adapter if adapter else None, demo_ids(path))
    check_against_reference(case)
    check_int4(case, tmp_path / "rounded")
    if adapter is not None:
        assert median(errors_without_expert_lora(case)) >= 0.5
