"""``--verify``: passes on an honest engine, fails on every sabotaged one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
import torch
from checkpoint.test_kt_files import write_tree
from helpers.loras import apply_lora
from helpers.tiny_models import (
    NUM_EXPERTS,
    LoraPlan,
    save_adapter,
    save_model,
    write_adapter,
)
from helpers.verify_cases import Backend, Made, check
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file

from ktrt.adapter.files.settings import LoraScale, LoraSettings
from ktrt.adapter.plan import AdapterPlan
from ktrt.audit.reference import Lora, RawAdapter, RawCheckpoint
from ktrt.audit.verify.linears import check_linear
from ktrt.audit.verify.model import LayerReport, verify, verify_layer
from ktrt.checkpoint.experts import ExpertWeights
from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.experts import KTExperts
from ktrt.loading.model import load_model
from ktrt.loading.plan import base_of_adapters, open_adapter, open_base

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from helpers.verify_cases import Folders

    from ktrt.audit.verify.probes import Check

Arguments = dict[str, torch.Tensor | None]

BACKENDS: tuple[Backend, ...] = ("AMXBF16", "AMXInt8", "AMXInt4")
CASES = [
    ("deepseek_v2", "a"), ("qwen3_moe", "b"), ("mixtral", "a"), ("mixtral", "b"), ("demo", "a"),
    ("demo", "b"),
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("family", "layout"), CASES)
def test_an_honest_engine_passes(
    made: Made, family: str, layout: Literal["a", "b"], backend: Backend
) -> None:
    (report,) = check(made(family, layout), backend)
    assert report.passed, report.failures
    names = [each.name for each in report.checks]
    assert names[:3] == ["each expert", "several at once", "token by token"]
    assert "self_attn.o_proj" in names
    for each in report.checks:
        # The engine agrees with NumPy's roundings; nothing was left unjudged.
        assert each.undecided == 0
        assert each.difference < 0.02
        assert each.apart > 0.2
    expected = {"AMXBF16": 0.01, "AMXInt8": 0.03, "AMXInt4": 0.3}[backend]
    assert report.checks[0].base < expected


def test_all_layers_dense_ones_too(made: Made) -> None:
    reports = check(made("deepseek_v2", "a"), everything=True)
    assert [report.layer for report in reports] == [0, 1, 2]
    assert all(report.passed for report in reports)
    assert reports[0].what == "no routed experts"
    assert {"mlp.gate_proj", "self_attn.q_proj"} <= {each.name for each in reports[0].checks}
    assert "mlp.shared_experts.down_proj" in {each.name for each in reports[1].checks}


@pytest.mark.parametrize(("family", "layout"), CASES[:4])
def test_int8_outside_the_experts_too(made: Made, family: str, layout: Literal["a", "b"]) -> None:
    reports = check(made(family, layout), "AMXInt8", 8, everything=True)
    for report in reports:
        assert report.passed, report.failures
    linears = [each for report in reports for each in report.checks if "_proj" in each.name]
    assert linears
    for each in linears:
        assert each.undecided == 0
        assert each.difference < 0.02


def test_only_the_verified_layer_is_packed(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[str] = set()
    original = ExpertWeights.read

    def spy(self: ExpertWeights, expert: int) -> Any:
        read.add(self._spec.path)
        return original(self, expert)

    monkeypatch.setattr(ExpertWeights, "read", spy)
    (report,) = check(made("deepseek_v2", "a"), layer=2)
    assert report.passed
    assert read == {"model.layers.2.mlp.experts"}


# Possible mistakes in the engine's LoRA: gate_a, gate_b, … [E, …], with the scaling in B.


def doubled(arguments: Arguments) -> None:
    for name in arguments:
        if name.endswith("_b"):
            arguments[name] = 2 * taken(arguments, name)


def ten_percent_more(arguments: Arguments) -> None:
    arguments["down_b"] = 1.1 * taken(arguments, "down_b")


def experts_swapped(arguments: Arguments) -> None:
    order = list(range(NUM_EXPERTS))
    order[3], order[5] = 5, 3
    for name, value in arguments.items():
        arguments[name] = None if value is None else value[order].contiguous()


def gate_and_up_exchanged(arguments: Arguments) -> None:
    gate, up = taken(arguments, "gate_b"), taken(arguments, "up_b")
    arguments["gate_b"], arguments["up_b"] = up, gate
    if arguments["up_a"] is not None:
        gate, up = taken(arguments, "gate_a"), taken(arguments, "up_a")
        arguments["gate_a"], arguments["up_a"] = up, gate


def zero_b(projection: str) -> Callable[[Arguments], None]:
    def spoil(arguments: Arguments) -> None:
        b = taken(arguments, f"{projection}_b").clone()
        b[7] = 0
        arguments[f"{projection}_b"] = b

    return spoil


def reordered_a(projection: str) -> Callable[[Arguments], None]:
    """Reads A of one expert as if its numbers lay column by column."""

    def spoil(arguments: Arguments) -> None:
        a = taken(arguments, f"{projection}_a").clone()
        a[4] = a[4].T.reshape(a[4].shape)
        arguments[f"{projection}_a"] = a

    return spoil


def ranks_reversed(arguments: Arguments) -> None:
    a = taken(arguments, "gate_a").clone()
    a[9] = a[9].flip(0)
    arguments["gate_a"] = a


def left_out(arguments: Arguments) -> None:
    for name in arguments:
        if name.endswith("_b"):
            arguments[name] = torch.zeros_like(taken(arguments, name))


def taken(arguments: Arguments, name: str) -> torch.Tensor:
    value = arguments[name]
    assert value is not None
    return value


SABOTAGE: dict[str, Callable[[Arguments], None]] = {
    "scaling doubled": doubled,
    "down's scaling 10 % more": ten_percent_more,
    "one expert swapped with another": experts_swapped,
    "gate and up exchanged": gate_and_up_exchanged,
    "B of gate zeroed": zero_b("gate"),
    "B of up zeroed": zero_b("up"),
    "B of down zeroed": zero_b("down"),
    "A of gate reordered": reordered_a("gate"),
    "A of down reordered": reordered_a("down"),
    "ranks reversed": ranks_reversed,
    "left out": left_out,
}


class Loaded:
    """A loaded model; the first layer with LoRA accepts other LoRA."""

    def __init__(self, folders: Folders, backend: Backend, bits: int | None = None) -> None:
        model, adapter = folders
        self.base, self.lora = RawCheckpoint(model), RawAdapter(adapter)
        self.layer = self.lora.expert_layers[0]
        args = (ModelArgs(model, quantization_bit=bits), AdapterArgs(adapter))
        self.model = load_model(*args, ExpertArgs(kt_backend=backend, kt_num_threads=1))
        plan = open_adapter(args[1], base_of_adapters(open_base(args[0])))
        assert plan is not None
        modules = self.model.model.named_modules()
        path, self.experts = next(
            (path, m) for path, m in modules
            if isinstance(m, KTExperts) and f"layers.{self.layer}." in path
        )  # fmt: skip
        self.arguments = plan.engine_arguments(path)

    def check(self, spoil: Callable[[Arguments], None]) -> LayerReport:
        arguments = dict(self.arguments)
        spoil(arguments)
        apply_lora(self.experts.layer, **arguments)
        return verify_layer(self.model, self.base, self.lora, self.layer)


# INT4 hides most: it gets every family; both layouts and all formats are one family's.
SABOTAGED = [
    pytest.param(*case, backend, marks=marks)
    for case in CASES
    for backend in BACKENDS
    for marks in [
        () if case == CASES[1] or (backend == "AMXInt4" and case in CASES[:4]) else pytest.mark.long
    ]
]


@pytest.mark.parametrize(("family", "layout", "backend"), SABOTAGED)
def test_every_sabotage_of_the_lora_fails(
    made: Made, family: str, layout: Literal["a", "b"], backend: Backend
) -> None:
    loaded = Loaded(made(family, layout), backend)
    try:
        for name, spoil in SABOTAGE.items():
            report = loaded.check(spoil)
            assert not report.passed, name
            assert any("tuned − base" in text for text in report.failures), name
            assert not any(": base is" in text for text in report.failures), name
        # Without sabotage it passes.
        assert loaded.check(lambda _arguments: None).passed
    finally:
        loaded.model.close()


def test_sabotage_at_load_fails(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    original = AdapterPlan.engine_arguments

    def spoiled(self: AdapterPlan, path: str) -> Arguments:
        arguments = original(self, path)
        if arguments:
            experts_swapped(arguments)
        return arguments

    monkeypatch.setattr(AdapterPlan, "engine_arguments", spoiled)
    (report,) = check(made("deepseek_v2", "a"))
    named = [text for text in report.failures if "(expert" in text]
    assert all("(expert 3," in text or "(expert 5," in text for text in named)
    assert len(named) >= 6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["deepseek_v2", "qwen3_moe", "mixtral", "demo"])
def test_sabotaged_base_weights_fail(
    made: Made, monkeypatch: pytest.MonkeyPatch, family: str, backend: Backend
) -> None:
    original = ExpertWeights.read

    def swapped(self: ExpertWeights, expert: int) -> Any:
        return original(self, {3: 5, 5: 3}.get(expert, expert))

    def exchanged(self: ExpertWeights, expert: int) -> Any:
        gate, up, down = original(self, expert)
        return up, gate, down

    for spoiled in (swapped, exchanged):
        monkeypatch.setattr(ExpertWeights, "read", spoiled)
        (report,) = check(made(family, "b"), backend)
        found = [text for text in report.failures if text.startswith("each expert: base is")]
        assert found
        if spoiled is swapped:
            named = [text for text in found if "(" in text]
            assert all("(expert 3," in text or "(expert 5," in text for text in named)


def double_scaling(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    original = LoraSettings.scale

    def spoiled(self: LoraSettings, module: str) -> LoraScale:
        scale = original(self, module)
        if where in module:
            return LoraScale(scale.rank, 2 * scale.alpha, 2 * scale.scaling)
        return scale

    monkeypatch.setattr(LoraSettings, "scale", spoiled)


def test_sabotaged_scaling_of_the_torch_modules_fails(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    double_scaling(monkeypatch, "self_attn.q_proj")
    (report,) = check(made("deepseek_v2", "a"))
    assert {text.partition(":")[0] for text in report.failures} == {"self_attn.q_proj"}


@pytest.mark.parametrize("size", [1e-2, 3e-3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_small_adapter_is_still_seen(
    made: Made, tmp_path: Path, size: float, backend: Backend
) -> None:
    """‖ΔW‖ is 1 % and 0.3 % of ‖W‖."""
    model, _ = made("deepseek_v2", "a")
    adapter = save_adapter(tmp_path, model, "a", LoraPlan(experts=size))
    loaded = Loaded((model, adapter), backend)
    try:
        honest = loaded.check(lambda _arguments: None)
        assert honest.passed, honest.failures
        assert honest.checks[0].undecided <= honest.checks[0].groups * 2 / 3
        for spoil in (left_out, doubled, experts_swapped):
            assert not loaded.check(spoil).passed
    finally:
        loaded.model.close()


def test_too_small_to_be_judged_is_no_pass(made: Made, tmp_path: Path) -> None:
    model, _ = made("deepseek_v2", "a")
    adapter = save_adapter(tmp_path, model, "a", LoraPlan(experts=1e-7))
    (report,) = check((model, adapter))
    assert any("too little to be verified" in text for text in report.failures)


def test_kt_kernels_files_for_two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their down projection is quantised in slices, so NumPy must do that too."""
    model = save_model(tmp_path / "model", "deepseek_v2", 512, hidden_size=256, n_routed_experts=4)
    adapter = save_adapter(tmp_path / "adapter", model, "a")
    experts = ExpertArgs("AMXInt8", kt_num_threads=1, kt_weight_path=write_tree(tmp_path, model, 2))
    arguments = (ModelArgs(model), AdapterArgs(adapter), experts)
    (report,) = verify(*arguments)
    assert report.passed, report.failures
    monkeypatch.setattr("ktrt.audit.verify.model._down_slices", lambda *_arguments: 1)
    (report,) = verify(*arguments)
    assert not report.passed


@pytest.mark.parametrize("bits", [None, 8])
def test_a_forward_that_leaves_lora_out_fails(made: Made, bits: int | None) -> None:
    """The parameters are right, but the replacement of PEFT's forward does not use them."""
    loaded = Loaded(made("deepseek_v2", "a"), "AMXBF16", bits)
    try:
        q: Any = loaded.model.model.get_submodule("model.layers.1.self_attn.q_proj")
        q.forward = q.base_layer.forward
        report = loaded.check(lambda _arguments: None)
        assert report.failures
        for text in report.failures:
            assert text.startswith("self_attn.q_proj: ")
            assert text.endswith(", as it runs")
    finally:
        loaded.model.close()


def test_a_damaged_int8_weight_fails(made: Made) -> None:
    """The parameters are right, but another matrix was packed."""
    loaded = Loaded(made("deepseek_v2", "a"), "AMXBF16", 8)
    try:
        q: Any = loaded.model.model.get_submodule("model.layers.1.self_attn.q_proj")
        weight = q.base_layer.weight.data
        with torch.no_grad():
            weight[:8] *= 2
            q.forward._inner._bind()
            q.forward.refresh()
            weight[:8] /= 2
        report = loaded.check(lambda _arguments: None)
        assert {text.partition(":")[0] for text in report.failures} == {"self_attn.q_proj"}
        assert all(text.endswith(", as it runs") for text in report.failures)
    finally:
        loaded.model.close()


def test_linears_with_a_bias(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "qwen3_moe", 96, attention_bias=True)
    adapter = save_adapter(tmp_path / "adapter", model, "a")
    assert any("q_proj.bias" in name for name in load_file(model / "model.safetensors"))
    (report,) = check((model, adapter))
    assert report.passed, report.failures


def save_on(
    folder: Path, modules: dict[str, tuple[int, int]], **config: list[str] | list[int]
) -> Path:
    """Writes an adapter on these modules, (in, out) each."""
    generator = torch.Generator().manual_seed(2)
    tensors: dict[str, torch.Tensor] = {}
    for module, (size_in, size_out) in modules.items():
        a, b = LoraPlan().pair(size_in, size_out, 0.5, generator)
        key = f"base_model.model.model.layers.1.{module}"
        tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    return write_adapter(folder, tensors, {"peft_type": "LORA", "r": 8, "lora_alpha": 16, **config})


def test_stacked_experts_on_disk(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "granitemoe", 96)
    adapter = save_on(
        tmp_path / "adapter", {"self_attn.q_proj": (160, 160)}, target_modules=["q_proj"],
        layers_to_transform=[1],
    )  # fmt: skip
    raw = RawCheckpoint(model)
    experts = raw.experts(1)
    assert experts is not None
    assert experts.stacked is not None
    whole = load_file(model / "model.safetensors")
    up = whole[experts.stacked[0]][5].float()[96:]
    np.testing.assert_array_equal(raw.read_expert(experts, 5)["up"], up.numpy())
    (report,) = check((model, adapter))
    assert report.passed, report.failures
    assert report.checks[0].apart == 0


def test_lora_on_the_router(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = made("qwen3_moe", "a")
    adapter = save_on(tmp_path, {"mlp.gate": (160, 16)}, target_parameters=["1.mlp.gate.weight"])
    (report,) = check((model, adapter))
    assert report.passed, report.failures
    assert report.checks[-1].name == "mlp.gate"
    assert report.checks[-1].apart > 0.2
    double_scaling(monkeypatch, "mlp.gate")
    (report,) = check((model, adapter))
    assert {text.partition(":")[0] for text in report.failures} == {"mlp.gate"}


def test_base_and_change_that_cancel_are_judged_by_their_size() -> None:
    """A gate has one output. For inputs in A's row space, W and LoRA may nearly cancel; the
    rounding of either is then a large fraction of the rest."""
    size, rank = 112, 1
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(rank, size, generator=generator) / size**0.5
    b = torch.tensor([[1.0]])
    model = torch.nn.Module()
    model.gate = torch.nn.Linear(size, 1, bias=False)
    weight = 0.05 * torch.randn(1, size, generator=generator)
    along = a / a.norm()
    weight -= (weight @ along.T) * along + 0.999 * b @ a
    model.gate.weight.data.copy_(weight)
    peft = inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=["gate"]), model
    )
    peft.gate.lora_A.default.weight.data.copy_(a)
    peft.gate.lora_B.default.weight.data.copy_(b)
    raw: Any = SimpleNamespace(linear=lambda _name: (weight.numpy(), np.float32(0)))
    assert _gate_check(peft, raw, a, b, 1.0).failures == []
    assert _gate_check(peft.bfloat16(), raw, a, b, 1.0).failures == []
    assert _gate_check(peft, raw, a, b, 1.1).failures


def _gate_check(model: torch.nn.Module, raw: Any, a: Any, b: Any, scaling: float) -> Check:
    return check_linear(model, "gate", raw, Lora(a.numpy(), b.numpy(), scaling), 0)
