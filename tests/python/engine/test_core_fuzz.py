"""Random calls of the compiled module and of the hand-off, in separate processes.

A crash or a hang fails the test and prints the last calls. ``make fuzz`` runs more of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import fake_cuda

TESTS = Path(__file__).resolve().parents[1]
SEEDS = (1, 2)
SEQUENCES = 12


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": f"{TESTS.parents[1]}:{TESTS}"}
    command = [sys.executable, "-X", "faulthandler", str(TESTS / "helpers" / script)]
    return subprocess.Popen(
        command + [str(each) for each in arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", cwd=TESTS.parents[1],
    )  # fmt: skip


def check(process: subprocess.Popen[str]) -> None:
    try:
        output, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        pytest.fail("a call hangs:\n" + output[-4000:])
    assert process.returncode == 0, f"{process.returncode}\n{output[-6000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("calls", [400, pytest.param(2000, marks=pytest.mark.long)])
def test_random_calls(tmp_path: Path, calls: int) -> None:
    library = fake_cuda.build(tmp_path)
    processes = [start("core_calls.py", seed, calls) for seed in SEEDS]
    if library is not None:
        processes.append(start("handoff_calls.py", library, 0, SEQUENCES))
    try:
        for process in processes:
            check(process)
    finally:
        for process in processes:
            process.kill()
