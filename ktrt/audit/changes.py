"""Measures an adapter's changes of a base: ‖ΔW‖ and ‖W‖, by module and expert."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ktrt.adapter.changes import find_deltas
from ktrt.engine import release_file_pages
from ktrt.utils.progress import byte_progress

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ktrt.adapter import AdapterPlan
    from ktrt.adapter.changes import Change
    from ktrt.loading.plan import BaseCheckpoint


def find_changes(base: BaseCheckpoint, plan: AdapterPlan, *, norms: bool = True) -> list[Change]:
    """Returns the changes of the whole adapter, by layer. With ``norms`` reads the changed base
    weights, one expert at a time."""
    changes = find_deltas(plan.audit, plan.norms, base.experts.specs)
    return with_weights(changes, read_weight_norms(base, changes)) if norms else changes


def with_weights(changes: Iterable[Change], weights: Mapping[str, float]) -> list[Change]:
    """Returns the changes with their ‖W‖, ``weights`` by module."""
    return [replace(change, weight=weights.get(change.module)) for change in changes]


def read_weight_norms(base: BaseCheckpoint, changes: Iterable[Change]) -> dict[str, float]:
    """Returns ‖W‖ of the changed modules, named like ``Change.module``."""
    modules = {change.module for change in changes}
    source = base.experts
    parts = ("gate_proj", "up_proj", "down_proj")
    specs = [s for s in source.specs if not modules.isdisjoint(f"{s.path}.{p}" for p in parts)]
    specs = [spec for spec in specs if spec.path in source.weights]  # in no file of kt_kernel's
    files = source.files()
    norms = _side_norms(base, modules)
    size = sum(2 * spec.num_weights for spec in specs)
    with byte_progress("Reading base weights", size) as advance:
        for spec in specs:
            norms |= _expert_norms(base, spec.path, spec.num_experts)
            advance(2 * spec.num_weights)
            for file in files:
                release_file_pages(str(file))
    return norms


def _expert_norms(base: BaseCheckpoint, path: str, num_experts: int) -> dict[str, float]:
    squares: dict[str, float] = {}
    for expert in range(num_experts):
        for name, matrix in zip(
            ("gate", "up", "down"), base.experts.weights[path].read(expert), strict=True
        ):
            if matrix is not None:
                module = f"{path}.{name}_proj"
                squares[module] = squares.get(module, 0.0) + _norm(matrix) ** 2
    return {module: square**0.5 for module, square in squares.items()}


def _side_norms(base: BaseCheckpoint, modules: set[str]) -> dict[str, float]:
    checkpoint = base.experts.checkpoint
    norms = {}
    for name in checkpoint.names():
        module = base.names.target(name).name.removesuffix(".weight")
        if module in modules and not name.endswith(".bias"):
            norms[module] = _norm(checkpoint.read(name))
    return norms


def _norm(matrix: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float32))
