"""INT8 linear layers outside the experts (``quantization_bit: 8``) against NumPy that rounds as the
format does, and whole models against transformers in float32."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from helpers.merge import save_merged
from helpers.tiny_models import save_adapter, save_model, token_ids
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.engine import Engine
from ktrt.engine.active_set import ActiveSet
from ktrt.layers import int8
from ktrt.layers.forward import DenseForward
from ktrt.layers.linear import accelerate, int8_bytes, refresh
from ktrt.loading.model import load_model
from ktrt.loading.plan import plan_memory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

IN, HIDDEN, OUT = 96, 200, 70


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(num_threads=2)
    yield engine
    engine.close()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(IN, HIDDEN)
        self.second = nn.Linear(HIDDEN, OUT, bias=False)
        self.gate = nn.Linear(IN, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(torch.tanh(self.first(x)))
        return out


def make(*adapters: str, **lora: Any) -> Any:
    torch.manual_seed(0)
    model: Any = Model().to(torch.bfloat16)
    for name in adapters:
        add(model, name, **{"r": 8, **lora})
    if adapters:
        set_active(model, adapters[0])
    return model.eval().requires_grad_(False)


def add(model: nn.Module, name: str, **lora: Any) -> None:
    config = LoraConfig(target_modules=["first", "second"], init_lora_weights=False, **lora)
    inject_adapter_in_model(config, model, name)
    model.requires_grad_(False)


def set_active(model: Any, *names: str) -> None:
    for module in (model.first, model.second):
        module.set_adapter(list(names))
        module.requires_grad_(False)


def inputs(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=generator).to(torch.bfloat16)


def rounded(rows: torch.Tensor) -> Any:
    """[rows, width] as INT8 codes with a scale per row, in float64."""
    values = rows.float().numpy()
    scale = np.abs(values).max(axis=1, keepdims=True) * np.float32(1 / 127)
    codes = np.rint(values * (np.float32(1) / np.where(scale > 0, scale, 1)))
    return codes.astype(np.float64) * scale


def by_hand(layer: Any, x: torch.Tensor, *adapters: str) -> torch.Tensor:
    """One layer [rows, in] -> [rows, out]: INT8 base, LoRA in float64 on BF16 numbers."""
    base = getattr(layer, "base_layer", layer)
    y = rounded(x) @ rounded(base.weight).T
    if base.bias is not None:
        y += base.bias.float().numpy()
    for name in adapters:
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight * layer.scaling[name]
        a, b = (part.to(torch.bfloat16).double().numpy() for part in (a, b))
        y += x.double().numpy() @ a.T @ b.T
    return torch.from_numpy(y).float()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


# The output's one rounding to BF16, and with LoRA that of the shrunk rows.
ROUNDING = 0.003


@pytest.mark.parametrize("rows", [1, 2, 33, 300])
def test_equals_numpy(engine: Engine, rows: int) -> None:
    model, x = make(), inputs(rows, IN)
    assert accelerate(model, engine, int8=True) == 3
    with torch.inference_mode():
        assert error(model.first(x), by_hand(model.first, x)) < ROUNDING
        deep = model.second(inputs(1, rows, HIDDEN))
    assert deep.shape == (1, rows, OUT)
    assert error(deep[0], by_hand(model.second, inputs(rows, HIDDEN))) < ROUNDING


@pytest.mark.parametrize("rank", [1, 7, 16])
def test_lora_is_exact(engine: Engine, rank: int) -> None:
    model, x = make("a", r=rank, lora_alpha=2 * rank), inputs(9, IN)
    accelerate(model, engine, int8=True)
    with torch.inference_mode():
        found = model.first(x)
    expected = by_hand(model.first, x, "a")
    assert error(by_hand(model.first, x), expected) > 0.1, "the adapter does something"
    assert error(found, expected) < ROUNDING


def test_rows_and_threads_change_no_bit(engine: Engine) -> None:
    x, results = inputs(70, IN), []
    for threads in (1, 2):
        other, model = Engine(num_threads=threads), make()
        accelerate(model, other, int8=True)
        with torch.inference_mode():
            results.append(model.first(x))
            assert torch.equal(model.first(x[40:41]), results[-1][40:41])
        other.close()
    assert torch.equal(*results)


def formats(model: nn.Module) -> dict[str, str]:
    return {
        path: forward.weight_format
        for path, module in model.named_modules()
        if isinstance(forward := module.__dict__.get("forward"), DenseForward)
    }


def test_gates_stay_bf16(engine: Engine) -> None:
    model = make()
    accelerate(model, engine, int8=True)
    assert formats(model) == {"first": "int8", "second": "int8", "gate": "bf16"}
    x = inputs(3, IN)
    with torch.inference_mode():
        assert error(model.gate(x), x.float() @ model.gate.weight.float().T) < ROUNDING


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("model.layers.1.mlp.gate", False),
        ("model.layers.1.mlp.router.layer", False),
        ("model.layers.1.mlp.shared_expert_gate", False),
        ("model.layers.1.self_attn.kv_b_proj", False),
        ("model.layers.1.self_attn.q_proj.lora_A.default", False),
        ("model.layers.1.mlp.gate_proj", True),
        ("model.layers.1.mlp.shared_experts.gate_up_proj", True),
        ("model.layers.1.self_attn.kv_a_proj_with_mqa", True),
        ("lm_head", True),
    ],
)
def test_which_layers(path: str, expected: bool) -> None:
    assert int8.is_int8(path, nn.Linear(4, 4)) == expected
    assert not int8.is_int8(path, nn.Embedding(4, 4))


def change_active(model: Any) -> tuple[str, ...]:
    set_active(model, "b")
    return ("b",)


def change_to_both(model: Any) -> tuple[str, ...]:
    set_active(model, "a", "b")
    return ("a", "b")


def disable(model: Any) -> tuple[str, ...]:
    model.first.enable_adapters(False)
    return ()


def change_numbers(model: Any) -> tuple[str, ...]:
    model.first.lora_A["a"].weight.mul_(2)
    return ("a",)


@pytest.mark.parametrize("change", [change_active, change_to_both, disable, change_numbers])
def test_follows_what_peft_does(engine: Engine, change: Any) -> None:
    model, x = make("a", "b"), inputs(5, IN)
    accelerate(model, engine, int8=True)
    with torch.inference_mode():
        before = model.first(x)
        active = change(model)
        refresh(model)
        found = model.first(x)
    assert error(found, by_hand(model.first, x, *active)) < ROUNDING
    assert error(found, before.float()) > 0.05


def test_merged_weights_are_packed_again(engine: Engine) -> None:
    model, x = make("a"), inputs(5, IN)
    accelerate(model, engine, int8=True)
    with torch.inference_mode():
        before = model.first(x)
        model.first.merge()
        refresh(model)
        merged = model.first(x)
        assert error(merged, by_hand(model.first, x)) < ROUNDING
        assert error(merged, before.float()) < 0.05, "the adapter still acts"
        model.first.unmerge()
        refresh(model)
        assert error(model.first(x), before.float()) < 0.05


def test_a_weight_is_packed_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many adapters come later, and whichever of them act."""
    packed: list[Any] = []
    monkeypatch.setattr(DenseForward, "_bind", counting(DenseForward._bind, packed))
    model, x, active_set = make(), inputs(4, IN), ActiveSet()
    accelerate(model, engine, active_set, int8=True)
    assert len(packed) == 2
    for name in ("a", "b"):
        add(model, name, r=4)
        accelerate(model, engine, active_set, int8=True)
    for names in (("a",), ("b",), ("a", "b")):
        set_active(model, *names)
        active_set.become(names)
        with torch.inference_mode():
            assert error(model.first(x), by_hand(model.first, x, *names)) < ROUNDING
    assert len(packed) == 2


def counting(function: Any, calls: list[Any]) -> Any:
    def counted(self: Any) -> None:
        function(self)
        if self.weight_format == "int8":
            calls.append(self)

    return counted


def test_other_parameters_are_packed(engine: Engine) -> None:
    """An adapter that replaces a base weight puts another parameter in its place."""
    model, x = make("a"), inputs(4, IN)
    accelerate(model, engine, int8=True)
    base = model.first.base_layer
    base.weight = nn.Parameter(2 * base.weight, requires_grad=False)
    refresh(model)
    with torch.inference_mode():
        assert error(model.first(x), by_hand(model.first, x, "a")) < ROUNDING


def test_what_the_engine_cannot_do(engine: Engine) -> None:
    """Ranks beyond the kernels' go through PEFT, on the INT8 base; copies and gradients through
    torch."""
    model, x = make("a", r=300), inputs(3, IN)
    accelerate(model, engine, int8=True)
    with torch.inference_mode():
        assert error(model.first(x), by_hand(model.first, x, "a")) < 2 * ROUNDING
    model = make()
    accelerate(model, engine, int8=True)
    twin = copy.deepcopy(model)
    assert formats(twin) == {}
    assert torch.equal(model.first(x.clone().requires_grad_()), twin.first(x))


def test_damaged_weights_are_refused(engine: Engine) -> None:
    model = make()
    model.second.weight.data[3, 5] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinity"):
        accelerate(model, engine, int8=True)


def test_bytes_are_those_of_the_engine(engine: Engine) -> None:
    model = make("a")
    accelerate(model, engine, int8=True)
    layers = (model.first.base_layer, model.second.base_layer)
    assert int8_bytes(model) == {id(each.weight): int8.int8_bytes(each) for each in layers}
    # 200 outputs are 7 strips of 32, 96 inputs 2 tiles of 64; a scale and a sum for each output.
    assert int8_bytes(model)[id(model.first.base_layer.weight)] == 224 * (128 + 8)


# Families with shared experts and latent attention, with plain attention, and with a tied head.
FAMILIES = ("deepseek_v2", "qwen3_moe", "granitemoe")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("int8")


def load(model: Path, adapter: Path | None, bits: int | None, backend: Any = "AMXInt8") -> Any:
    return load_model(
        ModelArgs(model, quantization_bit=bits),
        AdapterArgs(adapter),
        ExpertArgs(kt_backend=backend, kt_num_threads=2, ktrt_cache=False),
    )


@pytest.mark.end_to_end
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_against_float32(folder: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    model = save_model(folder / f"{family}-logits", family, 96)
    adapter = save_adapter(folder / f"{family}-adapter", model, "a")
    merged = save_merged(folder / f"{family}-merged", model, adapter, torch.float32)
    ids = token_ids(4, 40)
    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = plain(ids).logits
    medians = {}
    for bits in (None, 8):
        loaded = load(model, adapter, bits)
        try:
            assert ("int8" in formats(loaded.model).values()) == (bits == 8)
            with torch.inference_mode():
                found = loaded.model(ids).logits.float()
        finally:
            loaded.close()
        off = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
        medians[bits] = float(off.median())
    assert medians[8] < 0.06
    assert medians[8] < 4 * medians[None]


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_known_before_and_after_loading(folder: Path, family: str) -> None:
    """The plan's count of bytes is the loaded model's. Row by row: loading/test_inventory.py."""
    model = save_model(folder / f"{family}-sizes", family, 96)
    args = ModelArgs(model, quantization_bit=8)
    plan = plan_memory(args, AdapterArgs(), ExpertArgs(kt_num_threads=1))
    items = {item.name: item.ram for item in plan.items}
    before = {
        item.name: item.ram
        for item in plan_memory(ModelArgs(model), AdapterArgs(), ExpertArgs(kt_num_threads=1)).items
    }
    loaded = load(model, None, 8)
    try:
        packed = int8_bytes(loaded.model)
        parameters = {id(each): each for each in loaded.model.parameters()}
        table = loaded.model.get_input_embeddings().weight
        unread = sum(parameters[key].nbytes for key in packed if parameters[key] is not table)
    finally:
        loaded.close()
    assert items["linear layers in INT8"] == sum(packed.values()) > 0
    assert items["other weights"] == before["other weights"] - unread
    assert "linear layers in INT8" not in before
