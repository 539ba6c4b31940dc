"""``--verify`` on quantised bases: an honest engine passes, a wrong scale fails."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from helpers.coded_checkpoints import SCHEMES, code_folder, save_family
from helpers.family_adapters import RANK, write_stacked
from helpers.rounded_experts import experts_of, random_lora
from helpers.tiny_models import LoraPlan, save_adapter, save_model
from helpers.verify_cases import Backend, Folders, check
from transformers import AutoModelForCausalLM

from ktrt.audit.reference import RawCheckpoint
from ktrt.audit.reference.experts import Clamps, int4_groups
from ktrt.audit.reference.tensors import gate_and_up
from ktrt.audit.verify.probes import Limits, Outputs, Probe, compare
from ktrt.checkpoint.experts import ExpertWeights

if TYPE_CHECKING:
    from pathlib import Path

READER = "ktrt.audit.reference.checkpoint"


class Coded:
    """One small model with an adapter, in every scheme, written when it is first used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plain = save_family(folder / "plain", "deepseek_v3")
        self.adapter = save_adapter(folder / "adapter", self.plain, "b")

    def __call__(self, scheme: str) -> Folders:
        target = self.folder / scheme
        if not target.exists():
            code_folder(self.plain, target, scheme)
        return target, self.adapter


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Coded:
    return Coded(tmp_path_factory.mktemp("coded"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_as_shipped_pass(coded: Coded, scheme: str) -> None:
    (report,) = check(coded(scheme), "auto")
    assert report.passed, report.failures
    wanted = scheme.replace("gptq", "int4").upper()
    assert report.what == f"8 experts in {wanted}"
    assert {"each expert", "self_attn.o_proj"} <= {each.name for each in report.checks}
    for each in report.checks:
        assert each.undecided == 0
        assert each.difference < 0.02
    assert report.checks[0].base < 0.01


@pytest.mark.parametrize("backend", ["AMXBF16", "AMXInt8", "AMXInt4", "RAWINT4"])
def test_a_quantised_base_in_another_format_passes(coded: Coded, backend: Backend) -> None:
    (report,) = check(coded("fp8"), backend)
    assert report.passed, report.failures


def test_searched_int4(tmp_path: Path) -> None:
    """96 and 160 columns: the last group of 32 is whole in both."""
    model = save_model(tmp_path / "model", "mixtral", 96)
    adapter = save_adapter(tmp_path / "adapter", model, "a")
    (report,) = check((model, adapter), "RAWINT4")
    assert report.passed, report.failures
    assert report.what == "16 experts in INT4_G32"
    assert 0.1 < report.checks[0].base < 0.2
    assert report.checks[0].same < 0.0005


def test_the_search_finds_less_error_than_the_largest_weight_alone() -> None:
    rng = np.random.default_rng(0)
    for weights, most in (
        (rng.standard_normal((64, 70), np.float32), 0.09),
        (rng.standard_t(5, (64, 70)).astype(np.float32), 0.12),
    ):
        found = int4_groups(weights)
        error = np.linalg.norm(found - weights) / np.linalg.norm(weights)
        assert 0.5 * most < error < most
    assert not int4_groups(np.zeros((2, 40), np.float32)).any()


def test_another_scale_fails(coded: Coded, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ExpertWeights.read_codes

    def spoiled(self: ExpertWeights, expert: int) -> Any:
        found = original(self, expert)
        if expert == 3:
            found[2].scales[1] *= 1.05
        return found

    monkeypatch.setattr(ExpertWeights, "read_codes", spoiled)
    (report,) = check(coded("fp8"), "auto")
    assert report.failures
    assert all("expert 3," in text for text in report.failures if "(expert" in text)


@pytest.mark.parametrize("scheme", ["fp8", "int4_g32", "mxfp4"])
def test_a_small_adapter_is_still_seen(coded: Coded, tmp_path: Path, scheme: str) -> None:
    """‖ΔW‖ is 0.3 % of ‖W‖."""
    model, _ = coded(scheme)
    adapter = save_adapter(tmp_path, coded.plain, "b", LoraPlan(experts=3e-3))
    (report,) = check((model, adapter), "auto")
    assert report.passed, report.failures
    assert report.checks[0].undecided <= report.checks[0].groups * 2 / 3


def test_each_group_is_judged_by_the_kernel_that_ran() -> None:
    """One expert ran on codes and scales, another on their products in BF16, as AMX does."""
    rng = np.random.default_rng(0)
    shape = (8, 32)
    kernels = [tuple(rng.standard_normal(shape, np.float32) for _ in range(2)) for _ in range(2)]
    (base, tuned), (other_base, other_tuned) = kernels
    probe = Probe(base, np.zeros((8, 1), np.int64), base, {"a": slice(4), "b": slice(4, 8)})
    wanted = Outputs((base, tuned), (base, tuned), ((other_base, other_tuned),))
    limits = Limits(same=0.001, difference=0.03, noise=0.0003, float32=9.0)
    mixed = tuple(np.concatenate([x[:4], y[4:]]) for x, y in zip(*kernels, strict=True))
    assert compare("", probe, wanted, (mixed[0], mixed[1]), limits).failures == []
    wrong = compare("", probe, wanted, (mixed[0], tuned), limits)
    assert {text[-3:] for text in wrong.failures} == {"(b)"}


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """With a limit that a third of the activations reach."""
    folder = tmp_path_factory.mktemp("gpt_oss")
    model = save_family(folder / "model", "gpt_oss", swiglu_limit=0.3)
    folders = code_folder(model, folder / "coded", "mxfp4")
    experts = experts_of(AutoModelForCausalLM.from_pretrained(folders.plain))
    generator = torch.Generator().manual_seed(2)
    loras = {path: random_lora(each, RANK, True, generator) for path, each in experts.items()}
    return folders.coded, write_stacked(folder / "adapter", experts, loras)


def test_gpt_oss_passes(gpt_oss: Folders) -> None:
    (report,) = check(gpt_oss, "auto", packing="rank_major")
    assert report.passed, report.failures
    assert report.what == "8 experts in MXFP4"
    assert all(each.apart > 0.1 and each.base < 0.01 for each in report.checks)


@pytest.mark.parametrize("wrong", ["no biases", "gate before up", "limit"])
def test_wrong_gpt_oss_fails(gpt_oss: Folders, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the engine did it: NumPy is changed, which is less to change."""
    if wrong == "no biases":
        monkeypatch.setattr(RawCheckpoint, "read_biases", lambda *_: {})
    elif wrong == "gate before up":
        monkeypatch.setattr(f"{READER}.gate_and_up", lambda rows, _: gate_and_up(rows, False))
    else:
        other = Clamps(limit=0.31, slope=1.702)
        monkeypatch.setattr(f"{READER}.Clamps", lambda *_: other)
    (report,) = check(gpt_oss, "auto", packing="rank_major")
    assert not report.passed
