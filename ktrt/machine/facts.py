"""Reads /proc, /sys and the environment of this machine; measures nothing."""

from __future__ import annotations

import mmap
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ktrt.machine.memory import Limit, ram_limit
from ktrt.machine.threads import ThreadCount, count_threads

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# The flags in /proc/cpuinfo that decide which kernels run.
ISA_FLAGS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni",
    "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16",
)  # fmt: skip
_AMX_FLAGS = {"amx_tile", "amx_int8", "amx_bf16"}
ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "KMP_AFFINITY", "KTRT_ISA",
    "KTRT_BF16", "KTRT_CACHE", "KTRT_CACHE_DIR",
)  # fmt: skip
_MADV_COLLAPSE = 25  # Linux 6.1; Python's mmap has no name for it
_HUGE_PAGE = 2 << 20


@dataclass(frozen=True)
class HugePages:
    """``setting`` is always, madvise or never (empty: this kernel has none). ``on_fault`` and
    ``on_collapse``: whether a trial got 2 MB pages with MADV_HUGEPAGE and with MADV_COLLAPSE."""

    setting: str
    on_fault: bool
    on_collapse: bool

    @property
    def obtained(self) -> bool:
        return self.on_fault or self.on_collapse


@dataclass(frozen=True)
class MachineFacts:
    """Sizes in bytes. ``cpus`` counts the online CPUs, ``allowed`` the ones this process may use
    and ``cores`` their physical cores; ``nodes`` has the allowed CPUs by NUMA node. ``cpu_quota``
    is the time that the cgroup grants, in CPUs (None: no limit), by the file ``quota_from``.
    ``isa`` is in use, ``detected_isa`` possible; ``bf16``: what AVX-512 multiplies BF16 by, "dot"
    (VDPBF16PS) or "float32". ``ram``: free bytes, and their bound."""

    cpu: str
    flags: tuple[str, ...]
    isa: str
    detected_isa: str
    cpus: int
    allowed: int
    cores: int
    nodes: tuple[tuple[int, ...], ...]
    cpu_quota: float | None
    quota_from: str
    cpuset: str
    governor: str
    l3_bytes: int
    huge_pages: HugePages
    memory: int
    ram: Limit
    kernel: str
    environment: Mapping[str, str]
    bf16: str = "dot"

    @property
    def amx_denied(self) -> bool:
        """The CPU has AMX, but this process could not get permission to use it."""
        return set(self.flags) >= _AMX_FLAGS and self.detected_isa != "amx"

    def threads(self, kt_num_threads: int | None = None) -> ThreadCount:
        """Returns the thread count of an engine on this machine."""
        return count_threads(
            kt_num_threads, self.environment,
            cores=self.cores, allowed=self.allowed, quota=self.cpu_quota,
        )  # fmt: skip


def read_facts(
    *,
    isa: str,
    detected_isa: str,
    nodes: list[list[int]],
    cores: int,
    environment: Mapping[str, str],
    root: Path = Path("/"),
    huge_pages: HugePages | None = None,
    bf16: str = "dot",
) -> MachineFacts:
    """Reads the facts. ``isa``, ``detected_isa``, ``nodes``, ``cores`` and ``bf16`` come from the
    engine; ``root`` replaces the file system's root, ``huge_pages`` the trial with real memory."""
    info = _text(root / "proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.+)$", info, re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    quota, quota_from = cpu_quota(root)
    meminfo = re.search(r"^MemTotal:\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    cpu0 = root / "sys/devices/system/cpu/cpu0"
    return MachineFacts(
        cpu=model[1].strip() if model else "unknown",
        flags=tuple(flag for flag in ISA_FLAGS if flag in present),
        isa=isa,
        detected_isa=detected_isa,
        cpus=len(re.findall(r"^processor\s*:", info, re.MULTILINE)),
        allowed=sum(map(len, nodes)),
        cores=cores,
        nodes=tuple(map(tuple, nodes)),
        cpu_quota=quota,
        quota_from=quota_from,
        cpuset=_cpuset(root),
        governor=_text(cpu0 / "cpufreq/scaling_governor").strip(),
        l3_bytes=_size(_text(cpu0 / "cache/index3/size").strip()),
        huge_pages=huge_pages or try_huge_pages(root),
        memory=int(meminfo[1]) * 1024 if meminfo else 0,
        ram=ram_limit(root),
        kernel=_text(root / "proc/sys/kernel/osrelease").strip(),
        environment={name: environment[name] for name in ENVIRONMENT if name in environment},
        bf16=bf16,
    )


def cpu_quota(root: Path = Path("/")) -> tuple[float | None, str]:
    """Returns the lowest quota of this process's cgroup and its parents, in CPUs, with its file;
    None without a limit."""
    found: list[tuple[float, str]] = []
    for folder, version in _cgroup_folders(root, "cpu"):
        if version == 2:
            file = folder / "cpu.max"
            fields = _text(file).split()
        else:
            file = folder / "cpu.cfs_quota_us"
            fields = [_text(file).strip(), _text(folder / "cpu.cfs_period_us").strip()]
        if len(fields) == 2 and all(field.isdecimal() and int(field) > 0 for field in fields):
            found.append((int(fields[0]) / int(fields[1]), f"/{file.relative_to(root)}"))
    return min(found) if found else (None, "")


def _cpuset(root: Path) -> str:
    """Returns the cgroup's CPUs as the kernel writes them; empty if it has no such file."""
    for folder, version in _cgroup_folders(root, "cpuset"):
        name = "cpuset.cpus.effective" if version == 2 else "cpuset.effective_cpus"
        if text := _text(folder / name).strip():
            return text
    return ""


def _cgroup_folders(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """Yields the folders of this process's cgroup and its parents, with the cgroup version."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            bases, version = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"], 2
        elif controller in controllers.split(","):
            bases = [root / "sys/fs/cgroup" / name for name in (controllers, controller)]
            version = 1
        else:
            continue
        for base in bases:
            folder = base / path.strip("/")
            # In a container the path may be the host's; its own cgroup is then at the root.
            chain = [folder, *folder.parents] if folder.is_dir() else [base]
            yield from ((each, version) for each in chain if each.is_relative_to(base))


def try_huge_pages(root: Path = Path("/")) -> HugePages:
    """Asks for huge pages as the engine does, and checks whether the kernel gave them."""
    setting = re.search(
        r"\[(\w+)\]", _text(root / "sys/kernel/mm/transparent_hugepage/enabled") or ""
    )
    results = []
    for collapse in (False, True):
        with mmap.mmap(-1, 4 * _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            before = _huge_bytes()
            try:
                if not collapse:
                    memory.madvise(mmap.MADV_HUGEPAGE)
                for page in range(0, len(memory), mmap.PAGESIZE):
                    memory[page] = 1
                if collapse:
                    memory.madvise(_MADV_COLLAPSE)
            except OSError:
                results.append(False)
                continue
            results.append(_huge_bytes() > before)
    return HugePages(setting[1] if setting else "", *results)


def _huge_bytes() -> int:
    text = _text(Path("/proc/self/smaps_rollup"))
    found = re.search(r"^AnonHugePages:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _size(text: str) -> int:
    """Parses "32768K" into bytes; returns 0 for other text."""
    match = re.fullmatch(r"(\d+)([KMG]?)", text)
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]] if match else 0


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""


def environment_of_process() -> dict[str, str]:
    """Returns a copy of the environment: later changes by imported libraries do not show in it."""
    return dict(os.environ)
