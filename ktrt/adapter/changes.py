"""The changes that an adapter makes: ‖ΔW‖ by module and expert."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ktrt.experts.spec import Projection

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ktrt.adapter.audit import Audit, AuditRow
    from ktrt.experts.spec import ExpertsSpec

# Experts module path → projection → ‖ΔW_e‖, float64 [num_experts].
ExpertNorms = Mapping[str, Mapping[Projection, torch.Tensor]]


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


def find_deltas(audit: Audit, norms: ExpertNorms, specs: Iterable[ExpertsSpec]) -> list[Change]:
    """Returns the changes of the whole adapter, by layer, without ‖W‖. ``specs``: the base's routed
    experts."""
    inside, outside = _sorted_rows(audit, norms)
    changes = []
    for spec in specs:
        for projection, each in norms.get(spec.path, {}).items():
            module = f"{spec.path}.{projection}_proj"
            rows = inside[module]
            if projection in ("gate", "up"):
                rows = [*rows, *inside[f"{spec.path}.gate_up_proj"]]
            changes.append(_change(module, rows, float(each.norm()), tuple(each.tolist())))
    changes += [_change(module, rows, rows[0].delta_norm) for module, rows in outside.items()]
    return sorted(changes, key=lambda change: -1 if change.layer is None else change.layer)


def _sorted_rows(
    audit: Audit, norms: ExpertNorms
) -> tuple[dict[str, list[AuditRow]], dict[str, list[AuditRow]]]:
    """Returns the rows of routed experts by path and projection, and the other LoRAs' by module."""
    inside: dict[str, list[AuditRow]] = defaultdict(list)
    outside: dict[str, list[AuditRow]] = defaultdict(list)
    for row in audit.rows:
        path, leaf = row.acts_on, row.acts_on.rpartition(".")[2]
        while path and path not in norms:
            path = path.rpartition(".")[0]
        if path and path != row.acts_on:
            inside[f"{path}.{leaf}"].append(row)
        elif row.status != "no effect" and row.part.startswith("lora_"):
            outside[row.acts_on].append(row)
    return inside, outside


def _change(
    module: str,
    rows: Iterable[AuditRow],
    delta: float | None,
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
        None,
        experts,
    )
