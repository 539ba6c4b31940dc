"""ktrt.bench: sizes, tables, and whole runs on the demo; the adapter's switch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import ktrt
from ktrt.bench import __main__ as bench
from ktrt.bench.__main__ import Sizes
from ktrt.bench.report import markdown, plot
from ktrt.errors import ConfigError, KtrtError

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "examples/demo/chat.yaml"


def row(phase: str, tokens: int, adapter: bool, seconds: float, **more: object) -> dict[str, Any]:
    rate = (tokens if phase == "prefill" else 1) / seconds
    return {
        "phase": phase, "tokens": tokens, "adapter": adapter, "seconds": seconds,
        "tokens_per_s": rate, "of_limit": 0.8, "adapter_cost": 0.1 if adapter else None,
        "read_bandwidth": 40e9, **more,
    }  # fmt: skip


REPORT: dict[str, Any] = {
    "model": "m", "adapter": "a", "kt_backend": "AMXBF16", "threads": 2, "gpu": None,
    "kernels": {"gemm": "amx", "elementwise": "avx512"},
    "rows": [
        row("prefill", 32, True, 0.11), row("prefill", 32, False, 0.1),
        row("decode", 8, True, 0.022), row("decode", 8, False, 0.02, of_limit=None),
    ],
    "first_token": {
        "cold": {"seconds": 0.5, "prompt_tokens": 300, "reused_tokens": 3},
        "reuse": {"seconds": 0.05, "prompt_tokens": 320, "reused_tokens": 300},
    },
    "memory": {"resident": 10**9, "peak_resident": 2 * 10**9, "gpu_peak": None},
}  # fmt: skip


def test_the_table() -> None:
    text = markdown(REPORT)
    assert "| prefill 32 | 320.0 | 290.9 | +10.0% | 80% | 40.0 |" in text
    assert "| decode 8 | 50.0 | 45.5 | +10.0% | – | 40.0 |" in text
    assert "First token, second turn: 50 ms (320 tokens, 300 reused)" in text
    assert "Memory: 1.00 GB, at most 2.00" in text


def test_the_table_without_an_adapter() -> None:
    rows = [each for each in REPORT["rows"] if not each["adapter"]]
    text = markdown({**REPORT, "rows": rows, "adapter": ""})
    assert "| prefill 32 | 320.0 | – | – | 80% | 40.0 |" in text
    assert "no adapter" in text


def test_sizes_that_fit_stay() -> None:
    assert Sizes().within(4096) == Sizes()
    assert Sizes().within(2049).prefill == (32, 512, 2048)


def test_sizes_are_cut_to_the_context() -> None:
    sizes = Sizes((32, 512, 2048), decode=128).within(100)
    assert (sizes.prefill, sizes.decode) == ((32, 64), 67)
    assert "prefill 2048 does not fit the model's context of 100 tokens: 64 instead" in sizes.notes
    assert Sizes().within(2048).prefill == (32, 512, 1024)
    with pytest.raises(ConfigError, match="too few"):
        Sizes().within(33)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run on the demo with its adapter."""
    arguments = [str(DEMO), "ktrt_cache=false", "--json", "--prefill", "8,4096"]
    arguments += ["--decode", "5", "--rounds", "2"]
    with pytest.MonkeyPatch.context() as patch:
        shown: list[str] = []
        patch.setattr("builtins.print", lambda *a, **k: shown.append(str(a[0])))
        assert bench.main(arguments) == 0
    found: dict[str, Any] = json.loads(shown[-1])
    assert any("4096 does not fit" in line for line in shown[:-1])
    return found


def test_a_run_on_the_demo(report: dict[str, Any]) -> None:
    cases = {(each["phase"], each["tokens"], each["adapter"]) for each in report["rows"]}
    assert cases == {
        (phase, tokens, adapter)
        for phase, tokens in (("prefill", 8), ("prefill", 1024), ("decode", 5))
        for adapter in (False, True)
    }
    for each in report["rows"]:
        assert len(each["samples"]) == 2
        assert each["seconds"] > 0
        assert each["read_bandwidth"] > 1e8
        assert (each["adapter_cost"] is not None) == each["adapter"]
        assert each["of_limit"] is None or 0 < each["of_limit"] < 2
    # With AMX, one token's rows have a separate kernel.
    assert report["kernels"].keys() & {"gemm", "gemm_few_rows"}
    assert report["memory"]["peak_resident"] >= report["memory"]["resident"] > 10**7


def test_the_second_turn_reuses_the_first(report: dict[str, Any]) -> None:
    cold, reuse = report["first_token"]["cold"], report["first_token"]["reuse"]
    assert cold["reused_tokens"] < 30
    assert reuse["reused_tokens"] > 0.9 * cold["prompt_tokens"]
    assert reuse["prompt_tokens"] - reuse["reused_tokens"] < cold["prompt_tokens"] / 2


def test_without_an_adapter_there_is_one_column(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(DEMO), "adapter_name_or_path=", "ktrt_cache=false"]
    assert bench.main([*arguments, "--prefill", "4", "--decode", "2", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\| prefill 4 \| [\d.]+ \| – \| – \|", out)
    assert "no adapter" in out


def test_the_switch_is_the_base_model_and_back() -> None:
    ids = torch.arange(5, 15)[None]
    with torch.inference_mode():
        with ktrt.load(DEMO, ktrt_cache=False, adapter_name_or_path="") as session:
            base = session.model(ids).logits
            assert not session.adapters.names
            session.adapters.off()
            assert torch.equal(session.model(ids).logits, base)
        with ktrt.load(DEMO, ktrt_cache=False) as session:
            assert session.adapters.names
            adapted = session.model(ids).logits
            assert not torch.allclose(adapted, base, atol=0.1)
            session.adapters.off()
            assert torch.equal(session.model(ids).logits, base)
            session.adapters.on()
            assert torch.equal(session.model(ids).logits, adapted)
            assert not any(p.requires_grad for p in session.model.parameters())


def test_plot_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error comes before the model is loaded."""
    monkeypatch.setattr("ktrt.bench.report.importlib.util.find_spec", lambda _: None)
    assert bench.main(["/nowhere.yaml", "--plot", "out.png"]) == 2
    assert "pip install 'ktrt[plot]'" in capsys.readouterr().err


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot(REPORT, str(tmp_path / "out.png"))
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(KtrtError, match="cannot be written"):
        plot(REPORT, str(tmp_path / "no" / "out.png"))


@pytest.mark.parametrize("wrong", [["--prefill", "a"], ["--decode", "0"], ["--rounds", "0"]])
def test_arguments_that_are_wrong(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.main([str(DEMO), *wrong])
    assert caught.value.code == 2


def test_a_configuration_that_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["/nowhere/config.yaml"]) == 2
    assert "error:" in capsys.readouterr().err
