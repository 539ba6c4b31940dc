"""A sequence's logits are the same bits alone and in any company: other rows, other adapters, base
rows, another prompt in the same forward, any number of rows. `make test-isa` repeats this on every
instruction set below the machine's own."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.many_adapters import EVEN_LATENT, forget, load
from helpers.tiny_chat import make_tokenizer
from helpers.tiny_models import VOCAB_SIZE, LoraPlan, save_adapter, save_model

from ktrt.generate.step import Span, Step

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ktrt.generate.runner import ModelRunner
    from ktrt.session import Session

pytestmark = pytest.mark.usefixtures("one_thread")

_HEADS = {"head_dim": 64}
FAMILIES: dict[str, dict[str, int]] = {
    "deepseek_v2": EVEN_LATENT,
    "deepseek_v3": EVEN_LATENT,
    "qwen3_moe": {"intermediate_size": 224, "num_experts": 32, **_HEADS},
    "glm4_moe": {"intermediate_size": 224, "n_routed_experts": 32, **_HEADS},
    "mixtral": {"num_local_experts": 32, **_HEADS},
}
# Two kinds of attention, experts with and without shared ones; the others differ in routing.
ON_EVERY_ISA = {"deepseek_v2", "mixtral"}
BORDER = 128
NEW = 5
# Lengths of prompts with the adapter of each; the longest has two chunks.
PROMPTS = ((5, None), (17, "a"), (40, "b"), (150, "a"), (1, None), (9, "b"), (33, None), (2, "a"),
           (70, None))  # fmt: skip


@dataclass
class Row:
    """A prompt on its way: ``logits`` after the prompt and after each new token."""

    ids: list[int]
    adapter: int
    slot: Any
    logits: list[torch.Tensor]

    def next_span(self) -> Span:
        held = self.slot.length
        end = min(len(self.ids), (held // BORDER + 1) * BORDER)
        wanted = None if end == len(self.ids) else ()
        return Span(slot=self.slot, ids=self.ids[held:end], adapter=self.adapter, logits=wanted)

    def follow(self, logits: torch.Tensor) -> None:
        if len(logits):
            self.logits.append(logits[-1].clone())
            self.ids.append(int(logits[-1].float().argmax()))

    @property
    def done(self) -> bool:
        return len(self.logits) == NEW


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(f, marks=pytest.mark.end_to_end if f in ON_EVERY_ISA else ()) for f in FAMILIES
    ],
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    save_model(folder / "model", request.param, 96, **FAMILIES[request.param])
    make_tokenizer(vocab_size=384).save_pretrained(folder / "model")
    save_adapter(folder / "a", folder / "model", "a", LoraPlan(rank=8, seed=1, experts=0.5))
    save_adapter(folder / "b", folder / "model", "b", LoraPlan(rank=5, seed=2, experts=0.5))
    return folder


@pytest.fixture(scope="module", params=["bfloat16", "float32", "int8"])
def session(request: pytest.FixtureRequest, folder: Path) -> Iterator[Session]:
    options: dict[str, Any] = {"infer_dtype": request.param}
    if request.param == "int8":
        options = {"kt_backend": "AMXINT8", "quantization_bit": 8}
    with load(folder, ("a", "b"), **options) as session:
        yield session


def begin(session: Session, index: int) -> Row:
    length, adapter = PROMPTS[index]
    generator = torch.Generator().manual_seed(index)
    ids: list[int] = torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist()
    number = session.adapters.number(adapter)
    return Row(ids, number, runner_of(session).pool.open(index, ids), [])


def runner_of(session: Session) -> ModelRunner:
    return session._open().runner


def run(session: Session, sequences: Sequence[Row]) -> None:
    """One step of all these."""
    logits = runner_of(session).run(Step(tuple(each.next_span() for each in sequences)))
    for each, found in zip(sequences, logits, strict=True):
        each.follow(found)
        if each.done:
            runner_of(session).pool.close(each.slot, keep=False)


@pytest.fixture(scope="module")
def alone(session: Session) -> list[Row]:
    session.adapters.off()
    found = []
    for index in range(len(PROMPTS)):
        forget(session)
        one = begin(session, index)
        while not one.done:
            run(session, [one])
        found.append(one)
    forget(session)
    return found


def same(found: Row, alone: Row) -> bool:
    pairs = zip(found.logits, alone.logits, strict=False)
    return all(torch.equal(one, other) for one, other in pairs) and found.ids == alone.ids


def test_the_model_mixes_and_adapters_matter(session: Session, alone: list[Row]) -> None:
    assert runner_of(session).mixes
    one = begin(session, 1)
    one.adapter = -1
    while not one.done:
        run(session, [one])
    assert not same(one, alone[1])


def test_all_together(session: Session, alone: list[Row]) -> None:
    together = [begin(session, index) for index in range(len(PROMPTS))]
    while any(not each.done for each in together):
        run(session, [each for each in together if not each.done])
    wrong = [index for index, one in enumerate(together) if not same(one, alone[index])]
    assert not wrong


@pytest.mark.parametrize("seed", range(2))
def test_random_company(session: Session, alone: list[Row], seed: int) -> None:
    """Sequences come and go; in every step some of those under way take part, in any order."""
    chance = random.Random(seed)
    waiting = chance.sample(range(len(PROMPTS)), len(PROMPTS))
    running: dict[int, Row] = {}
    while waiting or running:
        for _ in range(chance.randint(0, 3)):
            if waiting:
                index = waiting.pop()
                running[index] = begin(session, index)
        taking_part = chance.sample(sorted(running), chance.randint(0, len(running)))
        if not taking_part:
            continue
        run(session, [running[index] for index in taking_part])
        for index in taking_part:
            if running[index].done:
                assert same(running.pop(index), alone[index]), f"sequence {index}"
