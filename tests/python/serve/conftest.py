"""A real server over the demo model, one for all tests of a process."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("fastapi", reason="the server needs `pip install '.[serve]'`")
pytest.importorskip("uvicorn", reason="the server needs `pip install '.[serve]'`")

import ktrt
from ktrt.serve.settings import ServeSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    import anthropic
    import openai
    from fastapi import FastAPI

    from ktrt.session import Session

DEMO = Path(__file__).resolve().parents[3] / "examples" / "demo"
# The base model's name in these tests; the adapters are adapter_a and adapter_b.
BASE = "demo"


@contextmanager
def serving_in_a_thread(app: FastAPI, settings: ServeSettings) -> Iterator[str]:
    """Serves an application as ``ktrt serve`` does, on a free port; yields ``http://HOST:PORT``."""
    from ktrt.serve.uvicorn_server import HttpServer, bind

    listener = bind(replace(settings, host="127.0.0.1", port=0))
    server = HttpServer(app, settings)
    thread = threading.Thread(target=server.serve_on, args=(listener,), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(30)
        listener.close()
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def serving() -> Callable[[FastAPI, ServeSettings], AbstractContextManager[str]]:
    """``serving_in_a_thread``, for tests with an application or settings of theirs."""
    return serving_in_a_thread


@pytest.fixture(scope="session")
def serve_session() -> Iterator[Session]:
    """The demo model with both adapters."""
    adapters = {name: str(DEMO / name) for name in ("adapter_a", "adapter_b")}
    with ktrt.load(DEMO / "chat.yaml", adapter_name_or_path=None, adapters=adapters) as session:
        yield session


@pytest.fixture(scope="session")
def serve_app(serve_session: Session) -> FastAPI:
    """The application that ``server_url`` serves."""
    from ktrt.serve.app import create_app

    return create_app(serve_session, ServeSettings(model_name=BASE))


@pytest.fixture(scope="session")
def server_url(serve_app: FastAPI) -> Iterator[str]:
    """The address of a server over the demo model."""
    with serving_in_a_thread(serve_app, ServeSettings(model_name=BASE)) as url:
        yield url


@pytest.fixture(scope="session")
def openai_client(server_url: str) -> Iterator[openai.OpenAI]:
    """OpenAI's own client, without its silent retries."""
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def anthropic_client(server_url: str) -> Iterator[anthropic.Anthropic]:
    """Anthropic's own client, without its silent retries."""
    anthropic = pytest.importorskip("anthropic")
    with anthropic.Anthropic(base_url=server_url, api_key="none", max_retries=0) as client:
        yield client
