"""Linear attention, state spaces and short convolutions through the engine, against transformers'
own functions."""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.family_models import MODELS, families, moe_folders, random_model
from helpers.linear_attention import CASES, RULE, Draw, copied, delta_rule, results
from transformers import DynamicCache

from ktrt.engine import Engine
from ktrt.engine.recording import RecordedSteps, active
from ktrt.kv.static import cache_argument
from ktrt.layers.linear_attention import accelerate_linear_attention
from ktrt.layers.linear_attention.families import FAMILIES, PARAMETERS
from ktrt.layers.linear_attention.functions import Functions
from ktrt.layers.linear_attention.gated_norm import GatedNormInBlocks, is_gated_norm
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
        assert held is state
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


@pytest.mark.parametrize("model_type", ["qwen3_next", "kimi_linear", "nemotron_h"])
def test_blocks_of_a_gated_norm_have_its_bits(model_type: str) -> None:
    family = next(each for each in families() if each.model_type == model_type)
    norm: Any = next(m for m in random_model(family).modules() if is_gated_norm(m))
    size = norm.weight.numel()
    x, gate = torch.randn(2, 2, (1 << 18) // size + 3, size)
    x, gate = x.bfloat16(), gate.bfloat16()
    calls = []

    def plain(*rows: torch.Tensor) -> torch.Tensor:
        calls.append(len(rows[0]))
        found: torch.Tensor = norm(*rows)
        return found

    with torch.no_grad():
        assert torch.equal(GatedNormInBlocks(plain)(x, gate), norm(x, gate))
    assert len(calls) > 3


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
