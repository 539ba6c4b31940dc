"""The GPU's share, decided on the CPU device; and logits of a whole model."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.coded_checkpoints import code_folder, save_family
from helpers.expert_layers import LayerCase
from helpers.merge import save_merged

import ktrt.loading.model
from ktrt._core import Engine, MoeLayer
from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.errors import KtrtError
from ktrt.experts import KTExperts, build_gpu_experts
from ktrt.experts.gpu import costs, setup
from ktrt.experts.gpu.costs import Line, streaming_threshold
from ktrt.experts.gpu.residents import GpuExperts
from ktrt.experts.gpu.setup import check_layer
from ktrt.generate.runner import KvCache
from ktrt.loading.model import LoadedModel, load_model

if TYPE_CHECKING:
    from collections.abc import Iterator

CPU = torch.device("cpu")
DEMO = Path(__file__).parents[3] / "examples" / "demo"
GIB = 1 << 30


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(num_threads=2, max_qlen=64)
    yield engine
    engine.close()


@pytest.fixture
def layers(engine: Engine) -> dict[str, MoeLayer]:
    cases = [LayerCase(6, 2, 64, 96, ranks=(4, 4, 4), seed=seed) for seed in range(2)]
    return {f"layers.{i}": case.build(engine, "int8") for i, case in enumerate(cases)}


@pytest.fixture
def experts(layers: dict[str, MoeLayer]) -> GpuExperts:
    return GpuExperts(layers, CPU)


class TestThreshold:
    """The CPU takes 10 ms and 0.1 ms a token, in calls of 1,000 tokens."""

    CPU_LINE = Line((100, 0.020), (1000, 0.110))

    def threshold(self, gpu: Line) -> int:
        return streaming_threshold(self.CPU_LINE, gpu, 1000)

    def test_where_the_lines_cross(self) -> None:
        # 50 ms whatever the tokens: the CPU needs 10 % more for 450.
        assert 450 <= self.threshold(Line((256, 0.050), (4096, 0.050))) <= 450 + 32

    def test_a_slow_gpu_never_wins(self) -> None:
        assert self.threshold(Line((256, 0.100), (4096, 3.0))) == 0

    def test_a_very_fast_gpu_wins_at_once(self) -> None:
        assert self.threshold(Line((256, 0.001), (4096, 0.002))) == 32

    def test_a_very_large_copy_wins_for_very_long_prompts_only(self) -> None:
        found = self.threshold(Line((256, 0.500), (4096, 0.500)))
        assert 5 * 1000 - 50 <= found <= 5 * 1000 + 32

    def test_a_line_does_not_fall(self) -> None:
        assert Line((10, 0.2), (20, 0.1)).seconds(1000) == 0.2
        assert Line((10, 0.2), (20, 0.4)).seconds(1) == 0.2


def settle(experts: GpuExperts, layers: dict[str, MoeLayer], number: Any, threshold: Any) -> bool:
    return setup._settle(experts, layers, number, threshold, 64)


def test_fixed_settings(experts: GpuExperts, layers: dict[str, MoeLayer]) -> None:
    assert settle(experts, layers, 2, 100)
    assert (experts.threshold, experts.prefill_chunk(150)) == (100, 150)
    assert [share.experts for share in experts.layers.values()] == [(0, 1), (0, 1)]


@pytest.mark.parametrize(("free", "tokens"), [(0, 8192), (2, 16384), (10, 32768), (1000, 131072)])
def test_prompts_take_a_share_of_the_memory(
    experts: GpuExperts,
    layers: dict[str, MoeLayer],
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    tokens: int,
) -> None:
    monkeypatch.setattr(setup, "_free_memory", lambda _: (free * GIB, 1000 * GIB))
    settle(experts, layers, 0, 100)
    assert experts.most_tokens == tokens
    room = setup.PROMPT_SHARE * free * GIB
    if tokens > 8192:
        assert setup.prompt_bytes(layers, tokens) <= room
    assert tokens == 131072 or setup.prompt_bytes(layers, tokens + 8192) > room
    settle(experts, layers, 0, 0)
    assert experts.most_tokens == 8192


def test_more_than_all_experts_are_all(experts: GpuExperts, layers: dict[str, MoeLayer]) -> None:
    assert settle(experts, layers, 99, 0)
    assert all(share.complete for share in experts.layers.values())


def test_measured_settings(
    experts: GpuExperts,
    layers: dict[str, MoeLayer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Everything is measured and logged; the time itself is the machine's affair."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(costs, "_GPU_TOKENS", (32, 64))
    pin, pinned = experts.pin, list[int | None]()

    def noted(layers: int | None = None) -> None:
        pinned.append(layers)
        pin(layers)

    monkeypatch.setattr(experts, "pin", noted)
    assert settle(experts, layers, 0, "auto") == (experts.threshold > 0)
    assert any("A layer's experts take" in message for message in caplog.messages)
    assert pinned[0] == 2  # copies run ahead of the layer that is measured
    assert experts.counts() == {"layers.0": [0] * 6, "layers.1": [0] * 6}
    assert (experts.pinned_bytes > 0) == (experts.threshold > 0)


@pytest.mark.parametrize(("spare", "count"), [(-1, 0), (0.5, 0), (3.5, 3), (1000, 6)])
def test_as_many_as_fit(
    experts: GpuExperts,
    layers: dict[str, MoeLayer],
    monkeypatch: pytest.MonkeyPatch,
    spare: float,
    count: int,
) -> None:
    """``spare``: free memory beyond the reserve, in experts of both layers."""
    each = sum(experts.source(path).resident_bytes() for path in layers)
    free = setup.RESERVED_BYTES + int(spare * each)
    monkeypatch.setattr(setup, "_free_memory", lambda _: (free, 10 * GIB))
    assert settle(experts, layers, "auto", 0) == (count > 0)
    assert [len(share.experts) for share in experts.layers.values()] == [count] * 2
    if count:
        assert experts.resident_bytes == count * each


def test_too_many_experts_are_an_error(
    experts: GpuExperts, layers: dict[str, MoeLayer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(experts, "select", full)
    with pytest.raises(KtrtError, match=r"kt_num_gpu_experts: 3 experts .* a smaller number"):
        settle(experts, layers, 3, 0)


def test_a_layer_that_torch_computes_otherwise_stays_on_the_cpu(
    experts: GpuExperts,
    layers: dict[str, MoeLayer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    for path, layer in layers.items():
        assert check_layer(experts.layers[path], layer, CPU) < 5e-4
    monkeypatch.setattr(torch.nn.functional, "silu", torch.nn.functional.relu)
    assert not settle(experts, layers, 2, 5)
    assert any("layers.0 on the GPU differs" in message for message in caplog.messages)


def attached(layers: dict[str, MoeLayer]) -> dict[str, KTExperts]:
    modules = {path: KTExperts() for path in layers}
    for path, layer in layers.items():
        modules[path].attach(layer, 64)
    return modules


def test_slices_of_down_stay_on_the_cpu(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    layer = MoeLayer(
        engine, num_experts=2, top_k=1, hidden_size=64, intermediate_size=128,
        weight_format="int8", down_slices=2, activation="gelu",
    )  # fmt: skip
    asked = ExpertArgs(kt_num_gpu_experts=1)
    assert build_gpu_experts(attached({"a.b": layer}), torch.device("cuda"), asked, 64) is None
    assert caplog.messages == [
        "All routed experts run on the CPU: a.b has down in slices of columns, which ktrt computes "
        "only there"
    ]


def test_unusual_experts_go_to_the_gpu(engine: Engine) -> None:
    """Clamps, biases and the like, as far as the check against the engine and the residents."""
    form = {"alpha": 1.702, "gate_limit": 0.7, "up_limit": 0.5, "up_offset": 1.0}
    cases = {
        "mxfp4": LayerCase(6, 2, 64, 96, form=form, biased=True),
        "bf16": LayerCase(6, 2, 64, 96, form={"has_gate": False, "activation": "relu2"}),
    }
    layers = {f"layers.{name}": case.build(engine, name) for name, case in cases.items()}
    experts = GpuExperts(layers, CPU)
    assert settle(experts, layers, 2, 100)
    assert all(share.resident and share.streams(100) for share in experts.layers.values())


def test_a_norm_after_each_expert_stays_on_the_cpu(
    layers: dict[str, MoeLayer], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    modules = attached(layers)
    assert [module.unusual_form for module in modules.values()] == [[], []]
    modules["layers.1"].post_expert_norm = torch.nn.LayerNorm(64)
    asked = ExpertArgs(kt_num_gpu_experts=1)
    assert build_gpu_experts(modules, torch.device("cuda"), asked, 64) is None
    assert "layers.1 has a norm after each expert" in caplog.messages[0]


def test_without_a_gpu(layers: dict[str, MoeLayer], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    modules = attached(layers)
    assert build_gpu_experts(modules, CPU, ExpertArgs(), 64) is None
    assert caplog.messages == []
    assert build_gpu_experts(modules, CPU, ExpertArgs(kt_num_gpu_experts=3), 64) is None
    assert "there is no GPU" in caplog.messages[0]
    moving = ExpertArgs(kt_enable_dynamic_expert_update=True)
    assert build_gpu_experts(modules, CPU, moving, 64) is None
    assert caplog.messages[1:] == [
        "kt_enable_dynamic_expert_update: there is no GPU, so no expert moves"
    ]


def test_without_residents_none_moves(
    experts: GpuExperts, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    hand_off: Any = SimpleNamespace(meanwhile=None)
    setup._follow(experts, hand_off)
    assert hand_off.meanwhile is None
    assert caplog.messages[-1].endswith("the GPU holds no experts, or all: none moves")


def load(model: Path, backend: Any, adapter: Path | None = None) -> LoadedModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ktrt.loading.model, "_device", lambda: CPU)
        return load_model(
            ModelArgs(model, infer_dtype="float32"),
            AdapterArgs(adapter),
            ExpertArgs(kt_backend=backend),
        )


def load_demo(backend: Any) -> LoadedModel:
    return load(DEMO / "model", backend, DEMO / "adapter_b")


def logits_of_all_ways(loaded: LoadedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the logits of the engine, of streamed, shared and resident experts; closes."""
    modules = {n: m for n, m in loaded.model.named_modules() if isinstance(m, KTExperts)}
    gpu = GpuExperts({path: module.layer for path, module in modules.items()}, CPU)
    model: Any = loaded.model
    found = {}
    with torch.no_grad():
        found["engine"] = model(ids).logits
        for path, module in modules.items():
            module.gpu = gpu.layers[path]
        for name, number, threshold in (("streamed", 0, 1), ("shared", 5, 0), ("both", 5, 1)):
            gpu.select(number)
            gpu.threshold = threshold
            found[name] = model(ids).logits
    gpu.close()
    loaded.close()
    return found


def median_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


@pytest.mark.parametrize("backend", ["AMXBF16", "AMXInt8", "AMXInt4"])
def test_logits_of_a_model(tmp_path: Path, backend: str) -> None:
    """Compared with the engine and a float32 merge."""
    from transformers import AutoModelForCausalLM

    ids = torch.randint(0, 2000, (1, 90), generator=torch.Generator().manual_seed(0))
    merged = save_merged(tmp_path, DEMO / "model", DEMO / "adapter_b", torch.float32)
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(ids).logits
    found = logits_of_all_ways(load_demo(backend), ids)
    limit = {"AMXBF16": 0.01, "AMXInt8": 0.05, "AMXInt4": 0.3}[backend]
    for name, logits in found.items():
        assert median_error(logits, reference) < limit, name
        assert median_error(logits, found["engine"]) < 2e-3, name


@pytest.mark.parametrize(
    ("family", "scheme", "weight_format"),
    [("gpt_oss", "mxfp4", "mxfp4"), ("gpt_oss", None, "bf16"), ("qwen3_moe", "fp8", "fp8"),
     ("deepseek_v3", "int4_g32", "int4_g32")],
)  # fmt: skip
def test_logits_of_formats_as_shipped(
    tmp_path: Path, family: str, scheme: str | None, weight_format: str
) -> None:
    """gpt-oss has clamped SwiGLU with a slope, an offset and biases. Compared with transformers on
    the dequantised weights."""
    from transformers import AutoModelForCausalLM

    stored = plain = save_family(tmp_path / "model", family)
    if scheme is not None:
        folders = code_folder(stored, tmp_path / "coded", scheme)
        stored, plain = folders.coded, folders.plain
    ids = torch.randint(0, 90, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)(ids).logits
    loaded = load(stored, "auto")
    modules = [m for m in loaded.model.modules() if isinstance(m, KTExperts)]
    assert {module.layer.weight_format for module in modules} == {weight_format}
    found = logits_of_all_ways(loaded, ids)
    for name, logits in found.items():
        assert median_error(logits, expected) < 0.02, name
        assert median_error(logits, found["engine"]) < 0.01, name


def test_prompts_go_in_the_chunks_that_streaming_wants() -> None:
    loaded = load_demo("AMXBF16")
    sizes: list[int] = []
    model: Any = loaded.model
    model.register_forward_pre_hook(
        lambda _module, _args, kwargs: sizes.append(kwargs["input_ids"].shape[1]),
        with_kwargs=True,
    )
    gpu: Any = SimpleNamespace(
        prefill_chunk=lambda remaining, divides: 700 if remaining >= 600 else None,
        refresh=lambda: None, version=0, threshold=0,
    )  # fmt: skip
    from ktrt.generate.loop import generate_step

    next(generate_step(KvCache(model, gpu=gpu), [5] * 1300, lambda _: 0))
    assert sizes == [700, 600]
    loaded.close()
