"""The memory plan: RAM and GPU memory of a model, before its first weight is read."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ktrt.engine.formats import FORMATS
from ktrt.errors import ConfigError
from ktrt.loading.inventory import (
    BASE,
    EXPERT_BIASES,
    EXPERT_LORA,
    EXPERTS,
    LINEAR_LORA,
    LORA,
    TABLES,
    WORKSPACE,
)
from ktrt.machine.memory import Limit, address_limit, ram_limit, resident_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from ktrt.kv.size import KvSize
    from ktrt.loading.inventory import Inventory

logger = logging.getLogger(__name__)

# Forms of rows that the engine packs; other forms are torch's dtypes.
_PACKED = {each.name for each in FORMATS}
# A plan with room for fewer tokens of conversation is refused.
MIN_CONTEXT = 2048
# Activations, allocator slack and later imports of libraries; measured on CPU-only starts.
_RUNTIME_BYTES = 32 << 20
# Share of the memory left after loading that KV caches may take; the rest is for activations of
# long prompts, the page cache and other programs.
_KV_SHARE = 0.9


@dataclass(frozen=True)
class Item:
    """Bytes of RAM and of GPU memory that one part takes."""

    name: str
    ram: int = 0
    gpu: int = 0


@dataclass(frozen=True)
class MemoryPlan:
    """``items`` has everything but the KV cache, whose arrays ``kv_size`` describes, for contexts
    of up to ``max_context`` tokens, on the GPU if ``on_gpu``. ``already``: RAM that the process
    holds; ``other_formats``: bytes of the experts by kt_backend; ``mapped_files``: addresses, not
    memory, that transformers takes for the checkpoint's files."""

    items: tuple[Item, ...]
    kv_size: KvSize
    max_context: int
    on_gpu: bool
    already: int
    other_formats: Mapping[str, int]
    mapped_files: int
    ram: Limit
    gpu: Limit | None
    addresses: Limit | None

    def kv(self, context: int) -> Item:
        """Returns the KV cache of ``context`` tokens."""
        size = self.kv_size.bytes_of(context)
        name = f"KV cache, {context} tokens"
        return Item(name, gpu=size) if self.on_gpu else Item(name, ram=size)

    def total(self, context: int) -> Item:
        """Returns the sum, with a KV cache of ``context`` tokens."""
        rows = [*self.items, self.kv(context)]
        return Item("total", sum(r.ram for r in rows), sum(r.gpu for r in rows))

    def excess(self, context: int) -> str | None:
        """Says what does not fit with a KV cache of ``context`` tokens; None if everything does."""
        total = self.total(context)
        for what, need, limit in self._needs(total):
            if need > limit.free:
                return f"{_gb(need)} more {what} needed, {_gb(limit.free)} free ({limit.what})"
        return None

    def _needs(self, total: Item) -> Iterator[tuple[str, int, Limit]]:
        """Yields what ``total`` takes in addition to what the process holds, by limit in force."""
        more = total.ram - self.already
        yield "RAM", more, self.ram
        if self.addresses is not None:
            yield "address space", more + self.mapped_files, self.addresses
        if self.gpu is not None:
            yield "GPU memory", total.gpu, self.gpu

    def kv_budget(self) -> int:
        """Returns the bytes that KV caches may take on their device next to everything else."""
        left = (limit.free - need for what, need, limit in self._needs(self.total(0))
                if (what == "GPU memory") == self.on_gpu)  # fmt: skip
        return max(0, int(min(left) * _KV_SHARE))

    def fitting_context(self) -> int:
        """Returns the longest context that fits, up to ``max_context``; 0 below MIN_CONTEXT."""
        low, high = 0, self.max_context
        if self.excess(min(MIN_CONTEXT, high)) is not None:
            return 0
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (low, middle - 1) if self.excess(middle) else (middle, high)
        return low

    def check(self) -> None:
        """Raises ``ConfigError`` with the numbers, and a format that fits, if the model cannot run;
        warns if the model's whole context does not fit."""
        context = self.fitting_context()
        if context == 0:
            reason = self.excess(min(MIN_CONTEXT, self.max_context))
            raise ConfigError(f"This does not fit: {reason}.\n{self.table()}\n{self._advice()}")
        if context < self.max_context:
            logger.warning(
                "Memory: %s. Conversations of up to %d tokens fit, the model's context is %d",
                self.excess(self.max_context), context, self.max_context,
            )  # fmt: skip

    def fitting_backends(self) -> dict[str, tuple[int, int]]:
        """Returns every kt_backend that fits, with the bytes of its experts and the longest
        context."""
        fitting = {}
        for backend, size in self.other_formats.items():
            experts = Item(self.items[0].name, size)
            plan = replace(self, items=(experts, *self.items[1:]))
            if context := plan.fitting_context():
                fitting[backend] = (size, context)
        return fitting

    def _advice(self) -> str:
        fitting = [
            f"kt_backend: {backend} (experts {_gb(size)}, {context} tokens)"
            for backend, (size, context) in self.fitting_backends().items()
            if size < self.items[0].ram
        ]
        if fitting:
            return f"It would fit with {' or '.join(fitting)}."
        return "No weight format of ktrt makes it fit: take a smaller model or a larger machine."

    def table(self) -> str:
        """Returns names and gigabytes in columns."""
        rows = [*self.items, self.kv(self.max_context), self.total(self.max_context)]
        width = max(len(row.name) for row in rows)
        lines = [f"{'':<{width}}  {'RAM':>9}  {'GPU':>9}"]
        lines += [f"{r.name:<{width}}  {_gb(r.ram):>9}  {_gb(r.gpu):>9}" for r in rows]
        gpu = _gb(self.gpu.free) if self.gpu else "none"
        free = _gb(self.ram.free + self.already)
        lines.append(f"{'free, with what is held now':<{width}}  {free:>9}  {gpu:>9}")
        lines.append(f"RAM is bounded by {self.ram.what}.")
        if self.addresses is not None:
            lines.append(
                f"{_gb(self.addresses.free)} of address space free: {self.addresses.what}."
            )
        context = self.fitting_context()
        if context == self.max_context:
            lines.append(f"It fits, with the model's whole context of {context} tokens.")
        elif context:
            lines.append(f"It fits for conversations of up to {context} tokens.")
        else:
            lines.append("It does not fit.")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Returns the plan for JSON, in bytes."""
        result = asdict(self)
        context = self.fitting_context()
        del result["kv_size"]
        result |= {"kv_token_bytes": self.kv_size.token_bytes, "kv_budget": self.kv_budget()}
        result |= {"fitting_context": context, "fits": context > 0}
        result["total"] = asdict(self.total(self.max_context))
        return result


def check_addresses(folder: Path) -> int:
    """Returns the addresses that reading the weight files takes: safetensors and torch both map
    each file. ``ConfigError`` if ulimit -v leaves no room for them."""
    files = [file for file in folder.glob("*.safetensors") if file.is_file()]  # no broken links
    size = 2 * sum(file.stat().st_size for file in files)
    limit = address_limit()
    if limit is not None and size > limit.free:
        raise ConfigError(
            f"This does not fit: {_gb(size)} more address space needed to map the weight files of "
            f"{folder}, {_gb(limit.free)} free ({limit.what}). Raise or remove that limit: it "
            "bounds addresses, not memory."
        )
    return size


def make_plan(
    inventory: Inventory,
    config: Any,
    kt_backend: str,
    *,
    layer_source: int = 0,
    mapped_files: int = 0,
    gpu: Limit | None = None,
    root: Path | None = None,
) -> MemoryPlan:
    """Makes the plan; ``config`` is transformers'.

    ``layer_source``: bytes that are mapped while experts are loaded (the largest layer of the
    checkpoint if experts are packed; less, or nothing, with a pack cache); ``mapped_files``:
    addresses of the checkpoint; ``root`` replaces the file system's root in tests.
    """
    roots = (root,) if root else ()
    already = resident_bytes(*roots)
    outside = _outside_on_cpu if gpu is None else _outside_on_gpu
    torch_lora = inventory.held(LORA)
    items = [
        Item(f"{EXPERTS}, packed ({kt_backend})", ram=inventory.experts[kt_backend].held),
        *outside(inventory, layer_source),
        Item(EXPERT_BIASES, ram=inventory.held(EXPERT_BIASES)),
        Item(WORKSPACE, ram=inventory.held(WORKSPACE)),
        Item(EXPERT_LORA, ram=inventory.held(EXPERT_LORA)),
        Item(LINEAR_LORA, ram=inventory.held(LINEAR_LORA)),
        Item(LORA, **({"gpu": torch_lora} if gpu else {"ram": torch_lora})),
        Item("Python and libraries", ram=already + _RUNTIME_BYTES),
    ]
    return MemoryPlan(
        items=tuple(each for each in items if each.ram or each.gpu),
        kv_size=inventory.kv,
        max_context=_max_context(config),
        on_gpu=gpu is not None,
        already=already,
        other_formats={backend: row.held for backend, row in inventory.experts.items()},
        mapped_files=mapped_files,
        ram=ram_limit(*roots),
        gpu=gpu,
        addresses=address_limit(*roots),
    )


def _outside_on_cpu(inventory: Inventory, layer_source: int) -> list[Item]:
    """Returns the RAM of the other weights at its peak.

    Pages of the checkpoint take memory once they are read. Tables of embeddings are read row by row
    (a conversation touches a few MB of V2-Lite's 0.42 GB). Layers that are packed hold their pages
    until all of them are, which is after the experts.
    """
    rows = inventory.of(*BASE)
    forms = sorted({row.form for row in rows if row.form in _PACKED})
    packed = [(form, sum(row.held for row in rows if row.form == form)) for form in forms]
    in_engine = sum(held for _, held in packed)
    tables = sum(row.mapped for row in rows if row.kind == TABLES)
    replaced = sum(row.replaced for row in rows)
    later = in_engine + sum(row.mapped for row in rows) - tables
    return [
        Item("other weights", ram=sum(row.held for row in rows) - in_engine - tables),
        *(Item(f"linear layers in {form.upper()}", ram=held) for form, held in packed),
        Item("sources while packing", ram=max(0, replaced, layer_source - later)),
    ]


def _outside_on_gpu(inventory: Inventory, layer_source: int) -> list[Item]:
    tables = inventory.held(TABLES)
    return [
        Item("other weights", gpu=inventory.held(*BASE) - tables),
        Item(f"{TABLES}, pinned", ram=tables),
        Item("a layer's source while packing", ram=layer_source),
    ]


def _max_context(config: Any) -> int:
    text = config.get_text_config()
    return int(getattr(text, "max_position_embeddings", None) or MIN_CONTEXT)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
