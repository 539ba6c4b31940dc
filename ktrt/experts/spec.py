"""Finds the routed-expert modules of a model by what transformers' experts interface sets on them.

Nothing here is a list of model families: ``use_experts_implementation``
(``transformers.integrations.moe``) marks every experts module with the attributes read below.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ktrt.errors import CheckpointError
from ktrt.experts.activation import Activation, recognise_activation

if TYPE_CHECKING:
    from torch import nn

# By these an experts module is recognised; transformers 5.17 sets no has_post_expert_norm.
_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
_NORM = "post_expert_norm"


@dataclass(frozen=True)
class ExpertsSpec:
    """One experts module: where it is, its sizes, and its form.

    ``path`` is the module's name in the model, ``layer`` the last number in it, ``class_name`` the
    class that ``KTExperts`` replaces. ``top_k`` bounds the experts per token. The parameters are
    ``gate_up_proj`` (``up_proj`` without gate) [E, rows, hidden_size] and ``down_proj`` [E,
    hidden_size, intermediate_size], the last two dimensions swapped if ``is_transposed``; rows of
    gate and up lie one after the other, or take turns if ``is_interleaved``.
    """

    path: str
    layer: int
    class_name: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    top_k: int
    has_gate: bool = True
    has_bias: bool = False
    is_transposed: bool = False
    is_interleaved: bool = False
    has_post_expert_norm: bool = False
    activation: Activation = field(default_factory=Activation)

    @property
    def first_parameter(self) -> str:
        """The name of the parameter that reads the hidden states."""
        return "gate_up_proj" if self.has_gate else "up_proj"

    @property
    def num_weights(self) -> int:
        """Weights and biases of all experts, without padding."""
        matrices = 3 if self.has_gate else 2
        biases = (matrices - 1) * self.intermediate_size + self.hidden_size if self.has_bias else 0
        one = matrices * self.hidden_size * self.intermediate_size + biases
        return self.num_experts * one


def find_experts(model: nn.Module) -> list[ExpertsSpec]:
    """The experts modules of ``model`` (built on the meta device), in the order of its layers.

    Raises ``CheckpointError`` naming the module and the reason if one of them is of a form that
    the engine does not compute.
    """
    return [
        _describe(path, module, model)
        for path, module in model.named_modules()
        if all(hasattr(module, name) for name in _MARKS)
    ]


def _describe(path: str, module: nn.Module, model: nn.Module) -> ExpertsSpec:
    marks = {name: bool(getattr(module, name, False)) for name in (*_MARKS, "has_" + _NORM)}
    activation = recognise_activation(module)
    reasons = _parameter_reasons(module, marks)
    if activation is None:
        reasons.append(f"its activation ({_activation_name(module)}) is none of the engine's")
    if reasons or activation is None:
        raise CheckpointError(
            f"{path} ({type(module).__name__}): {'; '.join(reasons)}. ktrt's engine computes "
            "down(f(gate x) * up x), or down(f(up x)), f being SiLU, GELU, ReLU or its square, "
            "clamped or not; this model cannot run on it."
        )
    down = module.get_parameter("down_proj").shape
    hidden_size, intermediate_size = down[:0:-1] if marks["is_transposed"] else down[1:]
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path)
    return ExpertsSpec(
        path=path,
        layer=int(numbers[-1]) if numbers else 0,
        class_name=type(module).__name__,
        num_experts=down[0],
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        top_k=_top_k(path, model, down[0]),
        has_gate=marks["has_gate"],
        has_bias=marks["has_bias"],
        is_transposed=marks["is_transposed"],
        is_interleaved=marks["has_gate"] and not marks["is_concatenated"],
        has_post_expert_norm=marks["has_" + _NORM],
        activation=activation,
    )


def _activation_name(module: nn.Module) -> str:
    from transformers.integrations.moe import _default_apply_gate

    if module.has_gate and getattr(type(module), "_apply_gate", None) is not _default_apply_gate:
        return f"{type(module).__name__}._apply_gate"
    act_fn = getattr(module, "act_fn", None)
    return getattr(act_fn, "__name__", type(act_fn).__name__)


def _parameter_reasons(module: nn.Module, marks: dict[str, bool]) -> list[str]:
    """What the parameters hold beyond the matrices and biases that the marks announce, or lack."""
    first = "gate_up_proj" if marks["has_gate"] else "up_proj"
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    found, down = shapes.pop(first, ()), shapes.pop("down_proj", ())
    if len(down) != 3:
        return [f"down_proj has shape {list(down)}, expected three dimensions"]
    experts, hidden, intermediate = down
    if marks["is_transposed"]:
        hidden, intermediate = intermediate, hidden
    rows = 2 * intermediate if marks["has_gate"] else intermediate
    expected = (experts, hidden, rows) if marks["is_transposed"] else (experts, rows, hidden)
    reasons = []
    if found != expected:
        reasons.append(f"{first} has shape {list(found)}, expected {list(expected)}")
    if marks["has_bias"]:
        for name, size in ((f"{first}_bias", rows), ("down_proj_bias", hidden)):
            if (shape := shapes.pop(name, ())) != (experts, size):
                reasons.append(f"{name} has shape {list(shape)}, expected [{experts}, {size}]")
    if marks["has_" + _NORM]:
        shapes = {name: s for name, s in shapes.items() if not name.startswith(f"{_NORM}.")}
    if shapes:
        reasons.append(f"it has further parameters {sorted(shapes)}")
    return reasons


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
