"""Progress of long operations: a bar on a terminal, silence in files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pexpect

from ktrt.utils.progress import byte_progress

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).resolve().parents[3]
CODE = """
import time
from ktrt.utils.progress import byte_progress
with byte_progress("Packing experts", 4 * 10**9) as advance:
    for _ in range(8):
        advance(0.4 * 10**9)
        time.sleep(0.25)
print("done")
"""


def test_nothing_is_written_to_a_file(capfd: pytest.CaptureFixture[str]) -> None:
    with byte_progress("Packing", 100) as advance:
        advance(50)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_a_terminal_shows_bytes_speed_and_time_left() -> None:
    child = pexpect.spawn(
        sys.executable, ["-c", CODE], cwd=str(ROOT), encoding="utf-8", dimensions=(24, 120)
    )
    child.expect(r"Packing experts.*[\d.]+/4\.0 GB.*[\d.]+ GB/s.*0:00:0\d", timeout=60)
    child.expect("done")
    child.wait()
