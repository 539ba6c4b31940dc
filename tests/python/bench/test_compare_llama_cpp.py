"""bench/llama_cpp/compare_llama_cpp.py: both sides of its pair hold the same numbers."""

from __future__ import annotations

import ctypes
import importlib
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import MagicMock

import compare_llama_cpp as compare
import compare_rows as measured
import llama_cpp_model as pair
import pytest
import torch

import ktrt

if TYPE_CHECKING:
    from pathlib import Path

SHAPE = pair.Shape(2, 512, 256, 128, 16, 4, 4, 2, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    pair.make_pair(folder, SHAPE)
    return folder


def test_ktrt_loads_model_and_adapter(folder: Path) -> None:
    settings = {"model_name_or_path": str(folder / "model"), "ktrt_cache": False}
    ids = torch.arange(2, 34)[None]
    with ktrt.load(settings, adapter_name_or_path=str(folder / "adapter")) as session:
        audit = session.audit
        linears = 4 + 3 * SHAPE.experts
        assert (
            audit.found == SHAPE.layers * linears * 2 == audit.applied_experts + audit.applied_peft
        )
        with torch.inference_mode():
            adapted = session.model(ids).logits
    with ktrt.load(settings) as session, torch.inference_mode():
        base = session.model(ids).logits
    assert compare.difference(adapted[0].float(), base[0].float()) > compare.AGREEMENT["int8"]


def test_a_pair_is_made_once(folder: Path) -> None:
    file = folder / "model/config.json"
    before = file.stat().st_mtime_ns
    pair.make_pair(folder, SHAPE)
    assert file.stat().st_mtime_ns == before


def test_q8_0_by_hand() -> None:
    matrix = torch.zeros(2, 64, dtype=torch.bfloat16)
    matrix[0, :3] = torch.tensor([127.0, -63.5, 0.5], dtype=torch.bfloat16)
    found = pair.q8_0(matrix)
    assert found.shape == (2, 68)
    assert found[0, :2].view(torch.float16).item() == 1
    # Half away from zero; a block of zeros has scale 0.
    assert found[0, 2:5].view(torch.int8).tolist() == [127, -64, 1]
    assert not found[0, 34:].any()
    assert not found[1].any()


def test_q8_0_is_ggufs_own() -> None:
    quants = pytest.importorskip("gguf.quants")
    constants = pytest.importorskip("gguf.constants")
    matrix = pair.Weights(SHAPE).expert(0, 3, "up")
    expected = quants.quantize(matrix.float().numpy(), constants.GGMLQuantizationType.Q8_0)
    assert (pair.q8_0(matrix).numpy() == expected).all()


@pytest.mark.parametrize("kind", ["bf16", "q8_0"])
def test_the_gguf_file_holds_the_same_numbers(tmp_path: Path, kind: pair.GgufType) -> None:
    gguf = pytest.importorskip("gguf")
    weights = pair.Weights(SHAPE)
    pair.write_gguf(tmp_path / "model.gguf", weights, kind)
    tensors = {each.name: each for each in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert len(tensors) == 3 + SHAPE.layers * (4 + 4 + 1 + 3)
    found = tensors["blk.1.ffn_down_exps.weight"]
    assert found.shape.tolist() == [SHAPE.inner, SHAPE.hidden, SHAPE.experts]
    values = torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type))
    expected = weights.expert(1, 5, "down").float()
    limit = 0 if kind == "bf16" else expected.abs().max() / 127
    assert (values[5] - expected).abs().max() <= limit


def test_the_lora_file_holds_the_same_numbers(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    weights = pair.Weights(SHAPE)
    pair.write_gguf_lora(tmp_path / "lora.gguf", weights)
    tensors = {each.name: each for each in gguf.GGUFReader(tmp_path / "lora.gguf").tensors}
    assert len(tensors) == SHAPE.layers * 7 * 2
    a, b = (tensors[f"blk.0.ffn_gate_exps.weight.lora_{part}"] for part in "ab")
    expected = weights.lora("0.7.gate", SHAPE.inner, SHAPE.hidden)
    for found, tensor in zip((a, b), expected, strict=True):
        values = torch.from_numpy(found.data.astype("float32"))
        assert values.shape == (SHAPE.experts, *tensor.shape)
        assert torch.allclose(values[7], tensor.float(), rtol=0, atol=1e-7)


def samples(ktrt_times: list[float], their_times: list[float]) -> list[tuple[Any, Any]]:
    return [
        (
            {"prefill": 10 * a, "decode": a, "read": 1e6},
            {"prefill": 40 * b, "decode": b, "read": 1e6},
        )
        for a, b in zip(ktrt_times, their_times, strict=True)
    ]


def test_ratios_are_medians_of_neighbours() -> None:
    (one,) = measured.sizes_of(compare.parse(["--out", "x", "--prompt", "10"]))
    both = {
        (False, one): samples([1, 2, 4], [2, 3, 4]), (True, one): samples([1, 1, 1], [1, 1, 1]),
    }  # fmt: skip
    rows = list(measured.rows_of("bf16", both, SHAPE))
    assert [(each["lora"], each["phase"]) for each in rows] == [
        (False, "prefill"), (False, "decode"), (True, "prefill"), (True, "decode"),
    ]  # fmt: skip
    assert rows[1]["ratio"] == 1.5
    assert (rows[1]["least"], rows[1]["most"]) == (1, 2)
    assert rows[1]["ktrt"] == 0.5
    assert rows[0]["ratio"] == 6
    text = measured.table(rows)
    size = SHAPE.token_bytes(2, 2)
    attention = 2 * 256 * 256 + 2 * 128 * 256
    assert size == 2 * (2 * (4 * 3 * 256 * 128 + attention) + 512 * 256)
    share = f"{size / 2 / 1e6:.0%} · {size / 3 / 1e6:.0%}"
    assert f"| BF16, decoding | 0.5 | 0.3 | 1.50 | 1.00–2.00 | {share} |" in text
    assert "| BF16, prompt of 10, LoRA r 8 | 1.0 | 0.2 | 4.00 | 4.00–4.00 | – |" in text


def test_with_a_gpu_prompts_and_depths_are_measured_apart() -> None:
    args = compare.parse(["--out", "x", "--gpu", "--new", "7"])
    sizes = measured.sizes_of(args)
    assert [tuple(size) for size in sizes] == [
        (1024, 0, ("prefill",)), (8192, 0, ("prefill",)),
        (32, 7, ("decode",)), (16384, 7, ("decode",)),
    ]  # fmt: skip
    assert (measured.context_of(args), args.formats) == (16384 + 8, ["bf16", "int8-experts"])
    both = {(False, size): samples([1, 2, 4], [2, 3, 4]) for size in sizes}
    rows = list(measured.rows_of("bf16", both, SHAPE, gpu=True))
    assert [(row["phase"], row["prompt"]) for row in rows] == [
        ("prefill", 1024), ("prefill", 8192), ("decode", 32), ("decode", 16384),
    ]  # fmt: skip
    assert rows[0]["ktrt"] == 1024 / 20
    # The experts alone are in RAM.
    assert rows[3]["of_read"][0] == 2 * SHAPE.layers * SHAPE.top_k * 3 * 256 * 128 / 2 / 1e6
    assert "| BF16, decoding after 16384 | 0.5 | 0.3 |" in measured.table(rows)


@pytest.mark.parametrize("kind", [ctypes.c_void_p, ctypes.POINTER(ctypes.c_char)])
def test_llama_cpp_leaves_experts_in_ram(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    """llama-cpp-python's functions as stand-ins: how its structures are filled."""

    class ModelParams(ctypes.Structure):
        _fields_ = (
            ("tensor_buft_overrides", kind), ("n_gpu_layers", ctypes.c_int32),
            ("use_extra_bufts", ctypes.c_bool),
        )  # fmt: skip

    logs: list[object] = []
    model, context = ModelParams(), SimpleNamespace(n_batch=512)
    api: Any = MagicMock()
    api.llama_log_callback = lambda function: function
    api.llama_log_set = lambda *arguments: logs.append(arguments)
    api.llama_model_default_params.return_value = model
    api.llama_context_default_params.return_value = context
    api.llama_token = ctypes.c_int32
    api.llama_decode.return_value = 0
    api._lib.ggml_backend_cpu_buffer_type = MagicMock(return_value=4711)
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(llama_cpp=api))
    monkeypatch.delitem(sys.modules, "llama_cpp_party", raising=False)
    party = importlib.import_module("llama_cpp_party")
    ours = party.LlamaCpp("model", "lora", 4, 20000, gpu=True)
    assert (model.n_gpu_layers, logs) == (999, [])
    found = ctypes.cast(model.tensor_buft_overrides, ctypes.POINTER(party.Override))
    assert (found[0].pattern, found[0].buffer_type) == (b"ffn_.*_exps", 4711)
    assert (found[1].pattern, found[1].buffer_type) == (None, None)
    ours.decode(list(range(5000)))
    sizes = [call.args[1] for call in api.llama_batch_get_one.call_args_list]
    assert (sizes, context.n_ubatch) == ([2048, 2048, 904], 2048)
    api.llama_supports_gpu_offload.return_value = False
    with pytest.raises(SystemExit, match="built without a GPU"):
        party.LlamaCpp("model", "lora", 4, 20000, gpu=True)
    assert party.LlamaCpp("model", "lora", 4, 20000)._batch == 2048
    assert (model.n_gpu_layers, len(logs)) == (0, 1)
    monkeypatch.delitem(sys.modules, "llama_cpp_party")


@pytest.mark.parametrize(
    "arguments", [["--formats", "int2"], ["--gpu", "--formats", "int8"], ["--depth", "3"]]
)
def test_settings_that_mean_nothing(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        compare.parse(["--out", "x", *arguments])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="PyTorch finds no GPU"):
        compare.main(["--out", str(tmp_path / "x"), "--gpu"])
    assert not list(tmp_path.iterdir())


def test_both_programs_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole script, where llama-cpp-python is installed."""
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    arguments = ["--out", str(tmp_path), "--small", "--rounds", "1", "--prompt", "32", "--new", "4"]
    # llama.cpp's AMX kernels crash on several threads (0.3.36).
    arguments.append("--plain-buffers")
    assert compare.main(arguments) == 0
    assert "INT8 · Q8_0, decoding, LoRA r 8" in capsys.readouterr().out
