"""Training, by an adapter's manifest: the base's fingerprint and the experts' format."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from helpers.adapter_layouts import random_adapter, write_c, write_manifest
from helpers.coded_checkpoints import code_folder, save_family
from helpers.tiny_models import save_model
from safetensors.torch import load_file, save_file

from ktrt.adapter.files.base_identity import difference
from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.loading.plan import plan_memory

if TYPE_CHECKING:
    from pathlib import Path

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base in INT4, in two shards, as kt_kernel wants it."""
    model = save_family(tmp_path / "model", "kimi_k2")
    folder = code_folder(model, tmp_path / "base", "int4_g32", experts_only=True).coded
    single = folder / "model.safetensors"
    tensors = load_file(single)
    single.unlink()
    names = sorted(tensors)
    parts = dict(zip(SHARDS, (names[::2], names[1::2]), strict=True))
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    places = {name: file for file, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}), "utf-8")
    return folder


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def test_fingerprints_are_kt_kernels(base: Path) -> None:
    kt = pytest.importorskip("kt_kernel.sft.artifacts", reason="kt_kernel is not installed")
    identity = kt._rawint4_base_identity(base)
    digests = (kt._sha256_file(base / name) for name in ("config.json", INDEX))
    other = {"fingerprint": kt._source_fingerprint(*digests)}
    assert difference(identity, base) is None
    assert difference(other, base) is None
    flip_a_bit(base / SHARDS[1])
    assert difference(identity, base) == f"in {base} differ: {SHARDS[1]}"
    config = base / "config.json"
    config.write_text(config.read_text("utf-8").replace("kimi_k2", "kimi_k3"), "utf-8")
    found = difference(identity, base)
    assert found is not None
    assert "config.json" in found
    assert f"config.json or {INDEX}" in (difference(other, base) or "")


@pytest.mark.parametrize(
    "identity",
    [{}, {"model_name_or_path": "/x"}, {"fingerprint": 7},
     {"fingerprint": "0" * 64, "fingerprint_schema": "a later one"}],
)  # fmt: skip
def test_without_a_fingerprint_nothing_is_said(tmp_path: Path, identity: dict[str, object]) -> None:
    assert difference(identity, tmp_path) is None


def test_another_base_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = save_model(tmp_path / "model", "qwen3_moe", 96)
    adapter = random_adapter(model)
    folder = write_manifest(
        write_c(tmp_path / "adapter", adapter), adapter, base={"fingerprint": "0" * 64}
    )
    plan_memory(ModelArgs(model), AdapterArgs(folder), ExpertArgs(kt_num_threads=1))
    assert f"was trained on another base by its manifest: {model} has no {INDEX}" in caplog.text


@pytest.mark.parametrize(("backend", "running"), [("auto", None), ("AMXBF16", "BF16")])
def test_formats_are_compared_in_kt_kernels_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, backend: str, running: str | None
) -> None:
    plain = save_model(tmp_path / "plain", "qwen3_moe", 96)
    adapter = random_adapter(plain)
    folder = write_manifest(
        write_c(tmp_path / "adapter", adapter), adapter, expert_weight_format="fp8"
    )
    coded = code_folder(plain, tmp_path / "coded", "fp8_channel").coded
    experts = ExpertArgs(backend, kt_num_threads=1)  # type: ignore[arg-type]
    plan_memory(ModelArgs(coded), AdapterArgs(folder), experts)
    said = "was trained on experts in FP8, and they run in"
    assert (said in caplog.text) == (running is not None)
    assert running is None or f"{said} {running} here" in caplog.text
