"""Windows, sinks and softcaps: models against transformers' eager attention in float32."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.family_models import small_config
from transformers import AutoModelForCausalLM, DynamicCache

from ktrt.engine import Engine
from ktrt.engine.step_rows import StepRows, TokenSpan
from ktrt.errors import KtrtError
from ktrt.kv.static import cache_argument
from ktrt.layers.attention import NAME, accelerate_attention
from ktrt.layers.engine_attention import EngineAttention, HeldKeys
from ktrt.layers.form import AttentionForm
from ktrt.layers.step_attention import attend
from ktrt.utils.patches import Patches

if TYPE_CHECKING:
    from collections.abc import Iterator

# Windows are 16 positions, prompts reach past them and past a block of queries.
FAMILIES = ["gpt_oss", "mimo_v2_flash", "gemma4_text", "mixtral", "qwen3_moe", "granitemoe_swa"]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(num_threads=2)
    yield engine
    engine.close()


def tiny(family: str) -> Any:
    torch.manual_seed(0)
    config = small_config(family)
    config.max_position_embeddings = 512
    if family == "mixtral":
        config.sliding_window = 16
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "sink" in name:
            torch.nn.init.normal_(parameter)
    return model


def logits(model: Any, chunks: list[torch.Tensor]) -> torch.Tensor:
    cache, argument = DynamicCache(config=model.config), cache_argument(model)
    with torch.inference_mode():
        return torch.cat([model(ids, **{argument: cache}).logits[0] for ids in chunks])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_models_logits_in_float32(engine: Engine, family: str) -> None:
    """A prompt in chunks, then token by token."""
    model = tiny(family)
    ids = torch.arange(300)[None] * 7 % 90 + 3
    chunks = [*ids[:, :290].split([5, 265, 20], 1), *ids[:, 290:].split(1, 1)]
    expected = logits(model, [ids])
    with Patches() as patches:
        count = accelerate_attention(model, engine, patches)
        assert count == model.config.num_hidden_layers
        assert model.config._attn_implementation == NAME
        for found in (logits(model, chunks), logits(copy.deepcopy(model), chunks)):
            errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
            assert errors.median() < 1e-4
    assert model.config._attn_implementation == "eager"
    assert torch.equal(logits(model, [ids]), expected)


FORMS = [
    AttentionForm(0.2, window=100),
    AttentionForm(0.2, window=300, sinks=torch.tensor([1.0, -2.0, 3.0, 0.5, 2.0, 0.0, 4.0, -1.0])),
    AttentionForm(0.2, softcap=3.0, sinks=torch.linspace(-2, 5, 8)),
    AttentionForm(0.2, sinks=torch.linspace(-2, 5, 8)),
    AttentionForm(0.2, softcap=2.0, window=64),
]


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, start: int, form: AttentionForm
) -> torch.Tensor:
    """query [heads, n, d], the positions from ``start`` on; [n, heads, dv] in float32."""
    heads, count, _ = query.shape
    key, value = (x.float().repeat_interleave(heads // len(x), 0) for x in (key, value))
    scores = query.float() @ key.transpose(1, 2) * form.scaling
    if form.softcap:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    own, at = torch.arange(start, start + count)[:, None], torch.arange(key.shape[1])
    seen = at <= own
    if form.window:
        seen &= at > own - form.window
    scores = scores.masked_fill(~seen, float("-inf"))
    if form.sinks is not None:
        scores = torch.cat([scores, form.sinks.view(-1, 1, 1).expand(-1, count, 1)], -1)
    return (scores.softmax(-1)[..., : key.shape[1]] @ value).transpose(0, 1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_many_sequences(engine: Engine, form: AttentionForm, dtype: torch.dtype) -> None:
    """Rows and spans against the formula; bits whatever the division of a prompt."""
    generator = torch.Generator().manual_seed(0)

    def states(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    query, key, value = states(2, 8, 600, 64), states(3, 2, 640, 64), states(3, 2, 640, 64)
    held = HeldKeys(EngineAttention(engine), key, value, form)
    options = {"softcap": form.softcap, "s_aux": form.sinks}

    def run(decode: list[tuple[int, int]], spans: list[tuple[int, int, int]]) -> torch.Tensor:
        tokens = [query[slot, :, n - 1 : n] for slot, n in decode]
        made, first = [], len(decode)
        for slot, start, end in spans:
            made.append(TokenSpan(slot, first, start, end - start))
            tokens.append(query[slot, :, start:end])
            first += end - start
        rows = StepRows(first, len(decode), spans=tuple(made))
        rows.slots.copy_(torch.tensor([slot for slot, _ in decode]))
        rows.lengths.copy_(torch.tensor([n for _, n in decode]))
        with torch.inference_mode():
            return attend(rows, torch.cat(tokens, 1)[None], held, 0.2, options, form)[0]

    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    whole = run([], [(1, 0, 600)])
    mixed = run([(0, 77), (1, 600)], [(1, 0, 130), (0, 250, 300)])
    parts = [mixed[2:132], run([], [(1, 130, 257)]), run([(0, 9)], [(1, 257, 600)])[1:]]
    assert torch.equal(torch.cat(parts), whole)
    cases = [(0, 76, mixed[:1]), (1, 599, mixed[1:2]), (0, 250, mixed[132:]), (1, 0, whole)]
    for slot, start, found in cases:
        end = start + len(found)
        states_of = query[slot, :, start:end], key[slot, :, :end], value[slot, :, :end]
        expected = reference(*states_of, start, form)
        assert (found.float() - expected).norm() / expected.norm() < tolerance
    options["position_bias"] = torch.ones(1)
    with pytest.raises(KtrtError, match="with .*position_bias, expected the form"):
        run([(0, 9)], [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rings_have_the_bits_of_flat_memory(engine: Engine, dtype: torch.dtype) -> None:
    """Position p of 1,000 lies at p % 256 there: one row, a recorded row, rows, a span."""
    generator, form = torch.Generator().manual_seed(0), AttentionForm(0.2, window=100)
    query, key, value = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((1, 4, 40, 64), (1, 2, 1024, 64), (1, 2, 1024, 64))
    )
    rings = [torch.zeros(1, 2, 256, 64, dtype=dtype) for _ in range(2)]
    for end in (90, 256, 300, 980, 1000):
        for ring, flat in zip(rings, (key, value), strict=True):
            held = torch.arange(max(0, end - 256), end)
            ring[:, :, held % 256] = flat[:, :, held]
        first = max(0, end - 40)
        rows = StepRows(41, 1, spans=(TokenSpan(0, 1, first, end - first),))
        rows.lengths.fill_(end)
        tokens = torch.cat([query[:, :, -1:], query], 2)[:, :, : 1 + end - first]
        rows.tokens = tokens.shape[2]
        attention = EngineAttention(engine)
        with torch.inference_mode():
            flat, found = (
                attend(rows, tokens, HeldKeys(attention, keys, values, form), 0.2, {}, form)[0]
                for keys, values in ((key, value), (rings[0], rings[1]))
            )
            assert torch.equal(found, flat)
            if dtype == torch.bfloat16:
                one = torch.empty(4, 64, dtype=dtype)
                attention.bind(tokens[0, :, 0], rings[0][0], rings[1][0], one, form)(
                    end, form.first_of(end)
                )
                assert torch.equal(one, flat[0])
