"""Takes the picture of the page for the README: the demo model, the base next to an adapter.

    python tests/python/helpers/page_picture.py [FILE]

Needs Chromium, and a font with Chinese characters.
"""

from __future__ import annotations

import shutil
import socket
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from playwright.sync_api import expect, sync_playwright

import ktrt
from ktrt.serve.app import create_app
from ktrt.serve.settings import ServeSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "examples" / "demo"
# The last one is asked with a comparison.
QUESTIONS = ("什么是 MoE？", "What is LoRA?")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip


@contextmanager
def served() -> Iterator[str]:
    """Serves the demo model with both adapters; yields the address."""
    adapters = {name: str(DEMO / name) for name in ("adapter_a", "adapter_b")}
    listener = socket.create_server(("127.0.0.1", 0))
    with ktrt.load(DEMO / "chat.yaml", adapter_name_or_path=None, adapters=adapters) as session:
        app = create_app(session, ServeSettings(model_name="base"))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join(10)


def take(url: str, file: Path) -> None:
    """Asks the questions and takes the picture."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport={"width": 1200, "height": 740}, locale="en-US")
        page.goto(url)
        page.locator("#model").select_option("adapter_b")
        for n, question in enumerate(QUESTIONS, start=1):
            if n == len(QUESTIONS):
                page.get_by_role("button", name="Compare").click()
            page.locator("#message").fill(question)
            page.keyboard.press("Enter")
            expect(page.locator(".assistant > .tools")).to_have_count(n, timeout=60_000)
        page.mouse.move(600, 400)
        page.screenshot(path=file)
        browser.close()


def main() -> None:
    file = Path(sys.argv[1]) if sys.argv[1:] else ROOT / "docs" / "page.png"
    with served() as url:
        take(url, file)
    print(f"{file}: {file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
