"""Attention of one token on the CPU: over the keys and values as they lie, in the engine.

torch's fused kernel gives a head's query of one token to one thread and multiplies without tiles:
on two cores it takes 1.4 to 6 ms per layer at 600 tokens, several times as long as reading keys and
values. The engine reads them once, with float32 sums; other dtypes than bfloat16 are computed
by torch's products, in float32 throughout.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ktrt.engine import HeadArray, TokenAttention
from ktrt.engine.recording import active
from ktrt.engine.torch_threads import set_torch_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from ktrt.engine import Engine
    from ktrt.engine.recording import Recorder
    from ktrt.utils.patches import Patches

_MARK = "kt_one_token_attention"
_SDPA = "sdpa"
# On the function in the table: the one that it stands in for.
_ORIGINAL = "kt_original"
# Keys and values together; two threads of a machine with 40 GB/s are no faster below.
_NUMBERS_OF_ONE_THREAD = 2 << 20
# Keys whose float32 copy fits into the second-level cache together with the values'.
_NUMBERS_OF_ONE_PRODUCT = 1 << 19


def accelerate_attention(model: nn.Module, engine: Engine, patches: Patches) -> int:
    """Runs the attention of single tokens on the CPU in the engine, for the layers of ``model``
    that transformers runs by ``sdpa``; returns how many there are.

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
    attention, count = EngineAttention(engine), 0
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
        and all(_is_nothing(arguments.get(name)) for name in _CHANGES)
    )


def _is_nothing(value: object) -> bool:
    return value is None or value is False or (isinstance(value, int | float) and value == 0)


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


class EngineAttention:
    """One token's attention in the engine, for layers of any form."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
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
        added = None if mask is None else _added(mask).float()
        for row in range(rows):
            cut = None if added is None else added[row if added.shape[0] > 1 else 0, 0, 0]
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


def _added(mask: torch.Tensor) -> torch.Tensor:
    """A mask to be added for one of bool (True: seen)."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape).masked_fill_(~mask, float("-inf"))


def one_token(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    """query [rows, heads, 1, d]; key [rows, groups, tokens, d], value [rows, groups, tokens, dv],
    ``groups`` a divisor of ``heads``; mask None, or bool (True: seen) or to be added, [rows, 1, 1,
    tokens]. Returns [rows, 1, heads, dv] in the query's dtype."""
    with _threads_for(key.numel() + value.numel()):
        return _products(query, key, value, mask, scaling)


@contextmanager
def _threads_for(numbers: int) -> Iterator[None]:
    """Little work is done by one thread of torch: to wake others takes longer (0.1 ms)."""
    threads = torch.get_num_threads()
    if threads == 1 or numbers > _NUMBERS_OF_ONE_THREAD:
        yield
        return
    set_torch_threads(1)
    try:
        yield
    finally:
        set_torch_threads(threads)


def _products(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    rows, heads, _, size = query.shape
    scaling = size**-0.5 if scaling is None else scaling
    # The heads of a group share keys: they are the rows of one product. In float32, since oneDNN
    # would compile its BF16 products for every length, 0.7 ms each.
    grouped = query.reshape(rows, key.shape[1], -1, size).float() * scaling
    if mask is not None:
        mask = _added(mask)
    if key.numel() <= _NUMBERS_OF_ONE_PRODUCT:
        out = _attend(grouped, key, value, mask)
    else:
        # One group after the other: its float32 copies stay in the cache.
        parts = [
            _attend(grouped[row, group], key[row, group], value[row, group], _row(mask, row))
            for row in range(rows)
            for group in range(key.shape[1])
        ]
        out = torch.stack(parts)
    return out.to(query.dtype).reshape(rows, 1, heads, -1)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """query [..., n, d] float32, key [..., tokens, d], value [..., tokens, dv]; float32."""
    scores = query @ key.float().transpose(-1, -2)
    if mask is not None:
        scores += mask
    return scores.softmax(dim=-1) @ value.float()


def _row(mask: torch.Tensor | None, row: int) -> torch.Tensor | None:
    return None if mask is None else mask[row if mask.shape[0] > 1 else 0, 0]
