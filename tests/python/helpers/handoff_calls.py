"""Random sequences of hand-off calls on the stand-in for the CUDA driver.

``python handoff_calls.py LIBRARY SEED SEQUENCES`` prints every call before making it. In any order,
each call returns or raises, no stream stays waiting, and the next hand-off computes correctly.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from experts.test_gpu_handoff import MECHANISMS, Case
from helpers.fake_cuda import FakeCuda
from helpers.loras import apply_no_lora

if TYPE_CHECKING:
    from collections.abc import Callable

EXPECTED = (TypeError, ValueError, RuntimeError, TimeoutError, OverflowError)
NUMBERS = (-1, 0, 1, 2, 3, 7, 1 << 31, (1 << 31) - 1, 1 << 40, None, "0", 1.5)


class Sequence:
    def __init__(self, cuda: FakeCuda, seed: int) -> None:
        self._random = random.Random(seed)
        self._cuda = cuda
        self._case = Case(cuda, self._random.choice(MECHANISMS), timeout=0.1)
        self._graphs: list[int] = []
        if self._random.randrange(4) == 0:
            cuda.set_delay(self._random.choice([100, 2000]))

    def _slot(self) -> object:
        return self._random.choice([0, 0, 1, 1, 1, *NUMBERS])

    def _call(self) -> tuple[str, Callable[[], object]]:
        case, handoff, stream = self._case, self._case.handoff, self._case.stream
        slot, other = self._slot(), self._slot()
        inputs = self._random.choice([case.inputs] * 8 + [[0, *case.inputs[1:]]])
        out = self._random.choice([*case.outs, *case.outs, 0])
        where = self._random.choice([stream] * 9 + [12345])
        shape = {"tokens": self._random.choice([1, 5, 16, 17, 0, -1]), "top_k": 2}
        dtype = self._random.choice(["float32", "bfloat16", "int8"])
        calls: dict[str, Callable[[], object]] = {
            f"submit({slot})": lambda: handoff.submit(slot, where, *inputs),  # type: ignore[arg-type]
            f"wait({slot})": lambda: handoff.wait(slot, where, out),  # type: ignore[arg-type]
            f"expect([{slot}, {other}])": lambda: handoff.expect([slot, other]),  # type: ignore[list-item]
            "enqueue": case.enqueue,
            "synchronize": case.synchronize,
            "capture": self._capture,
            "launch": self._launch,
            f"add_slot({shape})": lambda: handoff.add_slot(case.layers[0], dtype=dtype, **shape),  # type: ignore[arg-type]
            "read": lambda: (handoff.closed, handoff.mechanism, handoff.pinned_bytes),
            "no lora": lambda: apply_no_lora(case.layers[0]),
            "close": handoff.close if self._random.randrange(8) == 0 else gc.collect,
            "close engine": case.engine.close if self._random.randrange(12) == 0 else gc.collect,
            "fork": self._fork if self._random.randrange(4) == 0 else gc.collect,
        }
        name = self._random.choice(sorted(calls))
        return name, calls[name]

    def _capture(self) -> None:
        self._cuda.begin_capture(self._case.stream)
        try:
            self._case.enqueue()
        finally:
            self._graphs.append(self._cuda.end_capture(self._case.stream))

    def _launch(self) -> None:
        if self._graphs and not self._case.handoff.closed:
            if self._random.randrange(5):
                self._case.handoff.expect([0, 1])
            self._cuda.launch(self._random.choice(self._graphs), self._case.stream)

    def _fork(self) -> None:
        child = os.fork()
        if child == 0:
            for call in (lambda: self._case.handoff.pinned_bytes, self._case.enqueue,
                         self._case.handoff.close, self._case.engine.close):  # fmt: skip
                with contextlib.suppress(RuntimeError):
                    call()
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            raise SystemExit("the child of a fork failed")

    def run(self) -> None:
        for _ in range(self._random.randrange(3, 12)):
            name, call = self._call()
            print("  ", name, flush=True)
            with contextlib.suppress(*EXPECTED):
                call()
        with contextlib.suppress(*EXPECTED):
            self._case.synchronize()
        self._case.handoff.close()


def main(library: Path, seed: int, count: int) -> int:
    torch.set_num_threads(1)
    cuda = FakeCuda(library)
    for index in range(seed, seed + count):
        print("sequence", index, flush=True)
        sequence = Sequence(cuda, index)
        sequence.run()
        del sequence
        gc.collect()
        if cuda.reset() != 0:
            raise SystemExit("a stream is still waiting")
        if index % 16 == 0:
            case = Case(cuda)
            case.enqueue()
            case.synchronize()
            case.assert_right()
            case.handoff.close()
            del case
            gc.collect()
            cuda.reset()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
