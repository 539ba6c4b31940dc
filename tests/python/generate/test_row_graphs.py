"""Graphs of decode steps of many rows, on stand-in graphs: each sequence as it is alone."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.fake_streams import FakeGraphs
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoConfig, AutoModelForCausalLM

from ktrt.engine.active_set import ActiveSet
from ktrt.engine.rank_masks import RankMasks
from ktrt.engine.step_rows import ACTIVE, BASE, RunningStep
from ktrt.generate import graphs as decode_graph
from ktrt.generate import row_graphs
from ktrt.generate.graphs import NoHandOff
from ktrt.generate.row_graphs import RowGraphs
from ktrt.generate.runner import ModelRunner
from ktrt.generate.step import Span, Step
from ktrt.kv import static
from ktrt.layers.cuda_linear import FusedLora
from ktrt.layers.latent import use_latents
from ktrt.utils.patches import Patches

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ktrt.kv.pool import Slot

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 128, "max_position_embeddings": 512,
    "initializer_range": 0.1, "kv_lora_rank": 24, "q_lora_rank": None, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 2, "n_routed_experts": 4,
    "moe_intermediate_size": 32, "n_shared_experts": 1, "num_experts_per_tok": 2,
}  # fmt: skip
NAMES = ("default", "adapter1", "adapter2")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short conversations cross windows and growths."""
    monkeypatch.setattr(static, "MIN_CAPACITY", 16)
    monkeypatch.setattr(decode_graph, "MIN_WINDOW", 8)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Model:
    """A dense model with three adapters, on the CPU in a GPU's ways."""

    def __init__(self, family: str = "deepseek_v2") -> None:
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **SIZES)
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        targets = ["o_proj", "down_proj", "q_proj", "kv_b_proj", "lm_head"]
        for name in NAMES:
            lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets)
            inject_adapter_in_model(lora, model, name)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        self.model = model.eval().requires_grad_(False)
        self.running, self.active_set, self.patches = RunningStep(), ActiveSet(), Patches()
        masks = RankMasks(self.running)
        masks.watch(model, self.patches)
        self.activate()
        engine: Any = None  # where no layer is the engine's
        use_latents(model, engine, self.patches, self.running)
        self.linears = FusedLora(model, self.active_set, self.patches, masks)
        self.maker = FakeGraphs()
        self.runner = self.new_runner(graphs=True)
        self.alone = self.new_runner(graphs=False)
        self.forwards: list[int] = []
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    @property
    def graphs(self) -> RowGraphs:
        assert self.runner._alone is not None
        assert self.runner._alone.rows is not None
        return self.runner._alone.rows

    def _note(self, _module: Any, _args: Any, options: dict[str, Any]) -> None:
        self.forwards.append(options["input_ids"].numel())

    def new_runner(self, *, graphs: bool) -> ModelRunner:
        made = partial(RowGraphs, self.model, handoff=NoHandOff(), maker=self.maker)
        runner = ModelRunner(
            self.model, active_set=self.active_set, running=self.running, linears=self.linears,
            row_graphs=made if graphs else None, slots=64,
        )  # fmt: skip
        runner._mixed = None  # as on a GPU
        return runner

    def activate(self, **weights: float) -> None:
        for module in self.model.modules():
            if "lora_A" in module._modules:
                module._active_adapter = [name for name in module.lora_A if weights.get(name)]
        self.active_set.become(tuple(weights.items()))

    def step(self, runner: ModelRunner, *spans: tuple[Slot, Sequence[int], int]) -> torch.Tensor:
        found = runner.run(Step(tuple(Span(slot=s, ids=i, adapter=a) for s, i, a in spans)))
        return torch.cat(found)


def tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = torch.randint(2, 128, (count,), generator=generator).tolist()
    return found


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


class Talk:
    """A sequence in a slot of each of two runners."""

    def __init__(self, model: Model, adapter: int, length: int, seed: int) -> None:
        self.model, self.adapter, self.ids = model, adapter, tokens(60, seed)
        self.slots = [r.pool.open(seed, self.ids[:length]) for r in (model.runner, model.alone)]
        for runner, slot in zip((model.runner, model.alone), self.slots, strict=True):
            model.step(runner, (slot, self.ids[slot.length : length], adapter))

    def next(self, which: int) -> tuple[Slot, Sequence[int], int]:
        slot = self.slots[which]
        return slot, [self.ids[slot.length]], self.adapter


def compare(model: Model, talks: Sequence[Talk]) -> None:
    """One token for each: together, and one after the other without graphs."""
    found = model.step(model.runner, *(talk.next(0) for talk in talks))
    for talk, row in zip(talks, found, strict=True):
        assert close(row, model.step(model.alone, talk.next(1))[0])


@pytest.mark.parametrize("family", ["deepseek_v2", "llama"])
def test_rows_of_four_adapters_are_one_graph(family: str) -> None:
    model = Model(family)
    adapters, lengths = [0, BASE, 2, 1], [3, 9, 5, 7]
    talks = [Talk(model, a, n, i) for i, (a, n) in enumerate(zip(adapters, lengths, strict=True))]
    compare(model, talks)
    graphs = model.graphs
    assert (model.maker.captures, graphs.count, graphs.eager_forwards) == (1, 1, 1)
    # Over two windows and a growth of the memory, each of which takes another capture.
    for _ in range(12):
        compare(model, talks)
    captures, replays = model.maker.captures, model.maker.replays
    assert captures <= 4
    for talk in talks:
        talk.adapter = (talk.adapter + 2) % 4 - 1  # other adapters for the same rows
    model.forwards.clear()
    for _ in range(2):
        model.step(model.runner, *(talk.next(0) for talk in talks))
    assert model.maker.captures == captures
    assert model.maker.replays == replays + 2
    # A stand-in's replay calls the model; nothing else does.
    assert model.forwards == [4, 4]


def test_adapters_are_data_of_a_captured_graph() -> None:
    model = Model()
    talks = [Talk(model, 0, 3, i) for i in range(2)]
    compare(model, talks)
    captures = model.maker.captures
    for pair in ((1, 2), (BASE, 0), (2, BASE)):
        for talk, adapter in zip(talks, pair, strict=True):
            talk.adapter = adapter
        found = model.step(model.runner, *(talk.next(0) for talk in talks))
        alone = [model.step(model.alone, talk.next(1)) for talk in talks]
        assert close(found, torch.cat(alone))
    assert model.maker.captures == captures


def test_base_rows_have_the_bits_of_a_graph_of_base_rows() -> None:
    model = Model()
    talks = [Talk(model, BASE, 4 + i, i) for i in range(4)]
    compare(model, talks)
    base = model.step(model.runner, *(talk.next(0) for talk in talks))
    for talk, adapter in zip(talks, [BASE, 0, BASE, 1], strict=True):
        model.runner.pool.rollback(talk.slots[0], talk.slots[0].length - 1)
        talk.adapter = adapter
    mixed = model.step(model.runner, *(talk.next(0) for talk in talks))
    assert torch.equal(mixed[[0, 2]], base[[0, 2]])
    assert not close(mixed[1], base[1])


def test_a_copied_prefix_takes_a_new_slot() -> None:
    """The memory grows, and graphs of the old one end."""
    model = Model()
    talks = [Talk(model, i, 9, i) for i in range(2)]
    compare(model, talks)
    talks.append(Talk(model, 1, 12, 1))
    assert talks[2].slots[0].index == 2
    compare(model, talks)


def test_slots_that_do_not_take_part_keep_what_they_hold() -> None:
    model = Model()
    talks = [Talk(model, i - 1, 3 + 4 * i, i) for i in range(4)]
    compare(model, talks)
    for some in ([0, 3], [1], [2, 1], [3], [0, 2, 3]):
        compare(model, [talks[i] for i in some])
    compare(model, talks)


def test_slots_are_data_of_a_captured_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_graph, "MIN_WINDOW", 16)
    model = Model()
    talks = [Talk(model, i - 1, 3 + i, i) for i in range(4)]
    for some in ([0, 1], [2], [3, 1, 0]):
        compare(model, [talks[i] for i in some])
    captures = model.maker.captures
    for some in ([1, 3], [2, 0], [0], [3], [2, 1, 3], [0, 3, 2]):
        compare(model, [talks[i] for i in some])
    assert model.maker.captures == captures


def test_a_full_slot_beside_others() -> None:
    """Rows that stand for nothing store their token after what their slot holds: there is room."""
    model = Model()
    full, other = Talk(model, 0, 16, 1), Talk(model, 1, 3, 2)
    third = Talk(model, 2, 3, 3)
    assert model.runner.cache is not None
    compare(model, [other, third])
    compare(model, [full, other, third])
    assert model.graphs.usable


def test_prompts_beside_rows() -> None:
    model = Model()
    talks = [Talk(model, i, 3, i) for i in range(2)]
    compare(model, talks)
    prompt = tokens(9, 7)
    slots = [r.pool.open("new", prompt) for r in (model.runner, model.alone)]
    spans = [talks[0].next(0), (slots[0], prompt, 2), talks[1].next(0)]
    found = model.step(model.runner, *spans)
    alone = [(slots[1], prompt, 2) if i == 1 else talks[i // 2].next(1) for i in range(3)]
    assert close(found, torch.cat([model.step(model.alone, each) for each in alone]))
    compare(model, talks)


def test_more_rows_than_one_graph_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_graphs, "MOST_ROWS", 2)
    model = Model()
    talks = [Talk(model, i % 3, 3 + i, i) for i in range(5)]
    compare(model, talks)
    compare(model, talks[::-1])
    assert model.graphs.count >= 3


def test_graphs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_graphs, "_MOST_GRAPHS", 2)
    model = Model()
    talks = [Talk(model, i % 3, 3 + i, i) for i in range(4)]
    for some in ([0], [1], [2, 3], [0], [0, 1, 2, 3]):
        compare(model, [talks[i] for i in some])
        assert model.graphs.count <= 2


def test_active_adapters_for_all_rows_are_another_graph() -> None:
    model = Model()
    model.activate(adapter1=1.0)
    talks = [Talk(model, ACTIVE, 3 + i, i) for i in range(2)]
    compare(model, talks)
    compare(model, talks)
    model.activate(default=1.0)  # of the same ranks: the graph reads the new numbers
    compare(model, talks)
    captures = model.maker.captures
    for talk in talks:
        talk.adapter = 2
    compare(model, talks)
    assert model.maker.captures == captures + 1


def test_a_graph_that_computes_something_else_is_not_used(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Model()
    talks = [Talk(model, i, 3 + i, i) for i in range(3)]
    capture = model.maker.capture
    model.maker.capture = lambda step: (capture(step), lambda: None)[1]  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING):
        compare(model, talks)
    assert "No CUDA graph for decoding" in caplog.text
    assert not model.graphs.usable
    compare(model, talks)
