"""``python -m ktrt.doctor [config.yaml]``: the machine and its speed, a model's speed on it, and
advice on settings."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ktrt import __version__
from ktrt.command_line import EXIT_NEGATIVE, new_parser, parse, run_command, set_environment
from ktrt.config import load_config
from ktrt.doctor.advice import advise
from ktrt.machine.facts import environment_of_process

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping, Sequence

    from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
    from ktrt.engine.probes import ArithmeticPeak, GpuRates
    from ktrt.loading.work import ModelWork

# Shares of the limits that whole models reached on machines measured so far (docs/performance.md).
DECODE_SHARE = 0.85
PREFILL_SHARE = 0.6
_PROMPT = 512
Report = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report. Returns 0 if all is well, 1 if something should be fixed, 2 on failure."""
    args = _parse_arguments(argv)
    # The user's settings: imports of ktrt and torch change the environment later.
    environment = environment_of_process()

    def body() -> int:
        set_environment()
        report = examine(args, environment)
        print(json.dumps(report, indent=1) if args.json else "\n".join(lines(report)))
        return EXIT_NEGATIVE if any(each["level"] == "fix" for each in report["advice"]) else 0

    return run_command(body, args, level=logging.WARNING)


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser(
        "doctor",
        "Examines this machine, and the speed of a model on it.",
        "Exit code: 0 all is well, 1 something should be fixed, 2 the examination failed.",
    )
    parser.add_argument(
        "--json", action="store_true", help="as JSON: bytes and operations per second"
    )
    return parse(parser, argv)


def examine(args: argparse.Namespace, environment: Mapping[str, str]) -> Report:
    """Returns the whole report in basic types. ``KtrtError``: no engine, or a wrong
    configuration."""
    config = None if args.config is None else load_config(args.config, args.overrides)
    from ktrt.engine import probes

    facts = probes.machine_facts(environment)
    threads = facts.threads(config.experts.kt_num_threads if config else None).count
    bandwidth = probes.read_bandwidth(threads)
    peaks = probes.arithmetic_peaks(threads)
    driver = probes.has_nvidia_gpu()
    gpu = probes.gpu_rates() if driver else None
    report: Report = {
        "version": __version__,
        "machine": {**asdict(facts), "amx_denied": facts.amx_denied},
        "threads": threads,
        "read_bandwidth": bandwidth,
        "arithmetic": [asdict(peak) for peak in peaks],
        "gpu": asdict(gpu) if gpu else None,
        "model": None,
    }
    fits: list[str] = []
    excess, speeds = None, dict[str, float]()
    running = stored = None
    if config is not None:
        model = _examine_model(config.model, config.adapter, config.experts, bandwidth, peaks, gpu)
        report["model"] = model
        fits, excess = list(model["fits"]), model["excess"]
        running, stored = model["kt_backend"], model["stored"]
        speeds = {row["kt_backend"]: row["decode_bound"] for row in model["reach"]}
    advice = advise(
        facts, config.experts if config else None, running=running, stored=stored, fits=fits,
        excess=excess, speeds=speeds, cuda_missing=driver and gpu is None,
    )  # fmt: skip
    report["advice"] = [asdict(each) for each in advice]
    return report


def _examine_model(
    model: ModelArgs,
    adapter: AdapterArgs,
    experts: ExpertArgs,
    bandwidth: float,
    peaks: list[ArithmeticPeak],
    gpu: GpuRates | None,
) -> Report:
    """Returns the model's memory and speed limits, computed from its headers alone."""
    from ktrt.loading.formats import own_formats
    from ktrt.loading.plan import prepare
    from ktrt.loading.work import ModelWork

    ready = prepare(model, adapter, experts)
    ready.engine.close()
    work, memory = ModelWork(ready.inventory), ready.memory
    context = min(2048, memory.max_context)
    fits = memory.fitting_backends()
    return {
        "folder": str(model.model_name_or_path),
        "kt_backend": ready.formats.kt_backend,
        "stored": own_formats(ready.base.experts).kt_backend,
        "notes": list(ready.formats.notes),
        "bytes_per_token": work.bytes_by_part(ready.formats.kt_backend, context),
        "reach": [
            {**row, "fits": row["kt_backend"] in fits}
            for row in _reach(work, context, bandwidth, peaks, gpu)
        ],
        "memory": memory.as_dict(),
        "fits": {
            backend: {"bytes": size, "context": tokens} for backend, (size, tokens) in fits.items()
        },
        "excess": memory.excess(min(2048, memory.max_context))
        if not memory.fitting_context()
        else None,
    }


def _reach(
    work: ModelWork,
    context: int,
    bandwidth: float,
    peaks: list[ArithmeticPeak],
    gpu: GpuRates | None,
) -> Iterator[Report]:
    """Yields tokens per second by kt_backend, in what the checkpoint can run in: upper bounds and
    expected values."""
    from ktrt.engine.formats import format_named
    from ktrt.engine.probes import peak_of

    gpu_rate = gpu.read if gpu else None
    others = peak_of(format_named(work.other_format), peaks) if gpu is None else None
    for backend, experts in work.inventory.experts.items():
        weight_format = format_named(experts.form.split("+")[-1])  # after the plain layers' BF16
        decode = 1 / work.decode_seconds(backend, bandwidth, gpu_rate, context)
        row: Report = {"kt_backend": backend, "decode_bound": decode, "prompt": _PROMPT}
        row |= {"decode": DECODE_SHARE * decode, "prefill_bound": None, "prefill": None}
        if (peak := peak_of(weight_format, peaks)) is not None:
            other_peak = others.all_threads if others else None
            seconds = work.prefill_seconds(
                backend, _PROMPT, bandwidth, peak.all_threads, other_peak
            )
            row["prefill_bound"] = _PROMPT / seconds
            row["prefill"] = PREFILL_SHARE * _PROMPT / seconds
        yield row


# ---- text


def lines(report: Report) -> Iterator[str]:
    """Yields the report as text."""
    yield from _machine_lines(report)
    if report["model"] is not None:
        yield from _model_lines(report["model"])
    yield ""
    if not report["advice"]:
        yield "Nothing to change."
    for each in report["advice"]:
        mark = "FIX     " if each["level"] == "fix" else "consider"
        yield f"{mark}  {each['setting']}"
        yield f"          {each['reason']}"


def _machine_lines(report: Report) -> Iterator[str]:
    facts = report["machine"]
    nodes = len(facts["nodes"])
    yield (
        f"CPU         {facts['cpu']}: {facts['allowed']} of {facts['cpus']} CPUs, "
        f"{facts['cores']} cores, {nodes} NUMA node{'s' if nodes > 1 else ''}, "
        f"Linux {facts['kernel']}"
    )
    amx = "permitted" if facts["detected_isa"] == "amx" else "not there"
    if facts["amx_denied"]:
        amx = "REFUSED by the system"
    possible = f"possible: {facts['detected_isa']}; AMX: {amx}"
    yield f"kernels     {facts['isa']} ({possible}){_bf16_note(facts)}"
    quota = f"{facts['cpu_quota']:g} CPUs ({facts['quota_from']})" if facts["cpu_quota"] else "none"
    yield f"limits      CPU quota: {quota}; cpuset: {facts['cpuset'] or 'none'}"
    yield (
        f"memory      {_gb(facts['ram']['free'])} free of {_gb(facts['memory'])}, bounded by "
        f"{facts['ram']['what']}"
    )
    pages = facts["huge_pages"]
    got = (
        "obtained"
        if pages["on_fault"]
        else "by MADV_COLLAPSE only"
        if pages["on_collapse"]
        else "REFUSED"
    )
    collapse = "works" if pages["on_collapse"] else "does not work"
    yield f"huge pages  {pages['setting'] or 'unknown'}: {got}; MADV_COLLAPSE {collapse}"
    if facts["environment"]:
        pairs = (f"{name}={value}" for name, value in facts["environment"].items())
        yield f"environment {' '.join(pairs)}"
    threads = report["threads"]
    yield ""
    yield f"memory reads {report['read_bandwidth'] / 1e9:.1f} GB/s on {threads} threads"
    if report["arithmetic"]:
        yield f"{'arithmetic peak, 10⁹ operations/s':36} {'1 thread':>10} {threads:>6} threads"
    for peak in report["arithmetic"]:
        what = f"{peak['name']} ({peak['instruction']}, {peak['operands']})"
        yield f"  {what:34} {peak['one_thread'] / 1e9:10.0f} {peak['all_threads'] / 1e9:14.0f}"
    gpu = report["gpu"]
    if gpu is None:
        yield "GPU         none"
    else:
        yield (
            f"GPU         {gpu['name']}: {_gb(gpu['free'])} free of {_gb(gpu['memory'])}, reads "
            f"{gpu['read'] / 1e9:.0f} GB/s; bus to it {gpu['to_gpu'] / 1e9:.1f} GB/s, from it "
            f"{gpu['from_gpu'] / 1e9:.1f} GB/s"
        )


def _bf16_note(facts: Report) -> str:
    if "avx512_bf16" not in facts["flags"]:
        return ""
    faster = "vdpbf16ps" if facts["bf16"] == "dot" else "float32 multiply-adds"
    return f"; AVX-512 multiplies BF16 by {faster}"


def _model_lines(model: Report) -> Iterator[str]:
    parts = model["bytes_per_token"]
    yield ""
    yield f"{model['folder']}"
    yield from model["notes"]
    yield f"decoding one token reads {sum(parts.values()) / 1e6:.1f} MB with {model['kt_backend']}:"
    for name, size in parts.items():
        if size:
            yield f"  {name:34} {size / 1e6:10.1f} MB"
    yield (
        f"{'tokens/s, at most → expected':24} {'decoding':>20} "
        f"{f'prompt of {_PROMPT}':>22}   memory"
    )
    for row in model["reach"]:
        prefill = "unknown"
        if row["prefill"] is not None:
            prefill = f"{row['prefill_bound']:.0f} → {row['prefill']:.0f}"
        decode = f"{row['decode_bound']:.1f} → {row['decode']:.1f}"
        memory = "fits" if row["fits"] else "DOES NOT FIT"
        name = row["kt_backend"]
        if name == model["stored"]:
            name += " (as stored)"
        yield f"  {name:22} {decode:>20} {prefill:>22}   {memory}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


if __name__ == "__main__":
    sys.exit(main())
