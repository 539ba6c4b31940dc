"""``python -m ktrt.audit``: norms, the report for people, exit codes."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import (
    NUM_EXPERTS,
    base_of,
    read_folder,
    save_adapter,
    save_model,
    write_adapter,
)
from safetensors.torch import load_file

from ktrt.adapter import plan_adapter
from ktrt.adapter.changes import Change
from ktrt.adapter.delta_norms import expert_norms
from ktrt.adapter.internal import ExpertLora
from ktrt.audit.__main__ import main
from ktrt.audit.report import report
from ktrt.audit.verify.model import LayerReport
from ktrt.audit.verify.probes import Check

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "examples" / "demo"
EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "deepseek_v2", 96)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {layout: save_adapter(folder / layout, model, layout) for layout in ("a", "b")}


def config(folder: Path, model: Path, adapter: Path | None) -> str:
    file = folder / "chat.yaml"
    lines = [f"model_name_or_path: {model}", "use_kt: true", "kt_num_threads: 1"]
    lines += [f"adapter_name_or_path: {adapter}"] if adapter else []
    file.write_text("\n".join(lines), encoding="utf-8")
    return str(file)


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("layout", ["a", "b"])
def test_norms_equal_the_products(
    tmp_path: Path,
    model: Path,
    adapters: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    layout: str,
) -> None:
    found = as_json(capsys, config(tmp_path, model, adapters[layout]))
    weights = {name: w.float() for name, w in load_file(model / "model.safetensors").items()}
    tensors, _ = read_folder(adapters[layout])
    changes = {change["module"]: change for change in found["changes"]}
    assert len(changes) == 3 * 4 + 3 + 2 * 3 + 2 * 3
    q = "model.layers.0.self_attn.q_proj"
    a, b = (tensors[f"base_model.model.{q}.lora_{x}.weight"] for x in "AB")
    check(changes[q], 2 * b @ a, weights[f"{q}.weight"])
    down = changes[f"{EXPERTS}.down_proj"]
    products = [2 * b @ a for a, b in down_pairs(tensors, layout)]
    matrices = [weights[f"{EXPERTS}.{e}.down_proj.weight"] for e in range(NUM_EXPERTS)]
    check(down, torch.stack(products), torch.stack(matrices))
    assert down["experts"] == pytest.approx([float(p.norm()) for p in products], rel=1e-4)
    assert (down["ranks"], down["scalings"], down["layer"]) == ([8], [2.0], 1)


def down_pairs(
    tensors: dict[str, torch.Tensor], layout: str
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    if layout == "a":
        keys = [f"base_model.model.{EXPERTS}.{e}.down_proj.lora_" for e in range(NUM_EXPERTS)]
        return [(tensors[f"{key}A.weight"], tensors[f"{key}B.weight"]) for key in keys]
    a, b = (tensors[f"base_model.model.{EXPERTS}.lora_{x}.weight"] for x in "AB")
    return [(a[e * 8 : e * 8 + 8], b[:, e::NUM_EXPERTS]) for e in range(NUM_EXPERTS)]


def check(change: dict[str, Any], delta: torch.Tensor, weight: torch.Tensor) -> None:
    assert change["delta"] == pytest.approx(float(delta.norm()), rel=1e-4)
    assert change["weight"] == pytest.approx(float(weight.norm()), rel=1e-4)
    assert change["ratio"] == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-4)


def test_every_tensor_has_a_row_and_a_norm(
    tmp_path: Path, model: Path, adapters: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for layout, adapter in adapters.items():
        found = as_json(capsys, config(tmp_path, model, adapter), "--no-norms")
        rows = {row["tensor"]: row for row in found["tensors"]}
        assert rows.keys() == read_folder(adapter)[0].keys()
        assert all(row["delta_norm"] > 0 for row in rows.values())
        assert found["found"] == found["applied_experts"] + found["applied_peft"] == len(rows)
        assert all(change["weight"] is None for change in found["changes"])
        if layout == "b":
            # gate and up are one tensor in the file, with the norm of both together.
            both = rows[f"base_model.model.{EXPERTS}.base_layer.lora_A.weight"]["delta_norm"]
            each = {c["module"]: c["delta"] for c in found["changes"]}
            gate, up = (each[f"{EXPERTS}.{name}_proj"] for name in ("gate", "up"))
            assert both == pytest.approx((gate**2 + up**2) ** 0.5, rel=1e-6)


def test_shared_matrices_count_for_every_expert() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) for shape in ((1, 4, 32), (6, 16, 4)))
    scaling = torch.arange(6.0)
    found = expert_norms(ExpertLora(a, b, scaling))
    expected = [float((s * y @ a[0]).norm()) for s, y in zip(scaling, b, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


def test_zero_experts_inside_a_stacked_tensor_are_reported(
    tmp_path: Path,
    model: Path,
    adapters: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    tensors, settings = read_folder(adapters["b"])
    b = tensors[f"base_model.model.{EXPERTS}.lora_B.weight"]
    b[:, 5::NUM_EXPERTS] = 0
    tensors["base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight"].zero_()
    adapter = write_adapter(tmp_path / "adapter", tensors, settings)
    with caplog.at_level(logging.WARNING, "ktrt"):
        assert main([config(tmp_path, model, adapter)]) == 0
    out = capsys.readouterr().out
    assert f"unchanged: {EXPERTS}.down_proj: experts 5" in out
    assert "unchanged: model.layers.2.self_attn.q_proj: A or B is all zero" in out
    assert " 0! " in out
    assert f"(first {EXPERTS}.5.down_proj): this adapter changes nothing there" in caplog.text
    plan = plan_adapter(adapter, base_of(model), lora_rank=None, lora_alpha=None)
    assert "0!–" in plan.audit.table()


def test_zero_experts_of_single_tensors_are_reported_once(
    tmp_path: Path, model: Path, adapters: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    tensors, settings = read_folder(adapters["a"])
    tensors[f"base_model.model.{EXPERTS}.5.down_proj.lora_B.weight"].zero_()
    adapter = write_adapter(tmp_path / "adapter", tensors, settings)
    with caplog.at_level(logging.WARNING, "ktrt"):
        assert main([config(tmp_path, model, adapter), "--no-norms"]) == 0
    warnings = [r for r in caplog.records if "changes nothing there" in r.getMessage()]
    assert len(warnings) == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("nan", "q_proj.lora_A.weight holds 1 NaN or infinite"),
        ("unknown", "unexpected.weight"),
        ("dropped", "no LoRA for model.layers.1.self_attn.q_proj"),
    ],
)
def test_a_damaged_adapter_is_an_error(
    tmp_path: Path,
    model: Path,
    adapters: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    damage: str,
    message: str,
) -> None:
    tensors, settings = read_folder(adapters["a"])
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    if damage == "nan":
        tensors[key][0, 0] = torch.nan
    elif damage == "unknown":
        tensors["base_model.model.model.layers.1.unexpected.weight"] = torch.ones(3, 3)
    else:
        del tensors[key], tensors[key.replace("lora_A", "lora_B")]
    adapter = write_adapter(tmp_path / "adapter", tensors, settings)
    assert main([config(tmp_path, model, adapter), "--no-norms"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err


def test_no_adapter_is_an_error(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([config(tmp_path, model, None)]) == 2
    assert "no adapter_name_or_path" in capsys.readouterr().err


@pytest.mark.parametrize("which", ["1.5", "everything", "-1"])
def test_a_layer_that_is_none(capsys: pytest.CaptureFixture[str], which: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["chat.yaml", f"--verify={which}"])
    assert caught.value.code == 2
    assert "expected the number of a layer" in capsys.readouterr().err


def test_verify_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    demo = str(DEMO / "chat.yaml")
    # An override after --verify is no layer.
    assert main([demo, "--verify", "kt_backend=int8"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("layer 1: 16 experts in INT8\n")
    assert out.splitlines()[-1].startswith("verified: ")
    assert main([demo, "--verify", "7"]) == 2
    assert "no LoRA in layer 7" in capsys.readouterr().err
    found = as_json(capsys, demo, "--verify", "2")
    assert found["passed"] is True
    assert [layer["layer"] for layer in found["layers"]] == [2]
    assert found["layers"][0]["checks"][0]["name"] == "each expert"


def test_a_failed_verification_is_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = LayerReport(3, "2 experts in INT4")
    bad.checks.append(
        Check("each expert", 0.1, 0.2, 0.5, failures=[f"reason {i}" for i in range(9)])
    )
    monkeypatch.setattr("ktrt.audit.verify.model.verify", lambda *_args, **_options: [bad])
    assert main([str(DEMO / "chat.yaml"), "--verify"]) == 1
    out = capsys.readouterr().out
    assert "FAILED: each expert: reason 0" in out
    assert "… and 1 more" in out
    assert out.splitlines()[-1] == "NOT VERIFIED: layer 3"
    assert main([str(DEMO / "chat.yaml"), "--verify", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False


@pytest.mark.parametrize("where", ["model/config.json", "adapter/adapter_config.json"])
def test_verify_names_the_link_to_nothing(
    tmp_path: Path,
    model: Path,
    adapters: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    where: str,
) -> None:
    shutil.copytree(model, tmp_path / "model")
    shutil.copytree(adapters["a"], tmp_path / "adapter")
    (tmp_path / where).unlink()
    (tmp_path / where).symlink_to(tmp_path / "blob")
    assert main([config(tmp_path, tmp_path / "model", tmp_path / "adapter"), "--verify"]) == 2
    assert f"{tmp_path / where}: a link to {tmp_path / 'blob'}" in capsys.readouterr().err


def test_the_report_fits_a_narrow_terminal_without_colour(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([str(DEMO / "chat.yaml")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    lines = out.splitlines()
    assert max(map(len, lines[2:])) <= 80
    assert lines[2] == "tensors  86 = 16 on routed experts + 70 on other modules + 0 not applied"
    (header,) = [i for i, line in enumerate(lines) if line.startswith("layer ")]
    rows = {line.split()[0]: line for line in lines[header + 1 :]}
    assert list(rows) == ["0", "1", "2", "3", "4"]
    assert rows["0"].count("·") == 6
    assert "·" in rows["1"]


def test_a_wide_adapter_takes_several_maps() -> None:
    names = [f"group{i % 4}.name{i}_proj" for i in range(20)]
    changes = [
        Change(f"model.layers.{layer}.{name}", name, layer, (8,), (2.0,), 10.0**-i, 1.0)
        for layer in range(3)
        for i, name in enumerate(names)
    ]
    from ktrt.adapter import Audit

    lines = [str(line) for line in report("base", Audit(), changes)]
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("layer ") for line in lines) == 2
    text = "\n".join(lines)
    assert "100█" in text
    assert "~0░" in text
