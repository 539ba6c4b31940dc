"""Linear attention, state spaces and short convolutions through the engine, against transformers'
own functions."""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.family_models import MODELS, families, moe_folders, random_model
from transformers import DynamicCache

from ktrt.engine import Engine
from ktrt.engine.recording import RecordedSteps, active
from ktrt.kv.static import cache_argument
from ktrt.layers.linear_attention import accelerate_linear_attention
from ktrt.layers.linear_attention.families import FAMILIES, PARAMETERS
from ktrt.layers.linear_attention.functions import Functions
from ktrt.utils.patches import Patches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = Engine(num_threads=2, max_qlen=8)
    yield made
    made.close()


def functions_of(folder: str, name: str, engine: Engine) -> tuple[Any, Callable[..., Any]]:
    """Returns transformers' function and its stand-in, which must not fall back to it."""

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError(f"{name} fell back to transformers")

    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    return getattr(module, name), Functions(engine).function(name, refused)


class Draw:
    """Random tensors of one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype, self._generator = dtype, torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        numbers = torch.randn(shape, generator=self._generator)
        return numbers.to(dtype or self._dtype)

    def below_zero(self, *shape: int) -> torch.Tensor:
        return -0.3 * self(*shape, dtype=torch.float32).abs()


def delta_rule(draw: Draw, sequences: int, tokens: int, *, per_key: bool) -> dict[str, Any]:
    heads, key_heads, size, value_size = 4, 4 if per_key else 2, 20, 40
    keys = (sequences, tokens, key_heads, size)
    return {
        "query": draw(*keys), "key": draw(*keys),
        "value": draw(sequences, tokens, heads, value_size),
        "g": draw.below_zero(sequences, tokens, heads, *([size] if per_key else [])),
        "beta": draw(sequences, tokens, heads).sigmoid(), "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
        "initial_state": draw(sequences, heads, size, value_size, dtype=torch.float32),
    }  # fmt: skip


def mamba(draw: Draw, sequences: int, tokens: int) -> dict[str, Any]:
    channels, size = 24, 5
    rows = (sequences, channels, tokens)
    return {
        "hidden_states": draw(sequences, tokens, channels).transpose(1, 2), "dt": draw(*rows),
        "A": draw.below_zero(channels, size), "B": draw(sequences, size, tokens),
        "C": draw(sequences, size, tokens), "D": draw(channels).float(), "z": draw(*rows),
        "delta_bias": draw(channels).float(), "delta_softplus": True, "return_last_state": True,
    }  # fmt: skip


def mamba_step(draw: Draw, sequences: int) -> dict[str, Any]:
    channels, size = 24, 5
    return {
        "state": draw(sequences, channels, size, dtype=torch.float32),
        "hidden_states": draw(sequences, channels), "dt": draw(sequences, channels),
        "A": draw.below_zero(channels, size), "B": draw(sequences, size),
        "C": draw(sequences, size), "D": draw(channels), "z": draw(sequences, channels),
        "dt_bias": draw(channels).float(), "dt_softplus": True,
    }  # fmt: skip


def mamba2(draw: Draw, sequences: int, tokens: int) -> dict[str, Any]:
    heads, groups, head, size = 4, 2, 36, 12
    return {
        "hidden_states": draw(sequences, tokens, heads, head), "dt": draw(sequences, tokens, heads),
        "A": draw.below_zero(heads), "B": draw(sequences, tokens, groups, size), "chunk_size": 16,
        "C": draw(sequences, tokens, groups, size), "D": draw(heads), "dt_bias": draw(heads),
        "dt_softplus": True, "dt_limit": (0.001, 2.0), "return_final_states": True,
        "initial_states": draw(sequences, heads, head, size, dtype=torch.float32),
    }  # fmt: skip


def mamba2_step(draw: Draw, sequences: int) -> dict[str, Any]:
    heads, groups, head, size = 4, 2, 36, 12
    return {
        "state": draw(sequences, heads, head, size, dtype=torch.float32),
        "hidden_states": draw(sequences, heads, head),
        "dt": draw(sequences, heads, 1).expand(-1, -1, head),
        "A": draw.below_zero(heads)[:, None, None].expand(-1, head, size),
        "B": draw(sequences, groups, size), "C": draw(sequences, groups, size),
        "D": draw(heads)[:, None].expand(-1, head), "dt_softplus": True,
        "dt_bias": draw(heads)[:, None].expand(-1, head),
    }  # fmt: skip


def conv(draw: Draw, sequences: int, tokens: int, *, by_token: bool = True) -> dict[str, Any]:
    channels = 200
    shape = (sequences, tokens, channels) if by_token else (sequences, channels, tokens)
    x = draw(*shape)
    return {
        "hidden_states": x.transpose(1, 2) if by_token else x, "weight": draw(channels, 4),
        "bias": draw(channels), "activation": "silu",
    }  # fmt: skip


def conv_step(draw: Draw, sequences: int, *, taps: int = 4) -> dict[str, Any]:
    found = conv(draw, sequences, 1)
    return {**found, "conv_state": draw(sequences, 200, taps), "bias": None}


RULE, KIMI = "torch_{}_gated_delta_rule", "{}_kimi_delta_attention"
CASES: dict[str, tuple[str, str, Callable[[Draw], dict[str, Any]]]] = {
    "delta rule, prompt": (
        "qwen3_next", RULE.format("chunk"), lambda d: delta_rule(d, 2, 70, per_key=False)),
    "delta rule, start": (
        "qwen3_5_moe", RULE.format("chunk"),
        lambda d: delta_rule(d, 1, 33, per_key=False) | {"initial_state": None}),
    "delta rule, step": (
        "lara_mini", RULE.format("recurrent"), lambda d: delta_rule(d, 3, 1, per_key=False)),
    "kimi, prompt": (
        "kimi_linear", KIMI.format("chunk"), lambda d: delta_rule(d, 2, 70, per_key=True)),
    "kimi, step": (
        "glm5_next", KIMI.format("recurrent"), lambda d: delta_rule(d, 2, 1, per_key=True)),
    "mamba, prompt": ("jamba", "mamba_selective_scan", lambda d: mamba(d, 2, 35)),
    "mamba, step": ("jamba", "mamba_selective_state_update", lambda d: mamba_step(d, 2)),
    "mamba 2, prompt": ("nemotron_h", "mamba2_chunk_scan", lambda d: mamba2(d, 2, 35)),
    "mamba 2, step": (
        "granitemoehybrid", "mamba2_selective_state_update", lambda d: mamba2_step(d, 2)),
    "conv, prompt": ("lfm2_moe", "causal_conv1d_fn", lambda d: conv(d, 2, 300)),
    "conv, by channel": (
        "lfm2_moe", "causal_conv1d_fn", lambda d: conv(d, 1, 40, by_token=False)),
    "conv, linear": (
        "inkling", "causal_conv1d_fn", lambda d: conv(d, 1, 2) | {"activation": None}),
    "conv, step": ("qwen3_next", "causal_conv1d_update", lambda d: conv_step(d, 2)),
    "conv, short state": ("jamba", "causal_conv1d_update", lambda d: conv_step(d, 1, taps=3)),
}  # fmt: skip
_STATES = ("state", "conv_state")


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.clone() if name in (*_STATES, "initial_state", "initial_states")
        and value is not None else value
        for name, value in arguments.items()
    }  # fmt: skip


def results(function: Callable[..., Any], arguments: dict[str, Any]) -> list[torch.Tensor]:
    """What a function returns, and the states that it changes in place."""
    found = function(**arguments)
    found = list(found) if isinstance(found, tuple) else [found]
    return found + [arguments[name] for name in _STATES if name in arguments]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_function_equals_transformers(case: str, dtype: torch.dtype, engine: Engine) -> None:
    folder, name, make = CASES[case]
    arguments = make(Draw(dtype))
    reference, function = functions_of(folder, name, engine)
    expected = results(reference, copied(arguments))
    found = results(function, copied(arguments))
    # The references round to bfloat16 between their operations.
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        error = (one.float() - other.float()).abs().max()
        assert error < tolerance * other.float().abs().max()


def test_bits_depend_neither_on_threads_nor_on_cuts(engine: Engine) -> None:
    arguments = delta_rule(Draw(torch.bfloat16), 2, 50, per_key=False)
    whole, end = functions_of("qwen3_next", RULE.format("chunk"), engine)[1](**copied(arguments))
    alone = Engine(num_threads=1, max_qlen=8)
    function = functions_of("qwen3_next", RULE.format("chunk"), alone)[1]
    state, parts = arguments["initial_state"].clone(), []
    for tokens in (slice(0, 17), slice(17, 18), slice(18, 50)):
        cut = {name: value[:, tokens] for name, value in arguments.items()
               if name in ("query", "key", "value", "g", "beta")}  # fmt: skip
        part, state = function(**(arguments | cut | {"initial_state": state}))
        parts.append(part)
    alone.close()
    assert torch.equal(torch.cat(parts, 1), whole)
    assert torch.equal(state, end)


def test_a_recorded_step_changes_the_state_where_it_lies(engine: Engine) -> None:
    arguments = delta_rule(Draw(torch.float32), 1, 1, per_key=False)
    reference, function = functions_of("qwen3_next", RULE.format("recurrent"), engine)
    state, out = arguments["initial_state"].clone(), torch.zeros(1, 1, 4, 40)

    def step() -> None:
        recorder = active()
        assert recorder is not None
        recorder.describe([arguments["query"]], torch.zeros(1), None)
        found, held = function(**(arguments | {"initial_state": state}))
        state.copy_(held)
        out.copy_(found)

    replay = RecordedSteps().capture(step)
    for _ in range(2):
        expected, arguments["initial_state"] = reference(**arguments)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(state, arguments["initial_state"])
        arguments["query"].mul_(-0.5)
        replay()


def test_every_function_of_every_family_is_in_the_table() -> None:
    for folder in moe_folders():
        text = (MODELS / folder / f"modeling_{folder}.py").read_text("utf-8")
        defined = set(re.findall(r"^def (\w+)\(", text, re.MULTILINE)) & set(PARAMETERS)
        assert defined == set(FAMILIES.get(folder, ())), folder


def logits_of(model: Any, lengths: tuple[int, ...]) -> list[torch.Tensor]:
    """A prompt, then steps or follow-ups of these lengths, on one cache."""
    cache, found, at = DynamicCache(config=model.config), [], 0
    for length in lengths:
        ids = (torch.arange(at, at + length) * 7 % 90 + 3)[None]
        with torch.no_grad():
            options = {cache_argument(model): cache, "use_cache": True}
            found.append(model(input_ids=ids, **options).logits)
        at += length
    return found


# A model of each kind of layer; several tokens after a state restart jamba's.
MODEL_TYPES = {
    "qwen3_next": (21, 1, 1, 5), "kimi_linear": (21, 1, 5), "nemotron_h": (21, 1, 5, 1),
    "jamba": (21, 1, 1), "inkling_text": (3, 1, 5, 1), "lfm2_moe": (2, 1, 1),
}  # fmt: skip


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_model_has_the_same_logits(model_type: str, engine: Engine) -> None:
    family = next(each for each in families() if each.model_type == model_type)
    model = random_model(family)
    expected = logits_of(model, MODEL_TYPES[model_type])
    forwards = {kind: vars(kind).get("forward") for kind in {type(m) for m in model.modules()}}
    with Patches() as patches:
        assert accelerate_linear_attention(model, engine, patches) > 0
        found = logits_of(model, MODEL_TYPES[model_type])
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(vars(kind).get("forward") is forward for kind, forward in forwards.items())
