#!/usr/bin/env python3
"""Compares a whole model in llama.cpp and in ktrt, on the CPU or with a GPU, LoRA off and on.

    pip install '.[llama-cpp]'      # compiles llama.cpp for this machine: minutes
    python bench/llama_cpp/compare_llama_cpp.py --out /tmp/pair [--json] [--rounds N]

Both get the same random weights: Qwen3-MoE's architecture (which both know) with the experts of
DeepSeek-V2-Lite's shape, and a LoRA adapter of rank 8 on all linear layers, experts included: for
ktrt a Hugging Face folder and a PEFT adapter, for llama.cpp two GGUF files. First both compute the
logits of one text, which must agree. Then they alternate, prompt and decoding, same ids, same
number of threads; ratios are medians over neighbouring measurements.

AMXBF16 meets BF16, AMXInt8 meets Q8_0. llama.cpp's Q8_0 quantises all matrices; so does ktrt's INT8
here, by quantization_bit: 8 in addition to the experts' kt_backend (--formats int8-experts: only
the experts, the rest in BF16). The embeddings' table and the router count in neither; LoRA has 16
bits in both. --llama-cpp names a folder whose libllama.so replaces llama-cpp-python's own. --out
takes 9 GB with 4 layers.

--gpu: both have everything but the routed experts on the GPU. --llama-cpp then names llama.cpp
built with CUDA, whose tensor overrides leave the experts in RAM; for prompts it copies them to the
GPU once for 2,048 tokens, where that is faster. Measured are prompts of 1,024 and 8,192 tokens, and
decoding after 32 and after 16,384; without a GPU a prompt of 512, and decoding after it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compare_rows import CHECKED_TOKENS, Row, context_of, rows_of, sizes_of, table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from compare_rows import Samples
    from llama_cpp_model import Weights

    from ktrt.session import Session

# ktrt's kt_backend and quantization_bit, llama.cpp's format of all matrices.
FORMATS: dict[str, tuple[str, int | None, str]] = {
    "bf16": ("AMXBF16", None, "bf16"),
    "int8": ("AMXInt8", 8, "q8_0"),
    "int8-experts": ("AMXInt8", None, "q8_0"),
}
# The previous party's threads spin for a while, on the next one's cores.
SETTLE_SECONDS = 0.2
# Largest relative difference of the logits, median over positions, between two right answers.
AGREEMENT = {"bf16": 0.05, "int8": 0.15, "int8-experts": 0.15}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the models")
    parser.add_argument("--llama-cpp", type=Path, help="folder with libllama.so")
    parser.add_argument("--layers", type=int, default=4, help="1.1 GB each, in BF16")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=0, help="default: as an engine chooses")
    parser.add_argument("--prompt", type=int, help="tokens (512; with a GPU 1,024 and 8,192)")
    parser.add_argument("--depth", type=int, help="tokens before decoding, with a GPU (16,384)")
    parser.add_argument("--gpu", action="store_true", help="all but the routed experts on a GPU")
    parser.add_argument("--new", type=int, default=96, help="tokens to decode")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--formats", type=lambda text: text.split(","), help="bf16,int8; with a GPU int8-experts"
    )
    parser.add_argument("--keep", action="store_true", help="keep the GGUF files")
    parser.add_argument(
        "--plain-buffers", action="store_true",
        help="keep llama.cpp's weights unpacked: its AMX kernels crash (0.3.36)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--small", action="store_true", help="tiny layers: does the script work?")
    args = parser.parse_args(argv)
    args.formats = args.formats or ["bf16", "int8-experts" if args.gpu else "int8"]
    if args.gpu and "int8" in args.formats:
        parser.error("--formats int8 is of the CPU: with --gpu take int8-experts")
    if unknown := set(args.formats) - set(FORMATS):
        parser.error(f"--formats: {', '.join(sorted(unknown))}: expected {', '.join(FORMATS)}")
    if args.depth is not None and not args.gpu:
        parser.error("--depth needs --gpu; otherwise decoding follows the prompt")
    return args


class LlamaCppParty:
    """llama.cpp in a separate process."""

    def __init__(self, args: argparse.Namespace, model: Path, lora: Path) -> None:
        settings: Row = {"model": str(model), "lora": str(lora), "threads": args.threads}
        settings |= {"context": context_of(args), "plain_buffers": args.plain_buffers}
        settings["gpu"] = args.gpu
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "KMP_"))}
        if args.llama_cpp is not None:
            environment["LLAMA_CPP_LIB_PATH"] = str(args.llama_cpp.resolve())
        script = Path(__file__).resolve().with_name("llama_cpp_party.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script), json.dumps(settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self.system: str = self._answer()["system"]

    def ask(self, do: str, **arguments: object) -> Any:
        assert self._process.stdin is not None
        print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            hint = "; with AMX, try --plain-buffers" if code == -signal.SIGILL else ""
            raise SystemExit(f"llama.cpp ended with exit code {code}{hint}")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


class KtrtParty:
    """ktrt, loaded like in its chat."""

    def __init__(self, args: argparse.Namespace, backend: str, bits: int | None) -> None:
        import ktrt

        self.session: Session = ktrt.load(
            {
                "model_name_or_path": str(args.out / "model"),
                "adapter_name_or_path": str(args.out / "adapter"),
                "kt_backend": backend, "kt_num_threads": args.threads, "ktrt_cache": False,
                "quantization_bit": bits,
            }
        )  # fmt: skip
        self._vocab = self.session.model.config.vocab_size

    def measure(self, lora: bool, prompt: int, new: int, seed: int) -> Row:
        """Returns seconds of a prompt of random ids, and the median of the tokens after it."""
        from ktrt.generate.loop import generate_step

        (self.session.adapters.on if lora else self.session.adapters.off)()
        draw = random.Random(seed)
        ids = [draw.randrange(2, self._vocab) for _ in range(prompt + new)]
        rest = iter(ids[prompt:])
        # The sampler returns given ids: the other party gets the same.
        steps = generate_step(self.session.new_cache(), ids[:prompt], lambda _: next(rest, 2))
        times = [time.perf_counter()]
        for _ in range(1 + new):  # the first one is the prompt
            next(steps)
            times.append(time.perf_counter())
        prefill, *each = (end - start for start, end in itertools.pairwise(times))
        return {"prefill": prefill, "decode": statistics.median(each) if new else None}

    def logits(self, lora: bool, ids: list[int]) -> Any:
        """Returns logits [ids, vocabulary] in float32, fed token by token."""
        import torch

        (self.session.adapters.on if lora else self.session.adapters.off)()
        cache = self.session.new_cache()
        return torch.stack([cache.forward([each]).float() for each in ids])

    def close(self) -> None:
        self.session.close()


def check(args: argparse.Namespace, ours: KtrtParty, theirs: LlamaCppParty, name: str) -> Row:
    """Returns relative differences of the logits of one text: between the parties, and by LoRA.

    They are medians over positions: a router near a tie must not decide.
    """
    import numpy as np
    import torch

    draw = random.Random(0)
    ids = [draw.randrange(2, args.vocab) for _ in range(CHECKED_TOKENS)]
    file = args.out / "logits.npy"
    found: Row = {}
    base: dict[str, Any] = {}
    for lora in (False, True):
        theirs.ask("logits", lora=lora, ids=ids, file=str(file))
        both = {"ktrt": ours.logits(lora, ids), "llama.cpp": torch.from_numpy(np.load(file))}
        key = "lora" if lora else "base"
        found[key] = difference(both["ktrt"], both["llama.cpp"])
        same = both["ktrt"].argmax(-1) == both["llama.cpp"].argmax(-1)
        found[f"{key}_same_token"] = float(same.float().mean())
        if lora:
            changes = {who: difference(each, base[who]) for who, each in both.items()}
            found["lora_changes"] = changes
        base = both
    file.unlink()
    limit = AGREEMENT[name]
    if max(found["base"], found["lora"]) > limit or min(changes.values()) < limit:
        raise SystemExit(
            f"{name}: the logits do not agree (expected below {limit}, and LoRA to change them by "
            f"more than that): {found}"
        )
    return found


def difference(found: Any, expected: Any) -> float:
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


def measure(args: argparse.Namespace, weights: Weights, name: str) -> Iterator[Row]:
    """Runs the check; yields one row per LoRA setting and phase."""
    from llama_cpp_model import write_gguf

    backend, bits, gguf_type = FORMATS[name]
    file = args.out / f"model-{gguf_type}.gguf"
    if not file.exists():
        write_gguf(file, weights, gguf_type)  # type: ignore[arg-type]
    theirs = LlamaCppParty(args, file, args.out / "lora.gguf")
    ours = KtrtParty(args, backend, bits)
    try:
        note(args, f"{name}: logits: {json.dumps(check(args, ours, theirs, name))}")
        samples = alternate(args, ours, theirs)
    finally:
        ours.close()
        theirs.close()
        if not args.keep:
            file.unlink()
    yield from rows_of(name, samples, weights.shape, gpu=args.gpu)


def alternate(args: argparse.Namespace, ours: KtrtParty, theirs: LlamaCppParty) -> Samples:
    """Returns (ktrt, llama.cpp) of each round, by LoRA and size; the first, unmeasured round warms
    up, with a GPU by everything that is measured."""
    from ktrt.engine.probes import BandwidthProbe

    sizes = sizes_of(args)
    samples: Samples = {(lora, size): [] for lora in (False, True) for size in sizes}
    probe = BandwidthProbe(args.threads)
    note(args, f"measuring; llama.cpp: {theirs.system}")
    for number in range(-1, args.rounds):
        for (lora, size), pairs in samples.items():
            todo = {"prompt": size.prompt, "new": size.new, "seed": number + 1}
            if number < 0 and not args.gpu:
                todo |= {"prompt": 32, "new": 4}
            order = (0, 1) if number % 2 else (1, 0)
            pair: list[Row] = [{}, {}]
            for party in order:
                time.sleep(SETTLE_SECONDS)
                one = ours.measure(lora, **todo) if party == 0 else None
                pair[party] = one or theirs.ask("measure", lora=lora, **todo)
                time.sleep(SETTLE_SECONDS)
                pair[party]["read"] = statistics.median(probe.rate() for _ in range(3))
            if number >= 0:
                pairs.append((pair[0], pair[1]))
    probe.close()
    note(args, f"measured {args.rounds} rounds")
    return samples


def note(args: argparse.Namespace, text: str) -> None:
    print(text, file=sys.stderr if args.json else sys.stdout, flush=True)


def prepare(args: argparse.Namespace) -> Weights:
    """Writes the Hugging Face side of the pair, and the adapter's GGUF."""
    from llama_cpp_model import Shape, make_pair, write_gguf_lora

    context = max(Shape.context, context_of(args))
    shape = Shape(args.layers, args.vocab, context=context)
    if args.small:
        shape = Shape(2, 512, 256, 128, 16, 4, 4, 2, 64, context=context)
        args.vocab = shape.vocab
    weights = make_pair(args.out, shape)
    write_gguf_lora(args.out / "lora.gguf", weights)
    return weights


def need_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("--gpu: PyTorch finds no GPU; without --gpu both run on the CPU")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.gpu:
        need_gpu()
    # As in a chat: OpenMP's idle threads would spin on the engine's cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from ktrt import _core
    from ktrt.engine.threads import num_threads

    args.threads = num_threads(args.threads or None)
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    args.out.mkdir(parents=True, exist_ok=True)
    weights = prepare(args)
    rows = [row for name in args.formats for row in measure(args, weights, name)]
    if args.json:
        settings = {"threads": args.threads, "gpu": args.gpu, "new": args.new}
        print(json.dumps({**settings, "kernels": _core.kernels(), "rows": rows}, indent=1))
    else:
        print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
