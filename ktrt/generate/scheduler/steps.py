"""From requests to the step that computes their next tokens."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ktrt.engine.step_rows import ACTIVE
from ktrt.errors import EngineError, KtrtError
from ktrt.generate.scheduler.cost import StepSize
from ktrt.generate.step import Span, Step, StepStopped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ktrt.generate.scheduler.interfaces import AdapterSets
    from ktrt.generate.scheduler.requests import Request

# Tokens of a step with a prompt whose tokens are all scored: their logits take 105 MB in BF16 for a
# vocabulary of 102400.
SCORED_TOKENS = 512


def make_step(
    chosen: Sequence[tuple[Request, int]], adapters: AdapterSets, *, by_row: bool
) -> tuple[Step, StepSize]:
    """Returns the step that computes that many tokens of each request, all of one group, and its
    size; has ``adapters`` act as it needs."""
    first = chosen[0][0].new.choice
    choices = [first]
    if any(request.new.choice != first for request, _ in chosen):
        choices = list(dict.fromkeys(request.new.choice for request, _ in chosen))
    shared = adapters.prepare(choices, by_row=by_row)
    spans, rows, prompt, held = [], 0, 0, 0
    for request, count in chosen:
        start, row = request.held, request.new.choice.row
        ids = request.ids[start : start + count]
        span = Span(
            slot=request.slot,
            ids=ids,
            adapter=ACTIVE if shared or row is None else row,
            logits=_wanted(request, start, count),
            watch=partial(_watch, request, start, count),
        )
        spans.append(span)
        held += start
        rows += count == 1
        prompt += count if count > 1 else 0
    return Step(tuple(spans)), StepSize(rows, prompt, len(chosen) - rows, held)


def _watch(request: Request, start: int, count: int, layers: int, total: int) -> None:
    """Reports progress within a step of a prompt; ``StepStopped``: nobody wants it any more."""
    if request.handle.wants_cancel:
        raise StepStopped
    if request.new.progress:
        done = start - request.reused + count * layers // total
        request.handle.report(done, len(request.new.prompt_ids) - request.reused)


def _wanted(request: Request, start: int, count: int) -> Sequence[int] | None:
    if request.scores_prompt and count > 1:
        return range(count)
    return None if start + count == len(request.ids) else ()


def for_callers(error: Exception, request: Request) -> Exception:
    """Returns what the request's handle raises for an error of its step."""
    if not request.new.wraps_errors or isinstance(error, KtrtError):
        return error
    found = EngineError(f"a step of the model failed: {type(error).__name__}: {error}")
    found.__cause__ = error
    return found
