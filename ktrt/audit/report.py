"""Prints the audit for people: a summary and a map of layers × projections, legible without
colour."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from ktrt.adapter import Audit
    from ktrt.adapter.changes import Change
    from ktrt.audit.verify.model import LayerReport
    from ktrt.audit.verify.probes import Check

_WIDTH = 80
# Width of the layer's number, and of a column: three for the value, one for the shade, one space.
_LAYER, _COLUMN = 6, 5
# Lower bound of each shade, as a fraction of the largest value; shade; colour.
_SHADES = ((0.5, "█", "red"), (0.25, "▓", "yellow"), (0.125, "▒", "green"), (0.0, "░", "cyan"))
_MOST_FAILURES = 8
_MOST_NAMES = 4
_FLOW = ("q", "q_a", "q_b", "kv_a", "kv_b", "k", "v", "o", "gate", "up", "down")


def report(base: object, audit: Audit, changes: Sequence[Change]) -> Iterator[Text]:
    """Yields lines of at most 80 characters."""
    yield Text(f"base     {base}")
    yield Text(f"adapter  {audit.file}")
    yield Text(
        f"tensors  {audit.found} = {audit.applied_experts} on routed experts + "
        f"{audit.applied_peft} on other modules + {audit.not_applied} not applied"
        + (f" + {audit.no_effect} without effect" if audit.no_effect else "")
    )
    yield from _warnings(audit)
    yield Text()
    yield from _summary(changes)
    yield from _map(changes)
    yield from _unchanged(changes)
    whole = dict.fromkeys(
        row.kind
        for row in audit.rows
        if not row.part.startswith("lora_") and row.status != "no effect"
    )
    for kind in whole:
        yield Text(f"saved whole: {kind}")


def _warnings(audit: Audit) -> Iterator[Text]:
    for note in audit.notes:
        yield Text(f"assumed: {note}", style="yellow")
    partly = [row for row in audit.rows if row.zero_rows]
    if partly:
        yield Text(
            f"mostly zero: {partly[0].zero_rows} rows of {partly[0].tensor} and of "
            f"{len(partly) - 1} other tensors: one shard of several was saved",
            style="red",
        )


def _by_kind(changes: Iterable[Change]) -> dict[str, list[Change]]:
    kinds: dict[str, list[Change]] = {}
    for change in changes:
        kinds.setdefault(change.kind, []).append(change)
    return dict(sorted(kinds.items(), key=lambda item: _order(item[0])))


def _order(kind: str) -> tuple[str, int]:
    """Sorts by group, then in the order of the data flow."""
    leaf = _short(kind)
    return kind.rpartition(".")[0], _FLOW.index(leaf) if leaf in _FLOW else len(_FLOW)


def _summary(changes: Sequence[Change]) -> Iterator[Text]:
    kinds = _by_kind(changes)
    width = min(38, max((len(kind) for kind in kinds), default=0)) + 2
    yield Text(f"{'weights':{width}}{'layers':9}{'rank':6}{'scaling':9}‖ΔW‖/‖W‖", style="bold")
    for kind, found in kinds.items():
        name = kind if len(kind) < width else f"…{kind[3 - width :]}"
        layers = {change.layer for change in found if change.layer is not None}
        ranks = sorted({rank for change in found for rank in change.ranks})
        scalings = sorted({scaling for change in found for scaling in change.scalings})
        line = f"{name:{width}}{_ranges(layers):9}{_few(ranks):6}{_few(scalings):9}{_span(found)}"
        yield Text(line)


def _ranges(layers: set[int]) -> str:
    if not layers:
        return "–"
    low, high = min(layers), max(layers)
    whole = len(layers) == high - low + 1
    return (
        f"{low}" if low == high else f"{low}-{high}" if whole else f"{len(layers)} of {low}-{high}"
    )


def _few(values: Sequence[float]) -> str:
    shown = ",".join(f"{value:.3g}" for value in values[:2])
    return f"{shown},…" if len(values) > 2 else shown


def _span(found: Iterable[Change]) -> str:
    ratios = sorted(change.ratio for change in found if change.ratio is not None)
    if not ratios:
        return "–"
    low, high = (f"{100 * ratio:.3g}" for ratio in (ratios[0], ratios[-1]))
    return f"{low} %" if low == high else f"{low}–{high} %"


def _map(changes: Sequence[Change]) -> Iterator[Text]:
    inside = [change for change in changes if change.layer is not None]
    if not inside:
        return
    known = any(change.ratio is not None for change in inside)
    largest = max((change.delta or 0.0 for change in inside), default=0.0) or 1.0

    def value(change: Change) -> float | None:
        """Returns per cent of ‖W‖, or of the largest ‖ΔW‖ if ‖W‖ was not read."""
        share = change.ratio if known or change.delta is None else change.delta / largest
        return None if share is None else 100 * share

    yield Text()
    yield Text(f"‖ΔW‖ in % of {'‖W‖' if known else 'the largest ‖ΔW‖'}, by layer", style="bold")
    for kinds in _columns(list(_by_kind(inside))):
        yield from _block(inside, kinds, value)


def _columns(kinds: list[str]) -> Iterator[list[str]]:
    """Splits the columns into blocks that fit the width."""
    most = (_WIDTH - _LAYER) // _COLUMN
    for start in range(0, len(kinds), most):
        yield kinds[start : start + most]


def _block(
    changes: Sequence[Change], kinds: list[str], value: Callable[[Change], float | None]
) -> Iterator[Text]:
    groups: dict[str, int] = {}
    for kind in kinds:
        group = kind.rpartition(".")[0].removeprefix("mlp.")
        groups[group] = groups.get(group, 0) + 1
    above = "".join(_fit(group, n * _COLUMN) for group, n in groups.items())
    yield Text(f"{'':{_LAYER}}{above}".rstrip())
    names = "".join(_fit(_short(kind), _COLUMN) for kind in kinds)
    yield Text(f"{'layer':{_LAYER}}{names}".rstrip())
    cells = {(change.layer, change.kind): value(change) for change in changes}
    top = max((cell for cell in cells.values() if cell is not None), default=0.0)
    for layer in sorted({change.layer for change in changes if change.layer is not None}):
        line = Text(f"{layer:<{_LAYER}}")
        for kind in kinds:
            line.append_text(_cell(cells.get((layer, kind)), (layer, kind) in cells, top))
        line.rstrip()
        yield line


def _fit(text: str, width: int) -> str:
    return f"{text:{width}}" if len(text) < width else f"{text[: width - 2]}… "


def _short(kind: str) -> str:
    return kind.rpartition(".")[2].replace("_with_mqa", "").replace("_proj", "")


def _cell(value: float | None, present: bool, top: float) -> Text:
    if value is None:
        return Text(f"{'  ?' if present else '  ·':{_COLUMN}}", style="dim")
    if value == 0:
        return Text(f"{' 0!':{_COLUMN}}", style="bold red")
    _, shade, colour = next(each for each in _SHADES if value >= each[0] * top)
    return Text(f"{_three(value):>3}").append(f"{shade} ", style=colour)


def _three(value: float) -> str:
    """Formats a positive number in three characters."""
    if value >= 999.5:
        return ">1k"
    if value >= 9.95:
        return f"{value:.0f}"
    if value >= 0.995:
        return f"{value:.1f}"
    return f"{value:.2f}"[1:] if value >= 0.005 else "~0"


def _unchanged(changes: Iterable[Change]) -> Iterator[Text]:
    for change in changes:
        if change.delta == 0:
            yield Text(f"unchanged: {change.module}: A or B is all zero", style="red")
        elif zero := change.unchanged:
            experts = ", ".join(map(str, zero[:8])) + (", …" if len(zero) > 8 else "")
            yield Text(f"unchanged: {change.module}: experts {experts}", style="red")


def verification(reports: Sequence[LayerReport]) -> Iterator[Text]:
    """Yields the results of ``--verify``; lines of at most 80 characters, except failures."""
    for layer in reports:
        yield Text(f"layer {layer.layer}: {layer.what}", style="bold")
        yield Text(f"{'':31}{'off NumPy in float32':23}tuned − base")
        yield Text(f"{'':31}{'base':11}{'tuned':12}{'size':11}off NumPy's")
        yield from map(_checked, layer.checks)
        undecided = sum(check.undecided for check in layer.checks)
        if undecided:
            groups = sum(check.groups for check in layer.checks)
            yield Text(f"too little changed to be judged: {undecided} of {groups} groups of inputs")
        for text in layer.failures[:_MOST_FAILURES]:
            yield Text(f"FAILED: {text}", style="red")
        if (more := len(layer.failures) - _MOST_FAILURES) > 0:
            yield Text(f"FAILED: … and {more} more", style="red")
        yield Text()
    checks = sum(len(layer.checks) for layer in reports)
    if all(layer.passed for layer in reports):
        what = "layer" if len(reports) == 1 else "layers"
        yield Text(
            f"verified: base and adapter act as their files say ({checks} checks of "
            f"{len(reports)} {what})",
            style="green",
        )
        for text in dict.fromkeys(layer.assumed for layer in reports if layer.assumed):
            yield Text(
                f"but assumed, not verified: {text}; if answers are poor, set lora_B_layout",
                style="yellow",
            )
        if names := reports[0].unchecked:
            rest = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
            yield Text(
                f"not checked, outside the layers: {', '.join(names[:_MOST_NAMES])}{rest}",
                style="yellow",
            )
    else:
        bad = ", ".join(str(layer.layer) for layer in reports if not layer.passed)
        yield Text(f"NOT VERIFIED: layer {bad}", style="bold red")


def _checked(check: Check) -> Text:
    name = check.name if len(check.name) < 29 else f"…{check.name[-27:]}"
    line = Text(f"  {name:29}{_percent(check.base):11}{_percent(check.tuned):12}")
    line.append(f"{_percent(check.apart):11}{_percent(check.difference):10}")
    return line.append("FAILED" if check.failures else "ok")


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %" if value >= 0.0995 else f"{100 * value:.2f} %"
