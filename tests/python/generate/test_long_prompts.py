"""Blocks of a prompt side by side, with every kind of cache: transformers' models whose experts
meet, without the engine."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.family_models import families, random_model

from ktrt.errors import KtrtError
from ktrt.experts.gpu.blocks import Blocks, Call
from ktrt.generate.runner import KvCache
from ktrt.generate.step import Span, Step, StepStopped
from ktrt.kv import positions

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.usefixtures("one_thread")

# Full attention, sliding windows, linear attention, convolutions, state-space layers.
FAMILIES = ("deepseek_v2", "gpt_oss", "gemma4_text", "qwen3_next", "lfm2_moe", "granitemoehybrid")
BLOCK, PROMPT = 17, 60


class Meeting:
    """The experts of one layer, which all blocks have to reach."""

    def __init__(self, blocks: Blocks, plain: Any) -> None:
        self.blocks, self.plain = blocks, plain
        self.tokens: list[int] = []

    def forward(self, states: Any, index: Any, weights: Any) -> Any:
        if not self.blocks.running:
            return self.plain(states, index, weights)
        return self.blocks.meet(Call(self, states, index, weights, None))

    def streamed(self, calls: Sequence[Call]) -> list[torch.Tensor]:
        inputs = [
            torch.cat([getattr(call, name) for call in calls])
            for name in ("states", "index", "weights")
        ]
        self.tokens.append(len(inputs[0]))
        found: torch.Tensor = self.plain(*inputs)
        return list(found.split([len(call.states) for call in calls]))


def lengths(tokens: int) -> list[int]:
    return [end - first for first, end in pairwise([*range(0, tokens, BLOCK), tokens])]


def meet(model: Any) -> tuple[Any, list[Meeting]]:
    """A stand-in for the GPU's share, and the layers' meetings."""
    gpu = SimpleNamespace(
        threshold=BLOCK, blocks=Blocks(torch.device("cpu")), block_lengths=lengths, version=0,
        refresh=lambda: None, prefill_chunk=lambda remaining, divides: remaining,
    )  # fmt: skip
    meetings = []
    for name, module in model.named_modules():
        if name.endswith("experts") and "shared" not in name:
            meetings.append(Meeting(gpu.blocks, module.forward))
            module.forward = meetings[-1].forward
    gpu.layers = meetings
    return gpu, meetings


@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_are_those_of_one_forward(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(positions, "SLACK", 6)
    monkeypatch.setattr(positions, "_BLOCK", 8)
    family = next(each for each in families() if each.model_type == model_type)
    model = random_model(family)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 90, (2 * PROMPT,), generator=generator).tolist()
    expected = [KvCache(model).forward(ids[:PROMPT])]
    whole = KvCache(model)
    expected += [whole.forward(ids[: PROMPT + 41]), whole.forward([5])]
    gpu, meetings = meet(model)
    cache = KvCache(model, gpu=gpu)
    assert meetings
    # A prompt, what follows it, and a step.
    found = [cache.forward(part) for part in (ids[:PROMPT], ids[PROMPT : PROMPT + 41], [5])]
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-4
    assert {tuple(each.tokens) for each in meetings} == {(PROMPT, 41)}


def test_a_watched_prompt_is_stopped_between_layers() -> None:
    model = random_model(next(each for each in families() if each.model_type == FAMILIES[0]))
    ids = torch.arange(2, 2 + PROMPT).tolist()
    expected = KvCache(model).forward(ids)
    gpu, meetings = meet(model)
    cache, seen = KvCache(model, gpu=gpu), []
    cache.forward(ids[:5])

    def watch(layers: int, total: int) -> None:
        seen.append((layers, total))
        if layers == 1:
            raise StepStopped

    slot = cache._slot
    assert slot is not None
    with pytest.raises(StepStopped):
        cache.runner.run(Step((Span(slot=slot, ids=ids[5:], watch=watch),)))
    assert seen == [(1, len(meetings))]
    assert slot.length == 5
    assert not gpu.blocks.running
    found = cache.forward(ids[5:])
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_blocks_of_different_layers_are_an_error() -> None:
    blocks, nothing = Blocks(torch.device("cpu")), torch.zeros(1, 1)
    layers = [Meeting(blocks, None) for _ in range(2)]

    def forward(layer: Meeting) -> torch.Tensor:
        return blocks.meet(Call(layer, nothing, nothing, nothing, None))

    with pytest.raises(KtrtError, match="different layers"):
        blocks.run(
            [lambda: forward(layers[0]), lambda: forward(layers[1])], lambda: None, lambda _: None
        )
    with pytest.raises(KtrtError, match="different layers"):
        blocks.run(
            [lambda: forward(layers[0]), lambda: torch.zeros(1)], lambda: None, lambda _: None
        )
    assert not blocks.running
