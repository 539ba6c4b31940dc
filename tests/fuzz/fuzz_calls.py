"""``python tests/fuzz/fuzz_calls.py [SECONDS]``: makes random calls of the compiled module, in
processes that may crash. Prints the last calls of a crashed one, and its seed."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests/python"
sys.path[:0] = [str(ROOT), str(TESTS)]

from helpers import fake_cuda  # noqa: E402


def run(script: str, *arguments: object) -> bool:
    """Runs a script; returns whether it succeeded."""
    command = [sys.executable, "-X", "faulthandler", str(TESTS / "helpers" / script)]
    command += [str(each) for each in arguments]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": f"{ROOT}:{TESTS}"}, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace", timeout=1200,
        check=False,
    )  # fmt: skip
    if done.returncode != 0:
        print(done.stdout[-6000:], f"\n{script} {arguments}: exit code {done.returncode}")
    return done.returncode == 0


def main(seconds: float) -> int:
    end, rounds, failed = time.monotonic() + seconds, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        library = fake_cuda.build(Path(folder))
        while time.monotonic() < end:
            seed = random.randrange(1 << 30)
            failed += not run("core_calls.py", seed, 4000)
            if library is not None:
                failed += not run("handoff_calls.py", library, seed, 32)
            rounds += 1
    print(f"{rounds} rounds of 4,000 calls and 32 sequences, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 300))
