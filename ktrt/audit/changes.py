"""Measures an adapter's changes of a base: ‖ΔW‖ and ‖W‖, by module and expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ktrt.adapter.delta_norms import expert_norms
from ktrt.engine import release_file_pages
from ktrt.utils.progress import byte_progress

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ktrt.adapter import AdapterPlan, AuditRow
    from ktrt.loading.plan import BaseCheckpoint


@dataclass(frozen=True)
class Change:
    """The change of one Linear, or of one projection of all routed experts of a layer.

    ``module`` is its name in the model, ``kind`` the same without layer number. ``ranks`` and
    ``scalings``: all that occur. ``delta`` is ‖ΔW‖ (None for DoRA), ``weight`` ‖W‖ (None: not
    read), Frobenius, over all experts; ``experts`` ‖ΔW‖ of each, None outside the experts.
    """

    module: str
    kind: str
    layer: int | None
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    delta: float | None
    weight: float | None
    experts: tuple[float, ...] | None = None

    @property
    def ratio(self) -> float | None:
        """‖ΔW‖ / ‖W‖; None if one of them is unknown."""
        if self.delta is None or not self.weight:
            return None
        return self.delta / self.weight

    @property
    def unchanged(self) -> list[int]:
        """The experts whose ΔW is zero."""
        return [e for e, delta in enumerate(self.experts or ()) if delta == 0]


def find_changes(base: BaseCheckpoint, plan: AdapterPlan, *, norms: bool = True) -> list[Change]:
    """Returns the changes of the whole adapter, by layer. With ``norms`` reads the changed base
    weights, one expert at a time."""
    weights = _weight_norms(base, plan) if norms else {}
    changes = []
    for spec in base.experts.specs:
        for projection, lora in plan.experts.get(spec.path, {}).items():
            module = f"{spec.path}.{projection}_proj"
            rows = [row for row in plan.audit.rows if _is_of(row, spec.path, projection)]
            each = expert_norms(lora)
            changes.append(
                _change(module, rows, float(each.norm()), weights.get(module), tuple(each.tolist()))
            )
    found: dict[str, list[AuditRow]] = {}
    paths = tuple(f"{path}." for path in plan.experts)
    for row in plan.audit.rows:
        if row.status == "no effect" or row.acts_on.startswith(paths):
            continue
        if row.part.startswith("lora_"):
            found.setdefault(row.acts_on, []).append(row)
    changes += [
        _change(module, rows, rows[0].delta_norm, weights.get(module))
        for module, rows in found.items()
    ]
    return sorted(changes, key=lambda change: -1 if change.layer is None else change.layer)


def _is_of(row: AuditRow, path: str, projection: str) -> bool:
    leaf = row.acts_on.rpartition(".")[2]
    both = projection in ("gate", "up") and leaf == "gate_up_proj"
    return row.acts_on.startswith(f"{path}.") and (both or leaf == f"{projection}_proj")


def _change(
    module: str,
    rows: Iterable[AuditRow],
    delta: float | None,
    weight: float | None,
    experts: tuple[float, ...] | None = None,
) -> Change:
    rows = list(rows)
    plain = next((row.kind for row in rows), module)
    kind = plain.rpartition(".")[0] + "." + module.rpartition(".")[2] if "." in plain else plain
    return Change(
        module,
        kind,
        next((row.layer for row in rows), None),
        tuple(sorted({row.rank for row in rows if row.rank is not None})),
        tuple(sorted({row.scaling for row in rows if row.scaling is not None})),
        delta,
        weight,
        experts,
    )


def _weight_norms(base: BaseCheckpoint, plan: AdapterPlan) -> dict[str, float]:
    """Returns ‖W‖ by module, named like ``Change.module``."""
    source = base.experts
    specs = [spec for spec in source.specs if plan.experts.get(spec.path)]
    files = source.files()
    norms = _side_norms(base, {*plan.side.loras, *plan.side.routers})
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
