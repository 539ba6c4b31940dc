"""docs/serving.md lists every endpoint, setting and metric."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from ktrt.serve.settings import ServeSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "serving.md").read_text("utf-8")


def test_endpoints(serve_app: FastAPI) -> None:
    listed = set(re.findall(r"`(?:GET|POST) (/\S*)`", TEXT))
    paths = {re.sub(r"(:path)?}", "}", path) for path in serve_app.openapi()["paths"]}
    assert listed - {"/"} == paths


def test_settings() -> None:
    rows = dict(re.findall(r"^\| `--([\w-]+)` \| `(\w+)` \|", TEXT, re.MULTILINE))
    assert rows == {
        each.name.replace("_", "-"): each.metadata["variable"] for each in fields(ServeSettings)
    }


def test_metrics(server_url: str) -> None:
    shown = httpx.get(f"{server_url}/metrics").text
    names = set(re.findall(r"^# TYPE ((?:vllm|ktrt):\w+?)(?:_total)? ", shown, re.MULTILINE))
    names = {name for name in names if not name.endswith("_created")}
    listed = set(re.findall(r"`((?:vllm|ktrt):\w+)`", TEXT))
    assert names <= listed, names - listed
