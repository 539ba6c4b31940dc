"""Times the GPU's attention kernels alone, over contexts that no cache holds.

    python bench/gpu/attention.py [--json] [--contexts 1024 8192 32768] [--skip-prompts]

Decode: microseconds of one layer's attention within a CUDA graph, which runs it on as many
different caches as exceed the L2 cache; the share of the GPU's measured copy bandwidth that reading
the held keys and values once amounts to; and the error ‖found - exact‖ / ‖exact‖ against float32.
Prompts: the last tokens of a context, with torch's own attention next to it where there is one.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from ktrt.layers.form import AttentionForm
from ktrt.layers.gpu.decode import Operands, attend
from ktrt.layers.gpu.prefill import attend_prompt

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_CACHES = 256 << 20


@dataclass(frozen=True)
class Shape:
    """Heads, groups and sizes; ``rope`` numbers of a key are shared by all heads: of latents in
    decode steps, and of prompts' expanded keys. ``window``: with sinks."""

    name: str
    heads: int
    groups: int
    size: int
    value: int
    rope: int = 0
    window: int = 0

    def form(self) -> AttentionForm:
        scaling = (self.size + self.rope) ** -0.5
        if not self.window:
            return AttentionForm(scaling)
        return AttentionForm(scaling, self.window, 0.0, _random(self.heads))

    def operands(self, positions: int, queries: int) -> Operands:
        heads, size = self.heads, self.size
        query = _random(1, heads, queries, size)
        key = _random(1, self.groups, positions, size)
        latents = self.value == size and self.groups == 1
        value = key if latents else _random(1, self.groups, positions, self.value)
        if not self.rope:
            return Operands(query, key, value)
        rest = _random(1, 1, positions, self.rope).expand(-1, self.groups, -1, -1)
        return Operands(query, key, value, _random(1, heads, queries, self.rope), rest)


DECODE = (
    Shape("grouped queries 32/4/128", 32, 4, 128, 128),
    Shape("gpt-oss 64/8/64", 64, 8, 64, 64),
    Shape("gpt-oss 64/8/64, window 128, sinks", 64, 8, 64, 64, window=128),
    Shape("V2-Lite latents, 16 heads", 16, 1, 512, 512, rope=64),
    Shape("V3 latents, 128 heads", 128, 1, 512, 512, rope=64),
)
PROMPTS = (
    Shape("grouped queries 32/4/128", 32, 4, 128, 128),
    Shape("gpt-oss 64/8/64, window 128, sinks", 64, 8, 64, 64, window=128),
    Shape("V2-Lite expanded, 16 heads", 16, 16, 128, 128, rope=64),
)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def exact(operands: Operands, form: AttentionForm, positions: int) -> torch.Tensor:
    """Returns attention [1, n, heads, value] in float32 over the first ``positions``."""
    query, key, value = (x.float() for x in operands.joined())
    n, repeats = query.shape[2], query.shape[1] // key.shape[1]
    key, value = (x[:, :, :positions].repeat_interleave(repeats, 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * form.scaling
    at = torch.arange(positions, device=key.device)
    distance = at[-n:, None] - at
    hidden = (distance < 0) | (distance >= (form.window or positions))
    scores = scores.masked_fill(hidden, float("-inf"))
    if form.sinks is not None:
        sinks = form.sinks.float().view(1, -1, 1, 1).expand(-1, -1, n, 1)
        scores = torch.cat([scores, sinks], -1)
    return (scores.softmax(-1)[..., :positions] @ value).transpose(1, 2)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def milliseconds(call: Callable[[], Any], repeats: int = 15) -> float:
    """Returns the median time of ``call`` on the GPU."""
    times = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(median(times[2:]))


def copy_bandwidth() -> float:
    """Returns bytes per second, read and written, of a copy within the GPU."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) * 1e3


def time_decode(shape: Shape, context: int, bandwidth: float) -> dict[str, Any]:
    """Times one token's attention after ``context`` - 1 others."""
    form, capacity = shape.form(), context + 256
    held = min(context, shape.window or context)
    read = 2 * held * shape.groups * shape.size * (1 if shape.rope else 2) + 2 * held * shape.rope
    count = max(2, min(64, _CACHES // read))
    caches = [shape.operands(capacity, 1) for _ in range(count)]
    lengths = torch.tensor([context], device="cuda")
    found = attend(caches[0], lengths, form)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for each in caches:
            attend(each, lengths, form)
    took = milliseconds(graph.replay) / count
    return {
        "shape": shape.name, "context": context, "us": took * 1e3,
        "share": read / (took * 1e-3) / bandwidth,
        "error": error(found, exact(caches[0], form, context)),
    }  # fmt: skip


def time_prompt(shape: Shape, tokens: int, context: int) -> dict[str, Any]:
    """Times the last ``tokens`` of ``context``."""
    form, operands = shape.form(), shape.operands(context, tokens)
    took = milliseconds(lambda: attend_prompt(operands, form), 5)
    last = [x if x is None else x[:, :, -64:] for x in (operands.query, operands.query_rest)]
    assert last[0] is not None
    few = Operands(last[0], operands.key, operands.value, last[1], operands.key_rest)
    found = attend_prompt(operands, form)[:, -64:]
    seen = (context - tokens) * tokens + tokens * tokens // 2
    if shape.window:
        seen = min(seen, tokens * shape.window)
    work = 2 * shape.heads * seen * (shape.size + shape.rope + shape.value)
    result = {
        "shape": shape.name, "tokens": tokens, "context": context, "ms": took,
        "tflops": work / took / 1e9, "error": error(found, exact(few, form, context)),
    }  # fmt: skip
    if tokens == context and not shape.window:
        query, key, value = operands.joined()
        result["torch ms"] = milliseconds(
            lambda: scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=True, scale=form.scaling
            ), 5,
        )  # fmt: skip
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--contexts", type=int, nargs="*", default=[1024, 8192, 32768])
    parser.add_argument("--skip-prompts", action="store_true")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    steps = [time_decode(shape, n, bandwidth) for shape in DECODE for n in args.contexts]
    prompts = [] if args.skip_prompts else [
        time_prompt(shape, tokens, context)
        for shape in PROMPTS for tokens, context in ((8192, 8192), (2048, 32768))
    ]  # fmt: skip
    if args.json:
        name = torch.cuda.get_device_name()
        print(
            json.dumps(
                {"device": name, "bandwidth": bandwidth, "decode": steps, "prompts": prompts}
            )
        )
        return
    print(f"{torch.cuda.get_device_name()}, copies at {bandwidth / 1e12:.2f} TB/s")
    for each in steps:
        print(
            f"{each['shape']:36} {each['context']:6}  {each['us']:7.1f} us  "
            f"{each['share']:6.1%} of the copy bandwidth  error {each['error']:.1e}"
        )
    for each in prompts:
        torch_ms = f"  torch {each['torch ms']:.2f} ms" if "torch ms" in each else ""
        print(
            f"{each['shape']:36} {each['tokens']:5} of {each['context']:6}  {each['ms']:7.2f} ms  "
            f"{each['tflops']:5.0f} TFLOP/s  error {each['error']:.1e}{torch_ms}"
        )


if __name__ == "__main__":
    main()
