"""The adapters of a loaded model: loading, unloading, and which are active with what weights."""

from __future__ import annotations

import logging
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktrt.adapter import Audit, TorchAdapters, plan_adapter, words_of
from ktrt.engine.active_set import ActiveSet
from ktrt.errors import AdapterError, KtrtError, engine_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

    from torch import nn

    from ktrt.adapter import AdapterPlan, BaseModel
    from ktrt.experts import KTExperts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Resident:
    """``number``: the engine's, never used again. ``whole``: why its weight can only be 1 or 0, if
    so; ``common``: why all rows of a batch share it."""

    number: int
    torch_name: str
    audit: Audit
    whole: str | None
    common: str | None


class Adapters:
    """A model's adapters by name. The active ones act as their weighted sum; without any the model
    is the base, bit for bit. A weight is a factor of the trained scaling.

    A change takes effect with the next forward; none may be running. ``active_set`` is the version
    of the active adapters, for everything made from them.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        experts: Mapping[str, KTExperts] | None = None,
        base: BaseModel | None = None,
    ) -> None:
        """``experts``: the model's attached experts modules by path; ``base``: the model that
        adapters are checked against. Without a model nothing can be loaded."""
        self._model, self._base = model, base
        self._experts = dict(experts or {})
        self._torch = TorchAdapters(model) if model is not None else None
        self._residents: dict[str, _Resident] = {}
        self._loads = 0
        self._weights: dict[str, float] = {}
        self._factor = 1.0
        self._off = False
        self._rows: tuple[str | None, ...] | None = None
        self._combined: tuple[str, ...] = ()
        self.active_set = ActiveSet()
        # Takes the name, the folder and the future rows of embeddings, checks the adapter's words,
        # and returns a function that adds them.
        self.take_words: Callable[[str, Path, int], Callable[[], object]] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The resident adapters, in the order of loading."""
        return tuple(self._residents)

    @property
    def active(self) -> dict[str, float]:
        """The active adapters with their weights; empty: the base model."""
        if self._off:
            return {}
        return {name: weight * self._factor for name, weight in self._weights.items()}

    @property
    def version(self) -> int:
        """The version of the active adapters: equal versions mean equal numbers."""
        return self.active_set.version

    def _key(self) -> Hashable:
        if self._rows is not None:
            return ("rows", *(self._number(name) for name in self._rows))
        numbers = {self._number(name): weight for name, weight in self.active.items() if weight}
        return tuple(sorted(numbers.items()))

    def refresh(self) -> None:
        """Reads the adapters again after changes that bypass this object: numbers changed in place,
        or calls of PEFT's own methods. Both act outside the routed experts only."""
        self._not_in_rows()
        self.active_set.renew()
        self.active_set.become(self._key())

    def audit(self, name: str | None = None) -> Audit:
        """Says what each tensor of an adapter acts on. Without a name: the first active adapter,
        else the first one. Empty without adapters."""
        name = name or next(iter([*self.active, *self._residents]), None)
        return self._resident(name).audit if name is not None else Audit()

    @engine_errors()
    def activate(self, name_or_weights: str | Mapping[str, float]) -> None:
        """Activates one adapter as it was trained, or the weighted sum of several, in place of the
        active ones and their scale.

        The first sum of a set copies its adapters into one, which takes up to a second for large
        ones and is kept until another set is summed. ``AdapterError``, nothing changed: an unknown
        name, a weight that is no number, an adapter that cannot be weighed or summed.
        """
        given = {name_or_weights: 1.0} if isinstance(name_or_weights, str) else name_or_weights
        self._apply({name: float(weight) for name, weight in given.items()}, 1.0, off=False)

    @engine_errors()
    def off(self) -> None:
        """Turns all adapters off, until ``on``."""
        self._apply(self._weights, self._factor, off=True)

    @engine_errors()
    def on(self) -> None:
        """Turns on again what ``off`` turned off."""
        self._apply(self._weights, self._factor, off=False)

    @engine_errors()
    def scale(self, factor: float) -> None:
        """Multiplies the weights given to ``activate``; an earlier ``scale`` does not count.
        ``AdapterError`` if nothing is active, else as ``activate``."""
        if self._off or not self._weights:
            raise AdapterError("no adapter is active that could be scaled; activate one first")
        self._apply(self._weights, float(factor), off=False)

    @engine_errors()
    def load(self, name: str, path: str | Path) -> None:
        """Makes the adapter folder ``path`` resident, not active, checked as when a model loads.

        ``AdapterError`` with everything as it was: the name is taken, the adapter does not fit.
        """
        self.check_name(name)
        if self._base is None:
            raise KtrtError("this session has no model that an adapter could be loaded into")
        folder = Path(path).expanduser()
        plan = plan_adapter(folder, self._base, lora_rank=None, lora_alpha=None)
        for module in [*self._experts.values()][:1]:
            plan.warn_of_format(module.layer.weight_format)
        if self.take_words is None or self._model is None:
            self.add(name, plan)
            return
        rows = max(words_of(self._model), plan.vocabulary or 0)
        add_words = self.take_words(name, folder, rows)
        self.add(name, plan)
        add_words()

    def check_name(self, name: str) -> None:
        """``AdapterError`` unless an adapter could be loaded under this name."""
        if not name or name != name.strip():
            raise AdapterError(f"an adapter's name is {name!r}; expected text")
        if name in self._residents:
            raise AdapterError(f"there is an adapter {name!r} already; expected another name")

    def add(self, name: str, plan: AdapterPlan) -> None:
        """Makes a planned adapter resident, not active. Everything stays as it was if it fails."""
        self._not_in_rows()
        model, torch = self._model, self._torch
        if model is None or torch is None:
            raise KtrtError("this session has no model that an adapter could be loaded into")
        number, self._loads = self._loads, self._loads + 1
        torch_name = "default" if number == 0 else f"adapter{number}"
        try:
            torch.add(torch_name, lambda: plan.apply_to_torch(model, torch_name))
            self._load_experts(number, plan)
            plan.audit.check()
        except BaseException:
            self._take_out(number, torch_name)
            raise
        finally:
            self._restore()
            model.eval().requires_grad_(False)
            # Also after a failure: PEFT's layers stay, and recorded steps look for their forwards.
            self.active_set.add_modules()
        replaced = torch.replaced(torch_name)
        whole = f"replaces {replaced} of the base model" if replaced else None
        whole = "is a DoRA" if plan.settings.use_dora else whole
        common = "has LoRA on routers" if plan.side.routers else None
        common = "has extra experts" if plan.extra else common
        self._residents[name] = _Resident(number, torch_name, plan.audit, whole, whole or common)
        self._changed()

    @engine_errors()
    def unload(self, name: str) -> None:
        """Frees an adapter that is not active. ``AdapterError`` for an unknown or active one."""
        resident = self._resident(name)
        self._not_in_rows()
        if name in self.active:
            raise AdapterError(
                f"adapter {name!r} is active; activate another one, or none, before unloading it"
            )
        if name in self._weights:  # it would come back with `on`
            self._weights, self._factor = {}, 1.0
        self._take_out(resident.number, resident.torch_name)
        del self._residents[name]
        self._combined = () if name in self._combined else self._combined
        self._restore()
        self._changed()

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within the block, row i of the model's batch has the adapter ``names[i]`` as it was
        trained, or none (None).

        For forwards of the model itself, not for a session's answers. ``AdapterError``: an unknown
        name, or an adapter that acts on routers or replaces numbers of the base.
        """
        self._not_in_rows()
        names = tuple(names)
        chosen = sorted({n for n in names if n is not None}, key=self._number)
        for name in chosen:
            if reason := self._resident(name).common:
                raise AdapterError(f"adapter {name!r} {reason}: it cannot be chosen row by row")
        if not names or self._torch is None or self._model is None:
            raise KtrtError("rows: expected a loaded model and one name for every row of a batch")
        self._switch(dict.fromkeys(chosen, 1.0))
        numbers = tuple(-1 if name is None else self._number(name) for name in names)
        torch_names = [None if n is None else self._resident(n).torch_name for n in names]
        self._rows = names
        try:
            with self._torch.rows(torch_names):
                for module in self._experts.values():
                    module.row_adapters = numbers
                self._changed()
                yield
        finally:
            for module in self._experts.values():
                module.row_adapters = None
            self._rows = None
            self._restore()
            self._changed()

    def _number(self, name: str | None) -> int:
        return -1 if name is None else self._resident(name).number

    def _resident(self, name: str) -> _Resident:
        if name not in self._residents:
            known = ", ".join(self._residents) or "none"
            raise AdapterError(f"there is no adapter {name!r}; resident: {known}")
        return self._residents[name]

    def _not_in_rows(self) -> None:
        if self._rows is not None:
            raise AdapterError("adapters cannot be changed while rows of a batch have their own")

    def _apply(self, weights: Mapping[str, float], factor: float, *, off: bool) -> None:
        self._not_in_rows()
        effective = {} if off else {name: weight * factor for name, weight in weights.items()}
        self._check(effective)
        self._switch(effective)
        self._weights, self._factor, self._off = dict(weights), factor, off
        self._changed()

    def _check(self, weights: Mapping[str, float]) -> None:
        for name, weight in weights.items():
            resident = self._resident(name)
            if not math.isfinite(weight):
                raise AdapterError(f"the weight of adapter {name!r} is {weight}, expected a number")
            if resident.whole and weight not in (0, 1):
                raise AdapterError(
                    f"adapter {name!r} {resident.whole}: its weight is {weight:g}, expected 1 or 0"
                )
            if resident.whole and weight and sum(map(bool, weights.values())) > 1:
                raise AdapterError(
                    f"adapter {name!r} {resident.whole}: it cannot be summed with others"
                )

    def _switch(self, weights: Mapping[str, float]) -> None:
        """``AdapterError`` with everything as it was if the engine refuses."""
        started, parts = time.perf_counter(), tuple(sorted(weights, key=self._number))
        combines = len(parts) > 1 and parts != self._combined
        if combines:
            logger.info("Combining adapters %s …", ", ".join(parts))
        try:
            self._set(weights)
        except ValueError as error:
            self._restore()
            raise AdapterError(f"adapters {', '.join(parts)} cannot be summed: {error}") from error
        except BaseException:
            self._restore()
            raise
        if combines:
            self._combined = parts
            logger.info("Combined in %.2f s", time.perf_counter() - started)

    def _set(self, weights: Mapping[str, float]) -> None:
        ordered = sorted(weights.items(), key=lambda each: self._number(each[0]))
        numbers = [self._number(name) for name, _ in ordered]
        values = [weight for _, weight in ordered]
        for module in self._experts.values():
            module.layer.activate_loras(numbers, values)
        if self._torch is not None:
            self._torch.weigh({self._residents[name].torch_name: w for name, w in ordered})

    def _restore(self) -> None:
        self._set(self.active)

    def _load_experts(self, number: int, plan: AdapterPlan) -> None:
        """Gives every layer the LoRA, an empty one where the adapter has none, so that all layers
        know its number."""
        for path, module in self._experts.items():
            arguments: dict[str, Any] = plan.engine_arguments(path)
            module.layer.load_lora(number, **arguments)
            if arguments:
                plan.mark_experts(path)

    def _take_out(self, number: int, torch_name: str) -> None:
        """Removes the adapter from the engine and the model, even if it was loaded only in part;
        leaves all adapters inactive in the model."""
        for module in self._experts.values():
            try:
                module.layer.unload_lora(number)
            except ValueError:
                logger.debug("LoRA %d had not reached every layer", number)
                break
        if self._torch is not None:
            self._torch.remove(torch_name)

    def _changed(self) -> None:
        self.active_set.by_row = self._rows is not None
        self.active_set.become(self._key())
