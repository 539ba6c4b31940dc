"""Steps of many sequences on loaded models: bit for bit what each sequence computes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from helpers.tiny_models import LoraPlan, save_adapter, save_model

import ktrt.loading.model
from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.engine.step_rows import ACTIVE, BASE
from ktrt.generate.runner import ModelRunner
from ktrt.generate.step import Span, Step
from ktrt.loading.model import LoadedModel, load_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ktrt.kv.pool import Slot

LENGTHS = (300, 5, 1, 70)
DECODED = 4
# The base's folder of each loaded model.
folders: dict[int, Path] = {}


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["deepseek_v2", "qwen3_moe", "mixtral"])
def loaded(
    request: pytest.FixtureRequest, dtype: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LoadedModel]:
    folder = tmp_path_factory.mktemp("model")
    base = save_model(folder / "base", request.param, 32)
    adapters = {
        f"a{n}": save_adapter(folder / f"adapter{n}", base, "a", LoraPlan(rank=rank, seed=n))
        for n, rank in enumerate((8, 3))
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ktrt.loading.model, "_device", lambda: torch.device("cpu"))
        loaded = load_model(
            ModelArgs(base, infer_dtype=dtype),  # type: ignore[arg-type]
            AdapterArgs(adapters=adapters),
            ExpertArgs(kt_num_threads=2, kt_fixed_kernels=True, ktrt_cache=False),
        )
    loaded.adapters.activate({})
    folders[id(loaded)] = base
    yield loaded
    loaded.close()


def new_runner(loaded: LoadedModel, *, recorded: bool = True) -> ModelRunner:
    return ModelRunner(
        loaded.model, loaded.graphs, None, loaded.adapters.active_set, running=loaded.running,
        maker=loaded.recorder if recorded else None, capacity=512, slots=8,
    )  # fmt: skip


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, 380, (n,), generator=generator).tolist() for n in LENGTHS]


def answers(
    runner: ModelRunner, prompts: Sequence[list[int]], adapters: Sequence[int], chunk: int
) -> list[list[torch.Tensor]]:
    """All at once: the logits after each prompt, which the others' chunks and tokens accompany,
    and after each of the next tokens."""
    slots: list[Slot] = [runner.pool.open(object(), ()) for _ in prompts]
    found: list[list[torch.Tensor]] = [[] for _ in prompts]
    while any(len(each) <= DECODED for each in found):
        spans, last = [], []
        for at, slot in enumerate(slots):
            left = prompts[at][slot.length :][:chunk]
            if not left:
                left = [int(found[at][-1].argmax())]
            if len(found[at]) <= DECODED:
                spans.append(Span(slot=slot, ids=left, adapter=adapters[at]))
                last.append(at)
        for at, logits in zip(last, runner.run(Step(tuple(spans))), strict=True):
            if slots[at].length >= len(prompts[at]):
                found[at].append(logits[0])
    for slot in slots:
        runner.pool.close(slot, keep=False)
    return found


def check(loaded: LoadedModel, adapters: Sequence[int]) -> None:
    alone, given = new_runner(loaded, recorded=False), prompts()
    expected = [
        answers(alone, [ids], [adapter], chunk=512)[0]
        for ids, adapter in zip(given, adapters, strict=True)
    ]
    runner = new_runner(loaded)
    for chunk in (512, 100):
        found = answers(runner, given, adapters, chunk)
        for of_sequence, references in zip(found, expected, strict=True):
            for logits, reference in zip(of_sequence, references, strict=True):
                assert torch.equal(logits, reference)
    assert runner.mixes
    assert runner.has_graphs
    assert runner.pool.committed_bytes == 0


def test_bits_do_not_depend_on_company(loaded: LoadedModel) -> None:
    check(loaded, [BASE] * len(LENGTHS))


def test_nor_on_the_adapters_of_the_company(loaded: LoadedModel) -> None:
    check(loaded, [0, BASE, 1, 0])


def test_base_rows_are_those_of_a_model_without_adapters(
    loaded: LoadedModel, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = answers(new_runner(loaded), prompts(), [0, BASE, 1, BASE], 512)
    monkeypatch.setattr(ktrt.loading.model, "_device", lambda: torch.device("cpu"))
    plain = load_model(
        ModelArgs(folders[id(loaded)], infer_dtype=dtype),  # type: ignore[arg-type]
        AdapterArgs(),
        ExpertArgs(kt_num_threads=2, kt_fixed_kernels=True, ktrt_cache=False),
    )
    expected = answers(new_runner(plain), prompts(), [BASE] * len(LENGTHS), 512)
    plain.close()
    for at in (1, 3):
        for logits, reference in zip(found[at], expected[at], strict=True):
            assert torch.equal(logits, reference)


def test_a_tuned_row_is_the_adapter_alone(loaded: LoadedModel) -> None:
    """The same bits as with the adapter active for everything."""
    ids = prompts()[3]
    name = next(iter(loaded.adapters.names))
    (found,) = answers(new_runner(loaded), [ids], [0], 512)
    loaded.adapters.activate(name)
    try:
        (expected,) = answers(new_runner(loaded), [ids], [ACTIVE], 512)
    finally:
        loaded.adapters.activate({})
    assert any(not torch.equal(a, b) for a, b in zip(
        found, answers(new_runner(loaded), [ids], [BASE], 512)[0], strict=True))  # fmt: skip
    for logits, reference in zip(found, expected, strict=True):
        assert torch.equal(logits, reference)
