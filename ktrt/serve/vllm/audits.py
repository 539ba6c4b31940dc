"""Audits of adapters for the page: the size of every change, by layer and projection."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from pydantic import BaseModel
from torch import nn

from ktrt.audit.changes import read_weight_norms, with_weights
from ktrt.engine.torch_threads import set_torch_threads
from ktrt.errors import AdapterError
from ktrt.serve.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from ktrt.adapter import Audit
    from ktrt.adapter.changes import Change
    from ktrt.adapter.resident import Resident
    from ktrt.session import Session

# Audits that are kept; the oldest go.
_KEPT = 64
# Names that a warning lists.
_NAMED = 4


class AuditedTensors(BaseModel):
    """The tensors of the adapter's files, by what applies them."""

    found: int
    on_experts: int
    on_other_modules: int
    without_effect: int
    not_applied: int


class AuditedKind(BaseModel):
    """A kind of weight, such as ``self_attn.q_proj``: a column of the picture. ``changed`` of the
    base's ``total`` modules have LoRA."""

    kind: str
    changed: int
    total: int


class AuditedChange(BaseModel):
    """The change of one Linear, or of one projection of all routed experts of a layer: a cell of
    the picture.

    ``delta`` is ‖ΔW‖, ``weight`` ‖W‖ (Frobenius, over all experts), ``ratio`` their quotient; None
    if it is not known. ``experts`` has ‖ΔW‖ of each routed expert; ``unchanged_experts`` lists
    those whose ΔW is zero.
    """

    module: str
    kind: str
    layer: int | None
    ranks: list[int]
    scalings: list[float]
    delta: float | None
    weight: float | None
    ratio: float | None
    experts: list[float] | None = None
    unchanged_experts: list[int] = []


class AdapterAudit(BaseModel):
    """An adapter's changes of the base. ``layers``: the rows of the picture, all layers of the
    base; ``kinds``: its columns, also those without a change; ``changes``: its cells, and changes
    outside the layers. ``warnings``: for people."""

    name: str
    digest: str
    tensors: AuditedTensors
    layers: list[int]
    kinds: list[AuditedKind]
    changes: list[AuditedChange]
    saved_whole: list[str]
    warnings: list[str]


class Audits:
    """Computes audits in one thread, each once: they are kept by the adapter's digest.

    ‖ΔW‖ is known from the load. ‖W‖ is read from the base's files once for all adapters, one
    expert at a time.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._thread = ThreadPoolExecutor(1, "ktrt-audits")
        self._found: dict[tuple[str, bool], asyncio.Future[AdapterAudit]] = {}
        self._weights: dict[str, float] = {}

    async def audit(self, name: str, *, norms: bool = True) -> AdapterAudit:
        """Returns an adapter's audit. ``norms``: with ‖W‖. ``ApiError`` 404: no such adapter."""
        try:
            resident = self._session.adapters.resident(name)
        except AdapterError as error:
            raise ApiError(404, str(error), param="name", code="model_not_found") from error
        key = resident.digest, norms
        if key not in self._found:
            loop = asyncio.get_running_loop()
            work = loop.run_in_executor(self._thread, partial(self._compute, resident, norms))
            self._found[key] = work
            work.add_done_callback(partial(self._forget_failure, key))
            for old in list(self._found)[:-_KEPT]:
                del self._found[old]
        # A client that leaves does not interrupt what others may wait for.
        found = await asyncio.shield(self._found[key])
        return found.model_copy(update={"name": name})

    def _forget_failure(self, key: tuple[str, bool], work: asyncio.Future[AdapterAudit]) -> None:
        if work.cancelled() or work.exception() is not None:
            self._found.pop(key, None)

    def _compute(self, resident: Resident, norms: bool) -> AdapterAudit:
        set_torch_threads(1)  # the engine has the others
        base = self._session.base
        specs = base.experts.specs if base is not None else ()
        changes = resident.changes(specs)
        if norms and base is not None:
            new = [change for change in changes if change.module not in self._weights]
            self._weights |= read_weight_norms(base, new) if new else {}
            changes = with_weights(changes, self._weights)
        modules = list(_modules(self._session)) if base is not None else []
        return AdapterAudit(
            name="", digest=resident.digest, tensors=_tensors(resident.audit),
            layers=sorted({layer for layer, _ in modules if layer is not None}),
            kinds=_kinds(changes, modules), changes=[_cell(change) for change in changes],
            saved_whole=_saved_whole(resident.audit),
            warnings=list(_warnings(resident.audit, changes)),
        )  # fmt: skip


def _modules(session: Session) -> Iterator[tuple[int | None, str]]:
    """Yields (layer, kind) of everything in the base that LoRA can change."""
    assert session.base is not None
    paths = tuple(f"{spec.path}." for spec in session.base.experts.specs)
    for name, module in session.base.built.model.named_modules():
        if isinstance(module, nn.Linear) and not name.startswith(paths):
            yield _place(name)
    for spec in session.base.experts.specs:
        for projection in spec.projections:
            yield _place(f"{spec.path}.{projection}_proj")


def _place(module: str) -> tuple[int | None, str]:
    found = re.search(r"\.(\d+)\.", module)
    return (int(found[1]), module[found.end() :]) if found else (None, module)


def _tensors(audit: Audit) -> AuditedTensors:
    return AuditedTensors(
        found=audit.found, on_experts=audit.applied_experts, on_other_modules=audit.applied_peft,
        without_effect=audit.no_effect, not_applied=audit.not_applied,
    )  # fmt: skip


def _kinds(
    changes: Sequence[Change], modules: Iterable[tuple[int | None, str]]
) -> list[AuditedKind]:
    """Returns the columns in the order of the data flow, which is that of the model's modules;
    last the kinds outside of the layers."""
    ordered = sorted(modules, key=lambda each: each[0] is None)
    totals = Counter(kind for _, kind in ordered)
    changed: Mapping[str, int] = Counter(change.kind for change in changes)
    return [
        AuditedKind(kind=kind, changed=changed[kind], total=max(totals[kind], changed[kind]))
        for kind in dict.fromkeys([*totals, *changed])
    ]


def _cell(change: Change) -> AuditedChange:
    return AuditedChange(
        module=change.module, kind=change.kind, layer=change.layer, ranks=list(change.ranks),
        scalings=list(change.scalings), delta=change.delta, weight=change.weight,
        ratio=change.ratio, experts=list(change.experts) if change.experts else None,
        unchanged_experts=change.unchanged,
    )  # fmt: skip


def _saved_whole(audit: Audit) -> list[str]:
    rows = (row for row in audit.rows if row.status != "no effect")
    return list(dict.fromkeys(row.kind for row in rows if not row.part.startswith("lora_")))


def _warnings(audit: Audit, changes: Iterable[Change]) -> Iterator[str]:
    yield from (f"assumed: {note}" for note in audit.notes)
    if partly := [row.tensor for row in audit.rows if row.zero_rows]:
        yield f"mostly zero, as if one shard of several had been saved: {_listed(partly)}"
    if idle := [row.tensor for row in audit.rows if row.status == "no effect"]:
        yield f"without effect on text: {_listed(idle)}"
    if unchanged := [change.module for change in changes if change.delta == 0]:
        yield f"unchanged, since A or B is all zero: {_listed(unchanged)}"
    if unknown := [change.module for change in changes if change.delta is None]:
        yield f"‖ΔW‖ is not known, which a DoRA's A and B do not tell: {_listed(unknown)}"
    some = [change for change in changes if change.unchanged and change.delta != 0]
    if some:
        count = sum(len(change.unchanged) for change in some)
        yield f"{count} single experts unchanged, in {_listed([each.module for each in some])}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
