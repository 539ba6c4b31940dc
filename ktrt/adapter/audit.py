"""The adapter audit: lists the target of every tensor and proves that none was left out."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from io import StringIO
from typing import TYPE_CHECKING, Literal

from ktrt.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

Applier = Literal["experts", "peft"]


@dataclass
class AuditRow:
    """One tensor of the adapter.

    ``acts_on`` is the changed weight, in the model's names; ``layer`` is None outside the layers;
    ``rank`` and ``scaling`` are None for weights saved whole. ``delta_norm`` is the Frobenius norm
    of the tensor's ΔW, over all experts of a stacked one; None if A and B do not suffice for it.
    ``status`` is "not applied" until the engine ("experts") or PEFT ("peft") has taken the tensor;
    "no effect" if no text reaches it. ``zero_rows``: exactly zero rows of a lora_B that is mostly
    zero.
    """

    tensor: str
    acts_on: str
    part: str
    layer: int | None
    rank: int | None
    scaling: float | None
    status: Applier | Literal["not applied", "no effect"] = "not applied"
    delta_norm: float | None = None
    zero_rows: int = 0

    @property
    def kind(self) -> str:
        """``acts_on`` without layer and expert numbers, e.g. ``mlp.experts.gate_proj``."""
        inside = re.sub(r"^.*?\.\d+\.", "", self.acts_on)
        return re.sub(r"\.\d+(?=\.|$)", "", inside)


@dataclass
class Audit:
    """All tensors of one adapter; empty for a base model without adapter. ``notes``: assumptions
    made to read it."""

    file: Path | None = None
    rows: list[AuditRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def found(self) -> int:
        """Tensors in the file."""
        return len(self.rows)

    @property
    def applied_experts(self) -> int:
        """Tensors that the engine applies inside the routed experts."""
        return sum(row.status == "experts" for row in self.rows)

    @property
    def applied_peft(self) -> int:
        """Tensors that PEFT or torch applies outside the routed experts."""
        return sum(row.status == "peft" for row in self.rows)

    @property
    def no_effect(self) -> int:
        """Tensors that no text reaches, and copies of the base's weights."""
        return sum(row.status == "no effect" for row in self.rows)

    @property
    def not_applied(self) -> int:
        """Tensors without a target; ``check`` refuses them."""
        return self.found - self.applied_experts - self.applied_peft - self.no_effect

    def mark(self, tensors: Iterable[str], applier: Applier) -> None:
        """Records that these tensors (names in the file) are now in the model."""
        marked = set(tensors)
        for row in self.rows:
            if row.tensor in marked and row.status != "no effect":
                row.status = applier

    def check(self) -> None:
        """Raises ``AdapterError`` with the tensors that were not applied, if any."""
        left = [row.tensor for row in self.rows if row.status == "not applied"]
        if left:
            raise AdapterError(
                f"{self.file}: {len(left)} of {self.found} tensors were not applied: "
                f"{', '.join(left[:5])}{', …' if len(left) > 5 else ''}. This is a defect in ktrt."
            )

    def table(self) -> str:
        """Returns a table for people: one line per kind of weight, then the counts."""
        from rich.console import Console
        from rich.table import Table

        if not self.rows:
            return "no adapter: base model"
        table = Table("weights", "layers", "tensors", "rank", "scaling", "‖ΔW‖", "applied by")
        groups: dict[tuple[str, str], list[AuditRow]] = defaultdict(list)
        for row in self.rows:
            groups[row.kind, row.status].append(row)
        for (kind, status), rows in groups.items():
            table.add_row(
                kind, _ranges({row.layer for row in rows}), str(len(rows)),
                _values({row.rank for row in rows}), _values({row.scaling for row in rows}),
                _span({row.delta_norm for row in rows}),
                {"experts": "ktrt engine", "peft": "PEFT"}.get(status, status),
            )  # fmt: skip
        console = Console(file=StringIO(), width=120)
        console.print(table)
        assert isinstance(console.file, StringIO)
        return (
            f"{console.file.getvalue()}tensors found {self.found} = applied on experts "
            f"{self.applied_experts} + applied by PEFT {self.applied_peft} + not applied "
            f"{self.not_applied}"
            + (f" + without effect {self.no_effect}" if self.no_effect else "")
        )


def _ranges(numbers: set[int | None]) -> str:
    """Formats {0, 1, 2, 5} as "0-2, 5"; empty for weights outside the layers."""
    runs: list[list[int]] = []
    for number in sorted(n for n in numbers if n is not None):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def _values(values: set[int | None] | set[float | None]) -> str:
    known = sorted(value for value in values if value is not None)
    shown = [f"{value:g}" for value in known[:4]] + (["…"] if len(known) > 4 else [])
    return ", ".join(shown)


def _span(values: set[float | None]) -> str:
    """Formats smallest to largest; "0!" for a weight that does not change."""
    known = sorted({f"{value:.2g}" if value else "0!" for value in values if value is not None})
    known.sort(key=lambda text: float(text.rstrip("!")))
    return "–".join(dict.fromkeys([*known[:1], *known[-1:]]))
