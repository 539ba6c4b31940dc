"""Decoding on cached latents, against transformers in float32."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from ktrt.engine import Engine
from ktrt.layers.latent import NAME, LatentDecoder, use_latents
from ktrt.layers.linear import accelerate, refresh

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ktrt.utils.patches import Patches

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


def test_other_models_stay(engine: Engine, patches: Patches) -> None:
    model = make("deepseek_v2", lora=False)
    assert use_latents(model, engine, patches) == 0, "kv_b_proj is not the engine's"
    accelerate(model, engine)
    layer = model.model.layers[0].self_attn
    layer.expand_kv = lambda *states: type(layer).expand_kv(layer, *(2 * s for s in states))
    assert use_latents(model, engine, patches) == 1, "one expands otherwise, by factors of its own"
    assert model.model.layers[0].self_attn.__dict__.get("kt_latent") is None


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
    latent: LatentDecoder = module.kt_latent
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
            key, value = latent.expand_kv(
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
