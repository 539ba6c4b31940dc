"""Finds the routed-expert modules of a model by what transformers' experts interface sets on them.

Nothing here is a list of model families: ``use_experts_implementation``
(``transformers.integrations.moe``) marks every experts module with the attributes read below.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from ktrt.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

# What the interface sets on each experts module, the value of the plain form, and the words for a
# module that differs.
_PLAIN_FORM = {
    "has_gate": (True, "its experts have no gate projection (has_gate is false)"),
    "has_bias": (False, "its expert projections have biases (has_bias is true)"),
    "is_transposed": (False, "its expert weights are stored transposed (is_transposed is true)"),
    "is_concatenated": (True, "its gate and up rows are interleaved (is_concatenated is false)"),
    "has_post_expert_norm": (False, "a norm follows each expert (has_post_expert_norm is true)"),
}
# By these an experts module is recognised; transformers 5.17 sets no has_post_expert_norm.
_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


@dataclass(frozen=True)
class ExpertsSpec:
    """One experts module: where it is and its sizes.

    ``path`` is the module's name in the model, ``layer`` the last number in it, ``class_name`` the
    class that the patch mapping replaces. ``top_k`` bounds the experts per token.
    """

    path: str
    layer: int
    class_name: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    top_k: int

    @property
    def num_weights(self) -> int:
        """Weights of all experts: gate, up and down, without padding."""
        return 3 * self.num_experts * self.hidden_size * self.intermediate_size


def find_experts(model: nn.Module) -> list[ExpertsSpec]:
    """The experts modules of ``model`` (built on the meta device), in the order of its layers.

    Raises ``CheckpointError`` naming the module and the reason if one of them is of a form that
    the engine does not compute.
    """
    found = []
    for path, module in model.named_modules():
        if all(hasattr(module, name) for name in _MARKS):
            _refuse_other_forms(path, module)
            found.append(_describe(path, module, model))
    return found


def _refuse_other_forms(path: str, module: nn.Module) -> None:
    reasons = [
        text
        for name, (plain, text) in _PLAIN_FORM.items()
        if getattr(module, name, plain) is not plain
    ]
    if not reasons:
        reasons = _activation_reasons(module) + _parameter_reasons(module)
    if reasons:
        raise CheckpointError(
            f"{path} ({type(module).__name__}): {'; '.join(reasons)}. ktrt's engine computes "
            "down(silu(gate x) * up x) without biases; this model cannot run on it yet."
        )


def _activation_reasons(module: nn.Module) -> list[str]:
    from transformers.integrations.moe import _default_apply_gate

    if getattr(type(module), "_apply_gate", None) is not _default_apply_gate:
        return ["it overrides _apply_gate with its own activation"]
    # Compared by what it computes: SiLU goes by several class names, some of them parametrised.
    act_fn = getattr(module, "act_fn", None)
    sample = torch.linspace(-12, 12, 97, device="cpu")
    if callable(act_fn) and torch.allclose(act_fn(sample), functional.silu(sample)):
        return []
    return [f"its activation is {type(act_fn).__name__}, not SiLU"]


def _parameter_reasons(module: nn.Module) -> list[str]:
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    gate_up, down = shapes.pop("gate_up_proj", ()), shapes.pop("down_proj", ())
    if len(gate_up) != 3 or down != (gate_up[0], gate_up[2], gate_up[1] // 2):
        return [
            f"gate_up_proj {list(gate_up)}, down_proj {list(down)} are not [E, 2I, H], [E, H, I]"
        ]
    return [f"it has further parameters {sorted(shapes)}"] if shapes else []


def _describe(path: str, module: nn.Module, model: nn.Module) -> ExpertsSpec:
    num_experts, _, hidden_size = module.get_parameter("gate_up_proj").shape
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path)
    return ExpertsSpec(
        path=path,
        layer=int(numbers[-1]) if numbers else 0,
        class_name=type(module).__name__,
        num_experts=num_experts,
        hidden_size=hidden_size,
        intermediate_size=module.get_parameter("down_proj").shape[2],
        top_k=_top_k(path, model, num_experts),
    )


def _top_k(path: str, model: nn.Module, num_experts: int) -> int:
    """Experts per token: what the router beside the experts says, else the config, else all."""
    block = model.get_submodule(path.rpartition(".")[0])
    candidates = [getattr(child, "top_k", None) for child in block.children()]
    candidates += [getattr(block, "top_k", None)]
    candidates += [getattr(getattr(model, "config", None), "num_experts_per_tok", None)]
    for value in candidates:
        if isinstance(value, int) and 0 < value <= num_experts:
            return value
    return num_experts
