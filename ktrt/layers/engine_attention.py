"""Attention of single tokens in the engine: over the keys and values as they lie in a cache.

torch's fused kernel gives a head's query of one token to one thread and multiplies without tiles:
on two cores it takes 1.4 to 6 ms per layer at 600 tokens, several times as long as reading keys and
values. The engine reads them once, with float32 sums.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ktrt.engine import HeadArray, SlotRows, TokenAttention
from ktrt.engine.step_rows import RunningStep
from ktrt.layers.gpu.prefill import prefill_attention
from ktrt.layers.one_token import added

if TYPE_CHECKING:
    from collections.abc import Callable

    from ktrt.engine import Engine
    from ktrt.engine.recording import Recorder
    from ktrt.engine.step_rows import StepRows
    from ktrt.layers.form import AttentionForm


def head_array(numbers: torch.Tensor) -> HeadArray:
    """numbers [heads, tokens, size], bfloat16 or float32, the last dimension contiguous, as the
    engine takes them; the caller keeps the tensor."""
    (heads, tokens, size), (head_stride, token_stride, step) = numbers.shape, numbers.stride()
    if step != 1 and size > 1:
        raise ValueError(f"the numbers of a head are {step} elements apart, expected 1")
    if numbers.dtype not in (torch.bfloat16, torch.float32) or numbers.device.type != "cpu":
        raise ValueError(
            f"found {numbers.dtype} on {numbers.device}, expected bfloat16 or float32 on the CPU"
        )
    count = (heads - 1) * head_stride + (tokens - 1) * token_stride + size
    is_float = numbers.dtype == torch.float32
    return HeadArray(numbers.data_ptr(), count, head_stride, token_stride, is_float)


def slot_array(numbers: torch.Tensor) -> HeadArray:
    """The same for numbers [slots, heads, tokens, size] in bfloat16."""
    slots, heads, tokens, size = numbers.shape
    strides = numbers.stride()
    if strides[3] != 1 and size > 1:
        raise ValueError(f"the numbers of a head are {strides[3]} elements apart, expected 1")
    if numbers.dtype != torch.bfloat16 or numbers.device.type != "cpu":
        raise ValueError(f"found {numbers.dtype} on {numbers.device}, expected bfloat16 on the CPU")
    steps = zip((slots, heads, tokens), strides, strict=False)
    count = sum((n - 1) * stride for n, stride in steps) + size
    return HeadArray(numbers.data_ptr(), count, strides[1], strides[2], slot_stride=strides[0])


def slot_rows(rows: StepRows, held: torch.Tensor, window: int = 0) -> SlotRows:
    """The decode rows, whose sequences are in ``held`` [slots, heads, capacity, size]; ``window``:
    the last positions that a row attends to (0: all), which may lie in a ring of ``capacity``."""
    slots, lengths = rows.slots, rows.lengths
    sizes = rows.decode, held.shape[0], held.shape[2], *((window,) if window else ())
    return SlotRows(slots.data_ptr(), lengths.data_ptr(), *sizes)


class EngineAttention:
    """Attention of single tokens in the engine, for layers of any form."""

    def __init__(self, engine: Engine, running: RunningStep | None = None) -> None:
        self._engine = engine
        self.running = RunningStep() if running is None else running
        # With the sinks, whose identity is a part of the key.
        self._forms: dict[object, tuple[TokenAttention, torch.Tensor | None]] = {}

    def __deepcopy__(self, _memo: dict[int, Any]) -> None:
        """A copied module has no engine: torch computes it."""

    def takes(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> bool:
        return (
            query.dtype == key.dtype == value.dtype == torch.bfloat16
            and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
            and query.shape[0] == key.shape[0] == value.shape[0]
            and key.shape[-2] == value.shape[-2] > 0
            and query.shape[-1] == key.shape[-1]
            and (mask is None or mask.shape[-1] == key.shape[-2])
        )

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        form: AttentionForm,
    ) -> torch.Tensor:
        """Shapes as in ``one_token``; what ``takes`` has looked at."""
        rows, heads, _, _ = query.shape
        out = query.new_empty(rows, 1, heads, value.shape[-1])
        whole = None if mask is None else added(mask).float()
        for row in range(rows):
            cut = None if whole is None else whole[row if whole.shape[0] > 1 else 0, 0, 0]
            step = self.bind(query[row, :, 0], key[row], value[row], out[row, 0], form, mask=cut)
            step(key.shape[2], form.first_of(key.shape[2]))
        return out

    def record(
        self,
        recorder: Recorder,
        length: Callable[[], int],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        form: AttentionForm,
    ) -> torch.Tensor:
        """The same for one row, over as many tokens as ``length`` says whenever the step runs; key
        and value may be rings of a window's last positions."""

        def bind(out: torch.Tensor) -> Callable[[], None]:
            step = self.bind(query[0, :, 0], key[0], value[0], out[0, 0], form)

            def run() -> None:
                end = length()
                step(end, form.first_of(end))

            return run

        shape = 1, 1, query.shape[1], value.shape[-1]
        return recorder.call(shape, (query, key, value), bind)

    def bind(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        form: AttentionForm,
        *,
        mask: torch.Tensor | None = None,
    ) -> Callable[..., None]:
        """A function of ``end`` and, by default 0, ``start``, which fills ``out`` with the
        attention over positions ``start`` … ``end`` - 1 of what the arrays hold when it is called;
        position p lies at p modulo the capacity.

        query [heads, d] and out [heads, dv], bfloat16 or float32; keys [groups, capacity, d] and
        values [groups, capacity, dv], bfloat16; the last dimensions contiguous. The form's sinks
        are copied, its window is the caller's part. ``mask`` [capacity] float32 is added to the
        scores. The tensors are kept, and must stay where they are. ``ValueError``: shapes, dtypes,
        layouts.
        """
        heads, size = query.shape
        groups, capacity, value_size = values.shape
        if keys.shape[0] != groups or keys.shape[2] != size or out.shape != (heads, value_size):
            raise ValueError(
                f"query {[*query.shape]}, keys {[*keys.shape]}, values {[*values.shape]} and out "
                f"{[*out.shape]} do not fit: expected [heads, d], [groups, tokens, d], [groups, "
                "tokens, dv] and [heads, dv]"
            )
        attention = self._attention(heads, groups, size, value_size, form)
        first, last = head_array(query[:, None]), head_array(out[:, None])
        held_keys, held_values = head_array(keys), head_array(values)
        address, count = _numbers_of(mask)
        forward = attention.forward
        tensors = query, keys, values, out, mask

        def attend(end: int, start: int = 0, _kept: object = tensors) -> None:
            ring = (capacity,) if end > capacity and start > 0 else ()
            forward(
                first, None, held_keys, None, held_values, start, end, last, address, count, *ring
            )  # fmt: skip

        return attend

    def bind_rows(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        rows: StepRows,
        form: AttentionForm,
    ) -> Callable[[], None]:
        """A function that fills ``out`` with the attention of ``rows``' decode rows, each over the
        positions of its slot that the form's window leaves, as slots, lengths and the arrays say
        when it is called.

        query [heads, rows, d], keys [slots, groups, capacity, d], values [slots, groups, capacity,
        dv], out [rows, heads, dv]; the rest is as in ``bind``.
        """
        (heads, _, size), (_, groups, _, value_size) = query.shape, values.shape
        attention = self._attention(heads, groups, size, value_size, form)
        arrays = head_array(query), slot_array(keys), slot_array(values)
        last, places = head_array(out.transpose(0, 1)), slot_rows(rows, keys, form.window)
        forward, tensors = attention.forward_rows, (query, keys, values, out, rows)

        def attend(_kept: object = tensors) -> None:
            forward(*arrays, last, places)

        return attend

    def attend_prompt(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, form: AttentionForm,
        out: torch.Tensor, *, start: int, first: int = 0,
    ) -> bool:  # fmt: skip
        """Computes what ``attend_blocks`` does, with the same bits wherever a prompt is cut; False:
        torch is as fast on this processor, or has to compute tensors of this kind."""
        arrays = query[0], key[0], value[0], out[0].transpose(0, 1)
        if any(x.dtype != torch.bfloat16 or x.stride(-1) != 1 for x in arrays):
            return False
        heads, tokens, size = arrays[0].shape
        attention = self._attention(heads, key.shape[1], size, value.shape[-1], form)
        if not attention.takes_prompts:
            return False
        attention.forward_prompt(
            *map(head_array, arrays), start=start, tokens=tokens, first=first, window=form.window
        )
        return True

    def _attention(
        self, heads: int, groups: int, size: int, value_size: int, form: AttentionForm
    ) -> TokenAttention:
        sinks = form.sinks
        key = (heads, groups, size, value_size, form.scaling, form.softcap, id(sinks))
        if (known := self._forms.get(key)) is not None:
            return known[0]
        made = TokenAttention(
            self._engine, heads=heads, groups=groups, key_size=size, value_size=value_size,
            scaling=form.scaling, softcap=form.softcap,
            sinks=None if sinks is None else sinks.detach(),
        )  # fmt: skip
        self._forms[key] = made, sinks
        return made


def _numbers_of(mask: torch.Tensor | None) -> tuple[int, int]:
    if mask is None:
        return 0, 0
    if mask.dtype != torch.float32 or mask.ndim != 1 or not mask.is_contiguous():
        raise ValueError(
            f"mask is {mask.dtype} {[*mask.shape]}, expected float32 [tokens], contiguous"
        )
    return mask.data_ptr(), mask.numel()


class HeldKeys:
    """Keys and values of all slots, for ``step_attention``: position p of a slot lies at p modulo
    the capacity."""

    def __init__(
        self, engine: EngineAttention, key: torch.Tensor, value: torch.Tensor, form: AttentionForm
    ) -> None:
        self.prompts, self._form = engine, form
        self._key, self._value = key, value
        self.value_size = value.shape[-1]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self._key, self._value

    def bind(
        self, query: torch.Tensor, rows: StepRows, out: torch.Tensor
    ) -> Callable[[], None] | None:
        states = query, self._key, self._value
        if query.device.type != "cpu" or any(
            x.dtype != torch.bfloat16 or x.stride(-1) != 1 for x in states
        ):
            return None
        return self.prompts.bind_rows(*states, out, rows, self._form)

    def sequence(
        self, slot: int, length: int, _adapter: int, room: int, first: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # After what a slot holds, the pool has zeros.
        end, capacity = max(length, room), self._key.shape[2]
        both = self._key[slot : slot + 1], self._value[slot : slot + 1]
        if length <= capacity:
            return both[0][:, :, first:end], both[1][:, :, first:end]
        at = torch.arange(first, end, device=self._key.device) % capacity
        return both[0].index_select(2, at), both[1].index_select(2, at)

    def last(
        self, query: torch.Tensor, slot: int, length: int, adapter: int, form: AttentionForm
    ) -> torch.Tensor:
        first = form.first_of(length - query.shape[2] + 1)
        return prefill_attention(query, *self.sequence(slot, length, adapter, length, first), form)
