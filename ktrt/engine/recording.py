"""A decode step on the CPU as a flat list of operations: recorded once, then run without the model.

Between the large products of one token, transformers' modules run a hundred small operations a
layer, and the Python around them takes longer than they do. A recorder sees every operation while a
step runs once. All tensors of the step keep their memory, so that running the list again computes
the step for the new contents of its inputs.

- Torch's operations write into the memory that they returned the first time. Views need not be made
  again; results that depend on no input are computed once; results that nobody reads are left out.
- The engine's work is recorded as a whole, by ``Recorder.call``: its modules ask for ``active``.
- Operations that look at numbers (``item``, boolean indexing) or draw random ones are refused.

Parameters, and all other tensors that are neither inputs nor written to in the step, must not
change while the list is in use.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ktrt.engine.torch_threads import set_torch_threads
from ktrt.errors import KtrtError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ktrt.engine.active_set import ActiveSet

# Limit for the memory of a step's results; the results of one token are far smaller.
_MOST_BYTES = 1 << 30
# Operations that cannot run again on other numbers.
_REFUSED = {
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
}
# Numbers that the widest of torch's vectors take at once: of BF16 with AVX-512, two registers.
VECTOR = 64
_aten = torch.ops.aten
# Functions of torch that compute the same as an overload, with the same arguments and ``out``: they
# parse their arguments in 0.8 µs instead of 1.6.
_DIRECT: dict[Any, Callable[..., object]] = {
    _aten.add.Tensor: torch.add,
    _aten.sub.Tensor: torch.sub,
    _aten.mul.Tensor: torch.mul,
    _aten.div.Tensor: torch.div,
    _aten.clamp.default: torch.clamp,
    _aten.sigmoid.default: torch.sigmoid,
    _aten.silu.default: torch._C._nn.silu,  # type: ignore[attr-defined]
    _aten.cat.default: torch.cat,
    _aten.topk.default: torch.topk,
    _aten.polar.default: torch.polar,
}
# The same for operations in place, methods of a tensor.
_IN_PLACE = {_aten.copy_.default: "copy_", _aten.index_copy_.default: "index_copy_"}
# Operations that look at a tensor's shape only.
_SHAPES = {_aten.ones_like.default, _aten.zeros_like.default}
_local = threading.local()


def active() -> Recorder | None:
    """Returns this thread's recorder; None without one, or while it is paused."""
    found: Recorder | None = getattr(_local, "recorder", None)
    return None if found is None or found.paused else found


# Takes an operation, its arguments and its results; returns a function that computes the results
# again, in place, or None.
Shortcut = Callable[[Any, tuple[Any, ...], Sequence[torch.Tensor]], Callable[[], object] | None]


@dataclass(frozen=True)
class _Call:
    """One operation; ``reads`` and ``writes`` name the memory that it touches."""

    run: Callable[[], object]
    reads: frozenset[int]
    writes: frozenset[int]
    # Keeps tensors alive that ``run`` may know by address alone.
    held: tuple[torch.Tensor, ...]


class Recorder(TorchDispatchMode):
    """Within its ``recording`` block, every operation of this thread is recorded."""

    def __init__(self, shortcut: Shortcut | None = None) -> None:
        """``shortcut`` may replace an operation by a faster function."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._shortcut = shortcut
        self.paused = False
        self.length: Callable[[], int] | None = None
        self._mask = 0
        self._inputs: frozenset[int] = frozenset()
        self._calls: list[_Call] = []
        self._followers: dict[ActiveSet, list[Callable[[], object]]] = {}
        self._made: set[int] = set()
        # While they live, no other memory gets the same address.
        self._kept: list[torch.Tensor] = []
        self._bytes = 0

    def describe(
        self,
        inputs: Sequence[torch.Tensor],
        mask: torch.Tensor,
        length: Callable[[], int] | None,
    ) -> None:
        """Must be called before the first operation, with the facts that only the step's caller
        knows. ``inputs``: the tensors whose numbers differ from run to run; ``mask`` hides from
        attention the tokens after the step's, and nothing else; ``length()``: the number of tokens
        that the step attends to, if it is one number."""
        self._inputs, self._mask, self.length = _memories(inputs), _memory(mask), length

    def length_behind(self, mask: torch.Tensor | None) -> Callable[[], int] | None:
        """Returns the function for the number of tokens that attention may use instead of ``mask``;
        None: it must look at the mask."""
        known = mask is not None and _memory(mask) == self._mask
        return self.length if known else None

    @contextmanager
    def recording(self) -> Iterator[None]:
        if getattr(_local, "recorder", None) is not None:
            raise KtrtError("a step is being recorded in this thread already")
        _local.recorder = self
        try:
            # Inference mode would hand some composite operations over undivided.
            with torch.inference_mode(False), torch.no_grad(), self:
                yield
        finally:
            _local.recorder = None

    def call(
        self,
        shape: Sequence[int],
        reads: Sequence[torch.Tensor],
        bind: Callable[[torch.Tensor], Callable[[], object]],
    ) -> torch.Tensor:
        """Records work that torch does not see: ``bind(tensor)()`` fills a new tensor of ``shape``,
        in the dtype of the first of ``reads``, now and whenever the step runs. Returns it."""
        before, self.paused = self.paused, True
        try:
            out = _new(reads[0], shape)
            self._keep((out,))
            run = bind(out)
            run()
        finally:
            self.paused = before
        self._add(run, reads, (out,))
        return out

    def follow(self, active_set: ActiveSet, call: Callable[[], object]) -> None:
        """Has ``call`` called before a run of the step if ``active_set`` has changed since the last
        one: a single comparison for all layers, none of which looks at it itself."""
        self._followers.setdefault(active_set, []).append(call)

    def followers(self) -> list[Callable[[], None]]:
        """Returns what must be called before each run of the step."""
        return [_follower(*each) for each in self._followers.items()]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if not _REFUSED.isdisjoint(func.tags) and not _is_fixed(func, args, kwargs):
            raise KtrtError(f"the step cannot be recorded: {func} depends on the numbers")
        out = func(*args, **kwargs)
        reads, results = list(_tensors((args, kwargs))), list(_tensors(out))
        known = {_memory(tensor) for tensor in reads}
        new = [tensor for tensor in results if _memory(tensor) not in known]
        written = _written(func, args, kwargs)
        self._keep(new)
        if new and written:
            raise KtrtError(f"the step cannot be recorded: {func} both changes and makes tensors")
        if func in _SHAPES:
            reads = []
        if new:
            run = self._shortcut(func, args, results) if self._shortcut is not None else None
            self._add(run or _into(func, args, kwargs, results), reads, new)
        elif written:
            self._add(_again(func, args, kwargs), reads, written)
        return out

    def _add(
        self,
        run: Callable[[], object],
        reads: Sequence[torch.Tensor],
        writes: Sequence[torch.Tensor],
    ) -> None:
        held = (*reads, *writes)
        self._calls.append(_Call(run, _memories(reads), _memories(writes), held))

    def _keep(self, new: Sequence[torch.Tensor]) -> None:
        self._made.update(map(_memory, new))
        self._bytes += sum(tensor.untyped_storage().nbytes() for tensor in new)
        self._kept.extend(new)
        if self._bytes > _MOST_BYTES:
            raise KtrtError(
                f"the step cannot be recorded: its results take more than {_MOST_BYTES >> 20} MiB"
            )

    def calls(self) -> list[_Call]:
        """Returns the calls, in order, that the step's writes to outside memory depend on."""
        if not self._inputs:
            raise KtrtError("the step has not been described: its inputs are not known")
        return _needed(self._changing(), self._made)

    def _changing(self) -> list[_Call]:
        """Returns the calls whose results may differ between runs."""
        counts: dict[int, int] = {}
        for call in self._calls:
            for memory in call.writes:
                counts[memory] = counts.get(memory, 0) + 1
        # Memory that is written to more than once, or that existed before the step.
        changing = {m for m, count in counts.items() if count > 1 or m not in self._made}
        changing |= self._inputs
        found = []
        for call in self._calls:
            if call.reads & changing or call.writes & changing:
                changing |= call.writes
                found.append(call)
        return found


def _new(like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Returns a contiguous tensor with memory for whole vectors: zeros follow its numbers."""
    count = math.prod(shape)
    return like.new_zeros(-(-count // VECTOR) * VECTOR)[:count].view(*shape)


def _follower(active_set: ActiveSet, calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    # Not the version, which another forward may have left and come back to.
    seen = active_set.changes

    def follow() -> None:
        nonlocal seen
        if seen != active_set.changes:
            changes = active_set.changes
            for call in calls:
                call()
            seen = changes

    return follow


def _needed(calls: Sequence[_Call], made: set[int]) -> list[_Call]:
    """Returns the calls that outside memory depends on."""
    needed: set[int] = set()
    found = []
    for call in reversed(calls):
        if call.writes & needed or call.writes - made:
            needed |= call.reads | call.writes
            found.append(call)
    return found[::-1]


def _is_fixed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call of an operation that may depend on numbers does not: indexing by integers,
    attention without dropout."""
    if func is _aten.index.Tensor:
        return all(each.dtype not in (torch.bool, torch.uint8) for each in _tensors(args[1]))
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    return "attention" in func.name() and given.get("dropout_p", 0.0) == 0


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (each for each in tree_iter(tree) if isinstance(each, torch.Tensor))


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _memories(tensors: Iterable[torch.Tensor]) -> frozenset[int]:
    return frozenset(_memory(tensor) for tensor in tensors)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Returns the arguments that an operation changes in place."""
    found: list[torch.Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[index] if index < len(args) else kwargs.get(argument.name)
            found.extend(_tensors(given))
    return found


def _again(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], object]:
    """Returns a call of an operation in place."""
    name = _IN_PLACE.get(func)
    if name is not None and not kwargs:
        return functools.partial(getattr(args[0], name), *args[1:])
    return functools.partial(func, *args, **kwargs)


def _into(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], results: Sequence[Any]
) -> Callable[[], object]:
    """Returns a call that writes into the tensors that the first one returned."""
    if func is _aten._to_copy.default and not args[0].is_sparse:
        return functools.partial(results[0].copy_, args[0])
    direct = _DIRECT.get(func)
    if direct is not None:
        out = results[0] if len(results) == 1 else tuple(results)
        return functools.partial(direct, *args, **kwargs, out=out)
    if func is _aten.embedding.default and args[1].is_contiguous():
        table, out = args[0], results[0]
        return functools.partial(
            torch.index_select, table, 0, args[1].view(-1), out=out.view(-1, table.shape[1])
        )
    if func is _aten._softmax.default and not args[2] and not kwargs:
        return functools.partial(torch.softmax, *args[:2], out=results[0])
    variant = _out_variant(func)
    if variant is not None:
        call, names = variant
        return functools.partial(call, *args, **kwargs, **dict(zip(names, results, strict=True)))

    def run() -> None:
        for held, new in zip(results, _tensors(func(*args, **kwargs)), strict=True):
            held.copy_(new)

    return run


@functools.cache
def _out_variant(func: Any) -> tuple[Any, tuple[str, ...]] | None:
    """Returns the overload of an operation that takes memory for its results, and the names of
    these arguments."""
    wanted = [(a.name, str(a.type)) for a in func._schema.arguments]
    if any(str(each.type) != "Tensor" for each in func._schema.returns):
        return None
    packet = func.overloadpacket
    for name in packet.overloads():
        overload = getattr(packet, name)
        arguments = overload._schema.arguments
        outs = tuple(a.name for a in arguments if a.is_out)
        if len(outs) != len(func._schema.returns):
            continue
        if [(a.name, str(a.type)) for a in arguments if not a.is_out] == wanted:
            return overload, outs
    return None


class RecordedSteps:
    """Turns decode steps into functions that repeat them: the CPU's counterpart of CUDA graphs."""

    what = "recorded step"
    failure_level = logging.WARNING
    captures_compute = True

    def __init__(self, shortcut: Shortcut | None = None) -> None:
        self.usable = True
        self.proven = False
        self._shortcut = shortcut

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Runs ``step`` once, which describes itself to the recorder; returns a function that
        repeats its writes to outside memory. ``KtrtError``: the step cannot be recorded."""
        recorder = Recorder(self._shortcut)
        with recorder.recording():
            step()
        calls = recorder.calls()
        first, steps = recorder.followers(), [call.run for call in calls]

        def replay(_held: object = calls) -> None:
            # Torch's share is small: waking its threads would take longer, and they would disturb
            # the engine's.
            threads = set_torch_threads(1)
            try:
                for follow in first:
                    follow()
                for run in steps:
                    run()
            finally:
                set_torch_threads(threads)

        return replay

    def clear(self) -> None:
        """The steps so far are no longer needed."""
