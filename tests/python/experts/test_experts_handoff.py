"""The experts' hand-off over stand-in streams: same bits, joined in time, usable after errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from helpers import fake_cuda
from helpers.fake_cuda import FakeCuda
from helpers.fake_streams import (
    DriverCore,
    FakeCore,
    FakeGraphs,
    FakeTorchCuda,
    fake_hand_off,
)
from helpers.tiny_models import save_adapter, save_model, token_ids
from torch import nn

import ktrt.loading.model
from ktrt._core import Engine, MoeLayer
from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.engine.step_rows import IDLE, StepRows
from ktrt.errors import KtrtError
from ktrt.experts import HandOff, KTExperts
from ktrt.experts.handoff import Deferred
from ktrt.generate.runner import KvCache
from ktrt.loading.model import LoadedModel, load_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HIDDEN, INNER, E, K, MAX_QLEN = 64, 96, 8, 3, 8


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins take the place of a GPU that is there."""
    monkeypatch.setattr(ktrt.loading.model, "_device", lambda: torch.device("cpu"))


@pytest.fixture
def layer() -> Iterator[MoeLayer]:
    engine = Engine(num_threads=1, max_qlen=MAX_QLEN)
    layer = MoeLayer(
        engine, num_experts=E, top_k=K, hidden_size=HIDDEN, intermediate_size=INNER,
        weight_format="bf16",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for expert in range(E):
        shapes = [(INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)]
        layer.load_expert(expert, *(torch.randn(s, generator=generator) / 8 for s in shapes))
    yield layer
    engine.close()


@pytest.fixture
def modules(layer: MoeLayer) -> tuple[KTExperts, KTExperts, FakeCore]:
    """The experts called by the host, and through a hand-off."""
    plain, handed = KTExperts(), KTExperts()
    hand_off, core = fake_hand_off(MAX_QLEN)
    plain.attach(layer, MAX_QLEN)
    handed.attach(layer, MAX_QLEN, hand_off)
    return plain, handed, core


def inputs(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    states = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    index = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(tokens)])
    return states, index, torch.rand(tokens, K, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 9, 21])
def test_the_same_bits_as_without(
    modules: tuple[KTExperts, KTExperts, FakeCore], tokens: int, dtype: torch.dtype
) -> None:
    plain, handed, core = modules
    arguments = inputs(tokens, dtype)
    for _ in range(2):
        found = handed(*arguments) + 0
        assert found.dtype == dtype
        assert torch.equal(found, plain(*arguments))
    assert all(rows & (rows - 1) == 0 for _, rows, _, _ in core.slots)
    assert len(core.slots) <= 2


def test_padding_costs_no_expert(modules: tuple[KTExperts, KTExperts, FakeCore]) -> None:
    _, handed, core = modules
    states, index, weights = inputs(3)
    handed(states, index, weights)
    assert torch.equal(core.ids, torch.cat([index, torch.full((1, K), -1)]))


@pytest.mark.parametrize("tokens", [1, 3, 8, 21])
def test_adapters_of_tokens(modules: tuple[KTExperts, KTExperts, FakeCore], tokens: int) -> None:
    plain, handed, core = modules
    for number in range(2):
        a, b = torch.randn(E, 4, HIDDEN) / 8, torch.randn(E, INNER, 4)
        plain.layer.load_lora(number, up_a=a, up_b=b)
    rows = StepRows(tokens, 0)
    rows.adapters.copy_(torch.arange(tokens) % 4 - 1)
    rows.adapters[rows.adapters == 2] = IDLE
    handed.running = plain.running
    with plain.running.running(rows):
        expected = plain(*inputs(tokens))
        assert torch.equal(handed(*inputs(tokens)) + 0, expected)
    assert all(core.with_adapters)
    assert not torch.equal(handed(*inputs(tokens)) + 0, expected) or tokens == 1
    assert not all(core.with_adapters)


def test_any_integer_and_float_type_and_stride(
    modules: tuple[KTExperts, KTExperts, FakeCore],
) -> None:
    plain, handed, _ = modules
    states, index, weights = inputs(6)
    expected = plain(states, index, weights.to(torch.bfloat16))
    strided = (states.T.contiguous().T, index.int().T.contiguous().T, weights.to(torch.bfloat16))
    assert torch.equal(handed(*strided) + 0, expected)


def test_no_tokens(modules: tuple[KTExperts, KTExperts, FakeCore]) -> None:
    _, handed, core = modules
    assert handed(*(each[:0] for each in inputs(1))).shape == (0, HIDDEN)
    assert not core.slots


def test_another_device_is_refused(modules: tuple[KTExperts, KTExperts, FakeCore]) -> None:
    with pytest.raises(KtrtError, match="on meta, expected cpu"):
        modules[1](*(each.to("meta") for each in inputs(1)))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
class TestDeferred:
    def test_views_wait_for_nothing_and_reading_does(
        self, modules: tuple[KTExperts, KTExperts, FakeCore], mode: Any
    ) -> None:
        plain, handed, core = modules
        arguments = inputs(4)
        with mode():
            found = handed(*arguments)
            shaped = found.view(2, 2, HIDDEN)
            flat = shaped.reshape(1, 4, HIDDEN).unsqueeze(0).squeeze(0)
            assert (shaped.shape, flat.dtype, flat.device.type) == (
                (2, 2, 64),
                torch.float32,
                "cpu",
            )
            assert core.log == ["submit"]
            total = torch.ones(1, 4, HIDDEN) + flat
            assert core.log == ["submit", "joined"]
            assert type(total) is torch.Tensor
            assert torch.equal(total, plain(*arguments)[None] + 1)

    def test_in_place(self, modules: tuple[KTExperts, KTExperts, FakeCore], mode: Any) -> None:
        plain, handed, core = modules
        with mode():
            found = handed(*inputs(4))
            found += 1
            found.mul_(2)
            assert core.log == ["submit", "joined"]
            assert torch.equal(found.reshape(-1) + 0, (2 * (plain(*inputs(4)) + 1)).reshape(-1))

    def test_every_way_to_read(
        self, modules: tuple[KTExperts, KTExperts, FakeCore], mode: Any
    ) -> None:
        plain, handed, _ = modules
        arguments = inputs(4)
        with mode():
            expected = plain(*arguments)
            linear = nn.Linear(HIDDEN, 5)
            assert torch.equal(linear(handed(*arguments)), linear(expected))
            assert torch.equal(handed(*arguments).to(torch.bfloat16), expected.to(torch.bfloat16))
            assert torch.equal(torch.cat([handed(*arguments)]), expected)
            assert torch.equal(
                handed(*arguments).transpose(0, 1).reshape(-1), expected.T.reshape(-1)
            )
            with pytest.raises(RuntimeError, match="tolist"):
                handed(*arguments).tolist()
            assert handed(*arguments)[1, 2].item() == expected[1, 2].item()
            target = torch.zeros(4, HIDDEN)
            target.copy_(handed(*arguments))
            assert torch.equal(target, expected)

    def test_there_is_no_memory_to_read_by_accident(
        self, modules: tuple[KTExperts, KTExperts, FakeCore], mode: Any
    ) -> None:
        with mode():
            found = modules[1](*inputs(4))
            assert isinstance(found, Deferred)
            assert "Deferred" in repr(found)
            try:
                assert found.data_ptr() == 0
            except RuntimeError as error:
                assert "storage" in str(error)  # noqa: PT017


def test_a_result_that_nobody_reads_is_joined_by_the_next(
    modules: tuple[KTExperts, KTExperts, FakeCore],
) -> None:
    _, handed, core = modules
    handed(*inputs(4))
    handed(*inputs(4))
    assert core.log == ["submit", "joined", "submit"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in ("deepseek_v2", "qwen3_moe", "mixtral"):
        save_model(folder / family, family, 96)
        save_adapter(folder / f"{family}_lora", folder / family, "a")
    return folder


class Loaded:
    """A model whose experts go through a stand-in hand-off, and its graphs."""

    def __init__(self, folder: Path, family: str, patch: pytest.MonkeyPatch) -> None:
        self.core: FakeCore
        self.maker: FakeGraphs

        def new_hand_off(engine: Engine, _device: torch.device) -> Any:
            hand_off, self.core = fake_hand_off(engine.max_qlen)
            self.maker = FakeGraphs(self.core)
            return hand_off

        patch.setattr(ktrt.loading.model, "new_hand_off", new_hand_off)
        patch.setattr(ktrt.loading.model, "CudaGraphs", lambda: self.maker)
        self.loaded = load(folder, family)
        self.loaded.runner._mixed = None  # as on a GPU
        self.model: Any = self.loaded.model


def load(folder: Path, family: str) -> LoadedModel:
    return load_model(
        ModelArgs(folder / family, infer_dtype="float32"),
        AdapterArgs(adapter if (adapter := folder / f"{family}_lora").exists() else None),
        ExpertArgs(kt_num_threads=1),
    )


@pytest.fixture
def fake(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loaded]:
    fake = Loaded(folder, "deepseek_v2", monkeypatch)
    yield fake
    fake.loaded.close()
    assert fake.core.closed


@pytest.mark.parametrize("family", ["deepseek_v2", "qwen3_moe", "mixtral"])
def test_decoding_by_graphs_is_decoding(
    folder: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks, padding, LoRA everywhere; against the same model without hand-off and graphs."""
    plain = load(folder, family)
    fake = Loaded(folder, family, monkeypatch)
    ids = token_ids(1, 40)[0].tolist()
    ours, reference = fake.loaded.new_cache(), KvCache(plain.model)
    for part in (ids[:21], ids[21:24], *([each] for each in ids[24:])):
        found, expected = ours.forward(part), reference.forward(part)
        # On a CPU the plain model attends one token at a time another way than a graph does.
        assert (found - expected).norm() <= 5e-3 * expected.norm()
    assert fake.maker.captures == 1
    assert fake.maker.replays == 16
    assert not fake.core.expected
    fake.loaded.close()
    plain.close()


def test_shared_experts_run_meanwhile(fake: Loaded) -> None:
    block = fake.model.model.layers[1].mlp
    block.shared_experts.register_forward_hook(lambda *_: fake.core.log.append("shared experts"))
    fake.core.log.clear()
    with torch.no_grad():
        block(torch.randn(1, 3, block.experts.layer.hidden_size))
    assert fake.core.log == ["submit", "shared experts", "joined"]


def test_an_error_of_the_experts_comes_from_the_forward(fake: Loaded) -> None:
    ids = token_ids(1, 5)
    expected = fake.model(ids).logits
    fake.core.fail = ValueError("an expert is not loaded")
    with pytest.raises(ValueError, match="not loaded"):
        fake.model(ids)
    assert torch.equal(fake.model(ids).logits, expected)


def test_an_error_in_a_replay_leaves_the_conversation_usable(fake: Loaded) -> None:
    cache = fake.loaded.new_cache()
    ids = token_ids(1, 12)[0].tolist()
    cache.forward(ids)
    first = cache.forward([5])
    assert fake.maker.captures == 1
    fake.core.fail = TimeoutError("no progress")
    with pytest.raises(TimeoutError):
        cache.forward([6])
    assert cache.reuse([*ids, 5, 6]) == 0
    cache.forward(ids)
    again = cache.forward([5])
    assert fake.maker.captures == 1, "the graph is still good"
    assert (again - first).norm() <= 1e-3 * first.norm()


def test_ctrl_c_in_a_forward(fake: Loaded) -> None:
    """Layer 1 was handed off, its failure is not the next forward's."""
    ids = token_ids(1, 5)
    expected = fake.model(ids).logits

    def interrupt(*_: Any) -> None:
        fake.core.error = RuntimeError("released")
        raise KeyboardInterrupt

    with (
        fake.model.model.layers[2].register_forward_pre_hook(interrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        fake.model(ids)
    assert torch.equal(fake.model(ids).logits, expected)


def test_ctrl_c_in_a_launch(fake: Loaded) -> None:
    cache = fake.loaded.new_cache()
    ids = token_ids(1, 12)[0].tolist()
    cache.forward(ids)
    cache.forward([5])
    assert fake.loaded.hand_off is not None
    with pytest.raises(KeyboardInterrupt), fake.loaded.hand_off.launching([0, 1]):
        raise KeyboardInterrupt
    assert torch.isfinite(cache.forward([6])).all()


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[FakeCuda]:
    library = fake_cuda.build(tmp_path)
    if library is None:
        pytest.skip("no C++ compiler")
    driver = FakeCuda(library)
    yield driver
    assert driver.reset() == 0, "a stream was left waiting"


def test_over_the_compiled_hand_off(
    folder: Path, driver: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real slots, streams and threads: prefill, decode, and an error in between."""
    # As on a GPU, nothing but the experts runs in the engine.
    monkeypatch.setattr(ktrt.loading.model, "_accelerate", lambda *_, **__: None)
    plain = load(folder, "deepseek_v2")
    cores: list[DriverCore] = []

    def new_hand_off(engine: Engine, device: torch.device) -> HandOff:
        cuda = FakeTorchCuda()
        cores.append(DriverCore(engine, driver, cuda))
        return HandOff(cast("Any", cores[0]), device, engine.max_qlen, cuda)

    monkeypatch.setattr(ktrt.loading.model, "new_hand_off", new_hand_off)
    loaded = load(folder, "deepseek_v2")
    ids = token_ids(1, 40)[0].tolist()
    ours, reference = KvCache(loaded.model), KvCache(plain.model)
    for part in (ids[:21], *([each] for each in ids[21:])):
        assert torch.equal(ours.forward(part), reference.forward(part))
    loaded.engine.close()
    with pytest.raises(
        RuntimeError, match=r"slot \d+ \(model\.layers\.1\.mlp\.experts, 1 token\).*closed"
    ):
        ours.forward([3])
    assert ours.reuse(ids) == 0
    with pytest.raises(RuntimeError, match="closed"):
        loaded.model(torch.tensor([ids]))
    loaded.close()
    plain.close()


def test_graphs_can_be_switched_off(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hand_off, core = fake_hand_off(1024)
    monkeypatch.setattr(ktrt.loading.model, "new_hand_off", lambda *_: hand_off)
    with caplog.at_level("INFO"):
        loaded = load_model(
            ModelArgs(folder / "mixtral"), AdapterArgs(), ExpertArgs("AMXInt8", 1, False, False)
        )
    assert loaded.graphs is None
    assert "without a CUDA graph: kt_use_cuda_graph is false" in caplog.text
    assert torch.isfinite(KvCache(loaded.model).forward([3, 4])).all()
    loaded.close()
    assert core.closed


def test_a_sliding_window_has_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save_model(tmp_path, "mixtral", 96, sliding_window=8)
    with caplog.at_level("INFO"):
        fake = Loaded(tmp_path.parent, tmp_path.name, monkeypatch)
    assert fake.loaded.graphs is not None
    assert "Each decode step is one CUDA graph" in caplog.text
    fake.loaded.close()
