"""The changes of an adapter, by parameter of the model, in float32.

``Changes`` counts every use of an adapter's tensor, so that ``check_complete`` can prove that none
was left out or added twice.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import fields
from typing import TYPE_CHECKING

import torch

from ktrt.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from ktrt.adapter import AdapterPlan
    from ktrt.adapter.apply.side import TokenRows
    from ktrt.adapter.internal import ExpertLora
    from ktrt.experts import ExpertsSpec

# The fields of an expert's LoRA that are merged; further ones must not be lost in silence.
_MERGED_FIELDS = {"a", "b", "scaling"}
_ALL_EXPERTS = -1


class Changes:
    """The changes of one adapter; empty without an adapter.

    Raises ``AdapterError`` with module and reason for changes that no weight can express.
    """

    def __init__(
        self, plan: AdapterPlan | None, model: nn.Module, specs: Sequence[ExpertsSpec]
    ) -> None:
        self._plan, self._model = plan, model
        self._specs = {spec.path: spec for spec in specs}
        self._experts = plan.experts if plan else {}
        self._twins = _tied_parameters(model)
        # module → part → tensor, of LoRA and of weights saved whole
        self._modules: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        # parameter → its replacement in the base; parameter → (module, part) in the file
        self._base: dict[str, torch.Tensor] = {}
        self._owners: dict[str, list[tuple[str, str]]] = defaultdict(list)
        # parameter → new rows of single tokens
        self._rows: dict[str, TokenRows] = {}
        self._used: Counter[tuple[str, str, int]] = Counter()
        if plan:
            self._sort(plan)
            self._check(plan, model)

    def _sort(self, plan: AdapterPlan) -> None:
        side = plan.side
        for group in (side.loras, side.routers, side.whole):
            for module, tensors in group.items():
                for tensor in tensors:
                    self._modules[module][tensor.part] = tensor.value
        for module, tensors in side.base.items():
            for tensor in tensors:
                # Tied parameters are one: a replacement of one replaces all.
                for name in self.twins(f"{module}.{tensor.part}"):
                    earlier = self._base.setdefault(name, tensor.value)
                    self._owners[name].append((module, tensor.part))
                    if not torch.equal(earlier, tensor.value):
                        raise AdapterError(
                            f"{side.file}: {tensor.key} replaces {name}, which the base model ties "
                            "to another parameter that the adapter replaces by other values."
                        )

        for module, rows in side.rows.items():
            weight = f"{module}.weight"
            for name in self.twins(weight) if rows.tied or weight in self._base else [weight]:
                self._rows[name] = rows
                self._owners[name].append((module, rows.tensor.part))

    def _check(self, plan: AdapterPlan, model: nn.Module) -> None:
        side = plan.side
        if extra := getattr(plan, "extra", None):
            raise AdapterError(
                f"{side.file}: {next(iter(extra))} gets additional experts (kt_use_lora_experts), "
                "which no weight of the base can express."
            )
        for path, loras in self._experts.items():
            for lora in loras.values():
                for field in fields(lora):
                    if field.name not in _MERGED_FIELDS and getattr(lora, field.name) is not None:
                        raise AdapterError(
                            f"{side.file}: {field.name} of the LoRA on {path} cannot be merged "
                            "into the weights."
                        )
        for module, parts in self._modules.items():
            if module in side.whole and (module in side.loras or module in side.routers):
                raise AdapterError(
                    f"{side.file}: {module} has LoRA and is in modules_to_save; expected one."
                )
            if "lora_B.bias" not in parts:
                continue
            if getattr(model.get_submodule(module), "bias", None) is None:
                raise AdapterError(
                    f"{side.file}: {module} has a LoRA bias (lora_bias), but no bias in the base "
                    "model to add it to: it cannot be merged."
                )
            if "lora_magnitude_vector" in parts:
                raise AdapterError(
                    f"{side.file}: {module} has both a LoRA bias and DoRA; merging them is not "
                    "supported."
                )

    def twins(self, parameter: str) -> list[str]:
        """Returns the names of the parameters tied to this one, including it."""
        return self._twins.get(parameter, [parameter])

    def unties(self, parameter: str) -> bool:
        """Returns whether a change affects only one of several tied parameters, which unties
        them."""
        names = self.twins(parameter)
        same_rows = len({id(self._rows.get(name)) for name in names}) == 1
        return len(names) > 1 and (not same_rows or any(map(self._own_parts, names)))

    def shape(self, parameter: str, before: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the parameter's new shape (``before``: the base's): a vocabulary may be
        resized."""
        module, _, leaf = parameter.rpartition(".")
        whole = self._modules.get(module, {}).get(leaf, self._base.get(parameter))
        return before if whole is None else tuple(whole.shape)

    def _own_parts(self, parameter: str) -> list[str]:
        """Returns the parts that change this parameter but none of its twins."""
        module, _, leaf = parameter.rpartition(".")
        parts = self._modules.get(module, {})
        if leaf in parts:
            return [leaf]
        if leaf == "bias":
            return [part for part in parts if part == "lora_B.bias"]
        if leaf == "weight":
            return [part for part in parts if part.startswith("lora_") and part != "lora_B.bias"]
        return []

    def vocabulary(self) -> tuple[int, int] | None:
        """Returns the rows of the word tables (embeddings, output layer) without and with the
        adapter; None if they are equal. Raises ``AdapterError`` if only one of the two tables is
        resized, which no config.json can express."""
        sizes = {name: (size, self.shape(f"{name}.weight", size)) for name, size in self._tables()}
        after = {shape[0] for _, shape in sizes.values()}
        if len(after) > 1:
            found = ", ".join(f"{name} has {shape[0]}" for name, (_, shape) in sizes.items())
            raise AdapterError(
                "the adapter resizes only one of the word tables, which config.json cannot "
                f"express: {found} rows. Use the adapter without exporting."
            )
        before = {size[0] for size, _ in sizes.values()}
        return None if after == before else (before.pop(), after.pop())

    def _tables(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for name in self._plan.side.tables if self._plan else ():
            yield name, tuple(self._model.get_submodule(name).get_parameter("weight").shape)

    def touches(self, parameter: str) -> bool:
        """Returns whether the adapter changes this parameter of the model."""
        path, _, leaf = parameter.rpartition(".")
        if path in self._specs and (projections := self._specs[path].held_by(leaf)):
            return any(projection in self._experts.get(path, {}) for projection in projections)
        whole = parameter in self._base or parameter in self._rows
        return whole or bool(self._own_parts(parameter))

    def expert_delta(
        self, path: str, leaf: str, expert: int, piece: int = 0, pieces: int = 1
    ) -> torch.Tensor | None:
        """Returns ΔW of one expert, float32 [rows, in]: all rows of parameter ``leaf`` in its
        order, or piece ``piece`` of ``pieces`` (gate, up). None without LoRA."""
        spec = self._specs[path]
        projections = spec.held_by(leaf)
        if pieces > 1:
            projections = projections[piece : piece + 1]
        loras = self._experts.get(path, {})
        present = {p: loras[p] for p in projections if p in loras}
        if not present:
            return None
        deltas = {p: _expert_delta(lora, expert) for p, lora in present.items()}
        self._used.update((path, projection, expert) for projection in present)
        if len(projections) == 1:
            return deltas[projections[0]]
        zeros = torch.zeros(spec.intermediate_size, spec.hidden_size)
        return spec.join(deltas.get("gate", zeros), deltas.get("up", zeros), dim=0)

    def apply(self, parameter: str, weight: torch.Tensor) -> torch.Tensor:
        """Returns a parameter outside the routed experts, in the model's orientation, with its
        changes; float32."""
        module, _, leaf = parameter.rpartition(".")
        value = self._base.get(parameter, weight).float()
        self._used.update((*owner, _ALL_EXPERTS) for owner in self._owners.get(parameter, ()))
        own = self._own_parts(parameter)
        self._used.update((module, part, _ALL_EXPERTS) for part in own)
        parts = {part: self._modules[module][part].float() for part in own}
        if leaf in parts:
            value = parts.pop(leaf)
        if rows := self._rows.get(parameter):
            value = value.index_copy(0, torch.tensor(rows.indices), rows.tensor.value.float())
        if not parts:
            return value
        assert self._plan is not None
        scaling = self._plan.side.scales[module].scaling
        if leaf == "bias":
            return value + scaling * parts["lora_B.bias"]
        return _with_lora(value, parts, scaling)

    def check_complete(self) -> int:
        """Checks that each tensor of the adapter was used exactly once, by the plan's audit too;
        returns their number. Raises ``AdapterError`` with the first one that was not."""
        if self._plan is None:
            return 0
        side, audit = self._plan.side, self._plan.audit
        expected: set[tuple[str, str, int]] = {
            (path, projection, expert)
            for path, loras in self._experts.items()
            for projection in loras
            for expert in range(self._specs[path].num_experts)
        }
        expected |= {(module, tensor.part, _ALL_EXPERTS) for module, tensor in side.tensors()}
        replacements = {
            (*owner, _ALL_EXPERTS) for names in self._owners.values() for owner in names
        }
        for key in sorted(expected | set(self._used)):
            count = self._used[key]
            if count != 1 and not (key in replacements and count):
                module, part, expert = key
                whose = f"{module}, {part}" + (f" of expert {expert}" if expert >= 0 else "")
                raise AdapterError(
                    f"{side.file}: {whose} was merged into {count} tensors of the checkpoint, "
                    "expected one: the base model keeps this weight in a form that does not allow "
                    "merging."
                )
        for path in self._experts:
            self._plan.mark_experts(path)
        audit.mark([tensor.key for _, tensor in side.tensors()], "peft")
        audit.check()
        return audit.found


def _tied_parameters(model: nn.Module) -> dict[str, list[str]]:
    """Returns name → all names, for parameters with several names."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}


def _expert_delta(lora: ExpertLora, expert: int) -> torch.Tensor:
    return lora.scaling[expert] * (lora.b[expert] @ lora.a[expert])


def _with_lora(
    weight: torch.Tensor, parts: dict[str, torch.Tensor], scaling: float
) -> torch.Tensor:
    """Applies PEFT's formulas. DoRA: every row of W + ΔW gets its learnt length."""
    if "lora_embedding_A" in parts:
        return weight + scaling * (parts["lora_embedding_B"] @ parts["lora_embedding_A"]).T
    merged = weight + scaling * (parts["lora_B"] @ parts["lora_A"])
    if "lora_magnitude_vector" not in parts:
        return merged
    lengths = torch.linalg.vector_norm(merged, dim=1)
    scaled: torch.Tensor = (parts["lora_magnitude_vector"] / lengths)[:, None] * merged
    return scaled
