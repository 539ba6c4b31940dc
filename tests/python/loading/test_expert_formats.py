"""Which format the experts of a checkpoint run in, by kt_backend, and what is said about it."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.coded_checkpoints import code_folder, save_family
from safetensors.torch import load_file, save_file

from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.doctor import __main__ as doctor
from ktrt.errors import ConfigError
from ktrt.loading.formats import choose_formats, possible_formats
from ktrt.loading.model import load_model
from ktrt.loading.plan import open_base, prepare

if TYPE_CHECKING:
    from pathlib import Path

    from ktrt.loading.experts import ExpertSource

SCHEMES = ("fp8", "int4_g64", "mxfp4")
A_SECOND_TIME = "quantised a second time"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By scheme; ``plain``: BF16; ``mixed``: FP8 but for the first layer's experts."""
    root = tmp_path_factory.mktemp("formats")
    plain = save_family(root / "plain", "qwen3_moe", num_hidden_layers=2)
    found = {name: code_folder(plain, root / name, name).coded for name in SCHEMES}
    mixed = code_folder(plain, root / "mixed", "fp8").coded
    whole, coded = load_file(plain / "model.safetensors"), load_file(mixed / "model.safetensors")
    first = "model.layers.0.mlp.experts."
    kept = {name: tensor for name, tensor in coded.items() if not name.startswith(first)}
    kept |= {name: tensor for name, tensor in whole.items() if name.startswith(first)}
    save_file(kept, mixed / "model.safetensors")
    return {"plain": plain, "mixed": mixed, **found}


def source(folder: Path) -> ExpertSource:
    return open_base(ModelArgs(folder)).experts


@pytest.mark.parametrize(
    ("stored", "kt_backend", "formats", "said"),
    [
        ("plain", "auto", {"bf16"}, ""),
        ("plain", "AMXInt8", {"int8"}, ""),
        ("plain", "RAWINT4", {"int4_g32"}, "this checkpoint is not in INT4"),
        ("fp8", "auto", {"fp8"}, ""),
        ("fp8", "FP8", {"fp8"}, ""),
        ("fp8", "AMXBF16", {"bf16"}, ""),
        ("fp8", "AMXInt8", {"int8"}, f"stored in FP8 are {A_SECOND_TIME}"),
        ("fp8", "RAWINT4", {"int4_g32"}, f"{A_SECOND_TIME} while they are packed, to INT4_G32"),
        ("int4_g64", "auto", {"int4_g64"}, ""),
        ("int4_g64", "RAWINT4", {"int4_g64"}, ""),
        ("int4_g64", "AMXInt4", {"int4"}, A_SECOND_TIME),
        ("mxfp4", "MXFP4", {"mxfp4"}, ""),
        ("mixed", "auto", {"bf16", "fp8"}, "The experts of 1 of 2 layers are not quantised: BF16"),
        ("mixed", "FP8", {"bf16", "fp8"}, "not quantised"),
    ],
)
def test_formats_by_backend(
    folders: dict[str, Path], stored: str, kt_backend: str, formats: set[str], said: str
) -> None:
    chosen = choose_formats(kt_backend, source(folders[stored]))
    assert set(chosen.by_path.values()) == formats
    assert bool(chosen.notes) == bool(said)
    assert said in "".join(chosen.notes)


@pytest.mark.parametrize(
    ("stored", "kt_backend", "words"),
    [
        (
            "plain",
            "FP8",
            r"are in BF16, and nothing is converted to FP8.*AMXInt8 \(as small as FP8",
        ),
        ("plain", "MXFP4", r"nothing is converted to MXFP4.*RAWINT4 \(4 bits"),
        ("mxfp4", "FP8", "are in MXFP4"),
    ],
)
def test_what_a_checkpoint_is_not_in_is_refused(
    folders: dict[str, Path], stored: str, kt_backend: Any, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        prepare(ModelArgs(folders[stored]), AdapterArgs(), ExpertArgs(kt_backend, 1))


def test_possible_formats_begin_with_the_checkpoints(folders: dict[str, Path]) -> None:
    def names(stored: str) -> list[str]:
        return [each.kt_backend for each in possible_formats(source(folders[stored]))]

    assert names("plain") == ["AMXBF16", "AMXInt8", "RAWINT4", "AMXInt4"]
    assert names("mixed") == ["FP8", "AMXBF16", "AMXInt8", "RAWINT4", "AMXInt4"]
    assert names("int4_g64") == ["RAWINT4", "AMXBF16", "AMXInt8", "AMXInt4"]
    assert names("mxfp4") == ["MXFP4", "AMXBF16", "AMXInt8", "AMXInt4"]


def test_bf16_of_a_quantised_checkpoint_names_the_saving(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    args = ModelArgs(folders["fp8"]), AdapterArgs()
    prepare(*args, ExpertArgs("AMXBF16", 1)).engine.close()
    assert "decoding reads 2.0 times as many bytes of them. kt_backend: auto keeps" in caplog.text
    caplog.clear()
    prepare(*args, ExpertArgs("auto", 1)).engine.close()
    assert "times as many" not in caplog.text


def test_the_pack_cache_keeps_coded_experts(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("KTRT_CACHE", raising=False)
    caplog.set_level(logging.INFO)
    found = []
    for _ in range(2):
        loaded = load_model(
            ModelArgs(folders["mixed"]), AdapterArgs(),
            ExpertArgs("auto", kt_num_threads=1, ktrt_cache_dir=tmp_path),
        )  # fmt: skip
        with torch.no_grad():
            found.append(loaded.model(torch.arange(12)[None]).logits)
        loaded.close()
    assert torch.equal(*found)
    assert "from the pack cache" in caplog.text
    (folder,) = (each for each in tmp_path.iterdir() if each.is_dir())
    assert folder.name.startswith("mixed-bf16+fp8-")


def test_the_doctor_lists_what_the_checkpoint_can_run_in(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = f"{folders['mxfp4']}"
    doctor.main([path, "kt_backend=AMXBF16", "--json"])
    report = json.loads(capsys.readouterr().out)
    model = report["model"]
    assert (model["kt_backend"], model["stored"]) == ("AMXBF16", "MXFP4")
    assert [row["kt_backend"] for row in model["reach"]] == [
        "MXFP4", "AMXBF16", "AMXInt8", "AMXInt4",
    ]  # fmt: skip
    assert any(each["setting"] == "kt_backend: auto" for each in report["advice"])
