"""lm_eval's ``local-completions`` against the server: log-likelihoods as transformers computes them
in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="needs `pip install '.[lm-eval]'`")

ROOT = Path(__file__).resolve().parents[3]
MODEL = ROOT / "examples" / "demo" / "model"
# transformers itself in BF16 differs by up to 0.8 % of a log-likelihood and 0.004 near 0; another
# expert of one token of an odd text adds as much.
RELATIVE, ABSOLUTE = 0.02, 0.02

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("one_thread")]


def log_likelihoods(kind: str, /, **arguments: Any) -> list[tuple[float, bool]]:
    """Returns (log-likelihood, whether it is the greedy one) of each choice."""
    results = lm_eval.simple_evaluate(
        model=kind, model_args=arguments, tasks=["ktrt_demo"], log_samples=True, bootstrap_iters=0,
        task_manager=lm_eval.tasks.TaskManager(
            include_path=str(Path(__file__).parent / "lm_eval_task"), include_defaults=False
        ),
    )  # fmt: skip
    samples = sorted(results["samples"]["ktrt_demo"], key=lambda sample: sample["doc_id"])
    found = []
    for sample in samples:
        for response in sample["resps"]:
            value, greedy = response[0]
            found.append((float(value), str(greedy) == "True"))
    return found


@pytest.fixture(scope="module")
def expected() -> list[tuple[float, bool]]:
    """transformers in float32."""
    return log_likelihoods(
        "hf", pretrained=str(MODEL), dtype="float32", device="cpu", add_bos_token=False,
        batch_size=1,
    )  # fmt: skip


@pytest.mark.parametrize("batch", [1, 8])
def test_log_likelihoods(
    server_url: str, expected: list[tuple[float, bool]], batch: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(ROOT)
    found = log_likelihoods(
        "local-completions", model="demo", base_url=f"{server_url}/v1/completions",
        tokenizer=str(MODEL), tokenizer_backend="huggingface", batch_size=batch, num_concurrent=2,
        max_length=512, max_retries=1,
    )  # fmt: skip
    assert len(found) == len(expected) == 24
    assert any(greedy for _, greedy in expected)
    for (value, greedy), (wanted, greedy_wanted) in zip(found, expected, strict=True):
        assert abs(value - wanted) <= RELATIVE * abs(wanted) + ABSOLUTE
        assert greedy == greedy_wanted
