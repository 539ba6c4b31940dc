"""Reports of ``ktrt.bench``: a markdown table and a chart."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from ktrt.errors import KtrtError

if TYPE_CHECKING:
    from collections.abc import Iterator

Report = dict[str, Any]


def markdown(report: Report) -> str:
    """Returns a headline, a table of phases, and lines for first token and memory."""
    kernels = ", ".join(sorted(set(report["kernels"].values())))
    lines = [
        f"{report['model']}, {report['kt_backend']}, {report['threads']} threads, {kernels}"
        + (f", {report['gpu']}" if report["gpu"] else "")
        + (f", adapter {report['adapter']}" if report["adapter"] else ", no adapter"),
        "",
        "| | tokens/s | with adapter | adapter costs | of the limit | reads, GB/s |",
        "|---|---|---|---|---|---|",
        *_phase_lines(report["rows"]),
        "",
    ]
    first = report["first_token"]
    for name, title in (("cold", "First token, cold"), ("reuse", "First token, second turn")):
        each = first[name]
        lines.append(
            f"{title}: {1000 * each['seconds']:.0f} ms "
            f"({each['prompt_tokens']} tokens, {each['reused_tokens']} reused)"
        )
    memory = report["memory"]
    text = f"Memory: {memory['resident'] / 1e9:.2f} GB, at most {memory['peak_resident'] / 1e9:.2f}"
    if memory["gpu_peak"] is not None:
        text += f"; GPU {memory['gpu_peak'] / 1e9:.2f} GB"
    return "\n".join([*lines, text])


def _phase_lines(rows: list[Report]) -> Iterator[str]:
    for phase, tokens in dict.fromkeys((row["phase"], row["tokens"]) for row in rows):
        found = {
            row["adapter"]: row for row in rows if (row["phase"], row["tokens"]) == (phase, tokens)
        }
        base, adapted = found.get(False), found.get(True)
        one = base or adapted
        assert one is not None
        cells = [
            f"{base['tokens_per_s']:.1f}" if base else "–",
            f"{adapted['tokens_per_s']:.1f}" if adapted else "–",
            f"{adapted['adapter_cost']:+.1%}" if adapted and base else "–",
            f"{one['of_limit']:.0%}" if one["of_limit"] is not None else "–",
            f"{one['read_bandwidth'] / 1e9:.1f}",
        ]
        yield f"| {phase} {tokens} | {' | '.join(cells)} |"


def require_matplotlib() -> None:
    """Raises ``KtrtError`` if matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise KtrtError("--plot needs matplotlib: pip install 'ktrt[plot]', or leave --plot out")


def plot(report: Report, file: str) -> None:
    """Draws bars of tokens per second; prefill and decoding have separate scales."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for index, phase in enumerate(("prefill", "decode")):
        axes = figure.add_subplot(1, 2, index + 1)
        rows = [row for row in report["rows"] if row["phase"] == phase]
        sizes = list(dict.fromkeys(row["tokens"] for row in rows))
        for offset, adapter in ((-0.2, False), (0.2, True)):
            chosen = {
                row["tokens"]: row["tokens_per_s"] for row in rows if row["adapter"] == adapter
            }
            at = [sizes.index(size) + offset for size in chosen]
            if chosen:
                label = "with adapter" if adapter else "base"
                bars = axes.bar(at, list(chosen.values()), 0.4, label=label)
                axes.bar_label(bars, fmt="%.0f")
        axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axes.set_title(f"{phase}, tokens per second")
        axes.set_xlabel("tokens")
        axes.legend()
    figure.suptitle(f"{report['model']}, {report['kt_backend']}, {report['threads']} threads")
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:
        raise KtrtError(f"--plot {file}: cannot be written: {error}") from error
