"""An adapter's own words: tables of embeddings with other rows than the base's, and single rows.

A table is the weight of the input embeddings or of the output layer. Adapters replace one as a
whole, which may then have more rows (the vocabulary was resized for training), or give the rows of
some tokens (PEFT's trainable_token_indices). The base keeps its own tables and sizes: while it
answers, no word beyond them can be chosen, and one in a prompt reads as the mean of all its rows,
which is where training starts new words.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ktrt.adapter.apply.side import TokenRows
from ktrt.adapter.apply.switches import swap_parameter
from ktrt.errors import AdapterError
from ktrt.utils.json_files import typed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ktrt.adapter.apply.side import TorchSide
    from ktrt.adapter.apply.switches import Switch
    from ktrt.adapter.files.settings import LoraSettings
    from ktrt.adapter.internal import BaseModel
    from ktrt.adapter.tensors import AdapterTensor

logger = logging.getLogger(__name__)

# PEFT's wrapper around a table, and what it keeps: the new rows themselves, despite the name.
_WRAPPER = "token_adapter"
ROWS_PART = f"{_WRAPPER}.trainable_tokens_delta"
INDICES_KEY = "trainable_token_indices"


def input_table(base: BaseModel) -> nn.Module:
    """The module of the input embeddings."""
    model: Any = base.model
    found: nn.Module = model.get_input_embeddings()
    return found


def output_table(base: BaseModel) -> nn.Module | None:
    """The output layer."""
    model: Any = base.model
    found: nn.Module | None = model.get_output_embeddings()
    return found


def is_table(base: BaseModel, module: nn.Module) -> bool:
    """Whether the module's weight is a table."""
    return module is input_table(base) or module is output_table(base)


def find_tables(base: BaseModel, side: TorchSide) -> None:
    """Notes the base's tables in ``side``."""
    for name, module in base.model.named_modules():
        if is_table(base, module):
            side.tables[name] = module.get_parameter("weight").numel()
        if module is input_table(base):
            side.input_table = name


def plain_names(tensors: Sequence[AdapterTensor]) -> list[AdapterTensor]:
    """The tensors with the wrapper taken out of their modules' names: a whole table inside it is
    the module's weight, the rows are its part ``ROWS_PART``."""
    found = []
    for tensor in tensors:
        words = f"{tensor.module}.{tensor.part}".split(".")
        if _WRAPPER in words:
            at = words.index(_WRAPPER)
            module, rest = ".".join(words[:at]), words[at + 1 :]
            if rest == ["base_layer", "weight"]:
                tensor = replace(tensor, module=module, part="weight")
            elif rest[:1] == [ROWS_PART.rpartition(".")[2]] and len(rest) <= 2:  # adapter's name
                tensor = replace(tensor, module=module, part=ROWS_PART)
        found.append(tensor)
    return found


def plan_rows(base: BaseModel, settings: LoraSettings, side: TorchSide) -> None:
    """Takes the rows out of ``side.base`` to ``side.rows``, checked. ``AdapterError``: rows without
    indices or indices without rows, numbers of rows that differ, tokens that the table lacks."""
    found = {
        name: tensor
        for name, tensors in side.base.items()
        for tensor in tensors
        if tensor.part == ROWS_PART
    }
    for name in found:
        side.base[name] = [each for each in side.base[name] if each.part != ROWS_PART]
        if not side.base[name]:
            del side.base[name]
    wanted = _wanted_indices(base, settings)
    for name, tensor in found.items():
        indices = _indices_of(name, wanted, settings)
        if name in side.loras:
            raise AdapterError(
                f"{tensor.where}: {name} has LoRA and {INDICES_KEY}; expected one of them."
            )
        _check_rows(tensor, indices, _rows_of(base, side, name), settings)
        tied = base.model.get_submodule(name) is input_table(base) and _ties(base)
        tied &= not any(each != name for each in found)
        side.rows[name] = TokenRows(tensor, indices, tied)
    _check_all_there(side, wanted, base, settings)


def _wanted_indices(base: BaseModel, settings: LoraSettings) -> dict[str, tuple[int, ...]]:
    """Module → token ids, by adapter_config.json; a list is of the input embeddings."""
    shape: Any = list[int] | dict[str, list[int]] | None
    where = f"{settings.file}: {INDICES_KEY}"
    given = typed(settings.token_indices, shape, where, AdapterError) or {}
    names = {module: name for name, module in base.model.named_modules()}
    if isinstance(given, list):
        return {names[input_table(base)]: tuple(given)}
    found = {}
    for key, indices in given.items():
        modules = [name for name in names.values() if name == key or name.endswith(f".{key}")]
        if len(modules) != 1 or not is_table(base, base.model.get_submodule(modules[0])):
            raise AdapterError(
                f"{settings.file}: {INDICES_KEY} names {key!r}; expected the embeddings or the "
                f"output layer of the base, found {modules or 'no such module'}."
            )
        found[modules[0]] = tuple(indices)
    return found


def _indices_of(
    name: str, wanted: dict[str, tuple[int, ...]], settings: LoraSettings
) -> tuple[int, ...]:
    if name in wanted:
        return wanted[name]
    # Tied tables have the rows of the one that the configuration names.
    if len(set(wanted.values())) == 1:
        return next(iter(wanted.values()))
    raise AdapterError(
        f"{settings.file}: {INDICES_KEY} does not say which tokens the rows of {name} are for."
    )


def _check_rows(
    tensor: AdapterTensor, indices: tuple[int, ...], rows: int, settings: LoraSettings
) -> None:
    where = f"{settings.file}: {INDICES_KEY}"
    if len(indices) != len(tensor.value):
        raise AdapterError(
            f"{tensor.where} has {len(tensor.value)} rows, but {where} names {len(indices)} tokens."
        )
    if len(set(indices)) != len(indices):
        raise AdapterError(f"{where} names a token twice.")
    if outside := [index for index in indices if not 0 <= index < rows]:
        raise AdapterError(
            f"{where} names token {outside[0]}, but the table has {rows} rows: the vocabulary was "
            "resized for the training and the file lacks the whole table, or the adapter was "
            "trained on another base model."
        )


def _rows_of(base: BaseModel, side: TorchSide, name: str) -> int:
    """Rows that the table will have."""
    given = _given_table(side, name)
    table = base.model.get_submodule(name).get_parameter("weight")
    return len(table if given is None else given.value)


def _given_table(side: TorchSide, name: str) -> AdapterTensor | None:
    tensors = [*side.whole.get(name, ()), *side.base.get(name, ())]
    return next((tensor for tensor in tensors if tensor.part == "weight"), None)


def _ties(base: BaseModel) -> bool:
    output = output_table(base)
    return output is not None and output.weight is input_table(base).weight


def _check_all_there(
    side: TorchSide, wanted: dict[str, tuple[int, ...]], base: BaseModel, settings: LoraSettings
) -> None:
    for name in wanted:
        # PEFT saves the rows of tied tables once.
        elsewhere = _ties(base) and wanted[name] in [rows.indices for rows in side.rows.values()]
        if name not in side.rows and not elsewhere:
            raise AdapterError(
                f"{side.file}: no rows for {name}, though {settings.file} has {INDICES_KEY}. The "
                "file is incomplete."
            )


def check_sizes(base: BaseModel, side: TorchSide) -> None:
    """Logs the new sizes of tables. ``AdapterError``: they do not belong together, or something of
    the base's size depends on them."""
    sizes = {}
    names = {module: name for name, module in base.model.named_modules()}
    for module in (input_table(base), output_table(base)):
        given = None if module is None else _given_table(side, names[module])
        if module is None or given is None:
            continue
        name, before = names[module], len(module.get_parameter("weight"))
        if len(given.value) == before:
            continue
        sizes[name] = (before, len(given.value))
        if name in side.loras:
            raise AdapterError(
                f"{given.where} has {len(given.value)} rows, the base {before}, and {name} has "
                "LoRA as well, which ktrt does not apply to a resized vocabulary. Train the whole "
                "of it instead: modules_to_save (LLaMA-Factory's additional_target)."
            )
        parts = {tensor.part for tensor in [*side.whole.get(name, ()), *side.base.get(name, ())]}
        if getattr(module, "bias", None) is not None and "bias" not in parts:
            raise AdapterError(f"{given.where} has {len(given.value)} rows, but no bias of them.")
    if len({after for _, after in sizes.values()}) > 1:
        found = ", ".join(f"{name} {after}" for name, (_, after) in sizes.items())
        raise AdapterError(f"{side.file}: tables of one vocabulary differ in their rows: {found}.")
    if sizes:
        before, after = next(iter(sizes.values()))
        logger.info(
            "The adapter's vocabulary has %d rows, the base's %d: %s of the adapter are used",
            after, before, " and ".join(sizes),
        )  # fmt: skip


def vocabulary(side: TorchSide) -> int | None:
    """Rows of the input embeddings that the adapter brings; None if it brings none."""
    given = _given_table(side, side.input_table)
    return None if given is None else len(given.value)


def copied_numel(side: TorchSide) -> int:
    """Numbers of the tables that single rows are put into copies of."""
    return sum(size for name, size in side.tables.items() if name in side.rows)


def swap_tables(side: TorchSide, model: nn.Module) -> list[Switch]:
    """Prepares the adapter's tables to take the places of the base's. ``AdapterError``: two that
    differ for one that the base ties."""
    switches: list[Switch] = []
    shared: dict[int, torch.Tensor] = {}
    given = {name: _given_table(side, name) for name in (*side.whole, *side.base, *side.rows)}
    for name in side.tables:
        tensor, rows = given.get(name), side.rows.get(name)
        if tensor is None and rows is None:
            continue
        plain = _plain(model, name)
        base = plain.get_parameter("weight")
        table = base.detach() if tensor is None else tensor.value.to(base.device, base.dtype)
        if rows is not None:
            index = torch.tensor(rows.indices, device=base.device)
            table = table.index_copy(0, index, rows.tensor.value.to(base.device, base.dtype))
        tied = rows is not None and rows.tied
        if tensor is not None:
            # modules_to_save part with what the base ties, as in PEFT; numbers of the base itself
            # change wherever they are used.
            tied = any(each is tensor for each in side.base.get(name, ()))
        if tied and id(base) in shared:
            if not torch.equal(shared[id(base)], table):
                raise AdapterError(
                    f"{side.file}: {name} differs from the other table that it is tied to in the "
                    "base model; expected the same numbers."
                )
            continue
        if tied:
            shared[id(base)] = table
        switches += swap_parameter(model, name, "weight", table, tied=tied)
        if isinstance(plain, nn.Embedding) and len(table) != len(base):
            switches.append(UnknownWords(plain, base, len(table)))
    return switches


def words_of(model: Any) -> int:
    """The tokens that a model's embeddings read: with resident adapters, the largest vocabulary."""
    table = model.get_input_embeddings()
    plain = table.get_base_layer() if hasattr(table, "get_base_layer") else table
    # Not every model's table is an nn.Embedding.
    return getattr(plain, "num_embeddings", None) or len(table.weight)


def _plain(model: nn.Module, name: str) -> nn.Module:
    module: Any = model.get_submodule(name)
    found: nn.Module = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    return found


class UnknownWords:
    """Lets embeddings read tokens beyond their table as the mean of its rows: of the base's table
    while an adapter with more words is off, of the adapter's while one with fewer is on."""

    def __init__(self, module: nn.Embedding, base: nn.Parameter, rows: int) -> None:
        self._module, self._base, self._rows = module, base, rows
        scale: Any = getattr(module, "embed_scale", 1.0)
        mean = base.detach().mean(dim=0, dtype=torch.float32) * scale
        self._mean = mean.to(base.dtype)
        self._grows = rows > len(base)
        self._on = self._grows
        self._ids = torch.empty(0)
        # The ids that can be read; ``ktrt.generate.loop`` refuses prompts with others.
        module.num_embeddings = max(module.num_embeddings, rows)
        self._handles = [
            module.register_forward_pre_hook(self._clamp),
            module.register_forward_hook(self._replace),
        ]

    def _clamp(self, _: nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
        if not self._on:
            return None
        self._ids, *others = args
        return self._ids.clamp(max=len(self._module.weight) - 1), *others

    def _replace(self, _module: nn.Module, _args: Any, out: torch.Tensor) -> Any:
        if not self._on:
            return None
        unknown = self._ids >= len(self._module.weight)
        return torch.where(unknown[..., None], self._mean, out)

    def weigh(self, weight: float) -> None:
        self._on = self._grows != bool(weight)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        hooks = self._module._forward_pre_hooks.values()
        others = [getattr(hook, "__self__", None) for hook in hooks]
        sizes = [each._rows for each in others if isinstance(each, UnknownWords)]
        self._module.num_embeddings = max([len(self._base), *sizes])
