"""lm_eval's ``local-completions`` against the server: log-likelihoods as transformers computes them
in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="needs `pip install '.[lm-eval]'`")

from lm_eval.tasks import TaskManager

ROOT = Path(__file__).resolve().parents[3]
MODEL = ROOT / "examples" / "demo" / "model"
# BF16 keeps 8 bits of an activation. The demo's logits differ by 0.3 % in norm; its log
# probabilities are up to 25, and a continuation has up to 20 tokens, whose errors mostly cancel.
ERROR_PER_TOKEN = 0.06

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("one_thread")]


def log_likelihoods(kind: str, /, **arguments: Any) -> list[tuple[float, bool, int]]:
    """Returns (log-likelihood, whether it is the greedy one, length of the text) of each choice."""
    results = lm_eval.simple_evaluate(
        model=kind, model_args=arguments, tasks=["ktrt_demo"], log_samples=True, bootstrap_iters=0,
        task_manager=TaskManager(
            include_path=str(Path(__file__).parent / "lm_eval_task"), include_defaults=False
        ),
    )  # fmt: skip
    samples = sorted(results["samples"]["ktrt_demo"], key=lambda sample: sample["doc_id"])
    found = []
    for sample in samples:
        for response, choice in zip(sample["resps"], sample["doc"]["choices"], strict=True):
            value, greedy = response[0]
            found.append((float(value), str(greedy) == "True", len(choice)))
    return found


@pytest.fixture(scope="module")
def expected() -> list[tuple[float, bool, int]]:
    """transformers in float32."""
    return log_likelihoods(
        "hf", pretrained=str(MODEL), dtype="float32", device="cpu", add_bos_token=False,
        batch_size=1,
    )  # fmt: skip


@pytest.mark.parametrize(("tokenizer", "batch"), [("huggingface", 8), ("remote", 1)])
def test_log_likelihoods(
    server_url: str, expected: list[tuple[float, bool, int]], tokenizer: str, batch: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(ROOT)
    found = log_likelihoods(
        "local-completions", model="demo", base_url=f"{server_url}/v1/completions",
        tokenizer=str(MODEL), tokenizer_backend=tokenizer, batch_size=batch, num_concurrent=2,
        max_length=512, max_retries=1,
    )  # fmt: skip
    assert len(found) == len(expected) == 24
    worst = 0.0
    for (value, greedy, length), (wanted, best, _) in zip(found, expected, strict=True):
        worst = max(worst, abs(value - wanted) / length)
        assert abs(value - wanted) <= ERROR_PER_TOKEN * length, (value, wanted, length)
        assert greedy == best or abs(wanted) < 1.0
    print(f"largest difference: {worst:.4f} per character")
