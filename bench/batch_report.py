"""The tables and the chart of bench/batch_curve.py, and their place in docs/performance.md."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batch_chart import Panel, line_chart

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT, CHART = ROOT / "docs/performance.md", ROOT / "docs/batch_curve.svg"
START, END = "<!-- generated: bench/batch_curve.py --docs -->", "<!-- generated: end -->"
Result = dict[str, float]


def tables(report: Mapping[str, Any]) -> str:
    """Returns a Markdown table for each weight format."""
    return "\n\n".join(
        "\n".join([f"{backend}:", "", *_table(report, found)])
        for backend, found in report["results"].items()
    )


def _table(report: Mapping[str, Any], found: Sequence[Result]) -> list[str]:
    more = {"many_over_one": _many(report) + " / one", "fixed_cost": "`kt_fixed_kernels`"}
    shown = {key: name for key, name in more.items() if key in found[0]}
    columns = [
        "conversations", "distinct experts of a layer", "GB a step", "limit, ms", "multiplying, ms",
        "roof, ms", "base, ms", "of the limit", "of the roof", "one adapter, ms",
        f"{report['adapters']} adapters, ms", "mixed / one",
        *shown.values(), "tokens/s, base · one · mixed", "tokens/s each, mixed",
    ]  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for r in found:
        rates = (f"{rate(r, kind):.1f}" for kind in ("base", "one", "mixed"))
        cells = [
            f"{r['batch']:.0f}", f"{r['base_experts']:.1f}", f"{r['base_gb']:.2f}",
            f"{r['base_limit_ms']:.1f}", f"{r['arithmetic_ms']:.1f}",
            f"{r['base_roof_ms']:.1f}", f"{r['base_ms']:.1f}", f"{r['base_share']:.0%}",
            f"{r['base_roof_share']:.0%}",
            f"{r['one_ms']:.1f}", f"{r['mixed_ms']:.1f}", f"{r['mixed_over_one']:.2f}",
            *(f"{r[k]:+.1%}" if k == "fixed_cost" else f"{r[k]:.2f}" for k in shown),
            " · ".join(rates), f"{rate(r, 'mixed') / r['batch']:.2f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _many(report: Mapping[str, Any]) -> str:
    return f"{report['many_adapters']} of r {report['many_rank']}"


def rate(result: Result, kind: str) -> float:
    """Returns tokens per second of all conversations."""
    return 1e3 * result["batch"] / result[f"{kind}_ms"]


def chart(report: Mapping[str, Any]) -> str:
    """Returns tokens per second over conversations as SVG, a panel for each weight format."""
    names = {
        "base": "base",
        "one": f"one adapter of r {report['rank']}",
        "mixed": f"{report['adapters']} adapters",
        "many": _many(report),
    }
    panels = []
    for backend, found in report["results"].items():
        curves = {
            name: [1e3 * r["batch"] / r[f"base_{name}_ms"] for r in found]
            for name in ("limit", "roof")
        }
        curves |= {
            name: [rate(r, kind) for r in found]
            for kind, name in names.items()
            if f"{kind}_ms" in found[0]
        }
        panels.append(Panel(backend, [int(r["batch"]) for r in found], curves))
    return line_chart(panels, "conversations decoded in one step", "tokens/s")


def write_docs(report: Mapping[str, Any], machine: str) -> None:
    """Replaces the generated part of docs/performance.md, and its chart."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True,
        check=True,
    ).stdout.strip()  # fmt: skip
    origin = (
        f"{machine}, {time.strftime('%Y-%m-%d')}, commit {commit}; read bandwidth of the runs "
        f"{_bandwidth(report)} GB/s, {report['context']} tokens of context, adapters of r "
        f"{report['rank']}, medians of {report['rounds']} rounds."
    )
    text = DOCUMENT.read_text("utf-8")
    before, _, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{DOCUMENT}: expected {START} … {END}")
    block = f"{START}\n{origin}\n\n![Tokens per second](batch_curve.svg)\n\n{tables(report)}\n"
    DOCUMENT.write_text(f"{before}{block}{END}{after}", "utf-8")
    CHART.write_text(chart(report), "utf-8")


def _bandwidth(report: Mapping[str, Any]) -> str:
    rates = [r["read_gb_per_s"] for found in report["results"].values() for r in found]
    low, high = round(min(rates)), round(max(rates))
    return f"{low}" if low == high else f"{low}–{high}"
