"""Arguments of transformers' functions for layers with a state, small and random."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


class Draw:
    """Random tensors of one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype, self._generator = dtype, torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        numbers = torch.randn(shape, generator=self._generator)
        return numbers.to(dtype or self._dtype)

    def below_zero(self, *shape: int) -> torch.Tensor:
        return -0.3 * self(*shape, dtype=torch.float32).abs()


def delta_rule(
    draw: Draw, sequences: int, tokens: int, *, per_key: bool, value_size: int = 40
) -> dict[str, Any]:
    heads, key_heads, size = 4, 4 if per_key else 2, 20
    keys = (sequences, tokens, key_heads, size)
    return {
        "query": draw(*keys), "key": draw(*keys),
        "value": draw(sequences, tokens, heads, value_size),
        "g": draw.below_zero(sequences, tokens, heads, *([size] if per_key else [])),
        "beta": draw(sequences, tokens, heads).sigmoid(), "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
        "initial_state": draw(sequences, heads, size, value_size, dtype=torch.float32),
    }  # fmt: skip


def mamba(draw: Draw, sequences: int, tokens: int) -> dict[str, Any]:
    channels, size = 24, 5
    rows = (sequences, channels, tokens)
    return {
        "hidden_states": draw(sequences, tokens, channels).transpose(1, 2), "dt": draw(*rows),
        "A": draw.below_zero(channels, size), "B": draw(sequences, size, tokens),
        "C": draw(sequences, size, tokens), "D": draw(channels).float(), "z": draw(*rows),
        "delta_bias": draw(channels).float(), "delta_softplus": True, "return_last_state": True,
    }  # fmt: skip


def mamba_step(draw: Draw, sequences: int) -> dict[str, Any]:
    channels, size = 24, 5
    return {
        "state": draw(sequences, channels, size, dtype=torch.float32),
        "hidden_states": draw(sequences, channels), "dt": draw(sequences, channels),
        "A": draw.below_zero(channels, size), "B": draw(sequences, size),
        "C": draw(sequences, size), "D": draw(channels), "z": draw(sequences, channels),
        "dt_bias": draw(channels).float(), "dt_softplus": True,
    }  # fmt: skip


def mamba2(draw: Draw, sequences: int, tokens: int) -> dict[str, Any]:
    heads, groups, head, size = 4, 2, 36, 12
    return {
        "hidden_states": draw(sequences, tokens, heads, head), "dt": draw(sequences, tokens, heads),
        "A": draw.below_zero(heads), "B": draw(sequences, tokens, groups, size), "chunk_size": 16,
        "C": draw(sequences, tokens, groups, size), "D": draw(heads), "dt_bias": draw(heads),
        "dt_softplus": True, "dt_limit": (0.001, 2.0), "return_final_states": True,
        "initial_states": draw(sequences, heads, head, size, dtype=torch.float32),
    }  # fmt: skip


def mamba2_step(draw: Draw, sequences: int) -> dict[str, Any]:
    heads, groups, head, size = 4, 2, 36, 12
    return {
        "state": draw(sequences, heads, head, size, dtype=torch.float32),
        "hidden_states": draw(sequences, heads, head),
        "dt": draw(sequences, heads, 1).expand(-1, -1, head),
        "A": draw.below_zero(heads)[:, None, None].expand(-1, head, size),
        "B": draw(sequences, groups, size), "C": draw(sequences, groups, size),
        "D": draw(heads)[:, None].expand(-1, head), "dt_softplus": True,
        "dt_bias": draw(heads)[:, None].expand(-1, head),
    }  # fmt: skip


def conv(draw: Draw, sequences: int, tokens: int, *, by_token: bool = True) -> dict[str, Any]:
    channels = 200
    shape = (sequences, tokens, channels) if by_token else (sequences, channels, tokens)
    x = draw(*shape)
    return {
        "hidden_states": x.transpose(1, 2) if by_token else x, "weight": draw(channels, 4),
        "bias": draw(channels), "activation": "silu",
    }  # fmt: skip


def conv_step(draw: Draw, sequences: int, *, taps: int = 4) -> dict[str, Any]:
    found = conv(draw, sequences, 1)
    return {**found, "conv_state": draw(sequences, 200, taps), "bias": None}


RULE, KIMI = "torch_{}_gated_delta_rule", "{}_kimi_delta_attention"
CASES: dict[str, tuple[str, str, Callable[[Draw], dict[str, Any]]]] = {
    "delta rule, prompt": (
        "qwen3_next", RULE.format("chunk"), lambda d: delta_rule(d, 2, 70, per_key=False)),
    "delta rule, start": (
        "qwen3_5_moe", RULE.format("chunk"),
        lambda d: delta_rule(d, 1, 33, per_key=False) | {"initial_state": None}),
    "delta rule, step": (
        "lara_mini", RULE.format("recurrent"), lambda d: delta_rule(d, 3, 1, per_key=False)),
    "kimi, prompt": (
        "kimi_linear", KIMI.format("chunk"), lambda d: delta_rule(d, 2, 70, per_key=True)),
    "kimi, step": (
        "glm5_next", KIMI.format("recurrent"), lambda d: delta_rule(d, 2, 1, per_key=True)),
    "mamba, prompt": ("jamba", "mamba_selective_scan", lambda d: mamba(d, 2, 35)),
    "mamba, step": ("jamba", "mamba_selective_state_update", lambda d: mamba_step(d, 2)),
    "mamba 2, prompt": ("nemotron_h", "mamba2_chunk_scan", lambda d: mamba2(d, 2, 35)),
    "mamba 2, step": (
        "granitemoehybrid", "mamba2_selective_state_update", lambda d: mamba2_step(d, 2)),
    "conv, prompt": ("lfm2_moe", "causal_conv1d_fn", lambda d: conv(d, 2, 300)),
    "conv, by channel": (
        "lfm2_moe", "causal_conv1d_fn", lambda d: conv(d, 1, 40, by_token=False)),
    "conv, linear": (
        "inkling", "causal_conv1d_fn", lambda d: conv(d, 1, 2) | {"activation": None}),
    "conv, step": ("qwen3_next", "causal_conv1d_update", lambda d: conv_step(d, 2)),
    "conv, short state": ("jamba", "causal_conv1d_update", lambda d: conv_step(d, 1, taps=3)),
}  # fmt: skip
_STATES = ("state", "conv_state")


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.clone() if name in (*_STATES, "initial_state", "initial_states")
        and value is not None else value
        for name, value in arguments.items()
    }  # fmt: skip


def results(function: Callable[..., Any], arguments: dict[str, Any]) -> list[torch.Tensor]:
    """Returns a function's results, and the states that it changes in place."""
    found = function(**arguments)
    found = list(found) if isinstance(found, tuple) else [found]
    return found + [arguments[name] for name in _STATES if name in arguments]
