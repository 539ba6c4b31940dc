"""Converts routed experts' LoRA to the layouts a, b, c and f: names and tensors, same numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn import functional as F

from ktrt.adapter.write.names import ScaledName, alpha_for
from ktrt.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ktrt.adapter.internal import BaseModel, ExpertLora, ExpertLoras
    from ktrt.experts.spec import ExpertsSpec, Projection

Layout = Literal["a", "b", "c", "f"]
_PREFIX = "base_model.model."
# Largest rank that the engine takes.
_MAX_RANK = 256


@dataclass
class ExpertTensors:
    """Tensors by key, and their entries in adapter_config.json.

    ``names``: modules (a, f) or parameters (b) with rank and alpha; for c one entry for all.
    ``folded``: different scalings were multiplied into B, ``exact``: without rounding.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    names: list[ScaledName] = field(default_factory=list)
    folded: bool = False
    exact: bool = True


def expert_tensors(
    layout: Layout, loras: ExpertLoras, base: BaseModel, use_rslora: bool
) -> ExpertTensors:
    """Returns the tensors of ``loras`` in a layout. Raises ``AdapterError`` if the layout cannot
    express them."""
    if not loras:
        return ExpertTensors()
    if layout == "b":
        return _stacked(loras, base, use_rslora)
    if layout == "c":
        return _fused(loras, base)
    return _single(layout, loras, base, use_rslora)


def expert_name(
    layout: Layout, base: BaseModel, path: str, expert: int, projection: Projection
) -> str:
    """Returns the name of one expert's module in layouts a (on disk) and f (in the model)."""
    neutral = f"{path}.{expert}.{projection}_proj"
    return (
        base.expert_modules.get((path, expert, projection), neutral) if layout == "a" else neutral
    )


def _single(layout: Layout, loras: ExpertLoras, base: BaseModel, use_rslora: bool) -> ExpertTensors:
    found = ExpertTensors()
    prefix = _PREFIX if layout == "a" else ""
    for path, parts in loras.items():
        for projection, lora in parts.items():
            rank = lora.a.shape[1]
            for expert in range(lora.a.shape[0]):
                name = expert_name(layout, base, path, expert, projection)
                found.tensors[f"{prefix}{name}.lora_A.weight"] = lora.a[expert]
                found.tensors[f"{prefix}{name}.lora_B.weight"] = lora.b[expert]
                alpha = alpha_for(float(lora.scaling[expert]), rank, use_rslora)
                found.names.append(ScaledName(name, rank, alpha))
    return found


def _stacked(loras: ExpertLoras, base: BaseModel, use_rslora: bool) -> ExpertTensors:
    """Converts to PEFT ≥ 0.19.1: A [E·r, in] expert-major, B [out, r·E] rank-major. PEFT nests the
    wrappers of two parameters, the first innermost; a single one has the plain name."""
    found = ExpertTensors()
    for path, parts in loras.items():
        site = base.site(path)
        assert site is not None
        groups = _by_parameter(site, parts)
        for parameter, group in groups.items():
            scaling, matrices = _common_scaling(found, list(group.values()))
            scaled = dict(zip(group, matrices, strict=True))
            a, b = _block(site, parameter, group, scaled)
            rank = _checked_rank(f"{path}.{parameter}", a.shape[1])
            inner = ".base_layer" if len(groups) == 2 and parameter != "down_proj" else ""
            key = f"{_PREFIX}{path}{inner}"
            found.tensors[f"{key}.lora_A.weight"] = a.flatten(0, 1)
            found.tensors[f"{key}.lora_B.weight"] = b.permute(1, 2, 0).flatten(1)
            alpha = alpha_for(scaling, rank, use_rslora)
            found.names.append(ScaledName(f"{path}.{parameter}", rank, alpha))
    return found


def _by_parameter(
    site: ExpertsSpec, parts: Mapping[Projection, ExpertLora]
) -> dict[str, dict[Projection, ExpertLora]]:
    groups = {
        parameter: {p: parts[p] for p in site.held_by(parameter) if p in parts}
        for parameter in site.parameters
    }
    return {parameter: group for parameter, group in groups.items() if group}


def _block(
    site: ExpertsSpec,
    parameter: str,
    group: Mapping[Projection, ExpertLora],
    scaled: Mapping[Projection, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns A [E, r, in] and B [E, rows, r] of one parameter. If gate and up differ in A, their
    ranks follow each other, with zeros in B for the other's ranks."""
    if len(site.held_by(parameter)) == 1:
        ((projection, lora),) = group.items()
        return lora.a, scaled[projection]
    a = [group[p].a for p in ("gate", "up") if p in group]
    if len(a) == 2 and torch.equal(a[0], a[1]):
        gate, up = scaled["gate"], scaled["up"]
        a = a[:1]
    else:
        ranks = {p: lora.a.shape[1] for p, lora in group.items()}
        total, half = sum(ranks.values()), site.intermediate_size
        gate = up = torch.zeros(site.num_experts, half, total)
        if "gate" in group:
            gate = F.pad(scaled["gate"], (0, total - ranks["gate"]))
        if "up" in group:
            up = F.pad(scaled["up"], (total - ranks["up"], 0))
    return torch.cat(a, 1), site.join(gate, up, dim=1)


def _fused(loras: ExpertLoras, base: BaseModel) -> ExpertTensors:
    """Converts to KTransformers: every MoE layer whole, one rank, one scaling alpha / r, with
    rsLoRA too."""
    layers = [site.layer for site in base.experts]
    if len(set(layers)) != len(layers) or not all(site.has_gate for site in base.experts):
        raise AdapterError(
            "layout c names experts by layer and has gate, up and down in each; this base has "
            "layers with several experts modules, or experts without gate. Use layout b."
        )
    found = ExpertTensors()
    every = [lora for parts in loras.values() for lora in parts.values()]
    rank = _checked_rank("the adapter", max(lora.a.shape[1] for lora in every))
    scaling, matrices = _common_scaling(found, every)
    scaled = {id(lora): b for lora, b in zip(every, matrices, strict=True)}
    for site in base.experts:
        for projection in site.projections:
            size_in, size_out = site.features(projection)
            a = torch.zeros(site.num_experts, rank, size_in)
            b = torch.zeros(site.num_experts, size_out, rank)
            lora = loras.get(site.path, {}).get(projection)
            if lora is not None:
                missing = rank - lora.a.shape[1]
                a, b = F.pad(lora.a, (0, 0, 0, missing)), F.pad(scaled[id(lora)], (0, missing))
            key = f"layers.{site.layer}.experts.{projection}_lora"
            found.tensors[f"{key}_a"], found.tensors[f"{key}_b"] = a, b
    found.names.append(ScaledName("", rank, alpha_for(scaling, rank, use_rslora=False)))
    return found


def _checked_rank(name: str, rank: int) -> int:
    if rank > _MAX_RANK:
        raise AdapterError(
            f"{name}: the layout needs rank {rank} there (ranks add up if gate and up differ in "
            f"A); ktrt's engine takes up to {_MAX_RANK}. Use layout a."
        )
    return rank


def _common_scaling(
    found: ExpertTensors, loras: Sequence[ExpertLora]
) -> tuple[float, list[torch.Tensor]]:
    """Returns one scaling for all, and every B times the remaining factor.

    This is exact if scalings differ by powers of two. Otherwise B is multiplied by the whole
    scaling, in float32 and rounded once, like in the engine's loading: its numbers stay.
    """
    scalings = sorted({float(scaling) for lora in loras for scaling in lora.scaling})
    if len(scalings) == 1:
        return scalings[0], [lora.b for lora in loras]
    found.folded = True
    common = scalings[0]
    if all(math.frexp(scaling / common)[0] == 0.5 for scaling in scalings):
        folded = [lora.b * (lora.scaling / common)[:, None, None] for lora in loras]
        pairs = zip(folded, loras, strict=True)
        if all(torch.equal(b * common, lora.scaled_b()) for b, lora in pairs):
            return common, folded
    found.exact = False
    return 1.0, [lora.scaled_b() for lora in loras]
