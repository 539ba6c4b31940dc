"""Attention of single tokens on the CPU: over the keys and values as they lie, in the engine.

torch's fused kernel gives a head's query of one token to one thread and multiplies without tiles:
on two cores it takes 1.4 to 6 ms per layer at 600 tokens, several times as long as reading keys and
values. The engine reads them once, with float32 sums; other dtypes than bfloat16 are computed
by torch's products, in float32 throughout (``one_token``). A forward of many sequences, which
``engine.step_rows`` describes, is computed as ``step_attention`` says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ktrt.engine import HeadArray, SlotRows, TokenAttention
from ktrt.engine.recording import active
from ktrt.engine.step_rows import RunningStep
from ktrt.layers.form import form_of, is_nothing
from ktrt.layers.gpu.decode import decode_attention, runs_kernels
from ktrt.layers.one_token import added, one_token
from ktrt.layers.step_attention import attend

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from ktrt.engine import Engine
    from ktrt.engine.recording import Recorder
    from ktrt.engine.step_rows import StepRows
    from ktrt.utils.patches import Patches

_MARK = "kt_one_token_attention"
_SDPA = "sdpa"
# On the function in the table: the one that it stands in for.
_ORIGINAL = "kt_original"


def accelerate_attention(
    model: nn.Module, engine: Engine, patches: Patches, running: RunningStep | None = None
) -> int:
    """Runs the attention of single tokens on the CPU in the engine, and on any device that of
    ``running``'s steps, for the layers of ``model`` that transformers runs by ``sdpa``; returns how
    many there are.

    transformers keeps its attention functions in one table for all models. While ``patches`` are in
    effect, the entry for ``sdpa`` is a function that looks for a mark on the layer and leaves other
    models' layers alone. The engine must stay open as long.
    """
    config: Any = model.config
    if config.get_text_config()._attn_implementation != _SDPA:
        return 0
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    table = type(ALL_ATTENTION_FUNCTIONS)._global_mapping
    # Another loaded model may have put its function there; one in the chain is enough for all.
    original = getattr(table[_SDPA], _ORIGINAL, table[_SDPA])
    patches.entry(table, _SDPA, _by_mark(original))
    attention, count = EngineAttention(engine, running), 0
    for module in model.modules():
        if type(module).__name__.endswith("Attention"):
            patches.set(module, _MARK, attention)
            count += 1
    return count


def _by_mark(original: Callable[..., Any]) -> Callable[..., Any]:
    """An attention function of transformers: the engine's for marked layers, else ``original``."""

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attention_mask: torch.Tensor | None, **arguments: Any,
    ) -> Any:  # fmt: skip
        engine: EngineAttention | None = getattr(module, _MARK, None)
        scaling, recorder = arguments.get("scaling"), active()
        if engine is not None and (rows := places(engine.running)) is not None:
            return attend(
                rows, query, HeldKeys(engine, key, value, scaling), scaling, arguments
            ), None
        if engine is not None and (lengths := engine.running.lengths) is not None and query.is_cuda:
            form = form_of(query, scaling, arguments)
            if form is not None:
                engine.running.attended += runs_kernels(query)
                # The cache's layers with windows are rings: of one lap, position p lies at p.
                ring = key.shape[2] if form.window else 0
                return decode_attention(query, key, value, lengths, form, ring=ring), None
        length = None if recorder is None else recorder.length_behind(attention_mask)
        mask = attention_mask if length is None else None
        if engine is None or not _is_plain(query, key, mask, arguments):
            return original(module, query, key, value, attention_mask, **arguments)
        if not engine.takes(query, key, value, mask) or (recorder and length is None):
            return one_token(query, key, value, attention_mask, scaling), None
        if recorder is not None and length is not None:
            return engine.record(recorder, length, query, key, value, scaling), None
        return engine(query, key, value, mask, scaling), None

    setattr(attention, _ORIGINAL, original)
    return attention


# Arguments that change nothing here where they are None, False or 0.
_CHANGES = ("dropout", "position_bias", "cache", "softcap", "output_attentions", "s_aux")


def _is_plain(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, arguments: dict[str, Any]
) -> bool:
    return (
        query.shape[2] == 1
        and query.device.type == "cpu"
        and not torch.is_grad_enabled()
        and query.shape[1] % key.shape[1] == 0
        and (mask is None or (mask.ndim == 4 and mask.shape[1:3] == (1, 1)))
        and all(is_nothing(arguments.get(name)) for name in _CHANGES)
    )


def places(running: RunningStep) -> StepRows | None:
    """Returns the forward that runs if it is one of many sequences, by slots."""
    rows = running.rows
    return rows if rows is not None and (rows.decode or rows.spans) else None


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


def slot_rows(rows: StepRows, held: torch.Tensor) -> SlotRows:
    """The decode rows, whose sequences are in ``held`` [slots, heads, capacity, size]."""
    slots, lengths = rows.slots, rows.lengths
    return SlotRows(slots.data_ptr(), lengths.data_ptr(), rows.decode, held.shape[0], held.shape[2])


class EngineAttention:
    """Attention of single tokens in the engine, for layers of any form."""

    def __init__(self, engine: Engine, running: RunningStep | None = None) -> None:
        self._engine = engine
        self.running = RunningStep() if running is None else running
        self._forms: dict[object, TokenAttention] = {}

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
        scaling: float | None,
    ) -> torch.Tensor:
        """Shapes as in ``one_token``; what ``takes`` has looked at."""
        rows, heads, _, _ = query.shape
        out = query.new_empty(rows, 1, heads, value.shape[-1])
        whole = None if mask is None else added(mask).float()
        for row in range(rows):
            cut = None if whole is None else whole[row if whole.shape[0] > 1 else 0, 0, 0]
            step = self.bind(
                query[row, :, 0], key[row], value[row], out[row, 0], scaling=scaling, mask=cut
            )
            step(key.shape[2])
        return out

    def record(
        self,
        recorder: Recorder,
        length: Callable[[], int],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
    ) -> torch.Tensor:
        """The same for one row, over as many tokens as ``length`` says whenever the step runs."""

        def bind(out: torch.Tensor) -> Callable[[], None]:
            step = self.bind(query[0, :, 0], key[0], value[0], out[0, 0], scaling=scaling)
            return lambda: step(length())

        shape = 1, 1, query.shape[1], value.shape[-1]
        return recorder.call(shape, (query, key, value), bind)

    def bind(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        *,
        scaling: float | None = None,
        softcap: float = 0.0,
        sinks: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> Callable[..., None]:
        """A function of ``end`` and, by default 0, ``start``, which fills ``out`` with the
        attention over tokens ``start`` … ``end`` - 1 of what the arrays hold when it is called.

        query [heads, d] and out [heads, dv], bfloat16 or float32; keys [groups, capacity, d] and
        values [groups, capacity, dv], bfloat16; the last dimensions contiguous. ``sinks`` [heads]
        is copied; ``mask`` [capacity] float32 is added to the scores. The tensors are kept, and
        must stay where they are. ``ValueError``: shapes, dtypes, layouts.
        """
        heads, size = query.shape
        groups, _, value_size = values.shape
        if keys.shape[0] != groups or keys.shape[2] != size or out.shape != (heads, value_size):
            raise ValueError(
                f"query {[*query.shape]}, keys {[*keys.shape]}, values {[*values.shape]} and out "
                f"{[*out.shape]} do not fit: expected [heads, d], [groups, tokens, d], [groups, "
                "tokens, dv] and [heads, dv]"
            )
        factor = size**-0.5 if scaling is None else scaling
        form = self._form(heads, groups, size, value_size, factor, softcap, sinks)
        first, last = head_array(query[:, None]), head_array(out[:, None])
        held_keys, held_values = head_array(keys), head_array(values)
        address, count = _numbers_of(mask)
        forward = form.forward
        tensors = query, keys, values, out, mask

        def attend(end: int, start: int = 0, _kept: object = tensors) -> None:
            forward(
                first, None, held_keys, None, held_values, start, end, last, address, count
            )  # fmt: skip

        return attend

    def bind_rows(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        rows: StepRows,
        scaling: float | None,
    ) -> Callable[[], None]:
        """A function that fills ``out`` with the attention of ``rows``' decode rows, each over the
        first positions of its slot, as slots, lengths and the arrays say when it is called.

        query [heads, rows, d], keys [slots, groups, capacity, d], values [slots, groups, capacity,
        dv], out [rows, heads, dv]; the rest is as in ``bind``.
        """
        (heads, _, size), (_, groups, _, value_size) = query.shape, values.shape
        factor = size**-0.5 if scaling is None else scaling
        form = self._form(heads, groups, size, value_size, factor, 0.0, None)
        arrays = head_array(query), slot_array(keys), slot_array(values)
        last, places = head_array(out.transpose(0, 1)), slot_rows(rows, keys)
        forward, tensors = form.forward_rows, (query, keys, values, out, rows)

        def attend(_kept: object = tensors) -> None:
            forward(*arrays, last, places)

        return attend

    def _form(
        self, heads: int, groups: int, size: int, value_size: int, scaling: float, softcap: float,
        sinks: torch.Tensor | None,
    ) -> TokenAttention:  # fmt: skip
        key = (heads, groups, size, value_size, scaling, softcap)
        if sinks is None and (known := self._forms.get(key)) is not None:
            return known
        made = TokenAttention(
            self._engine, heads=heads, groups=groups, key_size=size, value_size=value_size,
            scaling=scaling, softcap=softcap, sinks=None if sinks is None else sinks.detach(),
        )  # fmt: skip
        if sinks is None:
            self._forms[key] = made
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
    """Keys and values of all slots, for ``step_attention``."""

    def __init__(
        self, engine: EngineAttention, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> None:
        self._engine, self._scaling = engine, scaling
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
        return self._engine.bind_rows(*states, out, rows, self._scaling)

    def sequence(
        self, slot: int, length: int, _adapter: int, room: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # After what a slot holds, the pool has zeros.
        end = max(length, room)
        return self._key[slot : slot + 1, :, :end], self._value[slot : slot + 1, :, :end]
