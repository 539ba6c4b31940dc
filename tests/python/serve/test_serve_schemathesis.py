"""Requests that the server's own description allows: every answer is as described, and none is a
failure of the server."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(sys.executable).with_name("schemathesis")
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance",
    "response_schema_conformance",
)  # fmt: skip

pytestmark = pytest.mark.skipif(
    shutil.which(COMMAND) is None, reason="schemathesis is not installed: pip install '.[test]'"
)


@pytest.mark.parametrize(
    "examples", [pytest.param(5, marks=pytest.mark.slow), pytest.param(200, marks=pytest.mark.long)]
)
def test_every_answer_is_as_described(server_url: str, tmp_path: Path, examples: int) -> None:
    command = [
        str(COMMAND), "run", f"{server_url}/openapi.json", "--checks", ",".join(CHECKS),
        "--max-examples", str(examples), "--seed", "1", "--no-color",
    ]  # fmt: skip
    # Its cache of examples would lie in the current directory.
    run = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=1500, check=False,
        env={
            **os.environ, "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(Path(__file__).parents[1]),
            "SCHEMATHESIS_HOOKS": "helpers.schemathesis_hooks",
        },
    )  # fmt: skip
    print(run.stdout[-3000:])
    assert run.returncode == 0, run.stdout[-12000:]
