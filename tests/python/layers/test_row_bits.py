"""A decoder layer's parts outside attention: a row's bits are the same in any company."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ktrt.engine import Engine, active_isa
from ktrt.layers.linear import accelerate
from ktrt.layers.norm import accelerate_norms
from ktrt.layers.row_products import FixedProducts
from ktrt.utils.patches import Patches

if TYPE_CHECKING:
    from collections.abc import Iterator

HIDDEN, EXPERTS, TOP_K = 320, 64, 6
_SIZES = {
    "hidden_size": HIDDEN, "intermediate_size": 208, "moe_intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "vocab_size": 64, "num_experts_per_tok": TOP_K, "first_k_dense_replace": 1,
    "n_shared_experts": 1, "kv_lora_rank": 24, "q_lora_rank": 40, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "n_group": 8, "topk_group": 4,
    "num_experts": EXPERTS, "n_routed_experts": EXPERTS, "num_local_experts": EXPERTS,
}  # fmt: skip
FAMILIES = ("deepseek_v3", "qwen3_moe", "glm4_moe", "mixtral")
ROWS = (2, 7, 40)
# Below AMX, where the number of rows may pick the kernel.
LEVELS = ("portable", "avx2", "avx512")


def model_of(family: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    known = AutoConfig.for_model(family)
    sizes = {name: size for name, size in _SIZES.items() if hasattr(known, name)}
    config = AutoConfig.for_model(family, **sizes)
    config._experts_implementation = "eager"
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval().requires_grad_(False)


@pytest.fixture(
    params=LEVELS[: LEVELS.index(active_isa()) + 1] if active_isa() in LEVELS else LEVELS
)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setitem(os.environ, "KTRT_ISA", request.param)
    engine = Engine(num_threads=2)
    yield engine
    engine.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_without_attention(engine: Engine, family: str, dtype: torch.dtype) -> None:
    model = model_of(family, dtype)
    patches = Patches()
    accelerate_norms(model, patches)
    accelerate(model, engine, patches=patches)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, max(ROWS), HIDDEN, generator=generator).to(dtype)
    with torch.inference_mode(), FixedProducts(engine):
        for layer in model.model.layers:
            for part in (layer.input_layernorm, layer.mlp):
                alone = torch.cat([part(x[:, row : row + 1]) for row in range(max(ROWS))], dim=1)
                for rows in ROWS:
                    assert torch.equal(part(x[:, :rows]), alone[:, :rows]), (part, rows)
        alone = torch.cat([model.lm_head(x[:, row : row + 1]) for row in range(max(ROWS))], dim=1)
        assert torch.equal(model.lm_head(x), alone)
    patches.undo()
