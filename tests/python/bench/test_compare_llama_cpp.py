"""bench/llama_cpp/compare_llama_cpp.py: both sides of its pair hold the same numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import compare_llama_cpp as compare
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
    args = compare.parse(["--out", "x", "--prompt", "10"])
    both = {False: samples([1, 2, 4], [2, 3, 4]), True: samples([1, 1, 1], [1, 1, 1])}
    rows = list(compare.rows_of(args, "bf16", both, SHAPE))
    assert [(each["lora"], each["phase"]) for each in rows] == [
        (False, "prefill"), (False, "decode"), (True, "prefill"), (True, "decode"),
    ]  # fmt: skip
    assert rows[1]["ratio"] == 1.5
    assert (rows[1]["least"], rows[1]["most"]) == (1, 2)
    assert rows[1]["ktrt"] == 0.5
    assert rows[0]["ratio"] == 6
    text = compare.table(rows, 10)
    size = SHAPE.token_bytes(2, 2)
    attention = 2 * 256 * 256 + 2 * 128 * 256
    assert size == 2 * (2 * (4 * 3 * 256 * 128 + attention) + 512 * 256)
    share = f"{size / 2 / 1e6:.0%} · {size / 3 / 1e6:.0%}"
    assert f"| BF16, decoding | 0.5 | 0.3 | 1.50 | 1.00–2.00 | {share} |" in text
    assert "| BF16, prompt of 10, LoRA r 8 | 1.0 | 0.2 | 4.00 | 4.00–4.00 | – |" in text


def test_an_unknown_format() -> None:
    with pytest.raises(SystemExit):
        compare.parse(["--out", "x", "--formats", "int2"])


def test_both_programs_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole script, where llama-cpp-python is installed."""
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    arguments = ["--out", str(tmp_path), "--small", "--rounds", "1", "--prompt", "32", "--new", "4"]
    # llama.cpp's AMX kernels crash on several threads (0.3.36).
    arguments.append("--plain-buffers")
    assert compare.main(arguments) == 0
    assert "INT8 · Q8_0, decoding, LoRA r 8" in capsys.readouterr().out
