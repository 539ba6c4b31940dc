"""What a model will take of RAM and GPU memory, known before its first weight is read."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ktrt.errors import CheckpointError, ConfigError
from ktrt.kv.static import cache_argument
from ktrt.layers.embedding import host_tables, table_bytes
from ktrt.layers.int8 import int8_bytes, int8_layers
from ktrt.machine.memory import (
    Limit,
    address_limit,
    gpu_limit,
    ram_limit,
    resident_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import nn

logger = logging.getLogger(__name__)

# A conversation shorter than this is no use; a plan with less room is refused.
MIN_CONTEXT = 2048
# Activations, allocator slack and what libraries import later; measured on CPU-only starts.
_RUNTIME_BYTES = 32 << 20


@dataclass(frozen=True)
class Item:
    """One consumer: bytes of RAM and of GPU memory."""

    name: str
    ram: int = 0
    gpu: int = 0


@dataclass(frozen=True)
class MemoryPlan:
    """``items`` hold everything but the KV cache, which takes ``kv_token_bytes`` per token of up to
    ``max_context`` tokens, on the GPU if ``on_gpu``. ``already`` bytes of RAM are held now.
    ``other_formats``: bytes of the experts by kt_backend. ``mapped_files``: addresses, not
    memory, that transformers takes for the checkpoint's files."""

    items: tuple[Item, ...]
    kv_token_bytes: int
    max_context: int
    on_gpu: bool
    already: int
    other_formats: Mapping[str, int]
    mapped_files: int
    ram: Limit
    gpu: Limit | None
    addresses: Limit | None

    def kv(self, context: int) -> Item:
        """The KV cache of ``context`` tokens."""
        size = context * self.kv_token_bytes
        name = f"KV cache, {context} tokens"
        return Item(name, gpu=size) if self.on_gpu else Item(name, ram=size)

    def total(self, context: int) -> Item:
        """All of it, with a KV cache of ``context`` tokens."""
        rows = [*self.items, self.kv(context)]
        return Item("total", sum(r.ram for r in rows), sum(r.gpu for r in rows))

    def excess(self, context: int) -> str | None:
        """What does not fit with a KV cache of ``context`` tokens, in words; None if all does."""
        total = self.total(context)
        for what, need, limit in (
            ("RAM", total.ram - self.already, self.ram),
            ("address space", total.ram - self.already + self.mapped_files, self.addresses),
            ("GPU memory", total.gpu, self.gpu),
        ):
            if limit is not None and need > limit.free:
                return f"{_gb(need)} more {what} needed, {_gb(limit.free)} free ({limit.what})"
        return None

    def fitting_context(self) -> int:
        """The longest context that fits, up to ``max_context``; 0 if not even MIN_CONTEXT."""
        low, high = 0, self.max_context
        if self.excess(min(MIN_CONTEXT, high)) is not None:
            return 0
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (low, middle - 1) if self.excess(middle) else (middle, high)
        return low

    def check(self) -> None:
        """``ConfigError`` with the numbers, and what would fit, if this cannot run; a warning if
        the model's whole context does not fit."""
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
        """By kt_backend that fits: the bytes of its packed experts, and the longest context."""
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
        """Names and gigabytes in columns."""
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
        """For JSON; bytes."""
        result = asdict(self)
        context = self.fitting_context()
        result |= {"fitting_context": context, "fits": context > 0}
        result["total"] = asdict(self.total(self.max_context))
        return result


def check_addresses(folder: Path) -> int:
    """Addresses that one look at the weight files takes: safetensors maps each, and torch does.
    ``ConfigError`` if ulimit -v leaves no room for them."""
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
    skeleton: nn.Module,
    *,
    experts: Mapping[str, int],
    kt_backend: str,
    expert_paths: Iterable[str],
    layer_source: int,
    mapped_files: int,
    workspace: int,
    lora: tuple[int, int],
    infer_dtype: str,
    int8: bool = False,
    mapped: bool = True,
    root: Path | None = None,
) -> MemoryPlan:
    """The plan of a model on the meta device.

    ``experts``: bytes of the packed experts by kt_backend; ``layer_source``: what is mapped for a
    while beside them (their largest layer in the checkpoint while it is packed; less, or nothing,
    where a pack cache is used); ``mapped_files``: addresses of the checkpoint; ``lora``: values of
    the adapter on experts, bfloat16 in the engine, and elsewhere, float32 in PEFT; ``int8``: the
    linear layers are, without a GPU (``quantization_bit: 8``); ``mapped``: weights whose dtype is
    not changed are the file's pages; ``root`` stands for the file system's root in tests.
    """
    dtype = None if infer_dtype == "auto" else getattr(torch, infer_dtype)
    which = skeleton, expert_paths, dtype
    roots = (root,) if root else ()
    gpu, already = gpu_limit(), resident_bytes(*roots)
    if gpu is None:
        outside = _outside_on_cpu(*which, int8=int8, mapped=mapped, layer_source=layer_source)
    else:
        tables = table_bytes(skeleton, dtype)
        outside = [
            Item("other weights", gpu=_other_bytes(*which) - tables),
            Item("tables of embeddings, pinned", ram=tables),
            Item("a layer's source while packing", ram=layer_source),
        ]
    torch_lora = 4 * lora[1]
    items = [
        Item(f"routed experts, packed ({kt_backend})", ram=experts[kt_backend]),
        *outside,
        Item("workspace of the experts", ram=workspace),
        Item("LoRA of the experts", ram=2 * lora[0]),
        Item("LoRA elsewhere", **({"gpu": torch_lora} if gpu else {"ram": torch_lora})),
        Item("Python and libraries", ram=already + _RUNTIME_BYTES),
    ]
    return MemoryPlan(
        items=tuple(each for each in items if each.ram or each.gpu),
        kv_token_bytes=kv_bytes_per_token(*which),
        max_context=_max_context(skeleton.config),
        on_gpu=gpu is not None,
        already=already,
        other_formats=dict(experts),
        mapped_files=mapped_files,
        ram=ram_limit(*roots),
        gpu=gpu,
        addresses=address_limit(*roots),
    )


def _outside_on_cpu(
    skeleton: nn.Module,
    expert_paths: Iterable[str],
    dtype: torch.dtype | None,
    *,
    int8: bool,
    mapped: bool,
    layer_source: int,
) -> list[Item]:
    """What lies in RAM besides the experts, at the moment when it is the most.

    Pages of the checkpoint count once they are read: those of tables of embeddings row by row (of
    V2-Lite's 0.42 GB a conversation touches a few MB); those of layers that become INT8 until all
    have been packed, which is after the experts.
    """
    which = skeleton, expert_paths, dtype
    others = _other_bytes(*which)
    packed, replaced = _int8_bytes(*which, mapped) if int8 else (0, 0)
    tables = _mapped_tables(skeleton, dtype) if mapped else 0
    later = packed + _unchanged_bytes(*which) - replaced - tables if mapped else packed
    return [
        Item("other weights", ram=others - replaced - tables),
        Item("linear layers in INT8", ram=packed),
        Item("sources while packing", ram=max(0, replaced, layer_source - later)),
    ]


def _max_context(config: Any) -> int:
    text = config.get_text_config()
    return int(getattr(text, "max_position_embeddings", None) or MIN_CONTEXT)


def _other_bytes(
    skeleton: nn.Module, expert_paths: Iterable[str], dtype: torch.dtype | None
) -> int:
    """Of all weights but the routed experts', in ``dtype`` or (None) their own."""
    paths = tuple(f"{path}." for path in expert_paths)
    return sum(
        tensor.numel() * (dtype or tensor.dtype).itemsize
        for name, tensor in (*skeleton.named_parameters(), *skeleton.named_buffers())
        if not name.startswith(paths)
    )


def _unchanged_bytes(
    skeleton: nn.Module, expert_paths: Iterable[str], dtype: torch.dtype | None
) -> int:
    """Of the parameters outside the experts whose dtype stays what it is in the file."""
    paths = tuple(f"{path}." for path in expert_paths)
    return sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in skeleton.named_parameters()
        if not name.startswith(paths) and parameter.dtype == (dtype or parameter.dtype)
    )


def _mapped_tables(skeleton: nn.Module, dtype: torch.dtype | None) -> int:
    """Of the tables of embeddings that only look rows up, and stay the file's pages."""
    weights = [table.weight for table in host_tables(skeleton)]
    return sum(w.numel() * w.element_size() for w in weights if w.dtype == (dtype or w.dtype))


def _int8_bytes(
    skeleton: Any, expert_paths: Iterable[str], dtype: torch.dtype | None, mapped: bool
) -> tuple[int, int]:
    """Of the packed layers, and of those of their parameters that nobody reads any more and that
    are the file's: pages that need no memory. A table of embeddings is still read."""
    table = skeleton.get_input_embeddings().weight
    packed = unread = 0
    for linear in int8_layers(skeleton, expert_paths, dtype):
        packed += int8_bytes(linear)
        weight = linear.weight
        if mapped and weight is not table and weight.dtype == (dtype or weight.dtype):
            unread += weight.numel() * weight.element_size()
    return packed, unread


def kv_bytes_per_token(
    skeleton: nn.Module, expert_paths: Iterable[str], dtype: torch.dtype | None
) -> int:
    """Bytes of KV cache per token, found by running two tokens through the model on the meta
    device; 0, with a log line, for a model that cannot run there."""
    from transformers import DynamicCache

    modules: list[Any] = [skeleton.get_submodule(path) for path in expert_paths]
    for module in modules:
        module.forward = lambda hidden_states, *_args, **_kwargs: torch.empty_like(hidden_states)
    cache = DynamicCache(config=skeleton.config)
    tokens = 2
    try:
        ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
        with torch.no_grad():
            skeleton(input_ids=ids, use_cache=True, **{cache_argument(skeleton): cache})
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        logger.info("The size of the KV cache is not known beforehand (%s)", error)
        return 0
    except (LookupError, ArithmeticError) as error:  # no matter of the meta device
        raise CheckpointError(
            f"config.json describes a {type(skeleton).__name__} that cannot run: "
            f"{type(error).__name__}: {error}. Correct the file, or download it again."
        ) from error
    finally:
        for module in modules:
            del module.forward
    tensors = [
        value
        for layer in cache.layers
        for value in vars(layer).values()
        if isinstance(value, torch.Tensor)
    ]
    return sum(t.numel() * (dtype or t.dtype).itemsize for t in tensors) // tokens


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
