"""The memory that this process may still take: of the machine, its cgroup, ulimit -v, the GPU."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 1 << 60


@dataclass(frozen=True)
class Limit:
    """Free bytes, and the name of their bound for messages."""

    free: int
    what: str


def ram_limit(root: Path = Path("/")) -> Limit:
    """Returns the lower of MemAvailable and the limits of the memory cgroups (v2 and v1). Page
    cache counts as free. ``root`` replaces the file system's root."""
    limits = [Limit(_meminfo(root, "MemAvailable"), "MemAvailable"), *_cgroups(root)]
    return min(limits, key=lambda limit: limit.free)


def address_limit(root: Path = Path("/")) -> Limit | None:
    """Returns the addresses that ulimit -v (RLIMIT_AS) leaves; None without a limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return None
    pages = int(_read(root / "proc/self/statm").split()[0] or 0)
    return Limit(soft - pages * resource.getpagesize(), f"ulimit -v {soft // 1024}")


def resident_bytes(root: Path = Path("/")) -> int:
    """Returns the RAM that this process holds now."""
    fields = _read(root / "proc/self/statm").split()
    return int(fields[1]) * resource.getpagesize() if len(fields) > 1 else 0


def gpu_limit() -> Limit | None:
    """Returns the free memory of the GPU that the model goes to; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return Limit(free, f"{torch.cuda.get_device_name()}, {total / 1e9:.1f} GB")


def _meminfo(root: Path, key: str) -> int:
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        if name == key:
            return int(rest.split()[0]) * 1024
    return _UNLIMITED


def _cgroups(root: Path) -> list[Limit]:
    """Returns the memory limits of this process's cgroup and its parents."""
    found = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            bases = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
            names = ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            bases = [root / "sys/fs/cgroup/memory"]
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        for base in bases:
            folder = base / path.strip("/")
            # In a container the path may be the host's; its own cgroup is then at the root.
            chain = [folder, *folder.parents] if folder.is_dir() else [base]
            found += [
                limit
                for each in chain
                if each.is_relative_to(base) and (limit := _cgroup(each, *names)) is not None
            ]
    return found


def _cgroup(folder: Path, limit_name: str, usage_name: str, cached_name: str) -> Limit | None:
    limit = _read(folder / limit_name).strip()
    if not limit.isdecimal() or int(limit) >= _UNLIMITED:
        return None
    used = int(_read(folder / usage_name).strip() or 0)
    for line in _read(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == cached_name:
            used -= int(value)
    return Limit(int(limit) - used, f"cgroup {limit_name} {int(limit) / 1e9:.1f} GB")


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError:
        return ""
