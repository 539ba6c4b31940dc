"""Advice on settings of this machine and the configuration, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ktrt.config import ExpertArgs
    from ktrt.machine.facts import MachineFacts

# "fix": the model does not run, or at a fraction of its speed; "consider": the user's choice.
Level = Literal["fix", "consider"]
# INT8's rounding is not worth a smaller speed-up than this.
_WORTH_IT = 1.2
_BF16, _INT8, _INT4, _OWN = "AMXBF16", "AMXInt8", "AMXInt4", "RAWINT4"
_SMALLER = "a smaller model, or more memory"


@dataclass(frozen=True)
class Advice:
    """``setting`` is the change to make."""

    level: Level
    setting: str
    reason: str


def advise(
    facts: MachineFacts,
    experts: ExpertArgs | None = None,
    *,
    running: str | None = None,
    stored: str | None = None,
    fits: Sequence[str] = (),
    excess: str | None = None,
    speeds: Mapping[str, float] | None = None,
    cuda_missing: bool = False,
) -> list[Advice]:
    """Returns the advice, urgent items first. ``experts`` is from the configuration; ``running``
    is the kt_backend that it comes to and ``stored`` the checkpoint's own; ``fits`` lists every
    kt_backend that memory suffices for; ``excess`` says why the running one does not fit;
    ``speeds``: of decoding, by kt_backend; ``cuda_missing``: there is an NVIDIA driver, but torch
    finds no GPU."""
    found = [*_isa(facts), *_threads(facts, experts), *_memory(facts), *_openmp(facts)]
    if experts is not None:
        if running is not None and experts.kt_weight_path is None:
            found += _backend(running, stored, fits, excess, speeds or {})
        found += _numa(facts, experts)
    if cuda_missing:
        found += _gpu(facts)
    return sorted(found, key=lambda each: each.level != "fix")


def _isa(facts: MachineFacts) -> Iterator[Advice]:
    override = facts.environment.get("KTRT_ISA")
    if override and facts.isa != facts.detected_isa:
        yield Advice(
            "fix", "unset KTRT_ISA",
            f"KTRT_ISA={override} keeps the engine on {facts.isa} kernels; this machine runs "
            f"{facts.detected_isa}",
        )  # fmt: skip
    if facts.amx_denied:
        yield Advice(
            "fix", "let the process use AMX (Linux 5.16 or newer; no seccomp filter on arch_prctl)",
            "the CPU has AMX, but arch_prctl(ARCH_REQ_XCOMP_PERM) was refused (kernel "
            f"{facts.kernel or 'unknown'}): prefilling runs on {facts.detected_isa} kernels",
        )  # fmt: skip
    if facts.detected_isa == "portable":
        yield Advice(
            "fix", "run on a CPU with AVX2 or newer",
            "neither AVX2 nor AVX-512 was found (in a virtual machine: pass the host's CPU model "
            "through); the portable kernels are many times slower",
        )  # fmt: skip


def _threads(facts: MachineFacts, experts: ExpertArgs | None) -> Iterator[Advice]:
    chosen = facts.threads(experts.kt_num_threads if experts else None)
    threads, wanted, name, usable = chosen.count, chosen.wanted, chosen.setting, chosen.default
    if facts.cpu_quota is not None and threads > facts.cpu_quota:
        yield Advice(
            "fix", f"kt_num_threads: {usable}, or raise the quota",
            f"{threads} threads, but {facts.quota_from} grants {facts.cpu_quota:g} CPUs of time: "
            "the kernel stops all threads for the rest of every period",
        )  # fmt: skip
    elif wanted is not None and wanted > facts.allowed:
        yield Advice(
            "consider", f"{name}: {usable}",
            f"{name} is {wanted}, this process may use {facts.allowed} CPUs; {facts.allowed} run",
        )  # fmt: skip
    elif threads > facts.cores:
        yield Advice(
            "consider", f"{name}: {usable}",
            f"{threads} threads on {facts.cores} cores share arithmetic units and caches",
        )  # fmt: skip
    elif wanted is not None and wanted < usable:
        yield Advice(
            "consider", f"{name}: {usable}",
            f"{name} is {wanted}, {usable} cores are there: fewer threads read memory more slowly",
        )  # fmt: skip
    if facts.allowed < facts.cpus:
        what = f"cpuset {facts.cpuset}" if facts.cpuset else "taskset or a cgroup"
        yield Advice(
            "consider", f"a cpuset of all {facts.cpus} CPUs",
            f"this process may use {facts.allowed} of {facts.cpus} CPUs ({what})",
        )  # fmt: skip
    if facts.governor == "powersave":
        yield Advice(
            "consider", "cpupower frequency-set -g performance",
            "the frequency governor is powersave: clocks rise late after each wait",
        )  # fmt: skip


def _memory(facts: MachineFacts) -> Iterator[Advice]:
    pages = facts.huge_pages
    if not pages.on_fault:
        yield Advice(
            "fix" if not pages.obtained else "consider",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
            f"memory gets no 2 MB pages (the setting is {pages.setting or 'missing'}): decoding "
            "from small pages takes up to a third longer",
        )


def _openmp(facts: MachineFacts) -> Iterator[Advice]:
    policy = facts.environment.get("OMP_WAIT_POLICY")
    if policy is not None and policy.lower() != "passive":
        yield Advice(
            "fix", "unset OMP_WAIT_POLICY, or set it to PASSIVE",
            f"OMP_WAIT_POLICY={policy}: torch's idle threads spin on the engine's cores",
        )  # fmt: skip


def _backend(
    running: str,
    stored: str | None,
    fits: Sequence[str],
    excess: str | None,
    speeds: Mapping[str, float],
) -> Iterator[Advice]:
    def gain(backend: str) -> float:
        return speeds[backend] / speeds[running] if {backend, running} <= speeds.keys() else 1.0

    if excess is not None:
        named = {stored: "auto"}
        choice = f"kt_backend: {named.get(fits[0], fits[0])}" if fits else _SMALLER
        yield Advice("fix", choice, f"{running} does not fit: {excess}")
    elif stored is not None and stored in fits and stored not in (running, _BF16):
        faster = (
            "as fast" if gain(stored) < _WORTH_IT else f"up to {gain(stored):.1f} times as fast"
        )
        error = "" if running == _BF16 else f"; {running} rounds them a second time"
        yield Advice(
            "consider", "kt_backend: auto",
            f"the experts are stored in {stored}, which decodes {faster} as {running}{error}",
        )  # fmt: skip
    elif running == _BF16 and _INT8 in fits and gain(_INT8) >= _WORTH_IT:
        yield Advice(
            "consider", f"kt_backend: {_INT8}",
            f"half the bytes of the experts, decoding up to {gain(_INT8):.1f} times as fast; costs "
            "1–3.5 % relative error of the logits (BF16 0.2–0.6 %)",
        )  # fmt: skip
    elif running == _INT4:
        yield from _instead_of_int4(fits)


def _instead_of_int4(fits: Sequence[str]) -> Iterator[Advice]:
    better = [each for each in (_INT8, _OWN) if each in fits]
    if better:
        more = f"; {_OWN}, 4 bits with a scale for every 32 columns, costs half of that"
        yield Advice(
            "consider", f"kt_backend: {' or '.join(better)}",
            "it fits too; INT4 in kt_kernel's format costs 11–25 % relative error of the logits"
            + (more if _OWN in fits else ""),
        )  # fmt: skip


def _numa(facts: MachineFacts, experts: ExpertArgs) -> Iterator[Advice]:
    nodes = len(facts.nodes)
    if experts.kt_tp_enabled and nodes == 1:
        yield Advice(
            "consider", "kt_tp_enabled: false",
            "there is one NUMA node: the experts are kept whole anyway",
        )  # fmt: skip
    elif not experts.kt_tp_enabled and nodes > 1:
        yield Advice(
            "consider", "kt_tp_enabled: true",
            f"{nodes} NUMA nodes: without it most threads read experts from another node's memory",
        )  # fmt: skip


def _gpu(facts: MachineFacts) -> Iterator[Advice]:
    visible = facts.environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        yield Advice(
            "consider", "CUDA_VISIBLE_DEVICES=0",
            "it is empty, which hides the GPU: everything runs on the CPU",
        )  # fmt: skip
    else:
        yield Advice(
            "fix", "a build of PyTorch with CUDA (https://pytorch.org/get-started)",
            "there is an NVIDIA driver, but torch finds no GPU: everything runs on the CPU",
        )  # fmt: skip
