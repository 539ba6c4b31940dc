"""Measures switches of resident adapters in the shape of DeepSeek-V2-Lite: 26 layers of 64 experts
and 189 other Linears, LoRA of rank 8 on all. Needs no base weights, since a switch does not touch
them, and 1.2 GB of memory.

    python bench/adapter_switch.py [--rank 8]
"""

from __future__ import annotations

import argparse
import statistics
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ktrt.adapter import Audit
from ktrt.adapter.residents import Adapters
from ktrt.engine import Engine, MoeLayer
from ktrt.experts import KTExperts

if TYPE_CHECKING:
    from collections.abc import Callable

LAYERS, EXPERTS, HIDDEN, INNER = 26, 64, 2048, 1408
# Attention of 27 layers, one dense MLP, 26 shared experts.
LINEARS = 27 * 4 + 3 + 26 * 3


class Model(nn.Module):
    """Has the model's number of Linears and experts modules; the Linears are small."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(LINEARS))
        self.experts = nn.ModuleList(KTExperts() for _ in range(LAYERS))
        for module in self.experts:
            layer = MoeLayer(
                engine,
                num_experts=EXPERTS,
                top_k=6,
                hidden_size=HIDDEN,
                intermediate_size=INNER,
                weight_format="bf16",
            )
            module.attach(layer, engine.max_qlen)  # type: ignore[operator]


def make_plan(rank: int) -> Any:
    """Returns random numbers in the form of ``Adapters.add``; all layers are equal."""
    arrays = {}
    for name, size_in, size_out in (
        ("gate", HIDDEN, INNER), ("up", HIDDEN, INNER), ("down", INNER, HIDDEN)
    ):  # fmt: skip
        arrays[f"{name}_a"] = torch.randn(EXPERTS, rank, size_in)
        arrays[f"{name}_b"] = torch.randn(EXPERTS, size_out, rank)

    def apply(model: nn.Module, name: str) -> list[Any]:
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=rank, target_modules=r"linears\.\d+", inference_mode=True)
        inject_adapter_in_model(config, model, name)
        return []

    return SimpleNamespace(
        apply_to_torch=apply,
        engine_arguments=lambda _: arrays,
        mark_experts=lambda _: None,
        audit=Audit(),
        settings=SimpleNamespace(use_dora=False),
        digest=f"rank {rank}",
        files=SimpleNamespace(folder=None),
        norms={},
        row_reason=None,
    )


def report(what: str, call: Callable[[], None], repeats: int = 20) -> None:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    print(f"{what:44} median {statistics.median(times):8.2f} ms, longest {max(times):8.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=8)
    rank = parser.parse_args().rank
    engine = Engine(num_threads=1, max_qlen=1)
    model = Model(engine)
    adapters = Adapters(model, {f"experts.{i}": each for i, each in enumerate(model.experts)})  # type: ignore[misc]
    report("load one from memory", lambda: adapters.add("one", make_plan(rank)), 1)
    report("load two from memory", lambda: adapters.add("two", make_plan(rank)), 1)

    def back_and_forth() -> None:
        adapters.activate("two" if "one" in adapters.active else "one")

    report("switch", back_and_forth)
    report("off and on", lambda: off_and_on(adapters))
    factors = iter(range(1, 1000))
    report("another scale", lambda: adapters.scale(1 / next(factors)))
    report("the first sum of two", lambda: adapters.activate({"one": 1, "two": 1}), 1)
    report("other weights of a sum", lambda: adapters.activate({"one": 1, "two": next(factors)}))
    report("from the sum to one and back", lambda: sum_and_back(adapters))
    adapters.activate("one")
    report("unload two", lambda: adapters.unload("two"), 1)
    engine.close()


def off_and_on(adapters: Adapters) -> None:
    adapters.off()
    adapters.on()


def sum_and_back(adapters: Adapters) -> None:
    adapters.activate("one")
    adapters.activate({"one": 1, "two": 1})


if __name__ == "__main__":
    main()
