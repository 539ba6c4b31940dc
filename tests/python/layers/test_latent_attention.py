"""Decoding on cached latents, against transformers in float32."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from ktrt.engine import Engine
from ktrt.engine.recording import RecordedSteps, active
from ktrt.engine.step_rows import RunningStep, StepRows, TokenSpan
from ktrt.layers.latent import NAME, attention, use_latents
from ktrt.layers.latent_decoder import LatentDecoder
from ktrt.layers.linear import accelerate, refresh
from ktrt.utils.patches import Patches

if TYPE_CHECKING:
    from collections.abc import Iterator

FAMILIES = ("deepseek_v2", "deepseek_v3")
PROMPT, STEPS = 13, 40


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(num_threads=2)
    yield engine
    engine.close()


def make(family: str, *, lora: bool, query_rank: int | None = None) -> Any:
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        family, vocab_size=60, hidden_size=64, intermediate_size=96, moe_intermediate_size=32,
        num_hidden_layers=2, first_k_dense_replace=2, num_attention_heads=4, num_key_value_heads=4,
        n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1,
        kv_lora_rank=40, q_lora_rank=query_rank, qk_nope_head_dim=16, qk_rope_head_dim=8,
        v_head_dim=12, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    if lora:
        targets = ["kv_b_proj", "o_proj"]
        adapter = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
        inject_adapter_in_model(adapter, model, "default")
    return model.eval().requires_grad_(False)


def step_by_step(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the positions from the prompt's last on, each new token by itself."""
    cache = DynamicCache(config=model.config)
    logits = []
    with torch.inference_mode():
        for part in (ids[:, :PROMPT], *ids[:, PROMPT:].split(1, dim=1)):
            output = model(input_ids=part, past_key_values=cache, use_cache=True)
            logits.append(output.logits[0, -1].float())
    return torch.stack(logits)


def errors(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    relative: torch.Tensor = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    return relative


@pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(
    engine: Engine, patches: Patches, family: str, lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(family, lora=lora, query_rank=24 if family == "deepseek_v3" else None)
    ids = torch.randint(0, 60, (1, PROMPT + STEPS), generator=torch.Generator().manual_seed(1))
    exact = copy.deepcopy(model).float()(input_ids=ids).logits[0, PROMPT - 1 :]
    ordinary = errors(step_by_step(model, ids), exact)
    decode, decoded = LatentDecoder.decode, 0

    def count(*args: Any) -> torch.Tensor:
        nonlocal decoded
        decoded += 1
        return decode(*args)

    monkeypatch.setattr(LatentDecoder, "decode", count)
    accelerate(model, engine)
    assert use_latents(model, engine, patches) == 2
    assert model.config._attn_implementation == NAME
    found = errors(step_by_step(model, ids), exact)
    assert decoded == 2 * STEPS
    assert float(found.mean()) <= 1.2 * float(ordinary.mean())
    if lora:
        # Switched off in PEFT, it is off here after a refresh.
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.enable_adapters(False)
        refresh(model)
        base = copy.deepcopy(make(family, lora=False, query_rank=model.config.q_lora_rank)).float()
        plain = base(input_ids=ids).logits[0, PROMPT - 1 :]
        assert float(errors(step_by_step(model, ids), plain).mean()) < 0.05
        assert float(errors(exact, plain).mean()) > 0.1


def test_several_sequences_and_masks_are_expanded(
    engine: Engine, patches: Patches, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("deepseek_v2", lora=False)
    ids = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    ordinary = model(input_ids=ids, attention_mask=mask).logits
    monkeypatch.setattr(LatentDecoder, "decode", None)
    accelerate(model, engine)
    use_latents(model, engine, patches)
    with torch.inference_mode():
        found = model(input_ids=ids, attention_mask=mask).logits
        cache = DynamicCache(config=model.config)
        model(input_ids=ids[:, :8], attention_mask=mask[:, :8], past_key_values=cache)
        last = model(input_ids=ids[:, 8:], attention_mask=mask, past_key_values=cache).logits
    assert float(errors(found[:, -1].float(), ordinary[:, -1].float()).max()) < 0.03
    assert float(errors(last[:, -1].float(), ordinary[:, -1].float()).max()) < 0.03


def test_other_layers_expand_for_themselves(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LatentDecoder, "decode", None)
    for dtype in (torch.float32, torch.bfloat16):
        model, patches = make("deepseek_v2", lora=False).to(dtype), Patches()
        layers = [layer.self_attn for layer in model.model.layers]
        for layer in layers:
            layer.expand_kv = partial(_expand_doubled, type(layer).expand_kv, layer)
        ids = torch.randint(0, 60, (1, PROMPT + 5), generator=torch.Generator().manual_seed(1))
        expected = step_by_step(model, ids)
        try:
            if dtype == torch.bfloat16:
                accelerate(model, engine, patches=patches)
            assert use_latents(model, engine, patches) == 0, "they expand with factors of their own"
            assert model.config._attn_implementation == NAME
            assert all(layer.kt_latent.decoder is None for layer in layers)
            limit = 1e-5 if dtype == torch.float32 else 0.03
            assert float(errors(step_by_step(model, ids), expected).max()) < limit
            copied = step_by_step(copy.deepcopy(model), ids)
            assert float(errors(copied, expected).max()) < limit, "a copy, outside of the engine"
        finally:
            patches.undo()
        assert step_by_step(model, ids).equal(expected)


def _expand_doubled(expand: Any, layer: Any, *states: torch.Tensor) -> Any:
    return expand(layer, *(2 * each for each in states))


def test_decode_steps_leave_torch_one_thread(engine: Engine) -> None:
    model, used = make("deepseek_v2", lora=False), []
    model.model.norm.register_forward_hook(lambda *_: used.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        accelerate(model, engine)
        step_by_step(model, torch.arange(PROMPT + 2)[None])
        assert used == [2, 1, 1]
        with pytest.raises(IndexError):
            step_by_step(model, torch.full((1, PROMPT + 1), 60))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
def test_a_bound_step_follows_its_arrays_and_adapters(
    engine: Engine, patches: Patches, lora: bool
) -> None:
    model = make("deepseek_v2", lora=lora)
    accelerate(model, engine)
    use_latents(model, engine, patches)
    module = model.model.layers[0].self_attn
    latent: LatentDecoder = module.kt_latent.decoder
    generator = torch.Generator().manual_seed(0)

    def states(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    query, latents, positions = states(4, 24), states(200, 40), states(200, 8)
    out = torch.empty(4, 12, dtype=torch.bfloat16)
    with torch.inference_mode():
        step = latent.bind(query, latents, positions, out, 0.3)
        for length in (1, 65, 200):
            query.copy_(states(4, 24))
            step(length)
            key, value = module.kt_latent.expand(
                latents[None, None, :length], positions[None, None, :length]
            )
            exact = torch.nn.functional.scaled_dot_product_attention(
                query[None, :, None].float(), key.float(), value.float(), scale=0.3
            )
            assert float(errors(out.float(), exact[0, :, 0]).max()) < 0.02
        with pytest.raises(ValueError, match=r"latents has 8000 elements"):
            step(201)
        with pytest.raises(ValueError, match=r"out is \[4, 11\], expected \[4, 12\], contiguous"):
            latent.bind(query, latents, positions, out[:, :11], 0.3)
        weight = latent._module.kv_b_proj.__dict__["forward"].base.weight
        weight.data = weight.data.clone()
        with pytest.raises(RuntimeError, match=r"kv_b_proj has other weights"):
            step(1)


def several_adapters(engine: Engine, patches: Patches, running: RunningStep) -> Any:
    """Adapters 0 and 3 of different ranks; 3 is active."""
    model = make("deepseek_v2", lora=True)
    other = LoraConfig(r=7, lora_alpha=8, target_modules=["kv_b_proj"], init_lora_weights=False)
    inject_adapter_in_model(other, model, "adapter3")
    model.eval().requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.set_adapter("adapter3" if "adapter3" in module.lora_A else [])
    model.requires_grad_(False)
    accelerate(model, engine, patches=patches, running=running)
    use_latents(model, engine, patches, running)
    return model


def test_rows_have_adapters_of_their_own(engine: Engine, patches: Patches) -> None:
    """In one call of the engine, recorded too: each row's bits alone, and the expanded numbers."""
    running = RunningStep()
    module = several_adapters(engine, patches, running).model.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    query, latents, positions = (
        torch.randn(shape, generator=generator).to(torch.bfloat16)
        for shape in ((1, 4, 5, 24), (3, 1, 200, 40), (3, 1, 200, 8))
    )
    rows = StepRows(5, 5)
    out = torch.empty(5, 4, 12, dtype=torch.bfloat16)

    def attended(rows: StepRows, query: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(), running.running(rows):
            found, _ = attention(module, query, latents, positions, None, 0.3)
        return found[0]

    def step() -> None:
        recorder = active()
        assert recorder is not None
        inputs = [query, rows.slots, rows.lengths, rows.adapters]
        recorder.describe(inputs, torch.empty(1), None)
        with running.running(rows):
            out.copy_(attention(module, query + 0, latents, positions, None, 0.3)[0][0])

    replay = None
    for slots, lengths, adapters in (
        ([0, 1, 2, 0, 1], [200, 65, 1, 0, 65], [0, 3, -1, -3, -2]),
        ([2, 2, 0, 1, 0], [64, 64, 64, 199, 200], [3, -1, 0, 0, -2]),
    ):
        rows.slots.copy_(torch.tensor(slots))
        rows.lengths.copy_(torch.tensor(lengths))
        rows.adapters.copy_(torch.tensor(adapters))
        together = attended(rows, query)
        replay = replay or RecordedSteps().capture(step)
        out.fill_(torch.nan)
        with running.running(rows):
            replay()
        assert torch.equal(out, together)
        for row, (slot, length, adapter) in enumerate(zip(slots, lengths, adapters, strict=True)):
            alone = StepRows(1, 1)
            alone.slots[0], alone.lengths[0], alone.adapters[0] = slot, length, adapter
            one = query[:, :, row : row + 1]
            assert torch.equal(attended(alone, one)[0], together[row])
            if length == 0:
                continue
            with torch.inference_mode():
                key, value = module.kt_latent.expand_with(
                    adapter, latents[slot : slot + 1, :, :length],
                    positions[slot : slot + 1, :, :length],
                )  # fmt: skip
            exact = torch.nn.functional.scaled_dot_product_attention(
                one.float(), key.float(), value.float(), scale=0.3
            )
            assert float(errors(together[row].float(), exact[0, :, 0]).max()) < 0.02


def test_a_spans_tokens_are_expanded_with_its_adapter(engine: Engine, patches: Patches) -> None:
    running = RunningStep()
    module = several_adapters(engine, patches, running).model.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    query, latents, positions = (
        torch.randn(shape, generator=generator).to(torch.bfloat16)
        for shape in ((1, 4, 30, 24), (3, 1, 200, 40), (3, 1, 200, 8))
    )
    spans = TokenSpan(1, 0, 0, 10), TokenSpan(2, 10, 7, 20)
    rows = StepRows(30, 0, spans=spans)
    rows.adapters[:10], rows.adapters[10:] = 3, 0
    with torch.inference_mode(), running.running(rows):
        found = attention(module, query, latents, positions, None, 0.3)[0][0]
        assert running.rows is rows
    for span, adapter in zip(spans, (3, 0), strict=True):
        places, end = slice(span.first, span.first + span.count), span.start + span.count
        tokens = StepRows(end, 0)
        tokens.adapters.fill_(adapter)
        with torch.inference_mode(), running.running(tokens):
            key, value = module.kt_latent._expand(
                latents[span.slot, None, :, :end], positions[span.slot, None, :, :end]
            )
        mask = torch.ones(end, end, dtype=torch.bool).tril()[span.start :]
        exact = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, places].float(), key.float(), value.float(), mask, scale=0.3
        )[0].transpose(0, 1)
        assert float(errors(found[places].float(), exact).max()) < 0.02
