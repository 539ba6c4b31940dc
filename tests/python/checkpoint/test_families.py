"""Compares ktrt's logits with transformers' for every MoE model type of the installed transformers.

transformers saves a tiny random model of each class under the family's names on disk. ktrt loads
it; the logits are compared in float32, per position ‖Δ‖/‖reference‖ over the vocabulary. The limit
is twice the loss of float32 experts that round where the engine rounds
(helpers/rounded_experts.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
import transformers
from helpers.families_table import REFUSED, current_block, table_block
from helpers.family_adapters import (
    RANK,
    layer_of,
    single_expert_modules,
    write_per_expert,
    write_stacked,
)
from helpers.family_models import (
    FIRST_SPECIAL,
    Family,
    families,
    folders_without_class,
    random_model,
    small_config,
)
from helpers.rounded_experts import Lora, experts_of, random_lora, use_rounded_experts

from ktrt.checkpoint.skeleton import build_skeleton
from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.errors import CheckpointError
from ktrt.generate.runner import KvCache
from ktrt.loading.model import LoadedModel, load_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FAMILIES = families()
SUPPORTED = [family for family in FAMILIES if family.class_name not in REFUSED]
# Model types that are not recorded, the model itself runs their steps: their attention asks for the
# positions of a ring in order.
NOT_RECORDED = {
    "inkling_mm_model", "inkling_text", "inkling2", "inkling2_text", "inkling2_loop",
    "inkling2_loop_text",
}  # fmt: skip
Backend = Literal["AMXBF16", "AMXInt8", "AMXInt4"]
_ROUNDING: dict[Backend, Any] = {"AMXBF16": "bf16", "AMXInt8": "int8", "AMXInt4": "int4"}

# Twice the loss by rounding alone: far less than a wrong expert costs.
_MOST_ALLOWED: dict[Backend, float] = {"AMXBF16": 0.03, "AMXInt8": 0.2, "AMXInt4": 0.8}


@pytest.fixture(scope="module", autouse=True)
def _one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def token_ids() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(2, FIRST_SPECIAL, (4, 24), generator=generator)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=token_ids()).logits.float()
    return result


def error(found: torch.Tensor, reference: torch.Tensor) -> float:
    relative = (found - reference).norm(dim=-1) / reference.norm(dim=-1)
    return float(relative.median())


def check_token_by_token(loaded: LoadedModel) -> None:
    """Runs a prompt, single tokens, and a prompt with the same beginning, like the chat; by the
    model and by a recorded step."""
    model: Any = loaded.model
    first, *_ = token_ids().tolist()
    with torch.no_grad():
        whole = model(input_ids=torch.tensor([first])).logits[0].float()
    for graphs in (None, loaded.graphs):
        cache = KvCache(model, graphs)
        found = [cache.forward(first[:12]).float()]
        found += [cache.forward(first[at : at + 1]).float() for at in range(12, len(first) - 1)]
        assert error(torch.stack(found), whole[11:-1]) < 0.02
        again = cache.reuse(first)
        assert error(cache.forward(first[again:]).float(), whole[-1]) < 0.05
    recorded = cache.plain and str(model.config.model_type) not in NOT_RECORDED
    assert cache.has_graphs == recorded


@dataclass
class Case:
    """A model in memory, its folder, and its logits without rounding, by adapter."""

    model: Any
    folder: Path
    references: dict[str, torch.Tensor] = field(default_factory=dict)

    def check(
        self, name: str, backend: Backend, loras: dict[str, Lora], adapter: Path | None
    ) -> None:
        use_rounded_experts(self.model, loras, "none")
        reference = self.references[name] = logits(self.model)
        use_rounded_experts(self.model, loras, _ROUNDING[backend])
        allowed = 2 * error(logits(self.model), reference)
        loaded = load_model(
            ModelArgs(self.folder, infer_dtype="float32"),
            AdapterArgs(adapter),
            ExpertArgs(kt_backend=backend, kt_num_threads=1),
        )
        try:
            assert error(logits(loaded.model), reference) <= allowed, (name, backend)
            assert loaded.audit.not_applied == 0
            assert (loaded.audit.applied_experts > 0) == bool(loras)
            if not loras and backend == "AMXBF16":
                check_token_by_token(loaded)
        finally:
            loaded.close()
        assert 0 < allowed <= _MOST_ALLOWED[backend], (name, backend)


def make_loras(model: Any, *, share_gate_a: bool) -> dict[str, Lora]:
    generator = torch.Generator().manual_seed(2)
    return {
        path: random_lora(module, RANK, share_gate_a, generator)
        for path, module in experts_of(model).items()
    }


# Experts on disk: fused; transposed and interleaved; transposed; without gate; rearranged by
# transformers. In the engine, other families' look like one of these.
FORMS = {"qwen3_moe", "granitemoe", "gpt_oss", "aria_text", "nemotron_h", "ernie4_5_vl_moe"}
QUANTIZED = [
    pytest.param(f, marks=() if f.model_type in FORMS else pytest.mark.long) for f in SUPPORTED
]


def saved_case(family: Family, folder: Path) -> Case:
    if family.folder == "inkling" and family.model_type == "inkling_mm_model":
        pytest.importorskip("scipy", reason="transformers' vision tower of Inkling needs scipy")
    case = Case(random_model(family), folder)
    case.model.save_pretrained(folder)
    return case


@pytest.mark.parametrize("family", SUPPORTED, ids=str)
def test_logits_equal_transformers(family: Family, tmp_path: Path) -> None:
    case = saved_case(family, tmp_path / "model")
    model = case.model
    plain = logits(model)
    case.check("base", "AMXBF16", {}, None)
    assert error(case.references["base"], plain) < 1e-4, "the reference is not the library"

    loras = make_loras(model, share_gate_a=True)
    adapter = write_stacked(tmp_path / "b", experts_of(model), loras)
    case.check("b", "AMXBF16", loras, adapter)
    # If a layer has two experts modules (text, vision), names alone do not tell them apart.
    layers = [layer_of(path) for path in loras]
    if single_expert_modules(case.folder) and len(set(layers)) == len(layers):
        loras = make_loras(model, share_gate_a=False)
        adapter = write_per_expert(tmp_path / "a", case.folder, loras)
        case.check("a", "AMXBF16", loras, adapter)
    for name, reference in case.references.items():
        if name != "base":
            assert error(case.references["base"], reference) > 0.02, "the adapter must matter"


@pytest.mark.parametrize("family", QUANTIZED, ids=str)
def test_quantized_experts(family: Family, tmp_path: Path) -> None:
    case = saved_case(family, tmp_path / "model")
    case.check("base", "AMXInt8", {}, None)
    case.check("base", "AMXInt4", {}, None)
    loras = make_loras(case.model, share_gate_a=True)
    adapter = write_stacked(tmp_path / "b", experts_of(case.model), loras)
    case.check("b", "AMXInt8", loras, adapter)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.class_name in REFUSED], ids=str)
def test_refused_families_say_why(family: Family, tmp_path: Path) -> None:
    small_config(family.model_type).save_pretrained(tmp_path)
    # Older transformers do not build every model type that they list.
    words = f"{REFUSED[family.class_name]}|transformers cannot build a model"
    with pytest.raises(CheckpointError, match=words):
        build_skeleton(tmp_path, trust_remote_code=False)


@pytest.mark.parametrize("folder", folders_without_class())
def test_types_that_generate_no_text_say_so(folder: str, tmp_path: Path) -> None:
    transformers.CONFIG_MAPPING[folder]().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no class that generates text"):
        build_skeleton(tmp_path, trust_remote_code=False)


def test_nothing_is_refused_that_is_not_there() -> None:
    assert set(REFUSED) <= {family.class_name for family in FAMILIES}


@pytest.mark.skipif(
    not current_block().startswith(f"<!-- families: transformers {transformers.__version__} "),
    reason="the table of docs/models.md is of another transformers",
)
def test_table_is_current() -> None:
    assert current_block() == table_block(), "run: make docs"
