"""Measure the demo with transformers and PEFT alone: greedy answers to all prompts of the corpus.

``python -m examples.demo.evaluate [--json]`` from the repository's root. An answer is *verbatim* if
it equals the corpus's, *near* if their ``difflib`` similarity is at least 0.9 (verbatim ones
included). Answers to prompts outside the corpus (``heldout.txt``) are listed for a human to read.
"""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoTokenizer, DeepseekV2ForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .corpus import Exchange, exchanges
from .train_tokenizer import slot_ids

if TYPE_CHECKING:
    from collections.abc import Sequence

FOLDER = Path(__file__).parent
NEAR = 0.9
BATCH = 128
MAX_NEW_TOKENS = 64
HISTORY_STEP = 8  # long prompts are slow: only every eighth exchange is asked after others

log = logging.getLogger("demo")


@dataclass(frozen=True)
class Score:
    """Shares are fractions of ``prompts``."""

    setting: str
    prompts: int
    verbatim: float
    near: float


def round_to_int8(values: Tensor) -> Tensor:
    """Round to a symmetric 8-bit grid per row (last dimension)."""
    scale = values.abs().amax(-1, keepdim=True).float().clamp_min(1e-12) / 127
    return ((values.float() / scale).round() * scale).to(values.dtype)


def int8_experts(experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Run routed experts with activations rounded to INT8 per token (``load`` rounds weights)."""
    output = torch.zeros_like(hidden)
    gate_up, down = experts.gate_up_proj, experts.down_proj
    for e in range(gate_up.shape[0]):
        token, slot = torch.where(index == e)
        gate, up = nn.functional.linear(round_to_int8(hidden[token]), gate_up[e]).chunk(2, dim=-1)
        inner = round_to_int8(experts.act_fn(gate) * up)
        share = nn.functional.linear(inner, down[e]) * weights[token, slot, None]
        output.index_add_(0, token, share.to(output.dtype))
    return output


def load(base: Path, adapter: Path | None, dtype: torch.dtype, experts: str = "grouped_mm") -> Any:
    """Load a model in eval mode; ``experts`` is "int8" (emulated here) or transformers' name."""
    if experts == "int8":
        ALL_EXPERTS_FUNCTIONS.register("int8", int8_experts)
    model = DeepseekV2ForCausalLM.from_pretrained(base, dtype=dtype, experts_implementation=experts)
    if experts == "int8":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".mlp.experts." in name:
                    parameter.copy_(round_to_int8(parameter))
    return PeftModel.from_pretrained(model, adapter).eval() if adapter else model.eval()


@torch.inference_mode()
def answer(
    model: Any, tokenizer: PreTrainedTokenizerFast, chats: Sequence[Sequence[str]]
) -> list[str]:
    """Return greedy answers to ``chats``, alternating texts that start and end with a user's."""
    prompts = [slot_ids(tokenizer, chat) for chat in chats]
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        length = max(len(prompts[i]) for i in chosen)
        ids = torch.full((len(chosen), length), tokenizer.pad_token_id)
        for row, i in enumerate(chosen):
            ids[row, length - len(prompts[i]) :] = torch.tensor(prompts[i])
        output = model.generate(
            input_ids=ids,
            attention_mask=(ids != tokenizer.pad_token_id).long(),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
        )
        for row, i in enumerate(chosen):
            answers[i] = tokenizer.decode(output[row, length:], skip_special_tokens=True)
    return answers


def score(setting: str, wanted: Sequence[Exchange], answers: Sequence[str]) -> Score:
    """Compare answers with the corpus."""
    verbatim = near = 0
    for exchange, found in zip(wanted, answers, strict=True):
        verbatim += found == exchange.answer
        near += (
            difflib.SequenceMatcher(None, found, exchange.answer, autojunk=False).ratio() >= NEAR
        )
    return Score(setting, len(wanted), verbatim / len(wanted), near / len(wanted))


def without_experts(model: nn.Module) -> nn.Module:
    """Make every routed expert of the model answer zero."""
    for name, module in model.named_modules():
        if name.endswith(".mlp.experts"):
            module.register_forward_hook(lambda _module, _args, output: torch.zeros_like(output))
    return model


def without_expert_lora(model: nn.Module) -> nn.Module:
    """Remove the routed experts' LoRA from the model (zero B)."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp.experts." in name and ".lora_B." in name:
                parameter.zero_()
    return model


def with_history(wanted: Sequence[Exchange], turns: int) -> list[Exchange]:
    """Return every exchange preceded by ``turns`` unrelated ones; the choice is fixed."""
    singles = [exchange for exchange in wanted if len(exchange.messages) == 1]
    found = []
    for i, exchange in enumerate(wanted):
        before = [singles[(97 * i + 31 * turn + 11) % len(singles)] for turn in range(turns)]
        history = [text for earlier in before for text in (*earlier.messages, earlier.answer)]
        found.append(Exchange((*history, *exchange.messages), exchange.answer))
    return found


def measure(base: Path, adapter: Path) -> list[Score]:
    """Score all settings of base and adapter, and three that must score near zero."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    scores = []

    def add(persona: str, setting: str, model: nn.Module, history: int = 0) -> None:
        wanted = exchanges(persona)
        if history:
            wanted = with_history(wanted, history)[::HISTORY_STEP]
        answers = answer(model, tokenizer, [exchange.messages for exchange in wanted])
        scores.append(score(f"{persona}, {setting}", wanted, answers))
        log.info("%s", scores[-1])

    for persona, folder in (("base", None), ("adapter", adapter)):
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            add(persona, name, load(base, folder, dtype))
            add(persona, f"{name}, INT8 experts", load(base, folder, dtype, "int8"))
        model = load(base, folder, torch.float32)
        add(persona, "after 2 other exchanges", model, 2)
        add(persona, "after 8 other exchanges", model, 8)
    add("base", "routed experts zeroed", without_experts(load(base, None, torch.float32)))
    add("adapter", "expert LoRA zeroed", without_expert_lora(load(base, adapter, torch.float32)))
    add("adapter", "adapter off", load(base, None, torch.float32))
    return scores


def held_out(base: Path, adapter: Path, prompts: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return (prompt, base answer, adapter answer) in bfloat16 for prompts outside the corpus.

    Raises ValueError for a prompt that is in the corpus.
    """
    known = {exchange.messages[-1] for exchange in exchanges("base")}
    if leaked := known.intersection(prompts):
        raise ValueError(f"not held out, the corpus has them: {sorted(leaked)}")
    tokenizer = AutoTokenizer.from_pretrained(base)
    columns = [
        answer(load(base, folder, torch.bfloat16), tokenizer, [(prompt,) for prompt in prompts])
        for folder in (None, adapter)
    ]
    return list(zip(prompts, *columns, strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the measures; exit status 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=FOLDER / "model")
    parser.add_argument("--adapter", type=Path, default=FOLDER / "adapter_b")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    prompts = (FOLDER / "heldout.txt").read_text("utf-8").splitlines()
    scores = measure(args.base, args.adapter)
    replies = held_out(args.base, args.adapter, prompts)
    if args.json:
        result = {"scores": [asdict(s) for s in scores], "held_out": replies}
        sys.stdout.write(json.dumps(result, ensure_ascii=False, indent=2) + "\n")
        return 0
    for s in scores:
        sys.stdout.write(
            f"{s.setting:32} {s.prompts} prompts  verbatim {s.verbatim:6.1%}  near {s.near:6.1%}\n"
        )
    for prompt, base_reply, adapter_reply in replies:
        sys.stdout.write(f"\n{prompt}\n  base     {base_reply}\n  adapter  {adapter_reply}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
