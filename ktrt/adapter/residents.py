"""The adapters of a loaded model: loading, unloading, and which are active with what weights."""

from __future__ import annotations

import math
import threading
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ktrt.adapter import Audit, plan_adapter, words_of
from ktrt.adapter.sides import Sides
from ktrt.engine.active_set import ActiveSet, AdapterChoice
from ktrt.engine.formats import backend_of, kt_name
from ktrt.engine.step_rows import BASE
from ktrt.errors import AdapterBusyError, AdapterError, KtrtError, engine_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping
    from types import EllipsisType

    from torch import nn

    from ktrt.adapter import AdapterPlan, BaseModel
    from ktrt.adapter.resident import Resident
    from ktrt.adapter.sides import Between
    from ktrt.experts import KTExperts


class Adapters:
    """A model's adapters by name. The active ones act as their weighted sum; without any the model
    is the base, bit for bit. A weight is a factor of the trained scaling.

    A change takes effect with the next forward; none may be running: ``between`` runs a change when
    that is so. ``active_set`` is the version of the adapters that act in the model: the active
    ones, except while ``prepare`` has it run a step of other ones.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        experts: Mapping[str, KTExperts] | None = None,
        base: BaseModel | None = None,
    ) -> None:
        """``experts``: the model's attached experts modules by path; ``base``: the model that
        adapters are checked against. Without a model nothing can be loaded."""
        self._base = base
        self._sides = Sides(model, experts or {})
        self._residents: dict[str, Resident] = {}
        self._loads = 0
        self._weights: dict[str, float] = {}
        self._factor = 1.0
        self._off = False
        self._acting: dict[str, float] = {}
        # Answers under way by the adapters that they use.
        self._users: Counter[str] = Counter()
        self._names = threading.RLock()
        # One at a time; answers go on meanwhile.
        self._loading = threading.Lock()
        self.active_set = ActiveSet()
        self.between: Between = lambda change: change()
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
        with self._names:
            weights, factor = ({} if self._off else self._weights), self._factor
        return {name: weight * factor for name, weight in weights.items()}

    @property
    def version(self) -> int:
        """The version of the active adapters: equal versions mean equal numbers."""
        return self.active_set.version

    def number(self, name: str | None) -> int:
        """Returns the engine's number of a resident adapter; None: of the base."""
        return BASE if name is None else self.resident(name).number

    def prefix_key(self, weights: Mapping[str, float]) -> Hashable:
        """Returns the key of keys and values that were computed with these adapters: by their
        contents, so that another adapter under an old name has another key."""
        digests = [(self.resident(name).digest, weight) for name, weight in weights.items()]
        form = next((each.layer.weight_format for each in self._sides.experts.values()), "")
        return form, self.renewals, tuple(sorted(each for each in digests if each[1]))

    def choose(
        self, adapter: str | Mapping[str, float] | EllipsisType | None = ...
    ) -> AdapterChoice:
        """Returns the choice of an adapter as it was trained, a weighted sum, the base (None), or
        the adapters that are active now (left out). ``AdapterError`` as for ``activate``."""
        given = {adapter: 1.0} if isinstance(adapter, str) else adapter
        weights = self.active if given is ... else {n: float(w) for n, w in (given or {}).items()}
        self._check(weights)
        ordered = sorted((each for each in weights.items() if each[1]), key=self._order)
        key = self.prefix_key(dict(ordered))
        row = BASE if not ordered else None
        if len(ordered) == 1 and ordered[0][1] == 1:
            resident = self.resident(ordered[0][0])
            row = resident.number if resident.row_reason is None else None
        return AdapterChoice(tuple(ordered), row, key)

    def hold(self, choice: AdapterChoice) -> Callable[[], None]:
        """Keeps the adapters of a choice from being unloaded until the result is called.
        ``AdapterError``: one of them has been."""
        names = [name for name, _ in choice.weights]
        with self._names:
            if not self.is_current(choice):
                shown = ", ".join(names) or "(none)"
                raise AdapterError(
                    f"adapters {shown} were changed before the answer began; ask again"
                )
            self._users.update(names)
        return partial(self._release, names)

    def is_current(self, choice: AdapterChoice) -> bool:
        """Returns whether the choice would be the same now: not after ``refresh``, nor where an
        adapter was loaded again, whose number is another. ``AdapterError``: one was unloaded."""
        return choice == self.choose(dict(choice.weights))

    def _release(self, names: Iterable[str]) -> None:
        with self._names:
            self._users.subtract(names)

    def prepare(self, choices: Iterable[AdapterChoice], *, by_row: bool = True) -> bool:
        """Readies the model for a step whose rows have these adapters. Returns whether what acts in
        the model is the adapters of all rows; else each row has to name its own, which it can
        ``by_row`` only."""
        one, *others = choices
        if others:
            if self._fixed():
                self._act({})
            return False
        if one.row is None or not by_row or self._fixed():
            self._act(dict(one.weights))
        return self._acting == dict(one.weights)

    @property
    def renewals(self) -> int:
        """Counts the calls of ``refresh``, which outdate everything that was computed before."""
        return self.active_set.renewals

    def restore(self) -> None:
        """Ends what ``prepare`` began: the active adapters act in the model again."""
        self._act(self.active)

    def _act(self, weights: dict[str, float]) -> None:
        if weights != self._acting:
            self._switch(weights)
            self._changed()

    def _order(self, each: tuple[str, float]) -> int:
        return self.number(each[0])

    def _key(self) -> Hashable:
        return tuple((self.number(name), w) for name, w in self._ordered(self._acting) if w)

    def _fixed(self) -> Hashable:
        """Returns the acting adapters that change modules themselves, as ``_key`` does."""
        acting = ((self.resident(name), w) for name, w in self._ordered(self._acting) if w)
        return tuple((each.number, w) for each, w in acting if each.row_reason is not None)

    def _ordered(self, weights: Mapping[str, float]) -> list[tuple[str, float]]:
        return sorted(weights.items(), key=self._order)

    def refresh(self) -> None:
        """Reads the adapters again after changes that bypass this object: numbers changed in place,
        or calls of PEFT's own methods. Both act outside the routed experts only."""
        self.between(self._renew)

    def _renew(self) -> None:
        self.active_set.renew()
        self._changed()

    def audit(self, name: str | None = None) -> Audit:
        """Says what each tensor of an adapter acts on. Without a name: the first active adapter,
        else the first one. Empty without adapters."""
        name = name or next(iter([*self.active, *self._residents]), None)
        return self.resident(name).audit if name is not None else Audit()

    @engine_errors()
    def activate(self, name_or_weights: str | Mapping[str, float]) -> None:
        """Activates one adapter as it was trained, or the weighted sum of several, in place of the
        active ones and their scale.

        ``AdapterError``, nothing changed: an unknown name, a weight that is no number, an adapter
        that cannot be weighed or summed.
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
    def load(self, name: str, path: str | Path, *, replace: bool = False) -> None:
        """Makes the adapter folder ``path`` resident, not active, checked as when a model loads.
        Answers under way go on: nothing keeps the model for longer than one layer's LoRA takes.

        ``AdapterError`` with everything as it was: the name is taken, the adapter does not fit.
        ``replace``: takes the place of the adapter of this name; ``AdapterBusyError`` if answers
        use it.
        """
        with self._loading:
            self._load(name, path, replace=replace)

    def _load(self, name: str, path: str | Path, *, replace: bool) -> None:
        self.check_name(name, replace=replace)
        if self._base is None:
            raise KtrtError("this session has no model that an adapter could be loaded into")
        folder = Path(path).expanduser()
        plan = plan_adapter(folder, self._base, lora_rank=None, lora_alpha=None)
        if modules := self._sides.experts.values():
            backend = backend_of(module.layer.weight_format for module in modules)
            plan.warn_of_training(kt_name(backend), self._base.folder)
        add_words: Callable[[], object] | None = None
        if self.take_words is not None and self._sides.model is not None:
            rows = max(words_of(self._sides.model), plan.vocabulary or 0)
            add_words = self.take_words(name, folder, rows)
        self._add(name, plan, self.between, add_words, replace=replace)

    def check_name(self, name: str, *, replace: bool = False) -> None:
        """``AdapterError`` unless an adapter could be loaded under this name; with ``replace``, in
        place of the one that has it."""
        if not name or name != name.strip():
            raise AdapterError(f"an adapter's name is {name!r}; expected text")
        if name not in self._residents:
            return
        if not replace:
            raise AdapterError(f"there is an adapter {name!r} already; expected another name")
        self._check_unused(name)

    def add(self, name: str, plan: AdapterPlan) -> None:
        """Makes a planned adapter resident, not active, with no forward running. Everything stays
        as it was if it fails."""
        self.check_name(name)
        self._add(name, plan, lambda change: change())

    def _add(
        self,
        name: str,
        plan: AdapterPlan,
        between: Between,
        add_words: Callable[[], object] | None = None,
        *,
        replace: bool = False,
    ) -> None:
        """Adds the adapter in turns between steps; until the last one no step knows its number."""
        self._sides.require()
        number, self._loads = self._loads, self._loads + 1

        def change(call: Callable[[], object]) -> None:
            try:
                call()
            finally:
                self._restore()
                self._sides.settle()
                # Also after a failure: PEFT's layers stay, and recorded steps look for their
                # forwards.
                self.active_set.add_modules()

        def apply() -> None:
            self._sides.apply(number, plan)
            self.active_set.numbers |= {number}

        def enter() -> None:
            resident = self._sides.resident(number, plan)
            with self._names:
                self.check_name(name, replace=replace)
                if add_words is not None:
                    add_words()
                if name in self._residents:
                    self._unload(name)
                self._residents[name] = resident
            self.active_set.outdate()

        def remove() -> None:
            self.active_set.numbers -= {number}
            self._sides.remove(number)

        try:
            between(partial(change, apply))
            self._sides.load_experts(number, plan, between)
            plan.audit.check()
            between(enter)
        except BaseException:
            between(partial(change, remove))
            raise

    @engine_errors()
    def unload(self, name: str) -> None:
        """Frees an adapter that is not active. ``AdapterError`` for an unknown one,
        ``AdapterBusyError`` for one that is active or that answers under way use."""
        self.between(partial(self._unload, name))

    def _unload(self, name: str) -> None:
        resident = self.resident(name)
        with self._names:
            self._check_unused(name)
            self.restore()
            del self._residents[name]
        if name in self._weights:  # it would come back with `on`
            self._weights, self._factor = {}, 1.0
        self.active_set.numbers -= {resident.number}
        self._sides.remove(resident.number)
        self._restore()
        # The engine's linears unload it.
        self.active_set.add_modules()
        self._changed()

    def _check_unused(self, name: str) -> None:
        if name in self.active:
            raise AdapterBusyError(
                f"adapter {name!r} is active; activate another one, or none, before unloading it"
            )
        if users := self._users[name]:
            raise AdapterBusyError(
                f"adapter {name!r} is used by {users} answer{'s' * (users > 1)} under way or "
                "waiting; cancel them, or unload it when they have ended"
            )

    def resident(self, name: str) -> Resident:
        """Returns a resident adapter. ``AdapterError``: there is none of this name."""
        if name not in self._residents:
            known = ", ".join(self._residents) or "none"
            raise AdapterError(f"there is no adapter {name!r}; resident: {known}")
        return self._residents[name]

    def _apply(self, weights: Mapping[str, float], factor: float, *, off: bool) -> None:
        self.between(partial(self._apply_now, weights, factor, off=off))

    def _apply_now(self, weights: Mapping[str, float], factor: float, *, off: bool) -> None:
        effective = {} if off else {name: weight * factor for name, weight in weights.items()}
        self._check(effective)
        self._switch(effective)
        with self._names:  # any thread may ask what is active
            self._weights, self._factor, self._off = dict(weights), factor, off
        self._changed()

    def _check(self, weights: Mapping[str, float]) -> None:
        for name, weight in weights.items():
            resident = self.resident(name)
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
        """Has these act, or after an exception the active ones."""
        try:
            self._set(weights)
        except BaseException:
            self._restore()
            raise

    def _set(self, weights: Mapping[str, float]) -> None:
        self._sides.weigh((self.number(name), weight) for name, weight in self._ordered(weights))
        self._acting = dict(weights)

    def _restore(self) -> None:
        self._set(self.active)
        self._changed()

    def _changed(self) -> None:
        self.active_set.become(self._key(), self._fixed())
