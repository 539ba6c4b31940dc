"""kt_kernel's files as experts: the same results as our packing, or an error."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
import torch
from engine.test_golden_packing import Case, pack
from helpers import kt_referee
from helpers.tiny_models import save_model, token_ids
from safetensors.torch import load_file, save_file

from ktrt import _core
from ktrt.checkpoint.kt_files import PROJECTIONS, KtWeights
from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.errors import CheckpointError, EngineError
from ktrt.experts import ExpertsSpec, new_layer
from ktrt.loading.model import load_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

HIDDEN, INTERMEDIATE, EXPERTS = 256, 512, 4
Kind = Literal["tree", "converted"]
Format = Literal["int8", "int4"]
BACKENDS: dict[Format, Any] = {"int8": "AMXInt8", "int4": "AMXInt4"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(
        tmp_path_factory.mktemp("base"), "deepseek_v2", INTERMEDIATE,
        hidden_size=HIDDEN, n_routed_experts=EXPERTS, num_experts_per_tok=2,
    )  # fmt: skip


def packed_parts(
    base: Path, parts: int, weight_format: Format
) -> Iterator[tuple[int, int, str, int, bytes, bytes]]:
    """Yields (layer, part, projection, expert, codes, scales) in kt_kernel's split: rows of gate
    and up, columns of down."""
    for name, tensor in load_file(base / "model.safetensors").items():
        words = name.split(".")
        if ".mlp.experts." not in name:
            continue
        layer, expert, projection = int(words[2]), int(words[5]), words[6].removesuffix("_proj")
        matrix = tensor.float().numpy()
        for part, values in enumerate(np.split(matrix, parts, axis=int(projection == "down"))):
            codes, scales = pack(np.ascontiguousarray(values), weight_format)
            yield layer, part, projection, expert, codes, scales


def write_tree(folder: Path, base: Path, parts: int, weight_format: Format = "int8") -> Path:
    for layer, part, projection, expert, codes, scales in packed_parts(base, parts, weight_format):
        place = folder / f"_layer_{layer}" / f"_numa_{part}"
        place.mkdir(parents=True, exist_ok=True)
        for what, data in (("quant", codes), ("scale", scales)):
            name = f"{weight_format.upper()}_{projection}_{expert}_{len(data)}Byte_{what}_.kt"
            (place / name).write_bytes(data)
    return folder


def write_converted(folder: Path, base: Path, parts: int, weight_format: Format = "int8") -> Path:
    folder.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for layer, part, projection, expert, codes, scales in packed_parts(base, parts, weight_format):
        key = f"blk.{layer}.ffn_{projection}_exps.{expert}.numa.{part}"
        tensors[f"{key}.weight"] = torch.frombuffer(bytearray(codes), dtype=torch.int8)
        tensors[f"{key}.scale"] = torch.frombuffer(bytearray(scales), dtype=torch.float32)
    # The converter keeps the other tensors too, some of odd sizes.
    tensors["blk.0.odd"] = torch.zeros(3, dtype=torch.uint8)
    save_file(tensors, folder / "model-00001.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return folder


WRITERS = {"tree": write_tree, "converted": write_converted}


def logits(base: Path, weight_format: Format, **experts: Any) -> torch.Tensor:
    args = ExpertArgs(BACKENDS[weight_format], kt_num_threads=1, ktrt_cache=False, **experts)
    loaded = load_model(ModelArgs(base), AdapterArgs(), args)
    with torch.no_grad():
        result: torch.Tensor = loaded.model(token_ids(1, 30)).logits
    loaded.close()
    return result


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["tree", "converted"])
def test_one_part_gives_the_logits_of_our_own_packing(
    base: Path, tmp_path: Path, kind: Kind, weight_format: Format
) -> None:
    folder = WRITERS[kind](tmp_path / "kt", base, 1, weight_format)
    found = logits(base, weight_format, kt_weight_path=folder)
    assert torch.equal(found, logits(base, weight_format))


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["tree", "converted"])
@pytest.mark.parametrize("parts", [2, 4])
def test_several_parts_are_our_packing_in_slices(
    base: Path,
    tmp_path: Path,
    kind: Kind,
    parts: int,
    weight_format: Format,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A row of down has one scale per part, so results differ a little from a single part; they
    equal our packing with the same number of slices."""
    folder = WRITERS[kind](tmp_path / "kt", base, parts, weight_format)
    ours = logits(base, weight_format)
    found = logits(base, weight_format, kt_weight_path=folder)
    assert not torch.equal(found, ours)
    assert (found - ours).norm() < (0.05 if weight_format == "int8" else 0.4) * ours.norm()
    monkeypatch.setattr(
        "ktrt.loading.plan.new_layer",
        lambda e, s, b, *_: new_layer(e, s, b, parts if b == weight_format else 1),
    )
    assert torch.equal(found, logits(base, weight_format))


def expected_integers(case: Case, parts: int) -> NDArray[np.float64]:
    """Computes the layer by kt_kernel's definition: each part quantises its activations, integer
    products are exact. Uses float64 elsewhere; activations are rounded to bfloat16 before
    quantisation."""

    def quantized(x: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        values = x.astype(np.float32)
        scale = np.abs(values).max(-1, keepdims=True) * (np.float32(1) / np.float32(127))
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
        return np.rint(values * inverse).astype(np.float64), scale.astype(np.float64)

    def product(w: NDArray[Any], x: NDArray[Any]) -> Any:
        (cw, sw), (cx, sx) = quantized(w), quantized(x)
        return (cw @ cx) * sw[:, 0] * sx[0]

    out = np.zeros(case.hidden.shape)
    for token, slot in np.ndindex(case.ids.shape):
        e, x = case.ids[token, slot], case.hidden[token]
        gate, up = product(case.gate[e], x), product(case.up[e], x)
        act = torch.tensor(gate / (1 + np.exp(-gate)) * up).bfloat16().double().numpy()
        split = np.split(case.down[e], parts, axis=1), np.split(act, parts)
        down = sum(product(w, a) for w, a in zip(*split, strict=True))
        out[token] += case.weights[token, slot] * down
    return out


@pytest.mark.parametrize("slices", [1, 2, 4])
def test_slices_compute_kt_kernels_numbers(slices: int) -> None:
    case = Case.random(EXPERTS, HIDDEN, INTERMEDIATE)
    layer = _core.MoeLayer(
        _core.Engine(num_threads=1, max_qlen=64), num_experts=EXPERTS, top_k=2, hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE, weight_format="int8", down_slices=slices,
    )  # fmt: skip
    for e in range(EXPERTS):
        layer.load_expert(e, case.gate[e], case.up[e], case.down[e])
    expected = expected_integers(case, slices)
    error = np.linalg.norm(case.forward(layer) - expected) / np.linalg.norm(expected)
    # Results with other numbers of slices differ by INT8's rounding.
    others = [expected_integers(case, n) for n in (1, 2, 4) if n != slices]
    least = min(np.linalg.norm(o - expected) / np.linalg.norm(expected) for o in others)
    assert error < 0.25 * least


SPEC = ExpertsSpec("experts", 0, "", num_experts=2, hidden_size=256, intermediate_size=256, top_k=1)


@pytest.mark.golden
@pytest.mark.parametrize("parts", [1, 2])
def test_files_of_kt_kernel_itself(tmp_path: Path, parts: int) -> None:
    if reason := kt_referee.why_unavailable():
        pytest.skip(reason)
    case = Case.random(2, 256, 256)
    theirs = kt_referee.referee(tmp_path, "int8", case.arrays(), parts)["out"]
    weights = KtWeights(tmp_path, [SPEC], "int8")
    assert weights.parts == parts
    layers = [
        _core.MoeLayer(
            _core.Engine(num_threads=1, max_qlen=64), num_experts=2, top_k=2, hidden_size=256,
            intermediate_size=256, weight_format="int8", down_slices=parts,
        )
        for _ in range(2)
    ]  # fmt: skip
    for e in range(2):
        layers[0].load_packed_expert(e, *weights.read(SPEC, e))
        layers[1].load_expert(e, case.gate[e], case.up[e], case.down[e])
        for p in PROJECTIONS:
            assert layers[0].packed_codes(e, p) == layers[1].packed_codes(e, p)
            assert layers[0].packed_scales(e, p) == layers[1].packed_scales(e, p)
    loaded, own = (case.forward(layer) for layer in layers)
    assert np.array_equal(loaded, own)
    expected = (theirs.astype(np.uint32) << 16).view(np.float32)
    assert np.linalg.norm(loaded - expected) < 0.015 * np.linalg.norm(expected)


def refused(base: Path, folder: Path, kt_backend: Any = "AMXInt8") -> str:
    args = ExpertArgs(kt_backend, kt_num_threads=1, kt_weight_path=folder)
    with pytest.raises(CheckpointError) as caught:
        load_model(ModelArgs(base), AdapterArgs(), args)
    return str(caught.value)


def test_refusals(base: Path, tmp_path: Path) -> None:
    assert "holds neither" in refused(base, tmp_path)
    folder = write_tree(tmp_path / "kt", base, 1)
    message = refused(base, folder, "AMXBF16")
    assert "expected kt_backend AMXInt8 or AMXInt4" in message
    (first, *_) = folder.rglob("INT8_up_2_*quant_.kt")
    data = first.read_bytes()
    first.write_bytes(data[:-64])
    assert f"{first} has {len(data) - 64} bytes, expected {len(data)} by its name" in refused(
        base, folder
    )
    first.unlink()
    assert "no codes of layer" in refused(base, folder)
    assert "up of expert 2" in refused(base, folder)


def test_files_of_another_model_or_format(base: Path, tmp_path: Path) -> None:
    folder = write_converted(tmp_path / "kt", base, 1)
    file = folder / "model-00001.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if k.endswith("ffn_down_exps.1.numa.0.weight"))
    save_file({**tensors, key: tensors[key][::2].contiguous()}, file)
    message = refused(base, folder)
    assert key in message
    assert "The files hold int4 experts: set kt_backend: AMXInt4" in message
    save_file({**tensors, key: tensors[key][64:].contiguous()}, file)
    assert "of another model, or damaged" in refused(base, folder)
    save_file({**tensors, key: tensors[key].float()}, file)
    assert "has dtype F32, expected I8" in refused(base, folder)
    scale = key.replace(".weight", ".scale")
    tensors[scale][5] = float("nan")
    save_file(tensors, file)
    with pytest.raises(EngineError, match="down scales of row 5"):
        logits(base, "int8", kt_weight_path=folder)
