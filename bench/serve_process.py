"""A separate process that serves, and the memory that it takes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Self

import yaml

from ktrt import _core

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parents[1]
_START = 600.0


class ServerProcess:
    """``ktrt serve`` of a model with adapters on a free port, as a context. Its log is a file of
    ``folder``; ``rows``: the answers that run at once."""

    def __init__(
        self, folder: Path, model: Path, adapters: Mapping[str, Path], rows: int, *,
        settings: Mapping[str, object] | None = None,
    ) -> None:  # fmt: skip
        self.host, self.port = "127.0.0.1", _free_port()
        self._log = folder / "server.log"
        config = folder / "serve.yaml"
        values: dict[str, object] = {
            "model_name_or_path": str(model), "template": "deepseek", "do_sample": False,
            "adapters": {name: str(path) for name, path in adapters.items()} or None,
            # With AMX the number of rows would pick the kernel, and with it the last bits.
            "kt_fixed_kernels": _core.isa() == "amx" or None, **(settings or {}),
        }  # fmt: skip
        kept = {name: value for name, value in values.items() if value is not None}
        config.write_text(yaml.safe_dump(kept), encoding="utf-8")
        command = [sys.executable, "-m", "ktrt.serve", str(config), "--port", str(self.port)]
        environment = {
            **os.environ, "MAX_CONCURRENT": str(rows), "API_MODEL_NAME": "base",
            "KTRT_MAX_WAITING": "256", "KTRT_ACCESS_LOG": "false",
        }  # fmt: skip
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    @property
    def pid(self) -> int:
        """The process' number."""
        return self._process.pid

    def __enter__(self) -> Self:
        end = time.monotonic() + _START
        while time.monotonic() < end and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://{self.host}:{self.port}/ready", timeout=5):
                    return self
            except OSError:
                time.sleep(0.2)
        self.__exit__()
        raise SystemExit(f"the server did not start:\n{self.log()}")

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def log(self) -> str:
        """Returns the end of the log."""
        return self._log.read_text("utf-8", "replace")[-4000:]


def resident_bytes(pid: int) -> int:
    """Returns the resident memory of a process that is not mapped from files."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
