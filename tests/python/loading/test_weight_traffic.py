"""Bytes that a token reads of the demo, counted again from shapes."""

from pathlib import Path
from typing import Any

import pytest

import ktrt

DEMO = Path(__file__).resolve().parents[3] / "examples" / "demo"


# The demo's experts are 88 wide, which packing pads.
INNER = {"bf16": 96, "int8": 128}


def counted(model: Any, expert: int, *, torch_lora: bool = False) -> int:
    """From the configuration and the names of the parameters. ``expert``: bytes of one."""
    config = model.config
    layers = config.num_hidden_layers - config.first_k_dense_replace
    total: int = layers * config.num_experts_per_tok * expert
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            total += config.hidden_size * parameter.element_size()
        elif ".lora_" not in name or torch_lora:
            total += parameter.numel() * parameter.element_size()
    return total


def bf16_expert(hidden_size: int, rank: int = 0) -> int:
    inner = INNER["bf16"]
    # A of gate and up (one serves both) and B of down; A of down, B of gate and of up.
    lora = rank * (2 * hidden_size + 3 * inner)
    return 2 * (3 * hidden_size * inner + lora)


@pytest.fixture(scope="module")
def session() -> Any:
    with ktrt.load(DEMO / "chat.yaml") as session:
        yield session


def test_weights_without_lora(session: Any) -> None:
    session.adapters.off()
    expert = bf16_expert(session.model.config.hidden_size)
    assert session.bytes_per_token == counted(session.model, expert)


def test_the_adapter_that_acts_is_counted(session: Any) -> None:
    session.adapters.on()
    found = session.bytes_per_token
    expert = bf16_expert(session.model.config.hidden_size, rank=8)
    # The engine pads a rank to its vectors.
    assert found == pytest.approx(counted(session.model, expert, torch_lora=True), rel=0.03)
    assert found > counted(session.model, bf16_expert(192), torch_lora=True)
    session.adapters.load("other", DEMO / "adapter_a")
    assert session.bytes_per_token == found
    session.adapters.unload("other")


def test_int8_experts_and_their_scales() -> None:
    with ktrt.load(DEMO / "chat.yaml", kt_backend="AMXInt8", adapter_name_or_path="") as small:
        hidden_size = small.model.config.hidden_size
        codes = 2 * 96 * hidden_size + hidden_size * INNER["int8"]
        scales = 4 * (2 * 96 + hidden_size)
        assert small.bytes_per_token == counted(small.model, codes + scales)
