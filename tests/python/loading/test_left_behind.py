"""A closed model leaves nothing in transformers, torch and PEFT."""

from __future__ import annotations

import gc
import sys
import threading
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.fake_streams import FakeGraphs, fake_hand_off
from helpers.tiny_models import save_adapter, save_model, token_ids

import ktrt.loading.model
from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.loading.model import LoadedModel, load_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("one_thread")

# The libraries that a load touches.
_LIBRARIES = ("transformers.", "peft.", "torch.nn.modules.linear", "torch.nn.modules.sparse")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("left")
    for family in ("deepseek_v2", "qwen3_moe"):
        model = save_model(folder / family, family, 96)
        save_adapter(folder / f"{family}_lora", model, "a")
    return folder


def load(folder: Path, family: str, dtype: Any = "bfloat16") -> LoadedModel:
    return load_model(
        ModelArgs(folder / family, infer_dtype=dtype),
        AdapterArgs(folder / f"{family}_lora"),
        ExpertArgs(kt_num_threads=1),
    )


def registries() -> dict[str, dict[Any, Any]]:
    """Every table of functions that transformers keeps for all models."""
    from transformers.utils.generic import GeneralInterface

    kinds: list[Any] = [GeneralInterface, *_subclasses(GeneralInterface)]
    return {f"{k.__module__}.{k.__qualname__}": dict(k._global_mapping) for k in kinds}


def _subclasses(kind: Any) -> Iterator[Any]:
    each: Any
    for each in kind.__subclasses__():
        yield each
        yield from _subclasses(each)


def classes() -> dict[str, dict[str, Any]]:
    """The attributes of all classes of the libraries, and the names in their modules."""
    found: dict[str, dict[str, Any]] = {}
    for name, module in list(sys.modules.items()):
        if not f"{name}.".startswith(_LIBRARIES):
            continue
        found[name] = {n: v for n, v in vars(module).items() if not n.startswith("__")}
        for kind in list(found[name].values()):
            if isinstance(kind, type) and kind.__module__ == name:
                found[f"{name}.{kind.__qualname__}"] = dict(vars(kind))
    return found


def settings() -> dict[str, Any]:
    """Settings of the whole process."""
    from transformers.utils import logging as library

    return {
        "filters": list(warnings.filters),
        "verbosity": library.get_verbosity(),
        "bars": library.is_progress_bar_enabled(),
        "threads": threading.active_count(),
        "torch": (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()),
    }


def snapshot() -> dict[str, Any]:
    return {"registries": registries(), "classes": classes(), "settings": settings()}


def check_as_before(before: dict[str, Any]) -> None:
    """Modules that were imported since are no difference; a name that has another object is."""
    now = snapshot()
    assert now["registries"] == before["registries"]
    assert now["settings"] == before["settings"]
    different = {
        f"{name}: {key}"
        for name, held in before["classes"].items()
        for key in {*held, *now["classes"][name]}
        if not _is_import(key, name) and now["classes"][name].get(key) is not held.get(key)
    }
    assert not {each for each in different if "_abc_impl" not in each}


def _is_import(key: str, name: str) -> bool:
    return f"{name}.{key}" in sys.modules


def patched_modules(loaded: LoadedModel) -> list[str]:
    """Modules with a forward, a hook or a mark of ktrt's."""
    return [
        name
        for name, module in loaded.model.named_modules()
        if "forward" in vars(module)
        or module._forward_pre_hooks
        or module._forward_hooks
        or any("kt_" in key for key in vars(module))
    ]


def use(loaded: LoadedModel) -> torch.Tensor:
    cache = loaded.new_cache()
    cache.forward(token_ids(1, 9)[0].tolist())
    cache.forward([3])
    return cache.forward([4])


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads as with a GPU: a hand-off, graphs, and LoRA in PEFT's fused linears."""

    def new_hand_off(engine: Any, _device: torch.device) -> Any:
        return fake_hand_off(engine.max_qlen)[0]

    accelerate: Callable[..., Any] = ktrt.loading.model._accelerate

    def as_on_a_gpu(
        model: Any, engine: Any, active: Any, patches: Any, _d: Any, *rest: Any, **more: Any
    ) -> Any:
        return accelerate(model, engine, active, patches, torch.device("cuda"), *rest, **more)

    monkeypatch.setattr(ktrt.loading.model, "new_hand_off", new_hand_off)
    monkeypatch.setattr(ktrt.loading.model, "CudaGraphs", FakeGraphs)
    monkeypatch.setattr(ktrt.loading.model, "_accelerate", as_on_a_gpu)


@pytest.fixture(params=["cpu", "fake_gpu"])
def path(request: pytest.FixtureRequest, folder: Path) -> str:
    """The way that a model is loaded; everything that a load imports has been imported."""
    load(folder, "deepseek_v2").close()
    load(folder, "qwen3_moe").close()
    name: str = request.param
    if name == "fake_gpu":
        request.getfixturevalue(name)
    return name


@pytest.mark.parametrize("family", ["deepseek_v2", "qwen3_moe"])
def test_one_model(folder: Path, family: str, path: str) -> None:
    before = snapshot()
    loaded = load(folder, family)
    use(loaded)
    # Other models of the process may have put the same entry there before.
    assert any(str(key).startswith("ktrt") for table in registries().values() for key in table)
    assert patched_modules(loaded)
    loaded.close()
    check_as_before(before)
    assert not patched_modules(loaded)
    loaded.close()


@pytest.mark.parametrize("first_closes_first", [True, False])
def test_two_models(folder: Path, path: str, first_closes_first: bool) -> None:
    before = snapshot()
    models = [load(folder, "deepseek_v2"), load(folder, "qwen3_moe")]
    expected = [use(model) for model in models]
    first, second = (0, 1) if first_closes_first else (1, 0)
    models[first].close()
    assert torch.equal(use(models[second]), expected[second]), "the other one goes on"
    third = load(folder, "qwen3_moe")
    assert torch.equal(use(third), expected[1])
    models[second].close()
    assert torch.equal(use(third), expected[1])
    third.close()
    check_as_before(before)
    assert not any(map(patched_modules, [*models, third]))


@pytest.mark.parametrize("where", ["_accelerate", "_attach", "_apply_adapters", "_log_result"])
def test_a_load_that_fails(
    folder: Path, path: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot()
    original: Callable[..., Any] = getattr(ktrt.loading.model, where)

    def failing(*args: Any, **more: Any) -> None:
        original(*args, **more)
        raise ZeroDivisionError

    monkeypatch.setattr(ktrt.loading.model, where, failing)
    with pytest.raises(ZeroDivisionError):
        load(folder, "deepseek_v2")
    check_as_before(before)


def fail() -> None:
    raise ZeroDivisionError


def test_a_close_that_fails_closes_the_rest(folder: Path) -> None:
    before = registries()
    loaded = load(folder, "deepseek_v2")
    loaded.patches.add(fail)
    with pytest.raises(ZeroDivisionError):
        loaded.close()
    assert loaded.engine.closed
    assert registries() == before


def test_a_load_that_fails_closes_the_gpus_share(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[bool] = []

    class Share:
        def close(self) -> None:
            closed.append(True)

    monkeypatch.setattr(ktrt.loading.model, "_share_with_gpu", lambda *_: Share())
    monkeypatch.setattr(ktrt.loading.model, "_accelerate", lambda *_, **__: fail())
    with pytest.raises(ZeroDivisionError):
        load(folder, "deepseek_v2")
    assert closed == [True]


def test_a_dropped_model_is_freed(folder: Path) -> None:
    """Without ``close``: in a notebook, a name gets the next model."""
    before = registries()
    loaded = load(folder, "deepseek_v2")
    use(loaded)
    model = weakref.ref(loaded.model)
    del loaded
    gc.collect()
    assert model() is None
    assert registries() == before
