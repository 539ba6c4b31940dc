"""Linears whose rows have different adapters: each row as it is alone, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from ktrt.engine import Engine
from ktrt.engine.active_set import ActiveSet
from ktrt.engine.recording import Recorder
from ktrt.engine.step_rows import ACTIVE, BASE, RunningStep, StepRows
from ktrt.errors import KtrtError
from ktrt.layers.linear import accelerate
from ktrt.layers.row_products import FixedProducts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

IN, HIDDEN, OUT = 96, 200, 70
NAMES = ("default", "adapter1", "adapter4")
NUMBERS = (0, 1, 4)


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
        self.head = nn.Linear(OUT, 40)

    def forward(self, x: torch.Tensor, wanted: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.second(torch.tanh(self.first(x)))
        out: torch.Tensor = self.head(hidden if wanted is None else hidden[:, wanted])
        return out


def add(model: nn.Module, name: str, *targets: str, **lora: Any) -> None:
    config = LoraConfig(target_modules=list(targets), init_lora_weights=False, **lora)
    inject_adapter_in_model(config, model, name)
    model.eval().requires_grad_(False)


class Case:
    """A model with adapters 0, 1 and 4 of different ranks, 4 on one layer alone, as
    ``Adapters`` would load them."""

    def __init__(
        self, engine: Engine, dtype: torch.dtype = torch.bfloat16, *, int8: bool = False
    ) -> None:
        torch.manual_seed(0)
        self.dtype = dtype
        self.model: Any = Model().to(dtype).eval().requires_grad_(False)
        self.active_set, self.running = ActiveSet(), RunningStep()
        for name, rank, targets in zip(
            NAMES, (8, 3, 17), (("first", "second", "head"), ("second", "head"), ("first",)),
            strict=True,
        ):  # fmt: skip
            add(self.model, name, *targets, r=rank, lora_alpha=rank)
        self.active_set.numbers = frozenset(NUMBERS)
        self.activate()
        accelerate(self.model, engine, self.active_set, int8=int8, running=self.running)

    def activate(self, **weights: float) -> None:
        for module in self.model.modules():
            if hasattr(module, "lora_A"):
                module._active_adapter = [name for name in weights if name in module.lora_A]
                for name in module.lora_A:
                    # lora_alpha is the rank: trained at 1.
                    module.scaling[name] = weights.get(name, 1.0)
        self.active_set.become(tuple(sorted(weights.items())))

    def run(
        self, x: torch.Tensor, adapters: Sequence[int] | None = None,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        with torch.inference_mode():
            if adapters is None:
                out: torch.Tensor = self.model(x, wanted)
                return out
            rows = StepRows(x.shape[1], x.shape[1])
            rows.adapters.copy_(torch.tensor(adapters, dtype=torch.int32))
            rows.logits = wanted
            with self.running.running(rows):
                mixed: torch.Tensor = self.model(x, wanted)
            return mixed


def inputs(rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, rows, IN, generator=generator).to(torch.bfloat16)


MIXED = [0, BASE, 4, 4, 1, ACTIVE, 0, -3, 1, BASE, ACTIVE, 4]


@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
def test_rows_are_as_alone(engine: Engine, int8: bool) -> None:
    """Next to rows of others, alone by number, and as the one active adapter of all rows."""
    case, x = Case(engine, int8=int8), inputs(len(MIXED))
    base = case.run(x)
    expected = {BASE: base, -3: base}
    for name, number in zip(NAMES, NUMBERS, strict=True):
        case.activate(**{name: 1.0})
        expected[number] = case.run(x)
        assert not torch.equal(expected[number], base)
    case.activate(default=0.5, adapter4=2.0)
    expected[ACTIVE] = case.run(x)
    mixed = case.run(x, MIXED)
    for row, adapter in enumerate(MIXED):
        assert torch.equal(mixed[:, row], expected[adapter][:, row]), (row, adapter)
        alone = case.run(x[:, row : row + 1], [adapter])
        assert torch.equal(alone[:, 0], mixed[:, row]), (row, adapter)


def test_the_head_has_the_wanted_tokens(engine: Engine) -> None:
    case, x = Case(engine), inputs(6)
    everything = case.run(x, [0, 1, BASE, 4, 1, 0])
    wanted = torch.tensor([1, 2, 5])
    assert torch.equal(case.run(x, [0, 1, BASE, 4, 1, 0], wanted), everything[:, [1, 2, 5]])
    rows = torch.arange(6)
    assert torch.equal(case.run(x, [0, 1, BASE, 4, 1, 0], rows), everything)


def test_rows_of_unknown_tokens_are_refused(engine: Engine) -> None:
    case, x = Case(engine), inputs(4)
    with torch.inference_mode():
        rows = StepRows(5, 5)
        rows.adapters.copy_(torch.tensor([0, 1, 1, 1, 1]))
        with case.running.running(rows), pytest.raises(KtrtError, match="4 rows in a step of 5"):
            case.model(x)
        # All have the same: any number of rows will do.
        rows = StepRows(5, 5)
        rows.adapters.fill_(1)
        with case.running.running(rows):
            assert torch.equal(case.model(x), case.run(x, [1] * 4))
    with pytest.raises(KtrtError, match="whose logits are wanted"):
        case.run(x, [0, 1, 0, 1], torch.tensor([3, 2, 1, 0]))


def test_a_weighted_sum_equals_peft(engine: Engine) -> None:
    case, x = Case(engine), inputs(9)
    case.activate(default=0.7, adapter1=-1.3, adapter4=0.4)
    found = case.run(x)
    plain: Any = Model()
    for name, rank, targets in zip(
        NAMES, (8, 3, 17), (("first", "second", "head"), ("second", "head"), ("first",)),
        strict=True,
    ):  # fmt: skip
        add(plain, name, *targets, r=rank, lora_alpha=rank)
    plain.load_state_dict(case.model.state_dict())
    plain.float()
    for module, own in zip(plain.modules(), case.model.modules(), strict=True):
        if hasattr(module, "lora_A"):
            module._active_adapter, module.scaling = own._active_adapter, own.scaling
    expected = plain(x.float())
    assert float((found.float() - expected).norm() / expected.norm()) < 0.02


def test_adapters_come_and_go(engine: Engine) -> None:
    """The adapters that were there act on; an adapter that has gone is unloaded at once."""
    case, x = Case(engine), inputs(3)
    before = case.run(x, [0, 1, BASE])
    add(case.model, "adapter5", "first", r=4, lora_alpha=4)
    case.active_set.numbers |= {5}
    case.active_set.add_modules()
    assert torch.equal(case.run(x, [0, 1, BASE]), before)
    assert not torch.equal(case.run(x, [5, 5, 5])[:, 2], before[:, 2])
    case.activate(adapter5=1.0)
    assert torch.equal(case.run(x), case.run(x, [5, 5, 5]))
    case.activate()
    for module in case.model.modules():
        if hasattr(module, "lora_A") and "adapter5" in module.lora_A:
            module.delete_adapter("adapter5")
    case.active_set.numbers -= {5}
    case.active_set.add_modules()
    assert torch.equal(case.run(x, [0, 1, BASE]), before)
    with pytest.raises(KtrtError, match="adapter number 5, which is not resident"):
        case.run(x, [0, 5, BASE])


def test_numbers_changed_in_place(engine: Engine) -> None:
    case, x = Case(engine), inputs(2)
    before = case.run(x, [0, 1])
    with torch.no_grad():
        case.model.second.lora_B["adapter1"].weight.mul_(3)
    assert torch.equal(case.run(x, [0, 1]), before)
    case.active_set.renew()
    after = case.run(x, [0, 1])
    assert torch.equal(after[:, 0], before[:, 0])
    assert not torch.equal(after[:, 1], before[:, 1])


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"lora_bias": True}])
def test_unusual_adapters_do_not_mix(engine: Engine, lora: dict[str, Any]) -> None:
    case, x = Case(engine), inputs(3)
    add(case.model, "adapter6", "first", r=4, **lora)
    case.active_set.numbers |= {6}
    case.active_set.add_modules()
    with pytest.raises(KtrtError, match="adapter number 6"):
        case.run(x, [0, 6, BASE])
    case.activate(adapter6=1.0)
    found = case.run(x)
    assert torch.equal(case.run(x, [ACTIVE] * 3), found), "for all rows PEFT computes it"
    with pytest.raises(KtrtError, match="all rows of a step share"):
        case.run(x, [0, ACTIVE, BASE])
    assert not torch.equal(case.run(x, [BASE] * 3), found)


def test_other_dtypes_compute_adapter_by_adapter(engine: Engine) -> None:
    """In float32 PEFT's layers, each row as with its adapter alone."""
    case, x = Case(engine, torch.float32), inputs(len(MIXED)).float()
    with FixedProducts(engine):
        expected = {BASE: case.run(x), -3: case.run(x)}
        for name, number in zip(NAMES, NUMBERS, strict=True):
            case.activate(**{name: 1.0})
            expected[number] = case.run(x)
        case.activate(default=0.5, adapter4=2.0)
        expected[ACTIVE] = case.run(x)
        mixed = case.run(x, MIXED)
    for row, adapter in enumerate(MIXED):
        assert torch.equal(mixed[:, row], expected[adapter][:, row]), (row, adapter)
    assert not torch.equal(expected[BASE], expected[0])
    add(case.model, "adapter6", "first", r=4, use_dora=True)
    case.active_set.add_modules()
    with pytest.raises(KtrtError, match="adapter number 6"):
        case.run(x[:, :2], [6, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_recorded_step_reads_the_adapters_again(engine: Engine, dtype: torch.dtype) -> None:
    """Ids and the active sum are data of the step."""
    case, x = Case(engine, dtype), inputs(4).to(dtype)
    case.activate(default=1.0)
    with torch.inference_mode(False):
        given, rows = x.clone(), StepRows(4, 4)
        out = torch.zeros(1, 4, 40, dtype=dtype)
    rows.adapters.copy_(torch.tensor([0, BASE, 4, ACTIVE]))
    recorder = Recorder()
    with recorder.recording(), FixedProducts(engine):
        recorder.describe([given, rows.adapters], torch.ones(1), None)
        with case.running.running(rows):
            out.copy_(case.model(given))
    runs = [*recorder.followers(), *(call.run for call in recorder.calls())]
    with FixedProducts(engine):
        assert torch.equal(out, case.run(x, [0, BASE, 4, ACTIVE]))
    for ids, weights in (
        ([1, 1, 0, BASE], {"default": 1.0}), ([ACTIVE, 4, ACTIVE, 0], {"adapter4": 0.5}),
    ):  # fmt: skip
        case.activate(**weights)
        rows.adapters.copy_(torch.tensor(ids))
        for run in runs:
            run()
        with FixedProducts(engine):
            assert torch.equal(out, case.run(x, ids))
