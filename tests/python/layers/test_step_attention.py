"""Attention of a forward of many sequences: each one's numbers and bits alone."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.tiny_models import VOCAB_SIZE, save_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM, Cache
from transformers.cache_utils import CacheLayerMixin

from ktrt.engine import Engine
from ktrt.engine.recording import RecordedSteps, active
from ktrt.engine.step_rows import RunningStep, StepRows, TokenSpan
from ktrt.errors import KtrtError
from ktrt.kv.static import cache_argument
from ktrt.layers.attention import accelerate_attention
from ktrt.layers.engine_attention import EngineAttention, HeldKeys
from ktrt.layers.form import AttentionForm
from ktrt.layers.latent import use_latents
from ktrt.layers.step_attention import attend

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ktrt.utils.patches import Patches

SLOTS, CAPACITY = 4, 600
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(num_threads=2, fixed_kernels=True)
    yield engine
    engine.close()


def states(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Sequences:
    """Queries, keys and values of sequences of 600 positions, in slots."""

    def __init__(self, engine: Engine, dtype: torch.dtype, heads: int, groups: int) -> None:
        self.attention = EngineAttention(engine)
        self.query = states(0, SLOTS, heads, CAPACITY, 48, dtype=dtype)
        self.key = states(1, SLOTS, groups, CAPACITY, 48, dtype=dtype)
        self.value = states(2, SLOTS, groups, CAPACITY, 32, dtype=dtype)

    def run(self, rows: StepRows, query: torch.Tensor) -> torch.Tensor:
        """[tokens, heads, 32]"""
        held = HeldKeys(self.attention, self.key, self.value, AttentionForm(0.2))
        with torch.inference_mode():
            return attend(rows, query, held, 0.2, {})[0]

    def step(
        self, decode: list[tuple[int, int]], spans: list[tuple[int, int, int]]
    ) -> list[torch.Tensor]:
        """``decode``: slots with lengths; ``spans``: slots, first and last positions. Returns the
        outputs of each. After a span, a pool holds zeros."""
        tokens = [self.query[slot, :, max(n - 1, 0)][:, None] for slot, n in decode]
        first, made = len(decode), []
        for slot, start, end in spans:
            made.append(TokenSpan(slot, first, start, end - start))
            tokens.append(self.query[slot, :, start:end])
            first += end - start
        rows = StepRows(first, len(decode), spans=tuple(made))
        rows.slots.copy_(torch.tensor([slot for slot, _ in decode], dtype=torch.int64))
        rows.lengths.copy_(torch.tensor([n for _, n in decode], dtype=torch.int64))
        kept = self.key.clone(), self.value.clone()
        for slot, _, end in spans:
            self.key[slot, :, end:], self.value[slot, :, end:] = 0, 0
        found = self.run(rows, torch.cat(tokens, dim=1)[None])
        self.key, self.value = kept
        return list(found.split([1] * len(decode) + [end - start for _, start, end in spans]))


def test_engine_attends_to_a_slot(engine: Engine) -> None:
    """Against torch in float32."""
    for dtype in DTYPES:
        sequences = Sequences(engine, dtype, 8, 2)
        decode, spans = [(3, 511), (3, 1), (2, 0)], [(1, 0, 40), (0, 130, 600), (2, 259, 260)]
        found = sequences.step(decode, spans)
        assert not found[2].any(), "a row of nothing"
        ends = [(slot, n - 1, n) for slot, n in decode[:2]] + spans
        for (slot, start, end), out in zip(ends, found[:2] + found[3:], strict=True):
            mask = torch.ones(end, end, dtype=torch.bool).tril()[start:]
            query, key, value = (
                x[slot : slot + 1].float()
                for x in (sequences.query, sequences.key, sequences.value)
            )
            expected = scaled_dot_product_attention(
                query[:, :, start:end], key[:, :, :end], value[:, :, :end], mask, scale=0.2,
                enable_gqa=True,
            )[0].transpose(0, 1)  # fmt: skip
            error = (out.float() - expected).norm() / expected.norm()
            assert error < (1e-6 if dtype == torch.float32 else 6e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (8, 2)])
@pytest.mark.parametrize("threads", [1, 2])
def test_bits_depend_neither_on_company_nor_on_chunks(
    engine: Engine, dtype: torch.dtype, heads: int, groups: int, threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sequences = Sequences(engine, dtype, heads, groups)
        for end in (600, 140):
            (cold,) = sequences.step([], [(1, 0, end)])
            for cuts in ([130], [1, 2, 33, 139], [128, 135], [256, 512], [255, 257, 300, 513]):
                edges = [0, *(cut for cut in cuts if cut < end), end]
                chunks = [
                    sequences.step([(0, 77), (2, 500)], [(3, 0, 9), (1, start, stop)])
                    for start, stop in pairwise(edges)
                ]
                assert torch.equal(torch.cat([chunk[3] for chunk in chunks]), cold), cuts
                (alone,) = sequences.step([(2, 500)], [])
                assert all(torch.equal(chunk[1], alone) for chunk in chunks)
        # The tokens after a cut have the bits of a longer prompt's.
        (short,) = sequences.step([], [(1, 0, 140)])
        (long,) = sequences.step([], [(1, 0, 600)])
        assert torch.equal(long[:140], short)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_recorded_step_reads_slots_and_lengths(engine: Engine, dtype: torch.dtype) -> None:
    sequences = Sequences(engine, dtype, 8, 2)
    rows = StepRows(3, 3)
    query = states(5, 1, 8, 3, 48, dtype=dtype)
    held = HeldKeys(sequences.attention, sequences.key, sequences.value, AttentionForm(0.2))
    out = torch.empty(3, 8, 32, dtype=dtype)

    def step() -> None:
        recorder = active()
        assert recorder is not None
        recorder.describe([query, rows.slots, rows.lengths], torch.empty(1), None)
        out.copy_(attend(rows, query + 0, held, 0.2, {})[0])

    rows.slots.copy_(torch.tensor([1, 2, 3]))
    rows.lengths.copy_(torch.tensor([5, 0, 600]))
    replay = RecordedSteps().capture(step)
    assert torch.equal(out, sequences.run(rows, query))
    for slots, lengths in (([0, 0, 2], [64, 300, 1]), ([3, 1, 1], [0, 599, 65])):
        rows.slots.copy_(torch.tensor(slots))
        rows.lengths.copy_(torch.tensor(lengths))
        query.copy_(states(sum(lengths), 1, 8, 3, 48, dtype=dtype))
        out.fill_(torch.nan)
        replay()
        assert torch.equal(out, sequences.run(rows, query))
    spans = StepRows(3, 2, spans=(TokenSpan(0, 2, 4, 1),))

    def prefill() -> None:
        attend(spans, query, held, 0.2, {})

    with pytest.raises(KtrtError, match="it has spans of prefill tokens"):
        RecordedSteps().capture(prefill)


def test_refuses_what_is_no_plain_attention_of_the_step(engine: Engine) -> None:
    sequences = Sequences(engine, torch.float32, 4, 4)
    rows, query = StepRows(3, 3), states(5, 1, 4, 3, 48, dtype=torch.float32)
    held = HeldKeys(sequences.attention, sequences.key, sequences.value, AttentionForm(0.2))
    with pytest.raises(KtrtError, match=r"\[1, 4, 2, 48\] queries, expected the step's 3 tok"):
        attend(rows, query[:, :, :2], held, 0.2, {})
    with pytest.raises(KtrtError, match="with softcap, expected the form"):
        attend(rows, query, held, 0.2, {"softcap": 2.0, "dropout": 0.0})
    assert rows.attended == 0


class PoolLayer(CacheLayerMixin):  # type: ignore[misc]
    """Stores a forward of many sequences as the pool does."""

    is_sliding = False

    def __init__(self, running: RunningStep) -> None:
        super().__init__()
        self.running = running

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = (
            x.new_zeros(SLOTS, x.shape[1], CAPACITY, x.shape[3]) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows = self.running.rows
        assert rows is not None
        rows.stored += 1
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            for row in range(rows.decode):
                if rows.lengths[row]:
                    held[rows.slots[row], :, rows.lengths[row] - 1] = new[0, :, row]
            for span in rows.spans:
                places = slice(span.first, span.first + span.count)
                held[span.slot, :, span.start : span.start + span.count] = new[0, :, places]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return CAPACITY


class Steps:
    """A model's forwards of many sequences."""

    def __init__(self, model: Any, running: RunningStep) -> None:
        self._model, self._running = model, running
        layers = [PoolLayer(running) for _ in range(model.config.num_hidden_layers)]
        self._cache = Cache(layers=layers)
        self.lengths = [0] * SLOTS

    def run(self, parts: list[tuple[int, torch.Tensor, int]], idle: int = 0) -> list[torch.Tensor]:
        """``parts``: slots, their next tokens [n], adapters; the decode rows first, after ``idle``
        ones. Returns logits [n, vocabulary] of each."""
        decode = idle + sum(len(ids) == 1 for _, ids, _ in parts)
        tokens = [torch.zeros(idle, dtype=torch.int64)] + [ids for _, ids, _ in parts]
        positions, first, spans = [0] * idle, idle, []
        for slot, ids, _ in parts:
            positions += range(self.lengths[slot], self.lengths[slot] + len(ids))
            if len(ids) > 1:
                spans.append(TokenSpan(slot, first, self.lengths[slot], len(ids)))
            self.lengths[slot] += len(ids)
            first += len(ids)
        rows = StepRows(first, decode, spans=tuple(spans))
        rows.slots[:idle] = SLOTS
        for row, (slot, _, _) in enumerate(parts[: decode - idle], idle):
            rows.slots[row], rows.lengths[row] = slot, self.lengths[slot]
        rows.adapters.copy_(torch.tensor([-3] * idle + [a for _, x, a in parts for _ in x]))
        with torch.inference_mode(), self._running.running(rows):
            logits = self._model(
                input_ids=torch.cat(tokens)[None], position_ids=torch.tensor([positions]),
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool),
                **{cache_argument(self._model): self._cache},
            ).logits[0]  # fmt: skip
        assert rows.stored == rows.attended == self._model.config.num_hidden_layers
        return list(logits[idle:].float().split([len(ids) for _, ids, _ in parts]))


def deepseek_v3(dtype: torch.dtype) -> Any:
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        "deepseek_v3", vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96,
        moe_intermediate_size=32, num_hidden_layers=2, first_k_dense_replace=1,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, n_shared_experts=1,
        num_experts_per_tok=2, n_group=1, topk_group=1, kv_lora_rank=40, q_lora_rank=24,
        qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12, max_position_embeddings=512,
        initializer_range=0.2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "deepseek_v2", "deepseek_v3"])
def test_a_models_logits(engine: Engine, patches: Patches, tmp_path: Path, model_type: str) -> None:
    """Against transformers' own forward of each sequence."""
    if model_type == "deepseek_v3":
        model = deepseek_v3(torch.float32)
    else:
        folder = save_model(tmp_path / "model", model_type, 96)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = [(torch.arange(n) * (3 + slot) + 5) % VOCAB_SIZE for slot, n in enumerate((150, 24, 304))]
    with torch.inference_mode():
        expected = [model(input_ids=each[None]).logits[0] for each in ids]
    running = RunningStep()
    accelerate_attention(model, engine, patches, running)
    use_latents(model, engine, patches, running)
    steps = Steps(model, running)
    one, two, three = ids
    plan: list[tuple[int, list[tuple[int, torch.Tensor]]]] = [
        (0, [(2, one[:130]), (0, two[:7])]),
        (0, [(2, one[130:131]), (0, two[7:8]), (3, three[:300])]),
        (2, [(3, three[300:301]), (2, one[131:132]), (0, two[8:20])]),
        (1, [(0, two[20:21]), (3, three[301:302])]),
        (0, [(0, two[21:]), (2, one[132:]), (3, three[302:])]),
    ]
    found: dict[int, list[torch.Tensor]] = {2: [], 0: [], 3: []}
    for idle, parts in plan:
        named = [(slot, new, -2) for slot, new in parts]
        for (slot, _), logits in zip(parts, steps.run(named, idle), strict=True):
            found[slot].append(logits)
    for each, wanted in zip(found.values(), expected, strict=True):
        logits = torch.cat(each)
        assert float(((logits - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max()) < 1e-4
    # Forwards of others are as they were.
    with torch.inference_mode():
        alone = partial(model, input_ids=one[None])
        assert (alone().logits[0] - expected[0]).norm() / expected[0].norm() < 1e-5
