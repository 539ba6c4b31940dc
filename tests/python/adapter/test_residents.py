"""Several adapters in one model: switching, weights, sums, choices, loading and unloading."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.merge import load_weights, merge
from helpers.resident_folder import save_residents
from helpers.tiny_models import (
    LoraPlan,
    read_folder,
    save_adapter,
    token_ids,
    write_adapter,
)
from safetensors.torch import save_file

from ktrt.adapter.residents import Adapters
from ktrt.adapter.sides import Sides
from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.errors import AdapterError, KtrtError
from ktrt.experts import KTExperts
from ktrt.loading.model import LoadedModel, load_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

IDS = token_ids(2, 30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_residents(tmp_path_factory.mktemp("adapters"))


def load(folder: Path, *names: str, **options: Any) -> LoadedModel:
    adapters = AdapterArgs(adapters={name: folder / name for name in names}, **options)
    base = ModelArgs(folder / "base", infer_dtype="float32")
    return load_model(base, adapters, ExpertArgs(kt_num_threads=1))


def logits(loaded: LoadedModel, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        device = next(loaded.model.parameters()).device
        found: torch.Tensor = loaded.model(ids.to(device)).logits.cpu()
    return found


ALL = ("a", "b", "attention", "router", "saved", "dora")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, torch.Tensor]:
    """The logits of every adapter loaded by itself; "base" without any."""
    found = {}
    for name in ("base", *ALL):
        loaded = load(folder, *([] if name == "base" else [name]))
        found[name] = logits(loaded)
        loaded.close()
    return found


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[LoadedModel]:
    loaded = load(folder, *ALL)
    yield loaded
    loaded.close()


@pytest.fixture
def several(shared: LoadedModel) -> Iterator[LoadedModel]:
    """All adapters resident, "a" active."""
    shared.adapters.activate("a")
    yield shared
    shared.adapters.activate({})


def merged_logits(folder: Path, out: Path, weights: Mapping[str, float]) -> torch.Tensor:
    """transformers in float32 on base + Σ weight · ΔW."""
    from transformers import AutoModelForCausalLM

    base = load_weights(folder / "base")
    total = {name: value.clone() for name, value in base.items()}
    for adapter, weight in weights.items():
        tuned = {name: value.clone() for name, value in base.items()}
        merge(tuned, folder / adapter)
        for name, value in total.items():
            value += weight * (tuned[name] - base[name])
    out.mkdir(exist_ok=True)
    shutil.copy(folder / "base" / "config.json", out)
    save_file(total, out / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def error(found: torch.Tensor, reference: torch.Tensor) -> float:
    return float(((found - reference).norm(dim=-1) / reference.norm(dim=-1)).median())


class TestOneOfSeveral:
    @pytest.mark.parametrize("name", ALL)
    def test_is_that_one_alone(
        self, several: LoadedModel, alone: dict[str, torch.Tensor], name: str
    ) -> None:
        assert error(alone[name], alone["base"]) > 0.05, "the adapter must matter"
        several.adapters.activate(name)
        assert several.adapters.active == {name: 1.0}
        assert torch.equal(logits(several), alone[name])

    def test_the_first_starts_active(self, folder: Path, alone: dict[str, torch.Tensor]) -> None:
        loaded = load(folder, "b", "a")
        assert loaded.adapters.names == ("b", "a")
        assert torch.equal(logits(loaded), alone["b"])
        loaded.close()

    def test_off_is_the_base_and_on_restores(
        self, several: LoadedModel, alone: dict[str, torch.Tensor]
    ) -> None:
        adapters = several.adapters
        for name in ALL:
            adapters.activate(name)
            adapters.off()
            assert adapters.active == {}
            assert torch.equal(logits(several), alone["base"])
            adapters.on()
            assert torch.equal(logits(several), alone[name])
        adapters.activate({"a": 0.25, "b": 0.5})
        adapters.scale(2)
        before = logits(several)
        adapters.off()
        adapters.on()
        assert adapters.active == {"a": 0.5, "b": 1.0}
        assert torch.equal(logits(several), before)

    def test_back_and_forth(self, several: LoadedModel, alone: dict[str, torch.Tensor]) -> None:
        for name in ("a", "saved", "b", "saved", "router", "a"):
            several.adapters.activate(name)
            assert torch.equal(logits(several), alone[name]), name


class TestWeights:
    @pytest.mark.parametrize("weights", [{"a": 1, "b": 1}, {"a": 0.5}, {"a": -0.4, "b": 1.5}])
    def test_equals_the_merge(
        self, several: LoadedModel, folder: Path, tmp_path: Path, weights: dict[str, float]
    ) -> None:
        several.adapters.activate(weights)
        assert error(logits(several), merged_logits(folder, tmp_path, weights)) <= 0.01

    def test_of_many_ranks(self, several: LoadedModel, folder: Path, tmp_path: Path) -> None:
        adapters = several.adapters
        plan = LoraPlan(rank=250, seed=4, experts=0.5)
        save_adapter(folder / "wide", folder / "base", "a", plan)
        adapters.load("wide", folder / "wide")
        weights = {"a": 1, "wide": 0.5}
        adapters.activate(weights)
        found = logits(several)
        adapters.activate("a")
        adapters.unload("wide")
        assert error(found, merged_logits(folder, tmp_path, weights)) <= 0.01

    def test_of_router_and_attention(
        self, several: LoadedModel, folder: Path, tmp_path: Path
    ) -> None:
        weights = {"attention": 0.5, "router": 0.5, "b": 1}
        several.adapters.activate(weights)
        assert error(logits(several), merged_logits(folder, tmp_path, weights)) <= 0.01

    def test_scale_is_absolute(self, several: LoadedModel, alone: dict[str, torch.Tensor]) -> None:
        adapters = several.adapters
        adapters.scale(0)
        assert adapters.active == {"a": 0.0}
        assert torch.equal(logits(several), alone["base"])
        adapters.scale(0.5)
        half = logits(several)
        adapters.activate({"a": 0.5})
        assert torch.equal(logits(several), half)
        adapters.activate("a")
        adapters.scale(1)
        assert torch.equal(logits(several), alone["a"])

    def test_a_weight_of_zero_is_no_adapter(
        self, several: LoadedModel, alone: dict[str, torch.Tensor]
    ) -> None:
        several.adapters.activate({"a": 0, "b": 1, "router": 0, "saved": 0})
        assert torch.equal(logits(several), alone["b"])

    def test_from_the_configuration(self, folder: Path, several: LoadedModel) -> None:
        weights = {"b": 0.5, "a": 0.25}
        loaded = load(folder, "a", "b", adapter_weights=weights)
        assert loaded.adapters.active == weights
        several.adapters.activate(weights)
        assert torch.equal(logits(loaded), logits(several))
        loaded.close()


class TestRefusals:
    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            ("c", "there is no adapter 'c'; resident: a, b, attention, router, saved, dora"),
            ({"a": 1, "c": 1}, "there is no adapter 'c'"),
            ({"a": float("nan")}, "the weight of adapter 'a' is nan, expected a number"),
            ({"saved": 0.5}, "'saved' replaces lm_head of the base model: its weight is 0.5"),
            ({"saved": 1, "a": 1}, "'saved' replaces lm_head .* cannot be summed"),
            ({"dora": 2}, "'dora' is a DoRA: its weight is 2, expected 1 or 0"),
            ({"dora": 1, "a": 1}, "'dora' is a DoRA: it cannot be summed"),
        ],
    )
    def test_change_nothing(
        self, several: LoadedModel, alone: dict[str, torch.Tensor], weights: Any, message: str
    ) -> None:
        key = several.adapters.version
        with pytest.raises(AdapterError, match=message):
            several.adapters.activate(weights)
        assert several.adapters.version == key
        assert torch.equal(logits(several), alone["a"])

    def test_an_engine_that_refuses(
        self,
        several: LoadedModel,
        alone: dict[str, torch.Tensor],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        adapters = several.adapters
        with monkeypatch.context() as patch:
            weigh = adapters._sides.torch.weigh  # type: ignore[union-attr]

            def refuse(weights: Mapping[str, float]) -> None:
                if len(weights) > 1:
                    raise RuntimeError("no")
                weigh(weights)

            patch.setattr(adapters._sides.torch, "weigh", refuse)
            with pytest.raises(RuntimeError, match="no"):
                adapters.activate({"a": 1, "b": 1})
        assert adapters.active == {"a": 1.0}
        assert torch.equal(logits(several), alone["a"])

    def test_scaling_the_base(self, several: LoadedModel) -> None:
        several.adapters.off()
        with pytest.raises(AdapterError, match="no adapter is active"):
            several.adapters.scale(0.5)
        several.adapters.activate("saved")
        with pytest.raises(AdapterError, match="expected 1 or 0"):
            several.adapters.scale(0.5)
        assert several.adapters.active == {"saved": 1.0}


class TestLoading:
    def test_load_and_unload(self, folder: Path, alone: dict[str, torch.Tensor]) -> None:
        loaded = load(folder)
        adapters = loaded.adapters
        base = {id(p) for p in loaded.model.parameters()}
        for name in ALL:
            adapters.load(name, folder / name)
            assert torch.equal(logits(loaded), alone["base"]), "loaded is not active"
            assert adapters.audit(name).not_applied == 0
            assert adapters.audit(name).found > 0
        for name in ALL:
            adapters.activate(name)
            assert torch.equal(logits(loaded), alone[name])
        adapters.activate("b")
        for name in ALL:
            if name != "b":
                adapters.unload(name)
                assert torch.equal(logits(loaded), alone["b"]), name
        assert adapters.names == ("b",)
        adapters.load("again", folder / "saved")
        adapters.activate("again")
        assert torch.equal(logits(loaded), alone["saved"])
        adapters.off()
        adapters.unload("b")
        adapters.unload("again")
        assert torch.equal(logits(loaded), alone["base"])
        assert {id(p) for p in loaded.model.parameters()} == base
        adapters.on()
        assert adapters.active == {}
        loaded.close()

    def test_two_that_replace_the_same_numbers(
        self, several: LoadedModel, folder: Path, alone: dict[str, torch.Tensor]
    ) -> None:
        adapters = several.adapters
        adapters.load("twin", folder / "saved")
        for name in ("saved", "twin", "saved"):
            adapters.activate(name)
            assert torch.equal(logits(several), alone["saved"]), name
        adapters.unload("twin")
        assert torch.equal(logits(several), alone["saved"])
        adapters.activate("b")
        assert torch.equal(logits(several), alone["b"])

    def test_a_reloaded_adapter_has_another_key(self, several: LoadedModel, folder: Path) -> None:
        adapters = several.adapters
        adapters.load("x", folder / "attention")
        adapters.activate("x")
        key = adapters.version
        adapters.activate("a")
        adapters.unload("x")
        adapters.load("x", folder / "b")
        adapters.activate("x")
        assert adapters.version != key
        adapters.activate("a")
        adapters.unload("x")

    def test_refusals(self, several: LoadedModel, folder: Path) -> None:
        adapters = several.adapters
        with pytest.raises(AdapterError, match="there is an adapter 'b' already"):
            adapters.load("b", folder / "b")
        with pytest.raises(AdapterError, match="expected text"):
            adapters.load(" ", folder / "b")
        with pytest.raises(AdapterError, match="'a' is active; activate another one"):
            adapters.unload("a")
        with pytest.raises(AdapterError, match="no adapter 'x'"):
            adapters.unload("x")

    @pytest.mark.parametrize("damage", ["file", "apply", "engine"])
    def test_a_failure_leaves_everything_as_it_was(
        self,
        several: LoadedModel,
        folder: Path,
        tmp_path: Path,
        alone: dict[str, torch.Tensor],
        damage: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        adapters = several.adapters
        source = folder / "saved" if damage == "apply" else folder / "b"
        tensors, config = read_folder(source)
        if damage == "file":
            tensors.pop(next(key for key in tensors if "lora_B" in key))
        write_adapter(tmp_path, tensors, config)
        modules = [m for m in several.model.modules() if isinstance(m, KTExperts)]
        if damage == "engine":
            plain = Sides.load_experts

            def fail(self: Sides, number: int, plan: Any, between: Any) -> None:
                plain(self, number, plan, between)
                raise MemoryError

            monkeypatch.setattr(Sides, "load_experts", fail)
        elif damage == "apply":
            monkeypatch.setattr("ktrt.adapter.plan.Audit.check", lambda _: 1 / 0)
        names = set(dict(several.model.named_parameters()))
        with pytest.raises((AdapterError, MemoryError, ZeroDivisionError)):
            adapters.load("x", tmp_path)
        assert "x" not in adapters.names
        assert set(dict(several.model.named_parameters())) == names
        assert [m.layer.active_loras for m in modules] == [[(0, 1.0)]] * 2
        assert torch.equal(logits(several), alone["a"])
        adapters.activate("b")
        assert torch.equal(logits(several), alone["b"])

    def test_no_model(self) -> None:
        adapters = Adapters()
        assert (adapters.names, adapters.active, adapters.audit().found) == ((), {}, 0)
        with pytest.raises(KtrtError, match="no model"):
            adapters.load("x", "/nowhere")
        adapters.off()
        adapters.on()


class TestChoices:
    def test_linears_in_float32_take_turns(self, several: LoadedModel) -> None:
        """PEFT computes them, for all rows alike."""
        adapters = several.adapters
        for name in ALL:
            assert adapters.choose(name).row is None
        assert adapters.choose(None).row == adapters.number(None) == -1
        assert adapters._residents["a"].row_reason == "has LoRA on float32 linears"

    def test_one_that_is_used_stays(self, several: LoadedModel, folder: Path) -> None:
        adapters = several.adapters
        adapters.load("x", folder / "attention")
        choice = adapters.choose("x")
        releases = [adapters.hold(choice) for _ in range(2)]
        for release, words in zip(releases, ("2 answers", "1 answer "), strict=True):
            with pytest.raises(AdapterError, match=f"'x' is used by {words}"):
                adapters.unload("x")
            release()
        adapters.unload("x")
        with pytest.raises(AdapterError, match="no adapter 'x'"):
            adapters.hold(choice)

    def test_prefixes_belong_to_contents(self, several: LoadedModel, folder: Path) -> None:
        """Not to names: the same contents have one key, other contents under a name another."""
        adapters = several.adapters
        first = adapters.choose("a")
        adapters.load("x", folder / "a")
        held = adapters.choose("x")
        assert held.key == first.key
        adapters.unload("x")
        adapters.load("x", folder / "b")
        assert adapters.choose("x").key == adapters.choose("b").key != first.key
        with pytest.raises(AdapterError, match="changed before the answer"):
            adapters.hold(held)
        adapters.unload("x")
        chosen: tuple[Any, ...] = ("a", None, {"a": 0.5}, {"a": 1, "b": 1})
        keys = {adapters.choose(each).key for each in chosen}
        assert len(keys) == 4
        adapters.refresh()
        assert not keys & {adapters.choose(each).key for each in chosen}


class TestKey:
    def test_tells_what_acts(self, several: LoadedModel) -> None:
        adapters = several.adapters
        keys = [adapters.version]
        changes: tuple[Callable[[], None], ...] = (
            lambda: adapters.activate("b"),
            lambda: adapters.scale(0.5),
            adapters.off,
            lambda: adapters.activate({"a": 1, "b": 1}),
            lambda: adapters.activate({"a": 1, "b": 2}),
        )
        for change in changes:
            change()
            keys.append(adapters.version)
        assert len(set(keys)) == len(keys)
        adapters.activate({"b": 0})
        off = adapters.version
        adapters.off()
        assert adapters.version == off
        adapters.activate("a")
        assert adapters.version == keys[0]

    def test_loads_are_told_apart(self, several: LoadedModel, folder: Path) -> None:
        adapters, found = several.adapters, several.adapters.active_set
        adapters.activate("a")
        calls: list[None] = []
        remove = found.on_modules(lambda: calls.append(None))
        seen = [(found.version, found.changes, len(calls))]

        def note() -> None:
            seen.append((found.version, found.changes, len(calls)))

        adapters.load("x", folder / "attention")
        note()
        adapters.activate("x")
        note()
        adapters.activate("a")
        note()
        adapters.unload("x")
        note()
        versions, changes, modules = ([each[n] - seen[0][n] for each in seen] for n in range(3))
        assert [v == 0 for v in versions] == [True, True, False, True, True]
        assert changes == [0, 0, 1, 2, 2]
        # Wrapped modules take a new adapter, and let go of one that leaves.
        assert modules == [0, 1, 1, 1, 2]
        remove()
        found.add_modules()
        assert len(calls) == 2

    def test_numbers_changed_in_place(self, several: LoadedModel) -> None:
        """``refresh`` outdates what was made before, also of adapters that are off."""
        adapters = several.adapters
        adapters.off()
        off = adapters.version
        adapters.on()
        before = adapters.version
        adapters.refresh()
        after = adapters.version
        assert after not in (before, off)
        adapters.off()
        assert adapters.version not in (before, off, after)
        adapters.on()
        assert adapters.version == after
