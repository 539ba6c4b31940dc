"""The module in the experts' place: slices, dtypes, and the mapping that puts it there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from helpers.tiny_models import save_model
from transformers import AutoConfig, AutoModelForCausalLM

from ktrt._core import Engine, MoeLayer
from ktrt.engine.recording import RecordedSteps, active
from ktrt.engine.step_rows import ACTIVE, BASE, IDLE, StepRows
from ktrt.errors import KtrtError
from ktrt.experts import KTExperts, experts_replaced

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HIDDEN, INNER, E, K = 64, 96, 8, 3


@pytest.fixture
def weights() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(E, INNER, HIDDEN), (E, INNER, HIDDEN), (E, HIDDEN, INNER)]
    made = [torch.randn(s, generator=generator) / s[2] ** 0.5 for s in shapes]
    return [w.to(torch.bfloat16) for w in made]


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(num_threads=1, max_qlen=8)
    yield engine
    engine.close()


@pytest.fixture
def fixed() -> Iterator[Engine]:
    """A row's bits do not depend on the other rows, also with AMX."""
    engine = Engine(num_threads=1, max_qlen=8, fixed_kernels=True)
    yield engine
    engine.close()


def make(engine: Engine, weights: list[torch.Tensor], max_qlen: int) -> KTExperts:
    layer = MoeLayer(
        engine,
        num_experts=E,
        top_k=K,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        weight_format="bf16",
    )
    for expert in range(E):
        layer.load_expert(expert, *(w[expert] for w in weights))
    module = KTExperts("anything", config=None)
    module.attach(layer, max_qlen)
    return module


def inputs(tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    states = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    index = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(tokens)])
    return states, index, torch.rand(tokens, K, generator=generator)


def expected(
    weights: list[torch.Tensor], states: torch.Tensor, index: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    gate, up, down = (w.float()[index] for w in weights)  # [tokens, K, out, in]
    x = states.float()[:, None, :, None]
    hidden = torch.nn.functional.silu(gate @ x) * (up @ x)
    return ((down @ hidden).squeeze(-1) * scale[..., None]).sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_keeps_dtype_and_computes_the_experts(
    engine: Engine, weights: list[torch.Tensor], dtype: torch.dtype
) -> None:
    states, index, scale = inputs(5, dtype)
    out = make(engine, weights, 8)(states, index, scale)
    assert out.dtype == dtype
    reference = expected(weights, states, index, scale)
    assert (out.float() - reference).norm() <= 0.01 * reference.norm()


def test_long_inputs_go_in_slices(engine: Engine, weights: list[torch.Tensor]) -> None:
    states, index, scale = inputs(27, torch.float32)
    module = make(engine, weights, 8)
    whole = module(states, index, scale)
    assert (whole - expected(weights, states, index, scale)).norm() <= 0.01 * whole.norm()
    assert torch.equal(whole[:8], module(states[:8], index[:8], scale[:8]))


def test_strided_inputs(engine: Engine, weights: list[torch.Tensor]) -> None:
    states, index, scale = inputs(6, torch.float32)
    module = make(engine, weights, 8)
    strided = (states.T.contiguous().T, index.T.contiguous().T, scale.T.contiguous().T)
    assert not strided[0].is_contiguous()
    assert torch.equal(module(*strided), module(states, index, scale))


def test_no_tokens(engine: Engine, weights: list[torch.Tensor]) -> None:
    states, index, scale = inputs(1, torch.float32)
    assert make(engine, weights, 8)(states[:0], index[:0], scale[:0]).shape == (0, HIDDEN)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_states_on_the_gpu(engine: Engine, weights: list[torch.Tensor]) -> None:
    arguments = inputs(5, torch.bfloat16)
    module = make(engine, weights, 8)
    out = module(*(argument.cuda() for argument in arguments))
    assert out.is_cuda
    assert torch.equal(out.cpu(), module(*arguments))


def test_unattached_module_says_so() -> None:
    module = KTExperts()
    assert "not attached" in repr(module)
    with pytest.raises(KtrtError, match="never loaded"):
        module(*inputs(1, torch.float32))


def test_has_no_parameters_and_describes_itself(
    engine: Engine, weights: list[torch.Tensor]
) -> None:
    module = make(engine, weights, 8)
    assert not list(module.parameters())
    assert "num_experts=8, top_k=3, hidden_size=64" in repr(module)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("mixtral"), "mixtral", 48)


def experts_of(folder: Path) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder)
    experts: torch.nn.Module = model.get_submodule("model.layers.0.mlp.experts")
    return experts


def test_replaced_only_inside_the_block(mixtral: Path) -> None:
    with experts_replaced(["MixtralExperts"]):
        assert isinstance(experts_of(mixtral), KTExperts)
    assert not isinstance(experts_of(mixtral), KTExperts)


def test_classes_come_back_after_a_failure(mixtral: Path) -> None:
    with pytest.raises(ZeroDivisionError), experts_replaced(["MixtralExperts"]):
        raise ZeroDivisionError
    assert not isinstance(experts_of(mixtral), KTExperts)


def test_initialising_weights_leaves_them_alone(mixtral: Path) -> None:
    config = AutoConfig.from_pretrained(mixtral)
    with experts_replaced(["MixtralExperts"]):
        model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model.get_submodule("model.layers.0.mlp.experts"), KTExperts)


def test_only_exact_names_are_replaced(mixtral: Path) -> None:
    with experts_replaced(["ixtralExperts", "MixtralExp"]):
        assert not isinstance(experts_of(mixtral), KTExperts)


def load_loras(layer: MoeLayer, count: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for number in range(count):
        a = torch.randn(E, 4 + number, HIDDEN, generator=generator) / HIDDEN**0.5
        b = torch.randn(E, INNER, 4 + number, generator=generator)
        layer.load_lora(number, gate_a=a, gate_b=b)


def test_each_token_has_the_lora_that_its_step_names(
    fixed: Engine, weights: list[torch.Tensor]
) -> None:
    module = make(fixed, weights, 8)
    load_loras(module.layer, 2)
    module.layer.activate_loras([1], [0.5])
    states, index, scale = inputs(27, torch.float32)
    alone = {}
    rows = StepRows(27, 0)
    for adapter in (BASE, ACTIVE, 0, 1):
        rows.adapters.fill_(adapter)
        with module.running.running(rows):
            alone[adapter] = module(states, index, scale)
    assert torch.equal(alone[ACTIVE], module(states, index, scale))
    assert len({tuple(each.flatten().tolist()) for each in alone.values()}) == 4
    rows.adapters.copy_(torch.arange(27) % 5 - 3)
    with module.running.running(rows):
        mixed = module(states, index, scale)
    for token, adapter in enumerate(rows.adapters.tolist()):
        expected = torch.zeros(HIDDEN) if adapter == IDLE else alone[adapter][token]
        assert torch.equal(mixed[token], expected)


def test_a_recorded_step_reads_the_adapters_again(
    engine: Engine, weights: list[torch.Tensor]
) -> None:
    module = make(engine, weights, 8)
    load_loras(module.layer, 2)
    states, index, scale = inputs(3, torch.float32)
    rows = StepRows(3, 3)
    out = torch.empty_like(states)

    def step() -> None:
        recorder = active()
        assert recorder is not None
        recorder.describe([states, rows.adapters], torch.empty(0), None)
        with module.running.running(rows):
            out.copy_(module(states, index, scale))

    replay = RecordedSteps().capture(step)
    for adapters in ([0, 1, BASE], [1, 1, IDLE], [ACTIVE, BASE, 0]):
        rows.adapters.copy_(torch.tensor(adapters))
        replay()
        with module.running.running(rows):
            assert torch.equal(out, module(states, index, scale))


def test_rows_that_are_not_the_steps_tokens_are_refused(
    engine: Engine, weights: list[torch.Tensor]
) -> None:
    module = make(engine, weights, 8)
    message = "given 3 rows in a step of 2 tokens"
    with module.running.running(StepRows(2, 2)), pytest.raises(KtrtError, match=message):
        module(*inputs(3, torch.float32))
