"""Rates of a GPU: only where there is one, with KTRT_TEST_GPU=1."""

import os

import pytest
import torch

from ktrt.engine.probes import gpu_rates

needs_gpu = pytest.mark.skipif(
    not os.environ.get("KTRT_TEST_GPU") or not torch.cuda.is_available(), reason="needs a GPU"
)


@needs_gpu
def test_rates_of_the_gpu() -> None:
    rates = gpu_rates()
    assert rates is not None
    assert 0 < rates.free <= rates.memory
    assert rates.read > rates.to_gpu > 1e8
    assert rates.from_gpu > 1e8


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_no_gpu() -> None:
    assert gpu_rates() is None
