"""Fused LoRA Linears whose rows have separate adapters, compared with each adapter alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from ktrt.engine.active_set import ActiveSet
from ktrt.engine.rank_masks import RankMasks
from ktrt.engine.step_rows import ACTIVE, BASE, IDLE, RunningStep, StepRows
from ktrt.errors import KtrtError
from ktrt.layers.cuda_linear import FusedLora
from ktrt.utils.patches import Patches

SIZE_IN, SIZE_OUT = 96, 72
RANKS = {"default": 6, "adapter1": 8, "adapter4": 3}
NUMBERS = {"default": 0, "adapter1": 1, "adapter4": 4}


class Net(nn.Module):
    """Two Linears, the second of which one adapter leaves alone."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first = nn.Linear(SIZE_IN, SIZE_OUT, bias=bias)
        self.second = nn.Linear(SIZE_OUT, SIZE_IN, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(self.first(x).tanh())
        return result


class Model:
    """The net with three adapters, fused, and plain copies to compare with."""

    def __init__(self, dtype: torch.dtype = torch.float32, *, bias: bool = True) -> None:
        torch.manual_seed(0)
        self.net: Any = Net(bias).to(dtype)
        for name, rank in RANKS.items():
            targets = ["first"] if name == "adapter1" else ["first", "second"]
            config = LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=targets)
            self.net = inject_adapter_in_model(config, self.net, name)
        for name, parameter in self.net.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.2)
        self.net.to(dtype).eval().requires_grad_(False)
        self.running, self.active_set, self.patches = RunningStep(), ActiveSet(), Patches()
        self.masks = RankMasks(self.running)
        self.masks.watch(self.net, self.patches)
        self.activate()
        self.fused = FusedLora(self.net, self.active_set, self.patches, self.masks)

    @property
    def layers(self) -> list[Any]:
        return [self.net.first, self.net.second]

    def activate(self, **weights: float) -> None:
        for layer in self.layers:
            layer._active_adapter = [name for name in layer.lora_A if weights.get(name)]
            for name in layer._active_adapter:
                layer.scaling[name] = 3.0 * weights[name]
        self.active_set.become(tuple(weights.items()))

    def by_row(self, x: torch.Tensor, adapters: list[int]) -> torch.Tensor:
        with self.running.running(rows_of(adapters)), torch.no_grad():
            result: torch.Tensor = self.net(x)
        return result

    def alone(self, x: torch.Tensor, **weights: float) -> torch.Tensor:
        """The same rows with one set for all."""
        self.activate(**weights)
        with torch.no_grad():
            result: torch.Tensor = self.net(x)
        return result


def rows_of(adapters: list[int]) -> StepRows:
    rows = StepRows(len(adapters), len(adapters))
    rows.adapters.copy_(torch.tensor(adapters))
    return rows


@pytest.mark.parametrize("shape", [(7, 1), (1, 7)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_each_row_has_its_own(shape: tuple[int, int], bias: bool) -> None:
    model = Model(bias=bias)
    x = torch.randn(*shape, SIZE_IN)
    mixed = model.by_row(x, [0, BASE, 4, 1, 0, BASE, 4]).view(7, -1)
    assert mixed.is_contiguous()
    for name, number in NUMBERS.items():
        alone = model.alone(x, **{name: 1.0}).view(7, -1)
        mine = [row for row, each in enumerate([0, -1, 4, 1, 0, -1, 4]) if each == number]
        torch.testing.assert_close(mixed[mine], alone[mine], rtol=1e-5, atol=1e-5)
    base = model.alone(x).view(7, -1)
    assert torch.equal(mixed[[1, 5]], base[[1, 5]])


@pytest.mark.parametrize("active", [{}, {"default": 1.0}], ids=["base", "default"])
def test_base_rows_keep_their_bits_in_bfloat16(active: dict[str, float]) -> None:
    model = Model(torch.bfloat16)
    x = torch.randn(5, 1, SIZE_IN).bfloat16()
    base = model.alone(x)
    model.activate(**active)
    assert torch.equal(model.by_row(x, [BASE, 0, BASE, 1, 4])[[0, 2]], base[[0, 2]])


def test_the_active_sum_beside_others() -> None:
    model = Model()
    x = torch.randn(4, 1, SIZE_IN)
    for weights in ({"default": 1.0}, {"default": 0.5, "adapter4": -2.0}, {}):
        expected = model.alone(x, **weights)
        found = model.by_row(x, [ACTIVE, 1, ACTIVE, BASE])
        torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=1e-5, atol=1e-5)


def test_a_row_s_numbers_do_not_reach_its_neighbours() -> None:
    """Not even a NaN, which a product with 0 would keep."""
    model = Model()
    x = torch.randn(3, 1, SIZE_IN)
    expected = model.by_row(x, [0, BASE, 4])
    x[1] = torch.nan
    model.net.first.lora_A["adapter1"].weight.fill_(torch.nan)
    model.fused.refresh()
    found = model.by_row(x, [0, IDLE, 4])
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


def test_uniform_steps_take_the_joint_product() -> None:
    model = Model()
    x = torch.randn(1, 1, SIZE_IN)
    expected = model.alone(x, default=1.0)
    assert torch.equal(model.by_row(x, [ACTIVE]), expected)
    rows = torch.randn(3, 1, SIZE_IN)
    assert torch.equal(model.by_row(rows, [ACTIVE, ACTIVE, IDLE]), model.alone(rows, default=1.0))


def test_ids_change_in_place_as_in_a_captured_graph() -> None:
    """A graph replays the operations, on ids that were copied in meanwhile."""
    model = Model()
    x, rows = torch.randn(3, 1, SIZE_IN), rows_of([0, 1, BASE])
    with model.running.running(rows), torch.no_grad():
        first = model.net(x)
        rows.adapters.copy_(torch.tensor([4, BASE, 1]))
        second = model.net(x)
    assert torch.equal(first, model.by_row(x, [0, 1, BASE]))
    assert torch.equal(second, model.by_row(x, [4, BASE, 1]))
    assert not torch.equal(first, second)


def test_one_mask_serves_the_layers_of_one_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    model.net.second.delete_adapter("default")
    model.net.first.delete_adapter("default")
    model.net.first.delete_adapter("adapter1")
    model.fused.refresh()
    made: list[int] = []
    owners = model.fused._linears[model.net.first]._owners
    assert owners is not None
    assert owners is model.fused._linears[model.net.second]._owners
    mask = type(owners).mask

    def spy(*args: Any) -> Any:
        made.append(1)
        return mask(*args)

    monkeypatch.setattr(type(owners), "mask", spy)
    x = torch.randn(2, 1, SIZE_IN)
    model.by_row(x, [4, BASE])
    assert len(made) == 1
    model.by_row(x, [4, BASE])
    assert len(made) == 2


def test_the_version_changes_with_memory_only() -> None:
    model = Model()
    x = torch.randn(2, 1, SIZE_IN)
    model.alone(x, adapter1=1.0)
    model.by_row(x, [0, 1])

    def changes(*steps: dict[str, float]) -> list[bool]:
        changed = []
        for weights in steps:
            before = model.fused.version
            model.activate(**weights)
            model.fused.follow()
            changed.append(model.fused.version != before)
        return changed

    assert changes({"default": 1.0}) == [True]  # the second layer has LoRA now
    # The same number of ranks, padded to 8: the memory is written again.
    assert changes({"adapter4": 1.0}, {"default": 1.0}) == [False, False]
    assert changes({}, {"default": 1.0}) == [True, True]
    assert changes({"default": 0.5}, {"default": 0.25}, {"default": 1.0}) == [True, False, True]
    found = model.by_row(x, [ACTIVE, ACTIVE])
    assert torch.equal(found, model.alone(x, default=1.0))
    version = model.fused.version
    for layer in model.layers:
        layer.delete_adapter("adapter4")
    model.fused.find()
    assert model.fused.version > version


def test_the_joint_product_follows_a_switch_in_place() -> None:
    """A graph that was captured with one adapter reads the next one's numbers."""
    model = Model(bias=True)
    x = torch.randn(1, 1, SIZE_IN)
    model.alone(x, default=1.0)
    first = model.fused._linears[model.net.first]

    def places() -> list[int]:
        held = first._joint, first._expand, first._joint_bias
        return [tensor.data_ptr() for tensor in held if tensor is not None]

    memory = places()
    assert len(memory) == 3
    found = model.alone(x, adapter4=1.0)
    assert places() == memory
    assert torch.allclose(found, model.by_row(x, [4]), atol=1e-5)


def test_unusual_adapters_keep_peft_s_forward_in_uniform_steps() -> None:
    model = Model()
    config = LoraConfig(r=4, target_modules=["first"], use_dora=True)
    model.net = inject_adapter_in_model(config, model.net, "adapter5")
    model.net.eval().requires_grad_(False)
    nn.init.normal_(model.net.first.lora_B["adapter5"].weight, std=0.2)
    model.fused.find()
    x = torch.randn(2, 1, SIZE_IN)
    for layer in model.layers:
        layer._active_adapter = ["adapter5"] if "adapter5" in layer.lora_A else []
    model.fused.refresh()
    found = model.by_row(x, [ACTIVE, ACTIVE])
    model.patches.undo()
    with torch.no_grad():
        assert torch.equal(found, model.net(x))


def test_rows_that_are_no_tokens_are_refused() -> None:
    model = Model()
    with (
        model.running.running(rows_of([0, 1])),
        pytest.raises(KtrtError, match="given 3 rows in a step of 2 tokens"),
    ):
        model.net(torch.randn(3, SIZE_IN))


def test_the_output_layer_sees_the_wanted_tokens() -> None:
    model = Model()
    x, rows = torch.randn(4, SIZE_IN), rows_of([0, 1, BASE, 4])
    expected = model.by_row(x, [0, 1, BASE, 4])
    rows.logits = torch.tensor([1, 3])
    with model.running.running(rows), torch.no_grad():
        found = model.net(x[[1, 3]])
    torch.testing.assert_close(found, expected[[1, 3]], rtol=1e-5, atol=1e-5)
