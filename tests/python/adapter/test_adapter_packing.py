"""lora_B on stacked parameters, rank-major or grouped by expert: the decision and its warnings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from adapter.test_adapter_every_layout import assert_same, plan
from helpers.adapter_layouts import Adapter, random_adapter, write_a, write_b
from helpers.adapter_names import PLAIN, UNSLOTH, write_grouped
from helpers.tiny_models import base_of, read_folder, save_model, write_adapter
from helpers.verify_cases import check

from ktrt.adapter.write.adapter import write_adapter as write_layout
from ktrt.audit.report import verification
from ktrt.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ktrt.adapter import BaseModel

EXPERTS = 4


class Subject:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = save_model(
            folder / "model", "qwen3_moe", 24, hidden_size=56, head_dim=16, num_experts=EXPERTS,
            num_experts_per_tok=2,
        )  # fmt: skip
        self.base: BaseModel = base_of(self.model)

    def adapter(self, rank: int = 4, unused: tuple[int, ...] = ()) -> Adapter:
        """``unused``: experts without any routed token in training, with the initial B = 0."""
        adapter = random_adapter(self.model, rank=rank)
        for loras in adapter.experts.values():
            for _, b in loras.values():
                b[list(unused)] = 0
        return adapter


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(tmp_path_factory.mktemp("packing"))


def unmarked(folder: Path, adapter: Adapter, **config: Any) -> Path:
    write_b(folder, adapter)
    tensors, old = read_folder(folder)
    return write_adapter(folder, tensors, old | config)


@pytest.mark.parametrize(
    ("rank", "unused"), [(2, (2,)), (3, (0,)), (4, (3,)), (4, (1, 3)), (4, (0, 1)), (8, (0, 1, 2))]
)
def test_experts_that_were_never_routed_to_decide(
    subject: Subject, tmp_path: Path, rank: int, unused: tuple[int, ...]
) -> None:
    """In one reading whole experts are zero, in the other some columns of each. The zeros outweigh
    Unsloth's entry in auto_mapping: nothing else explains them."""
    adapter = subject.adapter(rank, unused)
    expected = plan(write_a(tmp_path / "a", adapter), subject.base)
    for writer in (unmarked, write_grouped):
        for name, marks in {"plain": PLAIN, "unsloth": UNSLOTH, "none": {}}.items():
            found = plan(writer(tmp_path / writer.__name__ / name, adapter, **marks), subject.base)
            assert_same(found, expected)
            assert not found.audit.notes


@pytest.mark.parametrize("writer", [unmarked, write_grouped])
def test_the_config_or_the_yaml_decides(
    subject: Subject, tmp_path: Path, writer: Callable[..., Path], caplog: Any
) -> None:
    name = "grouped_by_expert" if writer is write_grouped else "rank_major"
    adapter = subject.adapter()
    expected = plan(write_a(tmp_path / "a", adapter), subject.base)
    said = writer(tmp_path / "said", adapter, lora_B_layout=name, **UNSLOTH)
    assert_same(plan(said, subject.base), expected)
    silent = writer(tmp_path / "silent", adapter)
    found = plan(silent, subject.base, packing=name)
    assert_same(found, expected)
    assert not caplog.messages
    assert not found.audit.notes
    other = ({"grouped_by_expert", "rank_major"} - {name}).pop()
    with pytest.raises(AdapterError, match=f"lora_B_layout is {other} in the conf.* says {name}"):
        plan(said, subject.base, packing=other)


def test_unsloths_mark_decides_and_is_said(
    subject: Subject, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By reports, all of its adapters have auto_mapping.unsloth_fixed."""
    adapter = subject.adapter()
    found = plan(write_grouped(tmp_path / "b", adapter, **UNSLOTH), subject.base)
    assert_same(found, plan(write_a(tmp_path / "a", adapter), subject.base))
    (message,) = caplog.messages
    assert "Assumed: grouped_by_expert" in message
    assert "rank-major (PEFT) or grouped by expert (Unsloth before 2026-09)" in message
    assert "lora_B_layout: grouped_by_expert (or rank_major) in the YAML" in message
    assert found.audit.notes == [message]


def test_nothing_decides(
    subject: Subject, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Takes PEFT's reading, with a warning; without one if PEFT wrote the configuration, or with a
    single expert or rank."""
    adapter = subject.adapter()
    expected = plan(write_a(tmp_path / "a", adapter), subject.base)
    assert_same(plan(unmarked(tmp_path / "plain", adapter, **PLAIN), subject.base), expected)
    assert not caplog.messages
    found = plan(unmarked(tmp_path / "bare", adapter), subject.base)
    assert_same(found, expected)
    assert "Assumed: rank_major" in caplog.text
    caplog.clear()
    plan(unmarked(tmp_path / "one", subject.adapter(1)), subject.base)
    (tmp_path / "bare" / "automodel_peft_config.json").write_text("{}", encoding="utf-8")
    plan(tmp_path / "bare", subject.base)
    assert not caplog.messages


def test_pefts_own_adapters_give_no_warning(
    subject: Subject, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(subject.model, dtype=torch.float32)
    config = LoraConfig(
        r=4, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        init_lora_weights=False,
    )  # fmt: skip
    get_peft_model(model, config).save_pretrained(tmp_path)
    found = plan(tmp_path, subject.base)
    assert len(found.experts) == 2
    assert not [record for record in caplog.records if record.name.startswith("ktrt")]
    assert not found.audit.notes


def test_zeros_that_fit_both_readings(subject: Subject, tmp_path: Path) -> None:
    """With rank 2 and unused experts 1 and 3 of 4, the grouped columns equal the columns of experts
    2 and 3 by rank. Unsloth's entry decides, with a warning."""
    folder = write_grouped(tmp_path / "g", subject.adapter(2, (1, 3)), **UNSLOTH)
    found = plan(folder, subject.base)
    assert_same(found, plan(write_a(tmp_path / "a", subject.adapter(2, (1, 3))), subject.base))
    assert len(found.audit.notes) == 1


def test_padded_ranks_are_no_evidence(subject: Subject, tmp_path: Path) -> None:
    """In a file of rank 4 with a rank of 2, A and B end in zeros for every expert."""
    adapter = subject.adapter()
    for loras in adapter.experts.values():
        for a, b in loras.values():
            a[:, 2:], b[:, :, 2:] = 0, 0
    expected = plan(write_a(tmp_path / "a", adapter), subject.base)
    assert_same(plan(unmarked(tmp_path / "b", adapter, **PLAIN), subject.base), expected)
    assert_same(plan(write_grouped(tmp_path / "g", adapter, **UNSLOTH), subject.base), expected)


def test_the_option_against_the_evidence(
    subject: Subject, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_grouped(tmp_path, subject.adapter(unused=(2,)), lora_B_layout="rank_major")
    plan(folder, subject.base)
    assert "columns that are exactly zero look like grouped_by_expert" in caplog.text


def test_a_rewritten_adapter_names_its_packing(subject: Subject, tmp_path: Path) -> None:
    folder = write_grouped(tmp_path / "g", subject.adapter(), lora_B_layout="grouped_by_expert")
    found = plan(folder, subject.base)
    write_layout(found, subject.base, tmp_path / "b", "b")
    _, config = read_folder(tmp_path / "b")
    assert config["lora_B_layout"] == "rank_major"
    assert_same(plan(tmp_path / "b", subject.base), found)
    write_layout(found, subject.base, tmp_path / "a", "a")
    assert "lora_B_layout" not in read_folder(tmp_path / "a")[1]


@pytest.mark.parametrize(
    ("marks", "unused", "option", "assumed"),
    [
        (UNSLOTH, (), None, "grouped by expert"),
        ({}, (1,), None, ""),
        ({"lora_B_layout": "grouped_by_expert"}, (), None, ""),
        (PLAIN, (), "grouped_by_expert", ""),
    ],
)
def test_verify_decides_for_itself(
    subject: Subject,
    tmp_path: Path,
    marks: dict[str, Any],
    unused: tuple[int, ...],
    option: str | None,
    assumed: str,
) -> None:
    """Its reader shares no code with the loader; its verdict names the assumption."""
    folder = write_grouped(tmp_path, subject.adapter(unused=unused), **marks)
    (report,) = check((subject.model, folder), packing=option)
    assert report.passed, report.failures
    assert assumed in report.assumed
    assert bool(report.assumed) == bool(assumed)
    text = "\n".join(str(line) for line in verification([report]))
    assert "verified: base and adapter" in text
    assert ("but assumed, not verified" in text) == bool(assumed)


def test_verify_finds_the_wrong_reading(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the loader takes the other packing, the numbers differ."""
    folder = write_grouped(tmp_path, subject.adapter(), lora_B_layout="grouped_by_expert")
    monkeypatch.setattr(
        "ktrt.adapter.layouts.target_parameters.decide_packing", lambda *_: "rank_major"
    )
    (report,) = check((subject.model, folder))
    assert not report.passed
