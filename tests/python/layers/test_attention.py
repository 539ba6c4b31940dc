"""Attention of one token on the CPU: the numbers of torch's kernel, on our models' layers only."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from helpers.family_models import small_config
from helpers.tiny_models import VOCAB_SIZE, save_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ktrt.engine import Engine
from ktrt.layers import attention
from ktrt.layers.attention import NAME, accelerate_attention
from ktrt.layers.engine_attention import EngineAttention, head_array
from ktrt.layers.form import AttentionForm
from ktrt.layers.one_token import one_token
from ktrt.utils.patches import Patches

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-3}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(num_threads=2)
    yield engine
    engine.close()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("rows", "heads", "groups", "size", "value_size", "tokens"),
    [
        (1, 16, 4, 128, 128, 77),
        (2, 4, 2, 128, 64, 1500),
        (1, 4, 4, 48, 32, 1),
        (2, 8, 2, 40, 40, 300),
        (3, 6, 1, 16, 8, 5),
    ],
)
@pytest.mark.parametrize("masked", ["none", "bool", "added"])
def test_numbers_of_torch(
    engine: Engine, dtype: torch.dtype, rows: int, heads: int, groups: int, size: int,
    value_size: int, tokens: int, masked: str,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    q = 3 * torch.randn(rows, heads, 1, size, generator=generator).to(dtype)
    k = torch.randn(rows, groups, tokens, size, generator=generator).to(dtype)
    v = torch.randn(rows, groups, tokens, value_size, generator=generator).to(dtype)
    mask = None
    if masked != "none":
        mask = torch.rand(rows, 1, 1, tokens, generator=generator) < 0.7
        mask[..., 0] = True
        if masked == "added":
            mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    reference = mask.float() if masked == "added" and mask is not None else mask
    expected = scaled_dot_product_attention(
        q.float(), k.float(), v.float(), reference, scale=0.2, enable_gqa=True
    )
    expected = expected.transpose(1, 2)
    form = AttentionForm(0.2)
    results = [one_token(q, k, v, mask, form)]
    in_engine = EngineAttention(engine)
    assert in_engine.takes(q, k, v, mask) == (dtype == torch.bfloat16)
    if dtype == torch.bfloat16:
        results.append(in_engine(q, k, v, mask, form))
        # Views of a cache that has room for more.
        room = [torch.full((rows, groups, tokens + 9, n), torch.nan, dtype=dtype)
                for n in (size, value_size)]  # fmt: skip
        views = [each[:, :, :tokens].copy_(x) for each, x in zip(room, (k, v), strict=True)]
        assert torch.equal(in_engine(q, views[0], views[1], mask, form), results[1])
    for found in results:
        assert found.shape == (rows, 1, heads, value_size)
        assert found.dtype == dtype
        assert (found.float() - expected).norm() / expected.norm() < TOLERANCE[dtype]


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v2", "mixtral", "granitemoe"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_models_logits(
    engine: Engine, patches: Patches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    model_type: str, dtype: torch.dtype,
) -> None:  # fmt: skip
    """Token by token after a prompt, marked layers against the same layers unmarked."""
    folder = save_model(tmp_path / "model", model_type, 96)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    ids = torch.arange(3, 43)[None] * 7 % VOCAB_SIZE
    calls = 0

    in_engine = dtype == torch.bfloat16
    ours = EngineAttention.__call__ if in_engine else one_token

    def counted(*arguments: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return ours(*arguments)  # type: ignore[arg-type]

    place, name = (EngineAttention, "__call__") if in_engine else (attention, "one_token")
    monkeypatch.setattr(place, name, counted)

    def logits() -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        steps = [ids[:, :20], *ids[:, 20:].split(1, dim=1)]
        with torch.inference_mode():
            found = [model(step, past_key_values=cache).logits[0, -1] for step in steps]
        return torch.stack(found).float()

    expected = logits()
    assert calls == 0
    layers = accelerate_attention(model, engine, patches)
    assert layers == model.config.num_hidden_layers
    found = logits()
    assert calls == 20 * layers
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    # In bfloat16 a router near a tie may decide otherwise.
    assert errors.median() < (1e-4 if dtype == torch.float32 else 0.03)
    with torch.enable_grad():
        model(ids[:, :1])
    with torch.inference_mode():
        copy.deepcopy(model)(ids[:, :1])
    # A copy has no engine: torch computes it.
    assert calls == 20 * layers


def test_models_with_other_attention_are_left_alone(
    engine: Engine, patches: Patches, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_model(tmp_path / "model", "qwen3_moe", 96)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="flex_attention")
    assert accelerate_attention(model, engine, patches) == 0
    config = small_config("deepseek_v32")
    with torch.device("meta"):
        indexed = AutoModelForCausalLM.from_config(config)
    with caplog.at_level("INFO"):
        assert accelerate_attention(indexed, engine, patches) == 0
    assert "stays transformers' sdpa: DeepseekV32Attention looks at" in caplog.text


def test_many_models_leave_the_tables_as_they_were(engine: Engine, tmp_path: Path) -> None:
    """Each one is loaded before the last one is closed."""
    folder = save_model(tmp_path / "model", "qwen3_moe", 96)
    table, before = type(ALL_ATTENTION_FUNCTIONS)._global_mapping, Patches()
    found = dict(table)
    for _ in range(3):
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
        patches = Patches()
        accelerate_attention(model, engine, patches)
        before.undo()
        before = patches
        assert model.config._attn_implementation == NAME
        assert table[NAME] is attention.attention
    before.undo()
    assert table == found
    assert model.config._attn_implementation == "sdpa"


def test_torchs_threads_are_given_back() -> None:
    threads = torch.get_num_threads()
    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 5, 8)
    one_token(q, k, k, None, AttentionForm(0.3))
    with pytest.raises(RuntimeError):
        one_token(q, k[..., :4], k, None, AttentionForm(0.3))
    assert torch.get_num_threads() == threads


def test_a_bound_step_reads_what_the_arrays_hold(engine: Engine) -> None:
    generator = torch.Generator().manual_seed(0)

    def states(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    q, k, v, sinks = states(8, 64), states(2, 500, 64), states(2, 500, 32), states(8)
    mask = torch.randn(500, generator=generator)
    out = torch.empty(8, 32)
    step = EngineAttention(engine).bind(
        q, k, v, out, AttentionForm(0.5, softcap=4.0, sinks=sinks), mask=mask
    )
    for start, end in ((0, 1), (0, 77), (250, 500)):
        q.copy_(states(8, 64))
        step(end, start)
        scores = torch.einsum("ghd,gtd->ght", q.view(2, 4, 64).float(), k.float()) * 0.5
        scores = (4 * (scores / 4).tanh() + mask)[..., start:end].reshape(8, -1)
        weights = torch.cat([scores, sinks.float()[:, None]], -1).softmax(-1)[:, :-1]
        expected = torch.einsum("ght,gtd->ghd", weights.view(2, 4, -1), v[:, start:end].float())
        assert (out - expected.reshape(8, 32)).norm() / expected.norm() < 1e-5
    with pytest.raises(ValueError, match=r"keys has .* expected room for \[2, 501, 64\]"):
        step(501)
    with pytest.raises(ValueError, match=r"do not fit: expected \[heads, d\]"):
        EngineAttention(engine).bind(q, k, v, out[:, :31], AttentionForm(1.0))
    with pytest.raises(ValueError, match=r"mask is torch.float64 \[500\], expected float32"):
        EngineAttention(engine).bind(q, k, v, out, AttentionForm(1.0), mask=mask.double())
    with pytest.raises(ValueError, match=r"found torch.float16 on cpu, expected bfloat16 or"):
        head_array(k.half())
    with pytest.raises(ValueError, match=r"2 elements apart, expected 1"):
        head_array(k[..., ::2])
