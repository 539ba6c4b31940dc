"""The audit: a row for every tensor, right counts, a table for people."""

from __future__ import annotations

from pathlib import Path

import pytest

from ktrt.adapter import Audit, AuditRow
from ktrt.errors import AdapterError


def row(tensor: str, acts_on: str, layer: int | None) -> AuditRow:
    return AuditRow(tensor, acts_on, "lora_A", layer, 8, 2.0)


@pytest.fixture
def audit() -> Audit:
    rows = [
        row(f"e{layer}{e}", f"model.layers.{layer}.mlp.experts.{e}.gate_proj", layer)
        for layer in (1, 2, 5)
        for e in range(2)
    ]
    rows.append(row("stack", "model.layers.7.mlp.experts.down_proj", 7))
    rows.append(row("q", "model.layers.0.self_attn.q_proj", 0))
    rows.append(AuditRow("head", "lm_head", "weight", None, None, None))
    return Audit(Path("adapter.safetensors"), rows)


def test_counts_follow_the_applied_tensors(audit: Audit) -> None:
    assert (audit.found, audit.not_applied) == (9, 9)
    audit.mark(["e10", "e11", "stack"], "experts")
    audit.mark(["q"], "peft")
    assert (audit.applied_experts, audit.applied_peft, audit.not_applied) == (3, 1, 5)
    assert audit.rows[0].status == "experts"


def test_tensors_left_over_are_an_error(audit: Audit) -> None:
    audit.mark([r.tensor for r in audit.rows if r.tensor != "q"], "experts")
    with pytest.raises(AdapterError, match=r"adapter\.safetensors: 1 of 9 tensors .* applied: q\."):
        audit.check()
    audit.mark(["q"], "peft")
    audit.check()


def test_kinds_leave_layer_and_expert_numbers_out(audit: Audit) -> None:
    assert [r.kind for r in audit.rows[::3]] == [
        "mlp.experts.gate_proj",
        "mlp.experts.gate_proj",
        "mlp.experts.down_proj",
    ]
    assert audit.rows[-1].kind == "lm_head"


def test_table_groups_and_counts(audit: Audit) -> None:
    audit.mark([r.tensor for r in audit.rows[:7]], "experts")
    audit.mark(["q", "head"], "peft")
    for r, norm in zip(audit.rows, (3.14, 0.0, 1.0), strict=False):
        r.delta_norm = norm
    table = audit.table()
    lines = [[cell.strip() for cell in line.split("│")] for line in table.splitlines()]
    assert [
        "",
        "mlp.experts.gate_proj",
        "1-2, 5",
        "6",
        "8",
        "2",
        "0!–3.1",
        "ktrt engine",
        "",
    ] in lines
    assert ["", "lm_head", "", "1", "", "", "", "PEFT", ""] in lines
    assert table.splitlines()[-1] == (
        "tensors found 9 = applied on experts 7 + applied by PEFT 2 + not applied 0"
    )


def test_base_model_has_an_empty_audit() -> None:
    audit = Audit()
    audit.check()
    assert audit.found == audit.not_applied == 0
    assert audit.table() == "no adapter: base model"
