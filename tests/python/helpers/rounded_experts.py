"""Runs transformers' routed experts in float32, with LoRA, rounded where ktrt's engine rounds.

An independent reference: the library's modules and activations, torch's products. Without rounding
it equals the plain library on weights merged by the formula.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from helpers.merge import rounded_to_int4
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

Projection = Literal["gate", "up", "down"]
# "activations": as "bf16", without the weights.
Rounding = Literal["none", "activations", "bf16", "int8", "int4"]
# projection → A [E, rank, in], B [E, out, rank], scaling folded into B.
Lora = dict[Projection, tuple[torch.Tensor, torch.Tensor]]


@dataclass
class _State:
    lora: Lora
    rounding: Rounding


def experts_of(model: nn.Module) -> dict[str, Any]:
    """Returns the experts modules by path, found by the interface's attributes."""
    return {p: m for p, m in model.named_modules() if hasattr(m, "is_concatenated")}


def use_rounded_experts(model: nn.Module, loras: dict[str, Lora], rounding: Rounding) -> None:
    """Replaces the forward of the experts of ``model`` by ``rounded_forward``."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register("rounded", rounded_forward)
    for path, module in experts_of(model).items():
        module.config._experts_implementation = "rounded"
        module.reference_state = _State(loras.get(path, {}), rounding)


def sizes(module: Any) -> tuple[int, int, int]:
    """Returns (experts, hidden_size, intermediate_size)."""
    experts, hidden, intermediate = module.down_proj.shape
    if module.is_transposed:
        hidden, intermediate = intermediate, hidden
    return experts, hidden, intermediate


def random_lora(module: Any, rank: int, share_gate_a: bool, generator: torch.Generator) -> Lora:
    """Returns LoRA on every projection, ‖B·A‖ near the size of the weights; gate and up may share
    A."""
    experts, hidden, intermediate = sizes(module)
    lora: Lora = {}
    names: list[Projection] = ["gate", "up", "down"] if module.has_gate else ["up", "down"]
    for name in names:
        size_in, size_out = (intermediate, hidden) if name == "down" else (hidden, intermediate)
        a = torch.randn(experts, rank, size_in, generator=generator) / size_in**0.5
        b = torch.randn(experts, size_out, rank, generator=generator) / rank**0.5
        if name == "up" and share_gate_a and "gate" in lora:
            a = lora["gate"][0]
        lora[name] = (a, b)
    return lora


def rounded_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    state: _State = self.reference_state
    out = torch.zeros_like(hidden_states, dtype=torch.float32)
    for expert in range(self.down_proj.shape[0]):
        tokens, slots = torch.where(top_k_index == expert)
        if len(tokens):
            y = _one_expert(self, expert, hidden_states[tokens].float(), state)
            weights = top_k_weights[tokens, slots, None].float()
            out.index_add_(0, tokens, y * weights)
    return out.to(hidden_states.dtype)


def _one_expert(module: Any, expert: int, x: torch.Tensor, state: _State) -> torch.Tensor:
    first = "gate_up_proj" if module.has_gate else "up_proj"
    y = _project(module, first, expert, x, state)
    act = module._apply_gate(y) if module.has_gate else module.act_fn(y)
    y = _project(module, "down_proj", expert, act, state)
    return module.post_expert_norm(y) if getattr(module, "has_post_expert_norm", False) else y


def _project(module: Any, name: str, expert: int, x: torch.Tensor, state: _State) -> torch.Tensor:
    x = _bf16(x, state)
    weight = getattr(module, name)[expert].float()
    weight = weight.T if module.is_transposed else weight
    weight = weight if state.rounding == "activations" else _bf16(weight, state)
    weight = rounded_to_int4(weight) if state.rounding == "int4" else _int8(weight, state)
    y = functional.linear(_int8(x, state), weight)
    deltas = list(_deltas(name, expert, x, state))
    if len(deltas) == 2:  # gate and up
        y = y + torch.cat(deltas, -1) if module.is_concatenated else y + _take_turns(*deltas)
    elif deltas:
        y = y + deltas[0]
    return y + getattr(module, f"{name}_bias")[expert].float() if module.has_bias else y


def _deltas(name: str, expert: int, x: torch.Tensor, state: _State) -> Iterator[torch.Tensor]:
    order: tuple[Projection, ...] = ("down",) if name == "down_proj" else ("gate", "up")
    for projection in order:
        if projection in state.lora:
            a, b = state.lora[projection]
            t = _bf16(functional.linear(x, _bf16(a[expert], state)), state)
            yield functional.linear(t, _bf16(b[expert], state))


def _take_turns(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.stack([gate, up], dim=-1).flatten(-2)


def _bf16(values: torch.Tensor, state: _State) -> torch.Tensor:
    return values if state.rounding == "none" else values.to(torch.bfloat16).float()


def _int8(rows: torch.Tensor, state: _State) -> torch.Tensor:
    """Rounds each row by kt_kernel's rule: scale = max / 127, half to even."""
    if state.rounding not in ("int8", "int4"):
        return rows
    scale = rows.abs().amax(-1, keepdim=True) / 127
    return torch.where(scale > 0, (rows / scale).round() * scale, 0.0)
