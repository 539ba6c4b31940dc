"""Settings for all tests."""

import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from ktrt.utils.patches import Patches

# Before anything imports torch: its OpenMP threads would spin between operations, on the cores that
# the engine's threads and other processes want (ten times slower on a busy machine).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The references are computed on the CPU, and so is what is compared with them; KTRT_TEST_GPU=1 runs
# the tests that are about a GPU.
if os.environ.get("KTRT_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Before anything imports triton: its kernels run on the CPU, in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"
# Before anything imports huggingface_hub: a test that would download fails at once and everywhere.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tests that are about the cache of packed experts name a folder for it.
os.environ["KTRT_CACHE"] = "0"


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_arrives() -> Iterator[None]:
    """Ctrl-C interrupts this process and those that it starts, even if the runner ignores SIGINT
    (as shells do for what a script starts with `&`) or blocks it: both are inherited.
    """
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


_kv_sizes: dict[Any, Any] = {}


@pytest.fixture(scope="module", autouse=True)
def kv_sizes_once() -> Iterator[None]:
    """Loading a tiny model spends a third of its time on a forward that measures its KV cache, on
    the meta device: a process of tests runs one for each config (test_memory_plan.py calls
    ``kv_size`` itself).
    """
    inventory: Any = sys.modules.get("ktrt.loading.inventory")
    if inventory is None:
        yield
        return
    measure = inventory.kv_size

    def kv_size(skeleton: Any, expert_paths: list[str], dtype: Any) -> Any:
        config = skeleton.config.to_dict() | {"_name_or_path": ""}
        key = (type(skeleton), repr(config), *expert_paths, dtype)
        if key not in _kv_sizes:
            _kv_sizes[key] = measure(skeleton, expert_paths, dtype)
        return _kv_sizes[key]

    with Patches() as patches:
        patches.set(inventory, "kv_size", kv_size)
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models are slower with more threads of torch; two processes of tests share 2 cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def patches() -> Iterator[Patches]:
    """A list of patches, taken back after the test."""
    with Patches() as patches:
        yield patches
