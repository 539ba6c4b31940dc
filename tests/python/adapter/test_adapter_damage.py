"""2400 damaged adapters (a fifth of them unless `-m long`): each is refused by name, or provably
changes nothing.

*Refused*: ``AdapterError`` naming the tensor (or its module), or the damaged file.
*Changes nothing*: the internal form is bit-equal to the undamaged adapter's. Anything else, another
exception included, is a failure. Cases are the same in every run.

Invisible to any reader, and therefore no case here: another lora_alpha, matching alpha_pattern or
use_rslora in adapter_config.json (a valid adapter of another strength; it is a case if the YAML
file or a manifest repeats lora_alpha); other finite numbers in files without a manifest; two
exchanged tensors of the same shape; no LoRA on routed experts at all (a warning: several writers do
that). The sizes ensure that no transposed matrix has the right shape.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
from adapter.test_adapter_every_layout import assert_same
from helpers.adapter_damage import (
    CONFIG,
    Damage,
    damage_config,
    damage_file,
    damage_manifest,
    damage_tensor,
    fresh_copy,
)
from helpers.adapter_layouts import (
    EXTRA,
    FUSED,
    WRITERS,
    Adapter,
    add_extra_experts,
    random_adapter,
    write_manifest,
)
from helpers.tiny_models import base_of, save_model, token_ids
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ktrt.adapter import AdapterPlan, BaseModel, plan_adapter
from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.errors import AdapterError
from ktrt.loading.model import load_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

MODEL = "adapter_model.safetensors"
RANK, ALPHA = 4, 8
SUBJECTS = [
    ("deepseek_v2", "a"), ("deepseek_v2", "b"), ("deepseek_v2", "c"), ("deepseek_v2", "c bare"),
    ("deepseek_v2", "a'"), ("mixtral", "a"), ("mixtral", "b old"), ("mixtral", "c bare"),
    ("mixtral", "stacked"), ("deepseek_v2", "mixed"), ("mixtral", "f"), ("deepseek_v2", "d"),
    ("deepseek_v2", "a and e"), ("mixtral", "c bare and e"),
]  # fmt: skip
# Layouts whose adapters share matrices here.
SHARED = ("stacked", "mixed")

# Outcomes of the cases: "refused" and "unchanged"; "planned" is their number.
tally: Counter[str] = Counter()


def cases(count: int) -> pytest.MarkDecorator:
    """A fifth of ``count`` cases, and in a test marked ``long`` all."""
    return pytest.mark.parametrize(
        "count", [count // 5, pytest.param(count, marks=pytest.mark.long)]
    )


def try_all(count: int, test: Callable[..., None], **given_by: st.SearchStrategy[Any]) -> None:
    tally["planned"] += count
    settings(
        max_examples=count, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck), report_multiple_bugs=True,
    )(given(**given_by)(test))()  # fmt: skip


class Subjects:
    """Undamaged adapters and their plans; each base is built once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models: dict[str, Path] = {}
        self.bases: dict[str, BaseModel] = {}
        self.made: dict[tuple[str, str], tuple[Path, AdapterPlan, Adapter]] = {}

    def base(self, family: str) -> BaseModel:
        if family not in self.bases:
            experts = (
                {"n_routed_experts": 3} if family == "deepseek_v2" else {"num_local_experts": 3}
            )
            self.models[family] = save_model(
                self.folder / family, family, 24, hidden_size=56, num_experts_per_tok=2, **experts
            )
            self.bases[family] = base_of(self.models[family])
        return self.bases[family]

    def get(self, family: str, layout: str) -> tuple[Path, AdapterPlan, Adapter]:
        if (family, layout) not in self.made:
            base = self.base(family)
            writer, _, extra = layout.partition(" and ")
            adapter = random_adapter(
                self.models[family], rank=RANK, alpha=ALPHA, extra_experts=2 if extra else 0,
                sharing="outer" if layout in SHARED else "nothing",
            )  # fmt: skip
            folder = WRITERS[writer](self.folder / f"{family}-{layout}", adapter)
            if extra:
                add_extra_experts(folder, adapter, own_file=True)
            self.made[family, layout] = (folder, read(folder, base), adapter)
        return self.made[family, layout]


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subjects]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    yield Subjects(tmp_path_factory.mktemp("damage"))
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)


def read(folder: Path, base: BaseModel, rank: int | None = None, alpha: float | None = None) -> Any:
    return plan_adapter(folder, base, lora_rank=rank, lora_alpha=alpha)


def judge(
    folder: Path, base: BaseModel, damage: Damage, expected: AdapterPlan, **yaml: Any
) -> None:
    try:
        found = read(folder, base, **yaml)
    except AdapterError as error:
        message = str(error)
        assert any(all(word in message for word in words) for words in damage.names), (
            f"{damage.what} is refused, but not by name: {message}"
        )
        tally["refused"] += 1
        return
    try:
        assert_same(found, expected)
        assert_same_extra(found, expected)
    except AssertionError as error:
        raise AssertionError(f"{damage.what} was accepted and changes the adapter") from error
    tally["unchanged"] += 1


def assert_same_extra(found: AdapterPlan, expected: AdapterPlan) -> None:
    for block, mlps in expected.extra.items():
        for ours, theirs in zip(found.extra[block], mlps, strict=True):
            assert all(torch.equal(a.float(), b.float()) for a, b in zip(ours, theirs, strict=True))


def test_undamaged_adapters_are_accepted(subjects: Subjects) -> None:
    for family, layout in SUBJECTS:
        folder, expected, _ = subjects.get(family, layout)
        assert_same(read(folder, subjects.base(family), RANK, ALPHA), expected)


@cases(1400)
def test_tensors(subjects: Subjects, count: int) -> None:
    """Damages one tensor of any file. Half of the time the manifest's hashes are rewritten, so that
    the tensors themselves are checked."""

    def case(data: st.DataObject) -> None:
        family, layout = data.draw(st.sampled_from(SUBJECTS))
        source, expected, adapter = subjects.get(family, layout)
        folder = fresh_copy(source, subjects.folder / "copy")
        files = [name for name in (MODEL, FUSED, EXTRA) if (folder / name).is_file()]
        damage = damage_tensor(data.draw, folder, files)
        if layout == "c":
            damage.names.append([str(folder)])
            if data.draw(st.booleans()):
                write_manifest_or_none(folder, adapter)
        judge(folder, subjects.base(family), damage, expected)

    try_all(count, case, data=st.data())


def write_manifest_or_none(folder: Path, adapter: Adapter) -> None:
    try:
        write_manifest(folder, adapter)
    except KeyError:
        # The writer does not know the dtype: the old hashes stay.
        return


@cases(400)
def test_configurations(subjects: Subjects, count: int) -> None:
    """Damages one entry of adapter_config.json."""

    def case(data: st.DataObject) -> None:
        family, layout = data.draw(st.sampled_from(SUBJECTS))
        source, expected, _ = subjects.get(family, layout)
        folder = fresh_copy(source, subjects.folder / "copy")
        damage = damage_config(data.draw, folder)
        yaml = {"rank": RANK, "alpha": ALPHA} if data.draw(st.booleans()) else {}
        judge(folder, subjects.base(family), damage, expected, **yaml)

    try_all(count, case, data=st.data())


@cases(80)
def test_alpha_that_is_repeated(subjects: Subjects, count: int) -> None:
    """Another lora_alpha is found if the YAML file or the manifest repeats it."""

    def case(alpha: float, where: int) -> None:
        family, layout = SUBJECTS[where]
        source, _, _ = subjects.get(family, layout)
        folder = fresh_copy(source, subjects.folder / "copy")
        text = (
            (folder / CONFIG)
            .read_text("utf-8")
            .replace(f'"lora_alpha": {ALPHA}', f'"lora_alpha": {alpha}')
        )
        (folder / CONFIG).write_text(text, encoding="utf-8")
        yaml = {} if layout == "c" else {"rank": RANK, "alpha": ALPHA}
        with pytest.raises(AdapterError, match="alpha|bytes"):
            read(folder, subjects.base(family), **yaml)
        tally["refused"] += 1

    try_all(
        count, case, alpha=st.sampled_from([1, 4, 7.5, 16, 1e38, 1e300]), where=st.integers(0, 13)
    )


@cases(280)
def test_files(subjects: Subjects, count: int) -> None:
    """Truncates or removes a file, or changes a byte of it; in layout c, any byte."""

    def case(data: st.DataObject) -> None:
        family, layout = data.draw(st.sampled_from([*SUBJECTS, *8 * [("deepseek_v2", "c")]]))
        source, expected, _ = subjects.get(family, layout)
        folder = fresh_copy(source, subjects.folder / "copy")
        damage = damage_file(data.draw, folder)
        judge(folder, subjects.base(family), damage, expected, rank=RANK, alpha=ALPHA)

    try_all(count, case, data=st.data())


@cases(200)
def test_manifests(subjects: Subjects, count: int) -> None:
    def case(data: st.DataObject) -> None:
        source, expected, _ = subjects.get("deepseek_v2", "c")
        folder = fresh_copy(source, subjects.folder / "copy")
        damage = damage_manifest(data.draw, folder)
        judge(folder, subjects.base("deepseek_v2"), damage, expected)

    try_all(count, case, data=st.data())


@cases(30)
def test_whole_loads(subjects: Subjects, count: int) -> None:
    """Loads with ``load_model``: expects an error before any answer, or the same logits."""
    expected: dict[str, torch.Tensor] = {}

    def case(data: st.DataObject) -> None:
        layout = data.draw(st.sampled_from(["a", "b", "c bare", "a and e"]))
        source, _, _ = subjects.get("deepseek_v2", layout)
        folder = fresh_copy(source, subjects.folder / "copy")
        damage_tensor(data.draw, folder, [MODEL])
        if layout not in expected:
            expected[layout] = logits(subjects, source)
        try:
            found = logits(subjects, folder)
        except AdapterError:
            tally["refused"] += 1
            return
        tally["unchanged"] += 1
        assert torch.equal(found, expected[layout])

    try_all(count, case, data=st.data())


def logits(subjects: Subjects, adapter: Path) -> torch.Tensor:
    loaded = load_model(
        ModelArgs(subjects.models["deepseek_v2"]),
        AdapterArgs(adapter),
        ExpertArgs(kt_num_threads=1),
    )
    try:
        with torch.no_grad():
            found: torch.Tensor = loaded.model(token_ids(1, 8)).logits
        return found
    finally:
        loaded.close()


def test_enough_cases_of_both_outcomes() -> None:
    """Runs last in the file: nothing was skipped, and neither outcome is rare."""
    if not tally:
        pytest.skip("the other tests of this file did not run")
    assert tally["refused"] + tally["unchanged"] >= tally["planned"]
    assert tally["refused"] > 0.45 * tally["planned"]
    assert tally["unchanged"] > 0.045 * tally["planned"]
