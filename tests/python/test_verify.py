"""``--verify``: passes on an honest engine, fails on every sabotaged one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
import torch
from helpers.tiny_models import (
    NUM_EXPERTS,
    LoraPlan,
    read_folder,
    save_adapter,
    save_model,
    write_adapter,
)
from safetensors.torch import load_file, save_file
from test_kt_weights import write_tree

from ktrt.adapter.plan import AdapterPlan
from ktrt.adapter.settings import LoraScale, LoraSettings
from ktrt.checkpoint import ExpertWeights
from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.model import load_model
from ktrt.moe import KTExperts
from ktrt.prepare import base_of_adapters, open_adapter, open_base
from ktrt.reference import CannotVerifyError, RawAdapter, RawCheckpoint
from ktrt.reference.experts import Expert, expert_output, to_bf16
from ktrt.verify import LayerReport, verify, verify_layer

if TYPE_CHECKING:
    from collections.abc import Callable

Backend = Literal["AMXBF16", "AMXInt8", "AMXInt4"]
Arguments = dict[str, torch.Tensor | None]
Folders = tuple[Path, Path]

DEMO = Path(__file__).parents[2] / "examples" / "demo"
BACKENDS: tuple[Backend, ...] = ("AMXBF16", "AMXInt8", "AMXInt4")
CASES = [
    ("deepseek_v2", "a"), ("qwen3_moe", "b"), ("mixtral", "a"), ("mixtral", "b"), ("demo", "a"),
    ("demo", "b"),
]  # fmt: skip


class Made:
    """Tiny models with adapters, made once; the demo's as they are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, family: str, layout: Literal["a", "b"]) -> Folders:
        if family == "demo":
            return DEMO / "model", DEMO / f"adapter_{layout}"
        model, adapter = self.folder / family, self.folder / f"{family}-{layout}"
        if not model.exists():
            save_model(model, family, 96)
        if not adapter.exists():
            save_adapter(adapter, model, layout)
        return model, adapter


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


def check(folders: Folders, backend: Backend = "AMXBF16", **options: Any) -> list[LayerReport]:
    model, adapter = folders
    experts = ExpertArgs(kt_backend=backend, kt_num_threads=1)
    return verify(ModelArgs(model), AdapterArgs(adapter), experts, **options)


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
        # The engine is as near as NumPy with the same roundings gets; nothing was left unjudged.
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


# What a mistake could make of the engine's LoRA: gate_a, gate_b, … [E, …], the scaling in B.


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
    """A of one expert, its numbers read as if they lay column by column."""

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
    """A loaded model whose first layer with LoRA can be given other LoRA."""

    def __init__(self, folders: Folders, backend: Backend) -> None:
        model, adapter = folders
        self.base, self.lora = RawCheckpoint(model), RawAdapter(adapter)
        self.layer = self.lora.expert_layers[0]
        args = (ModelArgs(model), AdapterArgs(adapter))
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
        self.experts.layer.set_lora(**arguments)
        return verify_layer(self.model, self.base, self.lora, self.layer)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("family", "layout"), CASES)
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
        # It was the sabotage, each time.
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
    """‖ΔW‖ of 1 % and 0.3 % of ‖W‖."""
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
    """Their down projection is quantised in slices, which NumPy must do too."""
    model = save_model(tmp_path / "model", "deepseek_v2", 512, hidden_size=256, n_routed_experts=4)
    adapter = save_adapter(tmp_path / "adapter", model, "a")
    experts = ExpertArgs("AMXInt8", kt_num_threads=1, kt_weight_path=write_tree(tmp_path, model, 2))
    arguments = (ModelArgs(model), AdapterArgs(adapter), experts)
    (report,) = verify(*arguments)
    assert report.passed, report.failures
    monkeypatch.setattr("ktrt.verify._down_slices", lambda *_arguments: 1)
    (report,) = verify(*arguments)
    assert not report.passed


# The independent reading itself.


def test_every_layout_reads_the_same(made: Made, tmp_path: Path) -> None:
    """b as trained, and rewritten by hand as a, a′, c, d, f and b of an older PEFT."""
    model, adapter = made("deepseek_v2", "b")
    raw = RawCheckpoint(model).experts(1)
    assert raw is not None
    sizes = (raw.num_experts, raw.hidden_size, raw.intermediate_size)
    wanted = RawAdapter(adapter).experts(1, *sizes)
    assert len(wanted[0]) == 3
    tensors, config = read_folder(adapter)
    for name, rewrite in REWRITES.items():
        changed, settings = dict(tensors), dict(config)
        fused = rewrite(changed, settings)
        folder = write_adapter(tmp_path / name, changed, settings)
        if fused:
            save_file(fused, folder / "fused_expert_lora.safetensors")
        read = RawAdapter(folder)
        assert read.expert_layers == [1, 2], name
        for found, expected in zip(read.experts(1, *sizes), wanted, strict=True):
            for projection, lora in expected.items():
                delta = found[projection].scaling * found[projection].b @ found[projection].a
                np.testing.assert_allclose(
                    delta, lora.scaling * lora.b @ lora.a, atol=1e-5, err_msg=name
                )
        q = read.linears(1)["model.layers.1.self_attn.q_proj"]
        assert q.a.shape == (8, 160)


Tensors = dict[str, torch.Tensor]


def per_expert(
    tensors: Tensors, config: dict[str, Any], prefix: str = "base_model.model.", infix: str = "."
) -> None:
    for layer in (1, 2):
        path = f"base_model.model.model.layers.{layer}.mlp.experts"
        for inner, parts in ((".base_layer", ("gate_proj", "up_proj")), ("", ("down_proj",))):
            a, b = (tensors.pop(f"{path}{inner}.lora_{x}.weight") for x in "AB")
            for e in range(NUM_EXPERTS):
                rows = b[:, e::NUM_EXPERTS].chunk(len(parts))
                for part, b_part in zip(parts, rows, strict=True):
                    key = f"{prefix}model.layers.{layer}.mlp{infix}experts.{e}.{part}"
                    tensors[f"{key}.lora_A.weight"] = a[e * 8 : (e + 1) * 8].clone()
                    tensors[f"{key}.lora_B.weight"] = b_part.contiguous()
    config.pop("target_parameters")


def rename(tensors: Tensors, change: Callable[[str], str]) -> None:
    for key in list(tensors):
        tensors[change(key)] = tensors.pop(key)


def as_f(tensors: Tensors, config: dict[str, Any]) -> None:
    per_expert(tensors, config, prefix="")


def as_a_prime(tensors: Tensors, config: dict[str, Any]) -> None:
    per_expert(tensors, config, infix=".original_moe.")
    for key in [key for key in tensors if "shared_experts" in key]:
        tensors[key.replace("shared_experts", "original_moe.shared_experts")] = tensors[key].clone()


def with_infix(tensors: Tensors, config: dict[str, Any]) -> None:
    rename(tensors, lambda key: key.replace(".lora_", ".orig_module.lora_"))


def as_c(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    per_expert(tensors, config)
    fused = {}
    for layer in (1, 2):
        for part in ("gate", "up", "down"):
            for x in "AB":
                keys = [
                    f"base_model.model.model.layers.{layer}.mlp.experts.{e}.{part}_proj.lora_{x}.weight"
                    for e in range(NUM_EXPERTS)
                ]
                stack = torch.stack([tensors.pop(key) for key in keys])
                fused[f"layers.{layer}.experts.{part}_lora_{x.lower()}"] = stack
    return fused


def as_stacks(tensors: Tensors, config: dict[str, Any]) -> None:
    """[E, …] under the projections' names; gate_up in one."""
    for layer in (1, 2):
        path = f"base_model.model.model.layers.{layer}.mlp.experts"
        for inner, part in ((".base_layer", "gate_up_proj"), ("", "down_proj")):
            a, b = (tensors.pop(f"{path}{inner}.lora_{x}.weight") for x in "AB")
            tensors[f"{path}.{part}.lora_A.weight"] = a.view(NUM_EXPERTS, 8, -1).contiguous()
            stack = b.view(-1, 8, NUM_EXPERTS).permute(2, 0, 1)
            tensors[f"{path}.{part}.lora_B.weight"] = stack.contiguous()
    config.pop("target_parameters")


def older_peft(tensors: Tensors, config: dict[str, Any]) -> None:
    """A [E·r, d1], B [d2, r·E] of the transposed change."""
    for key in [key for key in tensors if ".experts." in key and ".lora_A." in key]:
        a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        stack_a = a.view(NUM_EXPERTS, 8, -1)
        stack_b = b.view(-1, 8, NUM_EXPERTS).permute(2, 0, 1)
        tensors[key] = stack_b.transpose(1, 2).reshape(NUM_EXPERTS * 8, -1).contiguous()
        new_b = stack_a.permute(2, 1, 0).reshape(a.shape[1], -1)
        tensors[key.replace("lora_A", "lora_B")] = new_b.contiguous()
    config["peft_version"] = "0.18.0"


REWRITES: dict[str, Callable[[Tensors, dict[str, Any]], Tensors | None]] = {
    "a": per_expert, "a prime": as_a_prime, "c": as_c, "d": with_infix, "f": as_f,
    "b of PEFT 0.18": older_peft, "stacks": as_stacks,
}  # fmt: skip


def test_matrices_that_experts_share(made: Made, tmp_path: Path) -> None:
    """A of gate for all experts, once as a matrix and once as [1, …]; B for each."""
    _, adapter = made("deepseek_v2", "a")
    tensors, settings = read_folder(adapter)
    prefix = "base_model.model.model.layers.1.mlp.experts"
    key = f"{prefix}.3.gate_proj.lora_A.weight"
    shared = tensors[key]
    for e in range(NUM_EXPERTS):
        del tensors[f"{prefix}.{e}.gate_proj.lora_A.weight"]
    for value in (shared, shared[None]):
        tensors[f"{prefix}.gate_proj.lora_A.weight"] = value.clone()
        found = RawAdapter(write_adapter(tmp_path, tensors, settings)).experts(1, 16, 160, 96)
        for e, each in enumerate(found):
            np.testing.assert_array_equal(each["gate"].a, shared.numpy())
            b = tensors[f"{prefix}.{e}.gate_proj.lora_B.weight"]
            np.testing.assert_array_equal(each["gate"].b, b.numpy())
    del tensors[f"{prefix}.gate_proj.lora_A.weight"]
    with pytest.raises(CannotVerifyError, match="no lora_A for gate of expert 0"):
        RawAdapter(write_adapter(tmp_path, tensors, settings)).experts(1, 16, 160, 96)


def test_rslora_and_patterns(made: Made, tmp_path: Path) -> None:
    model, adapter = made("deepseek_v2", "a")
    tensors, config = read_folder(adapter)
    config |= {"use_rslora": True, "alpha_pattern": {r"experts\.7\.down_proj": 40, "q_proj": 4}}
    read = RawAdapter(write_adapter(tmp_path, tensors, config))
    experts = read.experts(1, NUM_EXPERTS, 160, 96)
    assert experts[7]["down"].scaling == pytest.approx(40 / 8**0.5)
    assert experts[7]["up"].scaling == pytest.approx(16 / 8**0.5)
    q = read.linears(1)["model.layers.1.self_attn.q_proj"]
    assert q.scaling == pytest.approx(4 / 8**0.5)
    (report,) = check((model, tmp_path))
    assert report.passed, report.failures


def save_on(
    folder: Path, modules: dict[str, tuple[int, int]], **config: list[str] | list[int]
) -> Path:
    """An adapter on these modules, (in, out) each."""
    generator = torch.Generator().manual_seed(2)
    tensors: Tensors = {}
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


@pytest.mark.parametrize("damage", ["names", "dtype", "activation", "form", "not LoRA"])
def test_what_cannot_be_verified_is_refused(made: Made, tmp_path: Path, damage: str) -> None:
    model, adapter = made("mixtral", "a")
    copy = tmp_path / "model"
    copy.mkdir()
    tensors = load_file(model / "model.safetensors")
    config = json.loads((model / "config.json").read_text("utf-8"))
    loras, settings = read_folder(adapter)
    if damage == "names":
        rename(tensors, lambda key: key.replace(".w1.", ".first."))
    elif damage == "dtype":
        tensors = {k: t.to(torch.float8_e4m3fn) if ".w1." in k else t for k, t in tensors.items()}
    elif damage == "activation":
        config["hidden_act"] = "gelu"
    elif damage == "form":
        tensors = {k: t for k, t in tensors.items() if ".w1." not in k}
    else:
        loras["base_model.model.model.layers.0.self_attn.q_proj.bias"] = torch.zeros(160)
    save_file(tensors, copy / "model.safetensors")
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    folder = write_adapter(tmp_path / "adapter", loras, settings)
    with pytest.raises(CannotVerifyError, match="verified|lacks"):
        read_all(copy, folder)


def read_all(model: Path, adapter: Path) -> None:
    base, lora = RawCheckpoint(model), RawAdapter(adapter)
    raw = base.experts(0)
    assert raw is not None
    lora.experts(0, raw.num_experts, raw.hidden_size, raw.intermediate_size)
    base.read_expert(raw, 0)
    check((model, adapter))


def test_rounding_to_bfloat16_is_torchs() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 1e-3
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8])
    x = torch.cat([values, ties])
    np.testing.assert_array_equal(to_bf16(x.numpy()), x.bfloat16().float().numpy())


def test_numpy_agrees_with_torch_in_float32() -> None:
    rng = np.random.default_rng(0)
    weights = {
        name: rng.standard_normal(shape, np.float32) / np.float32(8)
        for name, shape in {"gate": (48, 64), "up": (48, 64), "down": (64, 48)}.items()
    }
    x = rng.standard_normal((5, 64), np.float32)
    w = {name: torch.from_numpy(value) for name, value in weights.items()}
    states = torch.from_numpy(x)
    inner = torch.nn.functional.silu(states @ w["gate"].T) * (states @ w["up"].T)
    found = expert_output(Expert(weights, "float32"), x, {})
    np.testing.assert_allclose(found, (inner @ w["down"].T).numpy(), rtol=1e-5, atol=1e-5)
