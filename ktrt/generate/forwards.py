"""The model's forwards, operation by operation: of one sequence, and of the tokens of many."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ktrt.engine.step_rows import ACTIVE, StepRows, TokenSpan
from ktrt.kv.static import (
    CannotMixError,
    StaticKv,
    cache_argument,
    keeps_states,
    unusual_layers,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from ktrt.engine.step_rows import RunningStep
    from ktrt.generate.step import Span

logger = logging.getLogger(__name__)

# The attention of a first forward may read all that it is given: a multiple of this number of
# positions, and for a block of queries as many keys as in any other forward.
_CUT = 1024
# Rows of logits that may outlive their forward; a scored prompt's are 205 MB in float32.
_FEW_ROWS = 64
# Whose frequencies follow the longest position of a forward: a token's would depend on company.
_ROPE_OF_THE_LONGEST = {"dynamic", "longrope"}


@dataclass(frozen=True)
class Part:
    """A span together with how many tokens its slot holds: no slot says so during a forward."""

    span: Span
    start: int

    @property
    def count(self) -> int:
        return len(self.span.ids)

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def is_row(self) -> bool:
        return self.count == 1


class Forwards:
    """Runs a model without graphs; ``running``: the model's step, for its layers."""

    def __init__(self, model: Any, running: RunningStep) -> None:
        self.model, self.running = model, running
        self.device = model.get_input_embeddings().weight.device
        self._argument = cache_argument(model)
        # Logits [vocab_size] of the last forward that gave any; the first tokens of a prompt always
        # are one of these.
        self.latest = torch.empty(0)

    def alone(self, part: Part, cache: Any) -> tuple[torch.Tensor, Any]:
        """Runs one sequence on ``cache``, a static one or one of transformers (None: the model
        makes it); returns the wanted logits [wanted, vocab_size] and the cache."""
        ids, wanted = part.span.ids, list(part.span.wanted)
        place: AbstractContextManager[None] = nullcontext()
        if isinstance(cache, StaticKv):
            place = cache.sequence(part.span.slot.index, part.start, part.count)
        # Every model takes the length of a tail: one token, or up to the first that is wanted.
        tail = len(ids) - min(wanted, default=len(ids) - 1)
        with torch.inference_mode(), place, self._adapters(part, tail):
            inputs = torch.tensor([list(ids)], device=self.device)
            output = self.model(
                input_ids=inputs, use_cache=True, logits_to_keep=tail, **{self._argument: cache}
            )
            logits = output.logits[0, -tail:]
            self.latest = _kept(logits)
            if len(wanted) != tail:
                logits = logits[[index - len(ids) + tail for index in wanted]]
        return logits, getattr(output, self._argument) if cache is None else cache

    def _adapters(self, part: Part, tail: int) -> AbstractContextManager[None]:
        """Within the block, all tokens have the part's adapter; the cache knows their places."""
        if part.span.adapter == ACTIVE:
            return nullcontext()
        rows = StepRows(part.count, 0, self.device)
        set_adapters(rows, [part.span.adapter] * part.count)
        if tail < part.count:
            rows.logits = torch.arange(part.count - tail, part.count)
        return self.running.running(rows)

    def many(self, parts: Sequence[Part], cache: StaticKv, *, proven: bool) -> list[torch.Tensor]:
        """Runs the tokens of different slots in one forward: first the parts of one token each.
        Returns the wanted logits of each part.

        ``CannotMixError``: the model cannot; what the slots hold is unchanged.
        """
        rows, wanted = _rows(parts, self.device)
        most = None
        if not proven:
            end = -(-max(p.end for p in parts) // _CUT) * _CUT
            most = 1 + max(p.span.slot.index for p in parts), end
            for slot in range(most[0]):
                cache.commit(slot, end)
        for part in parts:
            cache.will_write(part.span.slot.index, part.end)
        tokens = [token for part in parts for token in part.span.ids]
        positions = [at for part in parts for at in range(part.start, part.end)]
        with torch.inference_mode(), cache.many(rows, most), self.running.running(rows):
            if len(wanted) < len(tokens):
                # No output layer takes zero tokens for granted.
                rows.logits = torch.tensor(wanted or [len(tokens) - 1])
            keep: Any = 0 if rows.logits is None else rows.logits.to(self.device)
            output = self.model(
                input_ids=torch.tensor([tokens], device=self.device),
                position_ids=torch.tensor([positions], device=self.device),
                attention_mask=mask_of_many(self.device),
                use_cache=True,
                logits_to_keep=keep,
                **{self._argument: cache},
            )
        check_attended(rows)
        self.latest = _kept(output.logits[0])
        logits = output.logits[0, : len(wanted)]
        return list(logits.split([len(part.span.wanted) for part in parts]))


def _kept(logits: torch.Tensor) -> torch.Tensor:
    """Returns the last row of ``logits`` [rows, vocab_size], by itself where it would keep many."""
    return logits[-1].clone() if len(logits) > _FEW_ROWS else logits[-1]


def _rows(parts: Sequence[Part], device: torch.device) -> tuple[StepRows, list[int]]:
    """Returns the facts of a forward of ``parts``, and the tokens whose logits are wanted."""
    decode = sum(part.is_row for part in parts)
    spans, wanted, first = [], list[int](), 0
    for part in parts:
        if not part.is_row:
            spans.append(TokenSpan(part.span.slot.index, first, part.start, part.count))
        wanted += [first + index for index in part.span.wanted]
        first += part.count
    rows = StepRows(first, decode, device, tuple(spans))
    if decode:
        rows.slots.copy_(torch.tensor([p.span.slot.index for p in parts[:decode]]))
        rows.lengths.copy_(torch.tensor([p.end for p in parts[:decode]]))
    set_adapters(rows, [p.span.adapter for p in parts for _ in range(p.count)])
    return rows, wanted


def set_adapters(rows: StepRows, adapters: Sequence[int]) -> None:
    """Gives each token its adapter."""
    rows.adapters.copy_(torch.tensor(adapters, dtype=torch.int32))
    if rows.device_adapters is not None:
        rows.device_adapters.copy_(rows.adapters)


def mask_of_many(device: torch.device) -> torch.Tensor:
    """Returns the attention mask of a forward of many sequences. Nobody reads it: a ready mask
    keeps transformers from making one, which is one sequence's."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def check_attended(rows: StepRows) -> None:
    """``CannotMixError``: layers attended to keys and values by something else than the step."""
    if rows.stored != rows.attended or not rows.stored:
        raise CannotMixError(
            f"the attention of {rows.stored - rows.attended} of {rows.stored} layers does not know "
            "the step's sequences"
        )


def _why_not_mixed(model: Any) -> str | None:
    """Returns why the tokens of many sequences cannot share a forward; None: nothing is known that
    prevents it."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
        if kinds & _ROPE_OF_THE_LONGEST:
            return f"its rotary embedding ({kinds.pop()}) follows the longest sequence"
    return None


def why_alone(model: Any, running: RunningStep | None) -> str | None:
    """Returns why sequences run one after the other; None: they may share a forward."""
    unusual = unusual_layers(model)
    if unusual:
        reason = f"the model's KV cache has unusual layers ({', '.join(unusual)})"
    elif keeps_states(model):
        reason = "layers keep states, and take one sequence after the other"
    elif running is None:
        return "the model's layers do not look at steps"
    else:
        return _why_not_mixed(model)
    logger.info("Sequences run one after the other, not in one forward: %s", reason)
    return reason
