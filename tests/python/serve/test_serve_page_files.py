"""The page's files over HTTP, and rules for their contents; no browser."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("fastapi", reason="the server needs `pip install '.[serve]'`")
pytest.importorskip("httpx", reason="the tests need `pip install '.[test]'`")

from helpers.page_server import PageServer, audit_of, page_app

from ktrt.config import SamplingArgs

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

STATIC = Path(__file__).resolve().parents[3] / "ktrt" / "serve" / "page" / "static"
OWN = [each for each in STATIC.rglob("*") if each.is_file() and each.parent.name != "vendor"]
SCRIPTS = sorted((STATIC / "js").rglob("*.js"))


@pytest.fixture(scope="module")
def client() -> Iterator[object]:
    from starlette.testclient import TestClient

    with TestClient(page_app(PageServer())) as client:
        yield client


def test_the_page_is_served_with_a_strict_policy(client: httpx.Client) -> None:
    found = client.get("/")
    assert found.status_code == 200
    assert found.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(
        each.strip().split(" ", 1) for each in found.headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in found.headers["content-security-policy"]
    assert found.headers["x-content-type-options"] == "nosniff"


def test_a_browser_that_has_a_file_gets_304(client: httpx.Client) -> None:
    for path in ("/", "/page/assets/js/app.js"):
        first = client.get(path)
        assert first.headers["cache-control"] == "no-cache"
        tag = first.headers["etag"]
        again = client.get(path, headers={"If-None-Match": f'"other", W/{tag}'})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        assert client.get(path, headers={"If-None-Match": '"other"'}).content == first.content
        assert client.head(path).headers["content-length"] == str(len(first.content))


@pytest.mark.parametrize(
    "path",
    ["../assets.py", "..%2fassets.py", "%2e%2e/assets.py", "/etc/passwd", "js", "", "js/app.js/",
     "x\x00.js".replace("\x00", "%00")],
)  # fmt: skip
def test_there_are_no_other_files(client: httpx.Client, path: str) -> None:
    found = client.get(f"/page/assets/{path}")
    assert found.status_code == 404
    assert set(found.json()) in ({"error"}, {"detail"})


def test_every_file_is_served_and_every_reference_exists(client: httpx.Client) -> None:
    types = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    for path in [each for each in STATIC.rglob("*") if each.is_file()]:
        found = client.get(f"/page/assets/{path.relative_to(STATIC)}")
        assert found.content == path.read_bytes()
        expected = types.get(path.suffix)
        assert expected is None or found.headers["content-type"].startswith(expected)
    page = (STATIC / "index.html").read_text("utf-8")
    references = re.findall(r'(?:href|src)="(?!#)([^"]+)"', page)
    assert len(references) >= 6
    for each in references:
        assert client.get(f"/{each}").status_code == 200, each
    for script in SCRIPTS:
        for each in re.findall(r'from\s+"(\.[^"]+)"', script.read_text("utf-8")):
            assert (script.parent / each).resolve().is_file(), f"{script.name}: {each}"


def test_the_page_names_no_other_host() -> None:
    for path in OWN:
        text = path.read_text("utf-8").replace("http://www.w3.org/", "")
        assert not re.search(r"https?://|//[a-z0-9-]+\.[a-z]{2,}/", text), path
    page = (STATIC / "index.html").read_text("utf-8")
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|<script(?![^>]*\ssrc=)", page)


def test_packages_are_as_published() -> None:
    notice = (STATIC / "NOTICE").read_text("utf-8")
    digests = {name: digest for digest, name in re.findall(r"sha256 (\S+)  (\S+)", notice)}
    vendor = STATIC / "vendor"
    scripts = {each.name for each in vendor.iterdir() if each.suffix in (".js", ".mjs")}
    assert set(digests) == scripts
    for name, digest in digests.items():
        assert hashlib.sha256((vendor / name).read_bytes()).hexdigest() == digest
        version = re.search(r"v?(\d+\.\d+\.\d+)", (vendor / name).read_text("utf-8")[:300])
        assert version
        assert f" {version[1]}," in notice
    for licence in re.findall(r"vendor/(\S+\.LICENSE)", notice):
        assert (vendor / licence).stat().st_size > 500


def texts_of(language: str) -> dict[str, str]:
    source = (STATIC / "js" / "lang" / f"{language}.js").read_text("utf-8")
    lines = re.findall(r'^ {2}("[^"]+"): ("(?:[^"\\]|\\.)*"),$', source, re.MULTILINE)
    assert len(lines) == source.count("\n") - 2, "one text a line"
    return {json.loads(key): json.loads(text) for key, text in lines}


def test_both_languages_have_all_texts() -> None:
    english, chinese = texts_of("en"), texts_of("zh")
    assert english.keys() == chinese.keys()
    for key, text in english.items():
        names = re.findall(r"\{(\w+)\}", text)
        assert sorted(names) == sorted(re.findall(r"\{(\w+)\}", chinese[key])), key
    code = "".join(
        each.read_text("utf-8") for each in [*SCRIPTS, STATIC / "index.html"]
        if each.parent.name != "lang"
    )  # fmt: skip
    used = set(re.findall(r'"([a-z_]+(?:\.[a-z_]+)*)"', code))
    # `field.${key}` and the like.
    made = tuple(re.findall(r"`([a-z]+\.)\$\{", code))
    unused = {key for key in english if key not in used and not key.startswith(made)}
    assert not unused
    asked = set(re.findall(r'\bt\("([^"]+)"', code)) | set(
        re.findall(r'i18n[a-z-]*="([^"]+)"', code)
    )
    assert asked
    assert asked <= english.keys()


def test_script_length() -> None:
    lengths = {each.name: len(each.read_text("utf-8").splitlines()) for each in SCRIPTS}
    assert lengths
    assert not {name: n for name, n in lengths.items() if n > 400}


def test_facts_of_the_server(client: httpx.Client) -> None:
    info = client.get("/v1/page/info").json()
    assert info["sampling"]["temperature"] == 0.95
    assert (info["context_limit"], info["thinking"]) == (4096, True)
    status = client.get("/v1/page/status").json()
    assert set(status) == {"running", "waiting", "generated_tokens", "limit_share"}


def test_greedy_is_told_as_temperature_0() -> None:
    from starlette.testclient import TestClient

    greedy = PageServer(sampling=SamplingArgs(do_sample=False))
    with TestClient(page_app(greedy)) as client:
        assert client.get("/v1/page/info").json()["sampling"]["temperature"] == 0


def test_the_made_up_audit_has_the_endpoint_s_form() -> None:
    from ktrt.serve.vllm.audits import AdapterAudit

    made_up = audit_of("poet")
    assert AdapterAudit.model_validate(made_up).model_dump().keys() == made_up.keys()
