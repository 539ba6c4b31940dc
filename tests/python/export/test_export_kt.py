"""--format kt: the packed experts equal a packing of the merged checkpoint, bit for bit."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from helpers.family_models import Family, random_model
from helpers.tiny_models import save_adapter, save_model, token_ids
from safetensors.torch import load_file, save_file

from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.errors import CheckpointError, ConfigError
from ktrt.experts import KTExperts
from ktrt.export.__main__ import main
from ktrt.export.checkpoint import merge_checkpoint
from ktrt.export.packed import merge_packed
from ktrt.loading.model import LoadedModel, load_model
from ktrt.loading.plan import base_of_adapters, open_adapter, open_base

if TYPE_CHECKING:
    from pathlib import Path

EXPERTS, LAYERS = 4, (1, 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(
        tmp_path_factory.mktemp("model"), "deepseek_v2", 256,
        hidden_size=128, n_routed_experts=EXPERTS, num_experts_per_tok=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapter"), model, "a")


def load(folder: Path, backend: Any, packed: Path | None = None) -> LoadedModel:
    args = ExpertArgs(backend, kt_num_threads=1, kt_weight_path=packed, ktrt_cache=False)
    return load_model(ModelArgs(folder), AdapterArgs(), args)


def packed(loaded: LoadedModel) -> list[bytes]:
    found = []
    for module in loaded.model.modules():
        if isinstance(module, KTExperts):
            for expert in range(EXPERTS):
                for projection in ("gate", "up", "down"):
                    found.append(module.layer.packed_codes(expert, projection))
                    found.append(module.layer.packed_scales(expert, projection))
    assert len(found) == len(LAYERS) * EXPERTS * 6
    return found


@pytest.mark.parametrize("backend", ["AMXInt8", "AMXInt4"])
def test_equals_packing_the_merged_checkpoint(
    model: Path, adapter: Path, tmp_path: Path, backend: Any
) -> None:
    base = open_base(ModelArgs(model))
    merge_checkpoint(
        base, open_adapter(AdapterArgs(adapter), base_of_adapters(base)), tmp_path / "hf"
    )
    plan = open_adapter(AdapterArgs(adapter), base_of_adapters(base))
    args = ExpertArgs(backend, kt_num_threads=1)
    summary = merge_packed(base, plan, tmp_path / "kt", args)
    assert plan is not None
    assert summary.adapter_tensors == plan.audit.found
    assert summary.format == "kt"

    results, codes = [], []
    inner = tmp_path / "kt" / "experts"
    for folder, path in ((tmp_path / "hf", None), (tmp_path / "kt", inner), (model, None)):
        loaded = load(folder, backend, path)
        codes.append(packed(loaded))
        with torch.no_grad():
            results.append(loaded.model(token_ids(1, 30)).logits)
        loaded.close()
    assert codes[0] == codes[1]
    assert torch.equal(results[0], results[1])
    assert not any(one == base for one, base in zip(codes[0], codes[2], strict=True))

    rest = load_file(tmp_path / "kt" / "model.safetensors")
    merged = load_file(tmp_path / "hf" / "model.safetensors")
    assert {name for name in merged if ".experts." not in name} == set(rest)
    assert all(torch.equal(rest[name], merged[name]) for name in rest)
    with pytest.raises(CheckpointError, match="no tensor for model.layers.1.mlp.experts"):
        load(tmp_path / "kt", backend)


def test_a_damaged_rest_is_still_refused(model: Path, tmp_path: Path) -> None:
    """A folder with some of the experts is no folder without experts."""
    base = open_base(ModelArgs(model))
    merge_packed(base, None, tmp_path / "kt", ExpertArgs("AMXInt8", kt_num_threads=1))
    file = tmp_path / "kt" / "model.safetensors"
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    save_file({**load_file(file), name: load_file(model / "model.safetensors")[name]}, file)
    with pytest.raises(CheckpointError, match="expected all of 4 experts"):
        load(tmp_path / "kt", "AMXInt8", tmp_path / "kt" / "experts")


def test_refusals(model: Path, tmp_path: Path) -> None:
    base, out = open_base(ModelArgs(model)), tmp_path / "out"
    with pytest.raises(ConfigError, match="no files of BF16 experts, only of int8, int4"):
        merge_packed(base, None, out, ExpertArgs())
    with pytest.raises(ConfigError, match="kt_weight_path is set"):
        merge_packed(base, None, out, ExpertArgs("AMXInt8", kt_weight_path=model))
    odd = open_base(ModelArgs(save_model(tmp_path / "odd", "mixtral", 96)))
    with pytest.raises(ConfigError, match="intermediate_size 96.* multiples of 128"):
        merge_packed(odd, None, out, ExpertArgs("AMXInt4"))
    sizes = {"hidden_size": 128, "intermediate_size": 64}
    library: Any = random_model(Family("gpt_oss", "gpt_oss", "GptOssForCausalLM"), changes=sizes)
    library.save_pretrained(tmp_path / "biased")
    with pytest.raises(ConfigError, match="biases: True"):
        merge_packed(open_base(ModelArgs(tmp_path / "biased")), None, out, ExpertArgs("AMXInt8"))
    assert not out.exists()


def test_from_the_command_line(
    model: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "chat.yaml"
    config.write_text(f"model_name_or_path: {model}\nadapter_name_or_path: {adapter}\n", "utf-8")
    out = str(tmp_path / "out")
    assert main([str(config), "--format", "kt", "--out", out, "-q"]) == 2
    assert "no files of BF16 experts" in capsys.readouterr().err
    arguments = [str(config), "kt_backend=AMXInt8", "kt_num_threads=1", "--format", "kt"]
    assert main([*arguments, "--out", out, "-q"]) == 0
    assert f"kt_weight_path: {out}/experts" in capsys.readouterr().out


KT_LOADER = """
import sys
import numpy as np
from kt_kernel.utils.loader import SafeTensorLoader

loader = SafeTensorLoader(sys.argv[1])
found = {}
for layer in sys.argv[2:]:
    for name, parts in loader.load_experts(f"blk.{layer}").items():
        (experts,) = parts
        for number, array in enumerate(experts):
            found[f"{layer}.{name}.{number}"] = array
np.savez(sys.argv[1] + "/found.npz", **found)
"""


@pytest.mark.golden
@pytest.mark.skipif(
    importlib.util.find_spec("kt_kernel") is None,
    reason="kt_kernel is not installed (it has wheels for Python 3.11 and 3.12)",
)
def test_kt_kernels_loader_reads_the_folder(model: Path, adapter: Path, tmp_path: Path) -> None:
    base = open_base(ModelArgs(model))
    plan = open_adapter(AdapterArgs(adapter), base_of_adapters(base))
    merge_packed(base, plan, tmp_path / "kt", ExpertArgs("AMXInt8", kt_num_threads=1))
    inner = tmp_path / "kt" / "experts"
    command = [sys.executable, "-c", KT_LOADER, str(inner), *map(str, LAYERS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = load(tmp_path / "kt", "AMXInt8", inner)
    with np.load(inner / "found.npz") as found:
        theirs = [
            found[f"{layer}.{projection}{what}.{expert}"].tobytes()
            for layer in LAYERS
            for expert in range(EXPERTS)
            for projection in ("gate", "up", "down")
            for what in ("", "_scale")
        ]
    assert theirs == packed(loaded)
    loaded.close()
