"""Linear layers through the engine, against torch and PEFT in float32."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from ktrt.engine import Engine
from ktrt.engine.active_set import ActiveSet
from ktrt.layers.forward import DenseForward
from ktrt.layers.linear import accelerate, refresh
from ktrt.utils.patches import Patches

if TYPE_CHECKING:
    from collections.abc import Iterator

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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(torch.tanh(self.first(x)))
        return out


def make(**lora: Any) -> Any:
    """A BF16 model, with PEFT adapters a and b if ``lora`` is given."""
    torch.manual_seed(0)
    model = Model().to(torch.bfloat16)
    if lora:
        config = LoraConfig(target_modules=["first", "second"], init_lora_weights=False, **lora)
        for name in ("a", "b"):
            inject_adapter_in_model(config, model, name)
        set_active(model, "a")
    return model.eval().requires_grad_(False)


def set_active(model: nn.Module, *names: str) -> None:
    module: Any
    for module in model.modules():
        if hasattr(module, "set_adapter"):
            module.set_adapter(list(names))
            module.requires_grad_(False)


def in_float32(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The same model's result in float32, without the engine."""
    plain: Any = copy.deepcopy(model)
    assert not any(map(is_accelerated, plain.modules()))
    plain.float()
    out: torch.Tensor = plain(x.float())
    return out


def inputs(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=generator).to(torch.bfloat16)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def is_accelerated(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("forward"), DenseForward)


@pytest.mark.parametrize("shape", [(IN,), (1, 1, IN), (2, 5, IN), (40, IN), (0, IN)])
def test_equals_torch(engine: Engine, shape: tuple[int, ...]) -> None:
    model, x = make(), inputs(*shape)
    ordinary = model(x)
    assert accelerate(model, engine) == 2
    with torch.inference_mode():
        found = model(x)
    assert found.shape == ordinary.shape
    assert found.dtype == torch.bfloat16
    if x.numel():
        assert error(found, in_float32(model, x)) < 1.2 * error(ordinary, in_float32(model, x))


def test_rows_apart(engine: Engine) -> None:
    """An input that is a view with gaps."""
    model, x = make(), inputs(6, 2 * IN)
    accelerate(model, engine)
    assert torch.equal(model(x[::2, :IN]), model(x[::2, :IN].contiguous()))


@pytest.mark.parametrize("rank", [1, 8, 16])
def test_lora_equals_peft(engine: Engine, rank: int) -> None:
    model, x = make(r=rank, lora_alpha=2 * rank), inputs(9, IN)
    base = in_float32(make(), x)
    ordinary = model(x)
    accelerate(model, engine)
    with torch.inference_mode():
        found = model(x)
    expected = in_float32(model, x)
    assert error(base, expected) > 0.1, "the adapter does something"
    assert error(found, expected) < 1.3 * error(ordinary, expected)


def test_parameters_stay(engine: Engine) -> None:
    model = make(r=4)
    before = {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()}
    state = set(model.state_dict())
    accelerate(model, engine)
    assert {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()} == before
    assert set(model.state_dict()) == state


def change_active(model: Any) -> None:
    set_active(model, "b")


def change_to_both(model: Any) -> None:
    set_active(model, "a", "b")


def change_scale(model: Any) -> None:
    for module in (model.first, model.second):
        module.scale_layer(3.0)


def disable(model: Any) -> None:
    for module in (model.first, model.second):
        module.enable_adapters(False)


def merge(model: Any) -> None:
    for module in (model.first, model.second):
        module.merge()


def change_numbers(model: Any) -> None:
    model.first.lora_A["a"].weight.mul_(2)


@pytest.mark.parametrize(
    "change", [change_active, change_to_both, change_scale, disable, merge, change_numbers]
)
@pytest.mark.parametrize("renewed", [True, False], ids=["renew", "refresh"])
def test_follows_what_peft_does(engine: Engine, change: Any, renewed: bool) -> None:
    """After a new version, or a call of ``refresh``; until then nothing is looked at."""
    model, x, active_set = make(r=8), inputs(5, IN), ActiveSet()
    accelerate(model, engine, active_set)
    with torch.inference_mode():
        before = model(x)
    with torch.no_grad():
        change(model)
    with torch.inference_mode():
        if change is not merge:
            assert torch.equal(model(x), before)
        active_set.renew() if renewed else refresh(model)
        found = model(x)
    assert error(found, in_float32(model, x)) < 0.02
    if change is not merge:
        assert error(found, before.float()) > 0.05


def test_modules_that_come_later(engine: Engine) -> None:
    """Modules that are announced are taken at once; ``undo`` takes all back."""
    model, x, active_set, patches = make(), inputs(5, IN), ActiveSet(), Patches()
    accelerate(model, engine, active_set, patches)
    config = LoraConfig(r=4, target_modules=["first"], init_lora_weights=False)
    inject_adapter_in_model(config, model, "late")
    model.eval().requires_grad_(False)
    assert not is_accelerated(model.first)
    active_set.add_modules()
    assert is_accelerated(model.first)
    with torch.inference_mode():
        found = model(x)
    assert error(found, in_float32(model, x)) < 0.02
    patches.undo()
    assert not any(map(is_accelerated, model.modules()))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"lora_bias": True}])
def test_unusual_lora_takes_peft(engine: Engine, lora: dict[str, Any]) -> None:
    model, x = make(r=4, **lora), inputs(3, IN)
    expected = in_float32(model, x)
    accelerate(model, engine)
    with torch.inference_mode():
        assert error(model(x), expected) < 0.02


def test_dropout_takes_peft_only_while_training(engine: Engine) -> None:
    model, x = make(r=4, lora_dropout=0.5), inputs(3, IN)
    accelerate(model, engine)
    with torch.inference_mode():
        assert error(model(x), in_float32(model, x)) < 0.02


def test_other_dtypes_and_gradients_take_torch(engine: Engine) -> None:
    model = make().float()
    assert accelerate(model, engine) == 0
    assert not is_accelerated(model.first)
    model, x = make(), inputs(3, IN).requires_grad_()
    accelerate(model, engine)
    model(x).sum().backward()
    assert x.grad is not None
    with pytest.raises(RuntimeError, match=r"dtype|mat1"):
        model(x.float())


def test_a_weight_that_moved_takes_torch(engine: Engine) -> None:
    model, x = make(), inputs(3, IN)
    accelerate(model, engine)
    model.first.weight.data = torch.zeros_like(model.first.weight)
    model.first.bias.data.zero_()
    with torch.inference_mode():
        assert not model(x).any()


def test_per_sample_adapters_take_peft(engine: Engine) -> None:
    model, x = make(r=4), inputs(2, IN)
    accelerate(model, engine)
    with torch.inference_mode():
        mixed = model.first(x, adapter_names=["a", "b"])
        alone = model.first(x)
    assert error(mixed[:1], alone[:1].float()) < 0.02
    assert error(mixed[1:], alone[1:].float()) > 0.05


@pytest.mark.parametrize(("threads", "engines"), [(2, 0), (1, 2)])
def test_amx_leaves_many_rows_to_torch(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, threads: int, engines: int
) -> None:
    """Where torch has several threads: in decode steps it has one."""
    model, x = make(), inputs(20, IN)
    ordinary = model(x)
    monkeypatch.setattr("ktrt.layers.forward.torch_rows", lambda _engine: 16)
    monkeypatch.setattr("ktrt.layers.row_products.torch.get_num_threads", lambda: threads)
    run, runs = DenseForward._run, list[int]()

    def spy(self: DenseForward, x: torch.Tensor, *rest: Any) -> None:
        runs.append(len(x))
        run(self, x, *rest)

    accelerate(model, engine)
    monkeypatch.setattr(DenseForward, "_run", spy)
    with torch.inference_mode():
        assert torch.equal(model(x), ordinary) or engines
        assert runs == [20] * engines
        assert error(model(x[:1]), in_float32(model, x[:1])) < 0.02
    assert len(runs) == engines + 2


def test_into_writes_what_a_call_returns(engine: Engine) -> None:
    """Whether the engine computes it, or torch: other dtypes of the output, PEFT's unusual LoRA."""
    x = inputs(1, 1, IN)
    for lora in ({}, {"r": 4}, {"r": 4, "use_dora": True}):
        model = make(**lora)
        accelerate(model, engine)
        forward = model.first.forward
        with torch.inference_mode():
            expected = model.first(x)
            for dtype in (torch.bfloat16, torch.float32):
                out = torch.full((1, 1, HIDDEN), float("nan"), dtype=dtype)
                forward.into(x, out)
                assert torch.equal(out, expected.to(dtype))
            gaps = torch.zeros(1, 1, 2 * HIDDEN, dtype=torch.bfloat16)[..., ::2]
            forward.into(x, gaps)
            assert torch.equal(gaps, expected)


def test_into_refuses_another_shape(engine: Engine) -> None:
    model, x = make(), inputs(1, 1, IN)
    accelerate(model, engine)
    with torch.inference_mode(), pytest.raises(ValueError, match="elements"):
        model.first.forward.into(x, torch.empty(1, 1, HIDDEN + 1, dtype=torch.bfloat16))
