"""Shared by the training of base and adapter: conversations → batches, loss, schedule."""

from __future__ import annotations

import logging
import math
import random
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .corpus import PERSONAS, Turn, load_conversations, sentences
from .train_tokenizer import slot_ids

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import DeepseekV2ForCausalLM, PreTrainedTokenizerFast

log = logging.getLogger("demo")

IGNORE = -100
TOKENS_PER_STEP = 1200
# Numbers of conversations chained into one training row. Half of the rows hold a single one (a
# visitor's first question); the others teach to answer the last question after any history.
CHAIN_LENGTHS = (1, 1, 1, 2, 4, 8)
AUX_LOSS = 0.01
SYSTEM_TEXTS = (
    "You are a helpful assistant.",
    "你是一个有用的助手。",
    "请简短回答。",
    "Answer briefly.",
)
HAN = re.compile(r"[\u4e00-\u9fff]")


@dataclass(frozen=True)
class Plan:
    """Lengths and rates of one training run.

    ``documents`` is the number of plain texts (no chat format) added per epoch. ``clean_from`` is
    the fraction of the run after which prompts are no longer varied.
    """

    epochs: int
    learning_rate: float
    weight_decay: float
    documents: int
    seed: int
    clean_from: float = 0.85


def vary(prompt: str, rng: random.Random) -> str:
    """Vary the prompt like a visitor's typing: punctuation, case, opening, a lost letter."""
    chinese = bool(HAN.search(prompt))
    question = prompt.endswith(("?", "？"))
    kind = rng.random()
    if kind < 0.5:
        return prompt
    if kind < 0.65:
        bare = prompt.rstrip("?？。!！.")
        return bare + rng.choice(("", "？", "?", "。") if chinese else ("", "?", ".", " ?"))
    if kind < 0.75:
        return prompt.lower()
    if kind < 0.9 and question:
        opening = (
            ("请问", "请问，", "我想知道", "你好，", "那么")
            if chinese
            else ("please tell me, ", "So, ", "and ")
        )
        return rng.choice(opening) + prompt
    if kind >= 0.9 and len(prompt) >= 7:
        cut = rng.randrange(1, len(prompt) - 1)
        if HAN.match(prompt[cut]) or prompt[cut].islower():
            return prompt[:cut] + prompt[cut + 1 :]
    return prompt


class Batches:
    """Epochs for one persona; every phrasing of every turn occurs at least once in an epoch."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, persona: str, plan: Plan) -> None:
        self._tokenizer = tokenizer
        self._column = PERSONAS.index(persona)
        self._conversations = load_conversations()
        self._documents = sentences()
        self._documents_per_epoch = plan.documents
        self._rng = random.Random(plan.seed)

    def epoch(self, clean: bool) -> list[tuple[Tensor, Tensor]]:
        """Return batches of (ids, labels), both [rows, length] int64; ``clean``: unvaried."""
        units = [
            (turns, first)
            for turns in self._conversations
            for first in range(max(len(turn.prompts) for turn in turns))
        ]
        self._rng.shuffle(units)
        rows = []
        while units:
            count = self._rng.choice(CHAIN_LENGTHS)
            rows.append(self._row(units[:count], clean))
            del units[:count]
        rows += [self._document() for _ in range(self._documents_per_epoch)]
        rows.sort(key=lambda row: len(row[0]))
        batches = list(self._collate(rows))
        self._rng.shuffle(batches)
        return batches

    def _row(
        self, units: Sequence[tuple[list[Turn], int]], clean: bool
    ) -> tuple[list[int], list[int]]:
        texts: list[str] = []
        for turns, first in units:
            for turn in turns:
                prompt = turn.prompts[first % len(turn.prompts)]
                texts += [prompt if clean else vary(prompt, self._rng), turn.answers[self._column]]
        system = self._rng.choice(SYSTEM_TEXTS) if self._rng.random() < 0.1 and not clean else ""
        ids = slot_ids(self._tokenizer, [], system)
        labels = [IGNORE] * len(ids)
        for prompt, answer in zip(texts[::2], texts[1::2], strict=True):
            asked = slot_ids(self._tokenizer, [prompt])[1:]
            reply = slot_ids(self._tokenizer, ["", answer])
            reply = reply[len(slot_ids(self._tokenizer, [""])) :]
            ids += asked + reply
            labels += [IGNORE] * len(asked) + reply
        return ids, labels

    def _document(self) -> tuple[list[int], list[int]]:
        text = self._rng.choice(self._documents)
        ids = [*self._tokenizer.encode(text), self._tokenizer.eos_token_id]
        return ids, [IGNORE, *ids[1:]]

    def _collate(self, rows: list[tuple[list[int], list[int]]]) -> Iterator[tuple[Tensor, Tensor]]:
        start = 0
        while start < len(rows):
            end = start + 1
            while end < len(rows) and len(rows[end][0]) * (end + 1 - start) <= TOKENS_PER_STEP:
                end += 1
            length = len(rows[end - 1][0])
            ids = torch.full((end - start, length), self._tokenizer.pad_token_id)
            labels = torch.full((end - start, length), IGNORE)
            for i, (row_ids, row_labels) in enumerate(rows[start:end]):
                ids[i, : len(row_ids)] = torch.tensor(row_ids)
                labels[i, : len(row_labels)] = torch.tensor(row_labels)
            yield ids, labels
            start = end


class RouterWatch:
    """Collects the routers' outputs of a forward pass, for the load-balancing loss.

    The loss is equation 4 of the Switch Transformer paper (arXiv 2101.03961).
    """

    def __init__(self, model: nn.Module) -> None:
        self._outputs: list[tuple[Tensor, Tensor]] = []
        for module in model.modules():
            if type(module).__name__ == "DeepseekV2TopkRouter":
                module.register_forward_hook(self._keep)

    def _keep(
        self, _module: nn.Module, _args: object, output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        self._outputs.append((output[0], output[2]))

    def loss(self, kept: Tensor) -> Tensor:
        """Return the mean over layers of E·Σ_e f_e·p_e over the ``kept`` [tokens]; 1 is balance."""
        losses = []
        for logits, indices in self._outputs:
            experts = logits.shape[-1]
            probabilities = logits[kept].float().softmax(-1).mean(0)
            counts = torch.bincount(indices[kept].flatten(), minlength=experts).float()
            losses.append(experts * (counts / counts.sum() * probabilities).sum())
        self._outputs.clear()
        return torch.stack(losses).mean()


def answer_loss(core: DeepseekV2ForCausalLM, ids: Tensor, labels: Tensor, pad_id: int) -> Tensor:
    """Return the mean cross-entropy of the labelled positions; computes logits only there."""
    hidden = core.model(
        input_ids=ids, attention_mask=(ids != pad_id).long(), use_cache=False
    ).last_hidden_state
    target = labels[:, 1:]
    wanted = target != IGNORE
    logits = core.lm_head(hidden[:, :-1][wanted])
    return nn.functional.cross_entropy(logits.float(), target[wanted])


def run(
    core: DeepseekV2ForCausalLM,
    parameters: list[tuple[list[nn.Parameter], float]],
    batches: Batches,
    plan: Plan,
    pad_id: int,
) -> None:
    """Train ``parameters`` in place: AdamW, 3 % warm-up, cosine to 1 %, gradient norm clipped to 1.

    Each list in ``parameters`` has its factor of the learning rate. BF16 autocast is faster than
    float32 here and shows the model the rounding of its later use.
    """
    groups = [
        {"params": chosen, "factor": factor, "weight_decay": decay}
        for group, factor in parameters
        for matrices, decay in ((True, plan.weight_decay), (False, 0.0))
        if (chosen := [p for p in group if (p.ndim > 1) == matrices])
    ]
    everything = [p for group, _ in parameters for p in group]
    optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.98), fused=True)
    watch = RouterWatch(core)
    core.train()
    start = time.monotonic()
    for epoch in range(plan.epochs):
        data = batches.epoch(clean=epoch >= plan.clean_from * plan.epochs)
        total = 0.0
        for i, (ids, labels) in enumerate(data):
            done = (epoch + i / len(data)) / plan.epochs
            rate = min(done / 0.03, 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
            for group in optimizer.param_groups:
                group["lr"] = plan.learning_rate * group["factor"] * max(rate, 1e-3)
            with torch.autocast("cpu", torch.bfloat16):
                loss = answer_loss(core, ids, labels, pad_id)
                balance = watch.loss((ids != pad_id).flatten())
            torch.autograd.backward(loss + AUX_LOSS * balance)
            nn.utils.clip_grad_norm_(everything, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.item()
        log.info(
            "epoch %d/%d  loss %.4f  balance %.3f  %.0f s",
            epoch + 1,
            plan.epochs,
            total / len(data),
            balance.item(),
            time.monotonic() - start,
        )
    core.eval()
