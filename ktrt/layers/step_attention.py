"""Attention of a forward of many sequences: decode rows, then spans of prefill tokens.

A decode row has the bits that it has alone, and a span's tokens have the same bits however the
prompt is divided (``prompt_attention``): neither chunks nor other sequences change them.
"""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

from torch.overrides import _get_current_function_mode_stack

from ktrt.engine.recording import active
from ktrt.errors import KtrtError
from ktrt.layers.form import AttentionForm, form_of, is_nothing
from ktrt.layers.one_token import one_token, torch_threads_for
from ktrt.layers.prompt_attention import attend_blocks, first_key, keys_end

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from ktrt.engine.step_rows import RunningStep, StepRows, TokenSpan
    from ktrt.layers.engine_attention import EngineAttention


class Held(Protocol):
    """A layer's keys and values of all slots."""

    value_size: int

    @property
    def prompts(self) -> EngineAttention | None:
        """Computes spans of prefill tokens on the CPU; None: torch."""

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Everything that the layer reads, for a recorder."""

    def bind(
        self, query: torch.Tensor, rows: StepRows, out: torch.Tensor
    ) -> Callable[[], None] | None:
        """Returns a function that computes the decode rows of ``query`` [heads, rows, size] into
        ``out`` [rows, heads, value size] in the engine, whose memory stays; None: by torch."""

    def sequence(
        self, slot: int, length: int, adapter: int, room: int, first: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys [1, groups, n, size] and values [1, groups, n, value size]: a slot's
        positions ``first`` to ``length`` - 1, then finite numbers up to ``room``, or up to the
        slot's end. ``first`` above 0: only for a form with a window."""

    def last(
        self, query: torch.Tensor, slot: int, length: int, adapter: int, form: AttentionForm
    ) -> torch.Tensor:
        """Returns the attention [1, n, heads, value size] of ``query`` [1, heads, n, size], the
        last of a slot's first ``length`` positions, as a GPU computes it."""


def places(running: RunningStep) -> StepRows | None:
    """Returns the forward that runs if it is one of many sequences, by slots."""
    rows = running.rows
    return rows if rows is not None and (rows.decode or rows.spans) else None


def attend(
    rows: StepRows, query: torch.Tensor, held: Held, scaling: float | None,
    options: Mapping[str, Any], form: AttentionForm | None = None,
) -> torch.Tensor:  # fmt: skip
    """query [1, heads, tokens, size]; returns [1, tokens, heads, value size]. ``form``: the one
    that ``held`` has; None: the plain one, by ``scaling``. ``KtrtError``: the model's attention is
    of another form, or not over the step's tokens."""
    asked = form_of(query, scaling, options)
    form = form or AttentionForm(query.shape[-1] ** -0.5 if scaling is None else scaling)
    if asked is None or not _is_of(asked, form):
        raise KtrtError(f"an attention with {_names(options)}, expected the form {form}")
    if query.shape[0] != 1 or query.shape[2] != rows.tokens:
        raise KtrtError(
            f"attention of {[*query.shape]} queries, expected the step's {rows.tokens} tokens"
        )
    rows.attended += 1
    if (recorder := active()) is not None:
        if rows.spans:
            raise KtrtError("the step cannot be recorded: it has spans of prefill tokens")
        shape = 1, rows.decode, query.shape[1], held.value_size
        reads = (query, *held.tensors, rows.slots, rows.lengths, rows.adapters)

        def bind(out: torch.Tensor) -> Callable[[], None]:
            return _decode(rows, query, held, form, out)

        return recorder.call(shape, reads, bind)
    out = query.new_empty(1, rows.tokens, query.shape[1], held.value_size)
    if rows.decode:
        _decode(rows, query[:, :, : rows.decode], held, form, out[:, : rows.decode])()
    for span in rows.spans:
        places = slice(span.first, span.first + span.count)
        _prefill(rows, span, query[:, :, places], held, form, out[:, places])
    return out


def _is_of(asked: AttentionForm, form: AttentionForm) -> bool:
    """Whether a call asks for ``form``; masks may say a window that the call does not name."""
    same = asked.softcap == form.softcap and asked.sinks is form.sinks
    return same and asked.window in (0, form.window)


def _names(options: Mapping[str, Any]) -> str:
    return ", ".join(name for name, value in options.items() if not is_nothing(value)) or "nothing"


def _decode(
    rows: StepRows, query: torch.Tensor, held: Held, form: AttentionForm, out: torch.Tensor
) -> Callable[[], None]:
    """Returns a function that fills ``out`` by what ``rows`` says when it is called."""
    bound = held.bind(query[0], rows, out[0])
    return bound or _within_modes(functools.partial(_each_row, rows, query, held, form, out))


def _within_modes(call: Callable[[], None]) -> Callable[[], None]:
    """Returns ``call`` within the present function modes of torch: the model's forward enters
    them, and a recorded step runs without it."""
    modes = _get_current_function_mode_stack()

    def run() -> None:
        with ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            call()

    return run if modes else call


def _each_row(
    rows: StepRows, query: torch.Tensor, held: Held, form: AttentionForm, out: torch.Tensor
) -> None:
    facts = rows.slots.tolist(), rows.lengths.tolist(), rows.adapters[: rows.decode].tolist()
    for row, (slot, length, adapter) in enumerate(zip(*facts, strict=True)):
        if length == 0:
            out[:, row] = 0
            continue
        one = query[:, :, row : row + 1]
        if query.device.type != "cpu":
            out[:, row] = held.last(one, slot, length, adapter, form)[:, 0]
            continue
        key, value = held.sequence(slot, length, adapter, length, form.first_of(length))
        # One thread, whether the step is recorded or not.
        with torch_threads_for(0):
            out[:, row] = one_token(one, key, value, None, form)[:, 0]


def _prefill(
    rows: StepRows, span: TokenSpan, query: torch.Tensor, held: Held, form: AttentionForm,
    out: torch.Tensor,
) -> None:  # fmt: skip
    end = span.start + span.count
    adapter = int(rows.adapters[span.first])
    if query.device.type != "cpu":
        out.copy_(held.last(query, span.slot, end, adapter, form))
        return
    first = first_key(span.start, form)
    key, value = held.sequence(span.slot, end, adapter, keys_end(end), first)
    attend_blocks(query, key, value, form, out, start=span.start, first=first, engine=held.prompts)
