"""The page in Chromium: against made-up answers, and against the demo model."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest

pytest.importorskip("fastapi", reason="the server needs `pip install '.[serve]'`")
pytest.importorskip("playwright", reason="playwright is not installed")

from helpers.page_server import KEY, SAID, PageServer, page_app
from playwright.sync_api import expect, sync_playwright

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from playwright.sync_api import Browser, Page

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH, nor named by CHROMIUM"),
]
# Without these Chromium asks its maker's servers for updates and the like.
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
# Milliseconds; a busy machine takes seconds for what an idle one does in 50 ms.
PATIENCE = 30_000
expect.set_options(timeout=PATIENCE)
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Ends with this module: its event loop would be in the way of other tests' loops."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[PageServer, str]]:
    import uvicorn

    state = PageServer()
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(page_app(state), log_level="warning"))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield state, f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.should_exit = server.force_exit = True
    thread.join(10)
    listener.close()


@pytest.fixture
def state(served: tuple[PageServer, str]) -> Iterator[PageServer]:
    found = served[0]
    found.requests.clear()
    found.cancelled = 0
    yield found
    found.key = None


@pytest.fixture
def url(served: tuple[PageServer, str]) -> str:
    return served[1]


@pytest.fixture
def open_page(browser: Browser, state: PageServer, url: str) -> Iterator[Callable[..., Page]]:
    """Opens the page; no page may ask another host, break the policy or raise."""
    contexts = []
    wrong: list[str] = []

    def open_(address: str = url, **options: Any) -> Page:
        options = {"viewport": {"width": 1200, "height": 800}, "locale": "en-US"} | options
        context = browser.new_context(**options, reduced_motion="reduce")
        context.set_default_timeout(PATIENCE)
        contexts.append(context)

        def watch(request: Any) -> None:
            if not request.url.startswith((address, "blob:")):
                wrong.append(request.url)

        context.on("request", watch)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: note(message.text))
        page.goto(address)
        expect(page.locator("#model option").first).to_be_attached()
        return page

    def note(text: str) -> None:
        if "Content Security Policy" in text or "TrustedHTML" in text:
            wrong.append(text)

    yield open_
    for context in contexts:
        context.close()
    assert not wrong


def ask(page: Page, text: str) -> None:
    page.locator("#message").fill(text)
    page.keyboard.press("Enter")


def answered(page: Page, count: int = 1) -> None:
    """Waits until `count` answers are complete."""
    expect(page.locator(".node.assistant > .tools")).to_have_count(count)


def test_stream_stop_and_figures(open_page: Callable[..., Page], state: PageServer) -> None:
    page = open_page()
    ask(page, "What is LoRA? slow")
    body = page.locator(".node.assistant .markdown")
    expect(body).to_contain_text("LoRA is embroidery")
    early = body.inner_text()
    page.wait_for_function(
        "(n) => document.querySelector('.live').innerText.length > n", arg=len(early)
    )
    assert len(early) < len(SAID["poet"]) * 20
    expect(page.locator("#send")).to_be_hidden()
    page.keyboard.press("Escape")
    answered(page)
    expect(page.locator(".figures")).to_contain_text("stopped")
    expect(page.locator("#send")).to_be_visible()
    for _ in range(100):
        if state.cancelled:
            break
        time.sleep(0.05)
    assert state.cancelled == 1
    ask(page, "What is LoRA?")
    answered(page, 2)
    expect(page.locator(".figures").last).to_contain_text("27 tokens")
    expect(page.locator(".figures").last).to_contain_text("prompt 9, 4 reused")
    said = [each["role"] for each in state.requests[-1]["messages"]]
    assert said == ["user", "assistant", "user"]
    expect(page.locator("#announce")).to_contain_text("Answer: LoRA is embroidery")


def test_retry_and_edit_keep_the_other_versions(
    open_page: Callable[..., Page], state: PageServer
) -> None:
    page = open_page()
    ask(page, "first question")
    answered(page)
    page.get_by_label("Answer again").click()
    expect(page.locator(".assistant .count")).to_contain_text("2/2")
    answered(page)
    seeds = {each["seed"] for each in state.requests}
    assert len(seeds) == 2
    page.get_by_label("Edit", exact=True).click()
    page.locator("#edit").fill("second question")
    page.keyboard.press("Enter")
    expect(page.locator(".user .count")).to_contain_text("2/2")
    answered(page)
    assert [each["content"] for each in state.requests[-1]["messages"]] == ["second question"]
    page.locator(".user").get_by_label("Previous version").press("Enter")
    expect(page.locator(".user").get_by_label("Next version")).to_be_focused()
    expect(page.locator(".said")).to_have_text("first question")
    expect(page.locator(".assistant .count")).to_contain_text("2/2")


def test_markdown_is_text_first(open_page: Callable[..., Page], url: str) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    ask(page, "markdown <b>bold</b>")
    answered(page)
    assert page.title() == "ktrt"
    expect(page.locator(".said")).to_have_text("markdown <b>bold</b>")
    answer = page.locator(".assistant .markdown")
    expect(answer.locator("li")).to_have_count(3)
    expect(answer.locator("table td")).to_have_count(4)
    assert page.locator(".assistant :is(img, script)").count() == 0
    expect(answer).to_contain_text("<script>1</script>")
    links = answer.locator("a[href]")
    assert [each.get_attribute("href") for each in links.all()] == [
        "http://127.0.0.1:9/y.png", "https://example.org",
    ]  # fmt: skip
    assert links.last.get_attribute("rel") == "noopener noreferrer nofollow"
    page.locator(".code .copy").click()
    expect(page.locator(".code .copy")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()").startswith("with ktrt.load(")


def test_models_and_sums(open_page: Callable[..., Page], state: PageServer) -> None:
    page = open_page()
    model = page.locator("#model")
    expect(model).to_have_value("poet")
    model.select_option("base")
    ask(page, "hello")
    answered(page)
    expect(page.locator(".assistant .model")).to_have_text("base")
    model.select_option(label="Weighted sum …")
    page.get_by_label("poet", exact=True).fill("0.75")
    page.get_by_label("terse", exact=True).fill("0")
    page.get_by_role("button", name="Use this sum").click()
    expect(model).to_have_value("poet*0.75")
    model.select_option(label="Weighted sum …")
    page.get_by_label("terse", exact=True).fill("-0.5")
    page.keyboard.press("Escape")
    expect(model).to_have_value("poet*0.75")
    ask(page, "hello again")
    answered(page, 2)
    assert [each["model"] for each in state.requests] == ["base", "poet*0.75"]


def test_sampling_and_system_prompt(open_page: Callable[..., Page], state: PageServer) -> None:
    page = open_page()
    page.locator("#settings-toggle").click()
    assert page.get_by_label("Temperature").get_attribute("placeholder") == "0.95"
    page.locator("#system").fill("Be brief.")
    values = {
        "temperature": "0.5", "top_p": "0.9", "top_k": "40", "min_p": "0.05", "max_tokens": "64",
        "seed": "7", "repetition_penalty": "1.1", "presence_penalty": "-0.5", "top_logprobs": "2",
        "frequency_penalty": "0.5", "stop_token_ids": "1, 2", "stop": "END\n###",
    }  # fmt: skip
    for name, value in values.items():
        page.locator(f"#field-{name}").fill(value)
    page.get_by_label("Show token probabilities").check()
    page.get_by_label("Show special tokens").check()
    page.get_by_label("Thinking").select_option("off")
    page.get_by_label("More request fields").fill('{"logit_bias": {"5": 1}}')
    ask(page, "hello")
    answered(page)
    sent = state.requests[-1]
    numbers = {name: json.loads(value) for name, value in list(values.items())[:10]}
    expected = numbers | {
        "stop_token_ids": [1, 2], "stop": ["END", "###"], "logprobs": True,
        "skip_special_tokens": False, "chat_template_kwargs": {"enable_thinking": False},
        "logit_bias": {"5": 1},
    }  # fmt: skip
    assert {name: sent[name] for name in expected} == expected
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    page.locator(".probabilities summary").click()
    token = page.locator(".tokens span").first
    assert token.get_attribute("title") == "LoRA i: 67 %\nother: 27.3 %"

    page.get_by_label("Temperature").fill("hot")
    expect(page.locator("#field-temperature-bad")).to_contain_text("found “hot”")
    ask(page, "again")
    expect(page.get_by_label("Temperature")).to_be_focused()
    assert len(state.requests) == 1
    page.get_by_role("button", name="Defaults").click()
    expect(page.get_by_label("Temperature")).to_have_value("")
    page.get_by_label("Top-k").fill("13")
    page.locator("#message").press("Enter")
    expect(page.locator("#field-top_k-bad")).to_contain_text("found 13")
    expect(page.locator(".error")).to_contain_text("top_k: expected")
    assert "temperature" not in state.requests[-1]


def test_compare_from_one_seed(open_page: Callable[..., Page], state: PageServer) -> None:
    page = open_page()
    page.get_by_role("button", name="Compare").click()
    ask(page, "What is LoRA?")
    answered(page)
    assert {each["model"] for each in state.requests} == {"base", "poet"}
    assert len({each["seed"] for each in state.requests}) == 1
    expect(page.locator(".side .model")).to_have_text(["base", "poet"])
    marks = page.locator(".side").nth(1).locator("mark").all_inner_texts()
    assert marks == [
        "embroidery",
        "cloth stays as it is",
        "thin threads,",
        ", draw the new pattern!",
    ]
    expect(page.locator(".assistant > .figures")).to_contain_text("words differ · both from seed")
    page.get_by_role("button", name="Continue with this").click()
    ask(page, "And then?")
    answered(page, 2)
    assert state.requests[-1]["messages"][1]["content"] == SAID["base"]
    page.locator("#other").select_option("poet")
    ask(page, "same")
    expect(page.locator("#notice")).to_have_text("Choose two different models to compare.")
    assert len(state.requests) == 4


def test_audit_picture(open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.get_by_role("button", name="Audit").click()
    cells = page.locator(".heat .cell")
    expect(cells).to_have_count(27 * 7)
    expect(page.locator(".cell.untouched")).to_have_count(3)
    expect(page.locator(".cell.unchanged")).to_have_count(1)
    expect(page.locator(".cell.unknown")).to_have_count(1)
    colours = cells.evaluate_all("(all) => all.map((each) => getComputedStyle(each).fill)")
    assert len(set(colours)) > 50
    page.locator('.cell[data-row="4"][data-column="16"]').hover()
    expect(page.locator("#readout")).to_contain_text("Layer 16 · mlp.experts.gate_proj")
    expect(page.locator("#readout .value")).to_have_text("2.1 %")
    expect(page.locator("#readout")).to_contain_text("64 experts")
    expect(page.locator("#readout")).to_contain_text("1 unchanged")
    expect(page.locator(".bar")).to_have_count(64)
    page.locator(".heat").focus()
    page.keyboard.press("ArrowDown")
    expect(page.locator(".place")).to_have_text("Layer 16 · mlp.experts.up_proj")
    page.keyboard.press("Home")
    expect(page.locator(".value")).to_have_text("not tuned, or not there")
    page.get_by_text("As a table").click()
    expect(page.locator("table tbody tr")).to_have_count(27)
    expect(page.locator("table tbody tr").nth(16).locator("td").nth(4)).to_have_text("2.1 %")
    page.locator("#audit-model").select_option("terse")
    expect(page.locator("#audit-body .error")).to_contain_text("its norms are not kept")
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("#message")).to_be_focused()


def test_errors_where_they_happen(open_page: Callable[..., Page], state: PageServer) -> None:
    page = open_page()
    ask(page, "busy")
    error = page.locator(".node.assistant .error")
    expect(error).to_contain_text("the queue is full (128 requests) Try again in 3 s.")
    ask(page, "broken")
    expect(error.last).to_contain_text("the engine failed")
    expect(page.locator(".assistant .markdown")).to_contain_text("LoRA is embroidery")
    ask(page, "cut")
    expect(error.last).to_contain_text("The connection ended before the answer did.")
    # A question without an answer is not part of what follows.
    assert [each["role"] for each in state.requests[1]["messages"]] == ["user"]
    before = len(state.requests)
    error.last.get_by_role("button", name="Try again").click()
    expect(page.locator(".assistant .count")).to_contain_text("2/2")
    assert len(state.requests) == before + 1
    page.context.set_offline(True)
    ask(page, "hello")
    expect(error.last).to_contain_text("The server cannot be reached")


def test_a_key_is_asked_for(browser: Browser, state: PageServer, url: str) -> None:
    state.key = KEY
    context = browser.new_context(locale="en-US")
    page = context.new_page()
    page.goto(url)
    key = page.get_by_label("Key", exact=True)
    key.fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_text("The server refused this key.")).to_be_visible()
    key.fill(KEY)
    page.get_by_role("button", name="Use key").click()
    expect(page.locator("#model")).to_have_value("poet")
    ask(page, "hello")
    answered(page)
    assert page.evaluate("Object.values(localStorage).join()").count(KEY) == 0
    context.close()


def test_thoughts_and_tool_calls(open_page: Callable[..., Page], state: PageServer) -> None:
    page = open_page()
    ask(page, "think about the weather")
    answered(page)
    thought = page.locator("details.thought")
    expect(thought).not_to_have_attribute("open", "")
    thought.locator("summary").click()
    expect(thought).to_contain_text("The user asks about LoRA.")
    expect(page.locator(".call")).to_contain_text("Calls weather")
    expect(page.locator(".call code")).to_have_text('{\n  "city": "Ulm"\n}')
    page.get_by_label("Result of weather").fill("rain")
    page.get_by_role("button", name="Send results").click()
    answered(page, 2)
    asked = state.requests[-1]["messages"]
    function = {"name": "weather", "arguments": '{"city": "Ulm"}'}
    calls = [{"id": "call_1", "type": "function", "function": function}]
    assert asked[1] == {"role": "assistant", "content": None, "tool_calls": calls}
    assert asked[2] == {"role": "tool", "tool_call_id": "call_1", "content": "rain"}


def test_saved_conversations(open_page: Callable[..., Page], tmp_path: Path) -> None:
    page = open_page()
    for text in ("one", "two"):
        page.get_by_role("button", name="New conversation").click()
        ask(page, text)
        answered(page)
    page.reload()
    titles = page.locator("#conversations .title")
    expect(titles).to_have_text(["two", "one"])
    titles.last.click()
    expect(page.locator(".said")).to_have_text("one")
    expect(page.locator(".assistant .markdown")).to_have_text(SAID["poet"])
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    file = tmp_path / "export.json"
    download.value.save_as(file)
    page.get_by_label("Delete “one”").click()
    page.locator("#delete-dialog").get_by_role("button", name="Delete").click()
    expect(titles).to_have_text(["two"])
    page.reload()
    expect(titles).to_have_text(["two"])
    page.locator("#import-file").set_input_files(file)
    expect(page.locator("#notice")).to_have_text("2 conversations imported.")
    expect(titles).to_have_count(2)
    wrong = tmp_path / "wrong.json"
    wrong.write_text(file.read_text("utf-8").replace('"assistant"', '"robot"'), "utf-8")
    page.locator("#import-file").set_input_files(wrong)
    expect(page.locator("#notice")).to_contain_text("found a message of another form")


def test_languages_and_themes(open_page: Callable[..., Page]) -> None:
    page = open_page(locale="zh-CN", color_scheme="dark")
    expect(page.locator("html")).to_have_attribute("lang", "zh")
    expect(page.locator("#message")).to_have_attribute("placeholder", "输入消息")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.locator("#theme").click()
    assert page.evaluate(ground) != dark
    page.get_by_role("button", name="English").click()
    expect(page.locator("h1").first).to_have_text("Ask something")
    page.reload()
    expect(page.locator("html")).to_have_attribute("lang", "en")
    expect(page.locator("html")).to_have_attribute("data-theme", "light")
    assert page.evaluate(ground) != dark


def test_keyboard_only(open_page: Callable[..., Page], state: PageServer) -> None:
    page = open_page()
    expect(page.locator("#message")).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    answered(page)
    assert state.requests[-1]["messages"][0]["content"] == "one\ntwo"
    expect(page.locator("#message")).to_be_focused()
    page.locator(".skip").focus()
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.ariaLabel"))
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        box = "document.activeElement.closest('.box, select') !== null"
        assert page.evaluate(outline) != "none" or page.evaluate(box), seen[-1]
        if seen[-1] == "send":
            break
    order = ["new", "language", "history-toggle", "model", "view-audit", "settings-toggle", "log",
             "Edit", "Answer again", "message", "compare", "send"]  # fmt: skip
    assert [each for each in seen if each in order] == order


def test_phone(open_page: Callable[..., Page]) -> None:
    page = open_page(viewport=PHONE, has_touch=True)
    wide = "document.documentElement.scrollWidth"
    page.get_by_role("button", name="Compare").click()
    ask(page, "markdown and a_very_long_word_" + "x" * 80)
    answered(page)
    assert page.evaluate(wide) == PHONE["width"]
    assert page.locator("#log").evaluate("(log) => log.scrollWidth <= log.clientWidth")
    boxes = [each.bounding_box() for each in page.locator(".side").all()]
    assert boxes[0]
    assert boxes[1]
    assert boxes[1]["y"] > boxes[0]["y"] + boxes[0]["height"]
    page.locator("#history-toggle").click()
    expect(page.locator("#history")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#history")).to_be_hidden()
    page.locator("#settings-toggle").click()
    expect(page.get_by_label("Temperature")).to_be_visible()
    page.locator("#settings-close").click()
    page.locator("#view-audit").click()
    expect(page.locator(".cell")).to_have_count(27 * 7)
    page.locator('.cell[data-row="3"][data-column="4"]').tap()
    expect(page.locator("#readout")).to_contain_text("Layer 3 · mlp.experts.gate_proj")
    expect(page.locator("#readout")).to_be_in_viewport()
    assert page.evaluate(wide) == PHONE["width"]


@pytest.mark.parametrize(("scheme", "phone"), [("light", False), ("dark", False), ("light", True)])
def test_axe_finds_nothing_serious(
    open_page: Callable[..., Page], scheme: str, phone: bool
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = open_page(color_scheme=scheme, **({"viewport": PHONE} if phone else {}))

    def check() -> None:
        violations = axe.run(page).response["violations"]
        found = [
            (each["id"], [node["html"][:200] for node in each["nodes"]])
            for each in violations
            if each["impact"] in ("serious", "critical")
        ]
        assert not found

    page.locator("#settings-toggle").click()
    check()
    if phone:
        page.locator("#settings-close").click()
    page.get_by_role("button", name="Compare").click()
    for text in ("think", "markdown", "weather", "busy"):
        ask(page, text)
        expect(page.locator("#send")).to_be_visible()
    check()
    page.locator("#model").select_option(label="Weighted sum …")
    check()
    page.keyboard.press("Escape")
    page.locator("#view-audit").click()
    page.locator(".heat").focus()
    page.get_by_text("As a table").click()
    check()


def test_the_demo_model(open_page: Callable[..., Page], server_url: str) -> None:
    """The real server: a comparison whose answers are the API's, and the audit's picture."""
    page = open_page(f"{server_url}/")
    page.locator("#model").select_option("adapter_a")
    page.get_by_role("button", name="Compare").click()
    ask(page, "What is LoRA?")
    expect(page.locator(".assistant > .tools")).to_have_count(1)
    answers = page.locator(".side .markdown").all_inner_texts()
    assert answers == [answer_of(server_url, model) for model in ("demo", "adapter_a")]
    assert answers[0] != answers[1]
    assert page.locator("mark").count() > 0
    page.locator("#view-audit").click()
    expect(page.locator(".cell.changed").first).to_be_visible()
    page.locator(".heat").focus()
    expect(page.locator("#readout .place")).to_contain_text("Layer 0")
    expect(page.locator("#audit-body")).to_contain_text("on routed experts")


def answer_of(server_url: str, model: str) -> str:
    messages = [{"role": "user", "content": "What is LoRA?"}]
    found = httpx.post(
        f"{server_url}/v1/chat/completions",
        json={"model": model, "messages": messages},
        timeout=30,
    )
    content: str = found.json()["choices"][0]["message"]["content"]
    return content
