"""An adapter that is resident in a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ktrt.adapter.changes import find_deltas

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from ktrt.adapter.audit import Audit
    from ktrt.adapter.changes import Change, ExpertNorms
    from ktrt.experts.spec import ExpertsSpec


@dataclass(frozen=True)
class Resident:
    """``number``: the engine's, never used again; ``digest`` tells contents apart. ``whole``: why
    its weight can only be 1 or 0, if so; ``row_reason``: why it cannot be chosen for single rows of
    a step, if so. ``folder`` held its files when it was loaded."""

    number: int
    audit: Audit
    digest: str
    whole: str | None
    row_reason: str | None
    folder: Path | None = None
    norms: ExpertNorms = field(default_factory=dict)

    def changes(self, specs: Iterable[ExpertsSpec]) -> list[Change]:
        """Returns the changes of the base, by layer, from norms computed at the load. ``specs``:
        the base's routed experts."""
        return find_deltas(self.audit, self.norms, specs)
