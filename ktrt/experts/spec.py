"""The description of a routed-experts module, and how to find such modules in a model.

``ExpertsSpec`` is the one description: names, shapes and row order of the parameters are asked of
it everywhere (only ``audit.reference`` has its own, to verify this one).

Nothing here is a list of model families: ``use_experts_implementation``
(``transformers.integrations.moe``) marks every experts module with the attributes read below.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch

from ktrt.engine.activation import Activation
from ktrt.errors import CheckpointError
from ktrt.experts.activation import recognise_activation

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

# The linear maps of an expert.
Projection = Literal["gate", "up", "down"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)

# By these an experts module is recognised; transformers 5.17 sets no has_post_expert_norm.
_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
_NORM = "post_expert_norm"


@dataclass(frozen=True)
class ExpertsSpec:
    """One experts module: where it is, its sizes, and its form.

    ``path`` is the module's name in the model, ``layer`` the last number in it, ``class_name`` the
    class that ``KTExperts`` replaces. ``top_k`` bounds the experts per token. The parameters are
    ``gate_up_proj`` (``up_proj`` without gate) [num_experts, rows, hidden_size] and ``down_proj``
    [num_experts, hidden_size, intermediate_size], the last two dimensions swapped if
    ``is_transposed``. Gate's rows come before up's, or alternate with them if ``is_interleaved``.
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
    def projections(self) -> tuple[Projection, ...]:
        """The projections that an expert has."""
        return ("gate", "up", "down") if self.has_gate else ("up", "down")

    def features(self, projection: Projection) -> tuple[int, int]:
        """(in, out) of one expert's projection."""
        if projection == "down":
            return self.intermediate_size, self.hidden_size
        return self.hidden_size, self.intermediate_size

    @property
    def parameters(self) -> dict[str, tuple[int, int]]:
        """Name → [out, in] of one expert's part of each matrix, in the module's order."""
        first = self.intermediate_size * len(self.held_by(self.first_parameter))
        return {
            self.first_parameter: (first, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
        }

    def stored_shape(self, parameter: str) -> tuple[int, int, int]:
        """The shape of a matrix of all experts as the module stores it."""
        rows, columns = self.parameters[parameter]
        one = (columns, rows) if self.is_transposed else (rows, columns)
        return (self.num_experts, *one)

    @property
    def biases(self) -> dict[str, int]:
        """Name → numbers of one expert's part of each bias; empty without biases."""
        if not self.has_bias:
            return {}
        return {f"{name}_bias": rows for name, (rows, _) in self.parameters.items()}

    def held_by(self, parameter: str) -> tuple[Projection, ...]:
        """The projections that a parameter holds, in the order of its pieces; none for biases."""
        if parameter == "down_proj":
            return ("down",)
        return self.projections[:-1] if parameter == self.first_parameter else ()

    def parameter_of(self, projection: Projection) -> str:
        """The parameter that holds a projection."""
        return "down_proj" if projection == "down" else self.first_parameter

    def split(self, rows: torch.Tensor, dim: int) -> dict[Projection, torch.Tensor]:
        """The rows of the first parameter, along ``dim``, by projection: views."""
        if not self.has_gate:
            return {"up": rows}
        if self.is_interleaved:
            pairs = rows.unflatten(dim, (-1, 2))
            return {"gate": pairs.select(dim + 1, 0), "up": pairs.select(dim + 1, 1)}
        gate, up = rows.chunk(2, dim)
        return {"gate": gate, "up": up}

    def join(self, gate: torch.Tensor, up: torch.Tensor, dim: int) -> torch.Tensor:
        """Rows of gate and of up in the order of the first parameter's: undoes ``split``."""
        if self.is_interleaved:
            return torch.stack([gate, up], dim + 1).flatten(dim, dim + 1)
        return torch.cat([gate, up], dim)

    @property
    def num_weights(self) -> int:
        """Weights and biases of all experts, without padding."""
        one = sum(rows * columns for rows, columns in self.parameters.values())
        return self.num_experts * (one + sum(self.biases.values()))


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
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    down, activation = shapes.get("down_proj", ()), recognise_activation(module)
    reasons = [f"down_proj has shape {list(down)}, expected three dimensions"]
    if len(down) == 3:
        spec = _form(path, module, down)
        reasons = _parameter_reasons(spec, shapes)
    if activation is None:
        reasons.append(f"its activation ({_activation_name(module)}) is none of the engine's")
    if reasons or activation is None:
        raise CheckpointError(
            f"{path} ({type(module).__name__}): {'; '.join(reasons)}. ktrt's engine computes "
            "down(f(gate x) * up x), or down(f(up x)), f being SiLU, GELU, ReLU or its square, "
            "clamped or not; this model cannot run on it."
        )
    return replace(spec, top_k=_top_k(path, model, spec.num_experts), activation=activation)


def _form(path: str, module: nn.Module, down: Sequence[int]) -> ExpertsSpec:
    """The description by the marks and the shape of ``down_proj``, as far as those tell."""
    marks = {name: bool(getattr(module, name, False)) for name in (*_MARKS, "has_" + _NORM)}
    hidden_size, intermediate_size = down[:0:-1] if marks["is_transposed"] else down[1:]
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path)
    return ExpertsSpec(
        path=path,
        layer=int(numbers[-1]) if numbers else 0,
        class_name=type(module).__name__,
        num_experts=down[0],
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        top_k=down[0],
        has_gate=marks["has_gate"],
        has_bias=marks["has_bias"],
        is_transposed=marks["is_transposed"],
        is_interleaved=marks["has_gate"] and not marks["is_concatenated"],
        has_post_expert_norm=marks["has_" + _NORM],
    )


def _activation_name(module: nn.Module) -> str:
    from transformers.integrations.moe import _default_apply_gate

    if module.has_gate and getattr(type(module), "_apply_gate", None) is not _default_apply_gate:
        return f"{type(module).__name__}._apply_gate"
    act_fn = getattr(module, "act_fn", None)
    return getattr(act_fn, "__name__", type(act_fn).__name__)


def _parameter_reasons(spec: ExpertsSpec, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """How the parameters differ from the matrices and biases that the marks announce."""
    left = dict(shapes)
    reasons = []
    expected: dict[str, tuple[int, ...]] = {n: spec.stored_shape(n) for n in spec.parameters}
    expected |= {name: (spec.num_experts, size) for name, size in spec.biases.items()}
    for name, shape in expected.items():
        if (found := left.pop(name, ())) != shape:
            reasons.append(f"{name} has shape {list(found)}, expected {list(shape)}")
    if spec.has_post_expert_norm:
        left = {name: shape for name, shape in left.items() if not name.startswith(f"{_NORM}.")}
    if left:
        reasons.append(f"it has further parameters {sorted(left)}")
    return reasons


def _top_k(path: str, model: nn.Module, num_experts: int) -> int:
    """Experts per token: by the router next to the experts, else by the config, else all."""
    block = model.get_submodule(path.rpartition(".")[0])
    candidates = [getattr(child, "top_k", None) for child in block.children()]
    candidates += [getattr(block, "top_k", None)]
    config = getattr(model, "config", None)
    if config is not None:
        config = config.get_text_config()
    # "top_k_experts": Gemma 4's name.
    candidates += [getattr(config, name, None) for name in ("num_experts_per_tok", "top_k_experts")]
    for value in candidates:
        if isinstance(value, int) and 0 < value <= num_experts:
            return value
    return num_experts
