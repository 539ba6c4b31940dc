"""Sampling fields of a request as the session's options."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ktrt.serve.errors import ApiError
from ktrt.serve.generation import SEEDS

if TYPE_CHECKING:
    from ktrt.serve.openai.schema import SamplingRequest

# The session's own names are the same.
_SAME = (
    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "do_sample", "stop_token_ids", "skip_special_tokens",
)  # fmt: skip


def sampling_options(request: SamplingRequest) -> dict[str, Any]:
    """Returns the session's options for the fields that ``request`` has."""
    options = {name: getattr(request, name) for name in _SAME}
    if request.temperature and request.do_sample is None:
        # A YAML with do_sample false is greedy by default, not by force.
        options["do_sample"] = True
    if request.top_k is not None:
        options["top_k"] = max(request.top_k, 0)  # -1 is vLLM's "off"
    if request.seed is not None:
        options["seed"] = request.seed % SEEDS
    options["stop"] = stop_strings(request.stop)
    options["logit_bias"] = _bias(request.logit_bias)
    return {name: value for name, value in options.items() if value is not None}


def stop_strings(given: object) -> list[str] | None:
    """Returns the stop strings of a text or a list of texts."""
    if given is None:
        return None
    texts = given if isinstance(given, list) else [given]
    if not all(isinstance(each, str) and each for each in texts):
        raise ApiError(
            400, f"stop: expected a text or a list of texts, none empty, found {given!r:.80}",
            param="stop",
        )  # fmt: skip
    return list(texts)


def _bias(given: object) -> dict[int, float] | None:
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise _wrong_bias(given)
    found = {}
    for key, value in given.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (str(key).isascii() and str(key).isdigit() and len(str(key)) < 10 and number):
            raise _wrong_bias({key: value})
        if not math.isfinite(value) or abs(value) > 100:
            raise _wrong_bias({key: value})
        found[int(key)] = float(value)
    return found


def _wrong_bias(found: object) -> ApiError:
    return ApiError(
        400, f"logit_bias: expected token ids with numbers from -100 to 100, found {found!r:.80}",
        param="logit_bias",
    )  # fmt: skip
