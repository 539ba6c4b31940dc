"""Keys, hosts, origins, sizes, settings: what a request may be."""

from __future__ import annotations

import argparse
import json
import logging
import re
import resource
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from ktrt.errors import ConfigError
from ktrt.serve.access import access_log
from ktrt.serve.app import create_app
from ktrt.serve.errors import ApiError
from ktrt.serve.json_text import check_json
from ktrt.serve.openai.conversation import readable_messages
from ktrt.serve.settings import ServeSettings, add_options, read_settings
from ktrt.serve.uvicorn_server import allow_connections

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from fastapi import FastAPI

    from ktrt.session import Session

    Serving = Callable[[FastAPI, ServeSettings], AbstractContextManager[str]]

KEYED = ServeSettings(
    model_name="demo", host="127.0.0.1", api_key="user key", admin_key="admin",
    cors_origins=("https://page.example",),
)  # fmt: skip


@pytest.fixture(scope="module")
def keyed_url(serve_session: Session, serving: Serving) -> Iterator[str]:
    with serving(create_app(serve_session, KEYED), KEYED) as url:
        yield url


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        (bearer("user"), 401),
        (bearer("user key"), 200),
        ({"authorization": "bearer   user key"}, 200),
        ({"x-api-key": "user key"}, 200),
        (bearer("admin"), 200),
        ({"x-api-key": "userkey"}, 401),
        ({"Authorization": "Basic user key"}, 401),
    ],
)
def test_keys(keyed_url: str, headers: dict[str, str], status: int) -> None:
    for path in ("/v1/models", "/metrics", "/openapi.json"):
        assert httpx.get(keyed_url + path, headers=headers).status_code == status
    assert httpx.get(f"{keyed_url}/health", headers=headers).status_code == 200
    assert httpx.get(f"{keyed_url}/ready", headers=headers).status_code == 200


def test_wrong_keys_get_each_apis_error(keyed_url: str) -> None:
    found = httpx.post(f"{keyed_url}/v1/chat/completions", json={})
    assert found.status_code == 401
    assert found.json()["error"]["code"] == "invalid_api_key"
    found = httpx.post(f"{keyed_url}/v1/messages", json={})
    assert found.json()["error"]["type"] == "authentication_error"
    assert found.json()["request_id"] == found.headers["x-request-id"]


@pytest.mark.parametrize(("key", "status"), [("", 401), ("user key", 403), ("other", 401)])
def test_administrators_need_their_key(keyed_url: str, key: str, status: int) -> None:
    for name in ("load", "unload"):
        url = f"{keyed_url}/v1/{name}_lora_adapter"
        assert httpx.post(url, headers={"x-api-key": key}, json={}).status_code == status
        assert httpx.post(url, headers={"x-api-key": "admin"}, json={}).status_code not in (
            401,
            403,
        )


def test_other_sites_pages_are_refused_unless_allowed(server_url: str, keyed_url: str) -> None:
    origin = {"Origin": "https://page.example"}
    for method in ("GET", "POST"):
        found = httpx.request(method, f"{server_url}/v1/models", headers=origin)
        assert found.status_code == 403
        assert "access-control-allow-origin" not in found.headers
    own = {"Origin": server_url}
    assert httpx.get(f"{server_url}/v1/models", headers=own).status_code == 200
    found = httpx.get(f"{keyed_url}/v1/models", headers={**origin, **bearer("wrong")})
    assert found.status_code == 401
    assert found.headers["access-control-allow-origin"] == "https://page.example"
    asking = {**origin, "Access-Control-Request-Method": "POST"}
    assert httpx.options(f"{keyed_url}/v1/models", headers=asking).status_code == 200
    asking["Origin"] = "https://other.example"
    assert httpx.options(f"{keyed_url}/v1/models", headers=asking).status_code == 400


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("page.localhost", 200),
     ("evil.example", 403), ("127.0.0.1.evil.example:80", 403), ("192.168.0.1", 403)],
)  # fmt: skip
def test_hosts_that_are_not_this_machine_are_refused(
    server_url: str, keyed_url: str, host: str, status: int
) -> None:
    assert httpx.get(f"{server_url}/health", headers={"Host": host}).status_code == status
    assert httpx.get(f"{keyed_url}/health", headers={"Host": host}).status_code == 200


def test_request_ids_come_back(server_url: str) -> None:
    found = httpx.get(f"{server_url}/health", headers={"X-Request-Id": "abc-1"})
    assert found.headers["x-request-id"] == "abc-1"
    first, second = (
        httpx.get(f"{server_url}/health", headers={"X-Request-Id": "a b\tc"}).headers[
            "x-request-id"
        ]
        for _ in range(2)
    )
    assert first != second
    assert len(first) == 32


def test_the_access_log_has_no_contents(server_url: str, tmp_path: Path) -> None:
    body = {"model": "adapter_a", "messages": [{"role": "user", "content": "Secret words"}]}
    with (tmp_path / "log").open("w") as stream, access_log(stream):
        found = httpx.post(
            f"{server_url}/v1/chat/completions?key=hidden", json={**body, "max_tokens": 3},
            headers={"X-Api-Key": "hidden", "X-Request-Id": "this"}, timeout=60,
        )  # fmt: skip
        assert httpx.get(f"{server_url}/nothing").status_code == 404
        end = time.monotonic() + 10
        # A line follows its response, which may have arrived already.
        while (tmp_path / "log").read_text().count("\n") < 2 and time.monotonic() < end:
            time.sleep(0.01)
    text = (tmp_path / "log").read_text()
    first, second = map(json.loads, text.splitlines())
    assert (first["id"], first["status"], first["adapter"]) == ("this", 200, "adapter_a")
    assert first["path"] == "/v1/chat/completions"
    assert first["generated_tokens"] == 3
    assert first["bytes"] == len(found.content)
    assert second["status"] == 404
    assert "Secret" not in text
    assert "hidden" not in text
    assert not logging.getLogger("ktrt.serve.requests").handlers


def metric(url: str, name: str) -> float:
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if line.startswith(name):
            return float(line.rpartition(" ")[2])
    pytest.fail(f"there is no metric {name}")


def test_metrics_count_what_happened(server_url: str) -> None:
    names = [
        "vllm:prompt_tokens_total", "vllm:generation_tokens_total",
        "vllm:time_to_first_token_seconds_count", "vllm:inter_token_latency_seconds_count",
        "vllm:request_queue_time_seconds_count", "vllm:e2e_request_latency_seconds_count",
        'ktrt:adapter_answers_total{adapter="adapter_b"', "ktrt:steps_total",
    ]  # fmt: skip
    body = {"model": "adapter_b", "messages": [{"role": "user", "content": "Go"}], "max_tokens": 5}
    url = f"{server_url}/v1/chat/completions"
    usage = httpx.post(url, json=body, timeout=60).json()["usage"]
    before = [metric(server_url, name) for name in names]
    assert httpx.post(url, json=body, timeout=60).status_code == 200
    grown = [metric(server_url, name) - was for name, was in zip(names, before, strict=True)]
    assert grown[:7] == [usage["prompt_tokens"], 5, 1, 4, 1, 1, 1]
    assert grown[7] >= 5
    assert metric(server_url, 'vllm:request_success_total{finished_reason="length"') >= 2
    for name in (
        "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
        "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total",
        "vllm:lora_requests_info", "ktrt:step_seconds_predicted", "ktrt:bytes_read_total",
    ):  # fmt: skip
        assert metric(server_url, name) >= 0


def test_sums_count_for_their_adapters(server_url: str) -> None:
    """A label for every weight that clients think of would fill the memory."""
    name = 'ktrt:adapter_answers_total{adapter="adapter_a"'
    url, labels = f"{server_url}/v1/chat/completions", set()
    for weight in ("0.25", "0.75"):
        body = {"model": f"adapter_a*{weight}+adapter_b*0.5", "max_tokens": 1}
        body["messages"] = [{"role": "user", "content": "Go"}]
        assert httpx.post(url, json=body, timeout=60).status_code == 200
        text = httpx.get(f"{server_url}/metrics").text
        labels.add(tuple(re.findall('adapter_answers_total{adapter="([^"]+)"', text)))
    assert metric(server_url, name) >= 2
    assert "adapter_b" in str(labels)
    assert "*" not in str(labels)


def read(*words: str, **environment: str) -> ServeSettings:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return read_settings(parser.parse_args(words), environment)


def test_settings_come_from_the_command_line_then_the_environment() -> None:
    assert read() == ServeSettings()
    assert (read().address, read().port) == ("127.0.0.1", 8000)
    found = read("--port", "1", API_PORT="2", API_KEY="k", API_MODEL_NAME="gpt", MAX_CONCURRENT="3")
    assert (found.port, found.api_key, found.model_name, found.max_concurrent) == (1, "k", "gpt", 3)
    assert found.address == "0.0.0.0"
    assert read("--host", "::1").is_loopback
    assert read(API_HOST="localhost", API_KEY="").api_key is None
    assert read(KTRT_ACCESS_LOG="0").access_log is False
    assert read("--cors-origins", "http://a, http://b").cors_origins == ("http://a", "http://b")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"API_PORT": "many"}, "API_PORT: expected an integer, found 'many'"),
        ({"API_PORT": "70000"}, "port: expected 0 … 65535, found 70000"),
        ({"API_HOST": "0.0.0.0"}, "set a key"),
        ({"API_HOST": "example.org"}, "set a key"),
        ({"API_KEY": "ключ"}, "api_key: expected printable ASCII"),
        ({"MAX_CONCURRENT": "0"}, "max_concurrent: expected 1 or more, found 0"),
        ({"KTRT_BODY_SECONDS": "nan"}, "KTRT_BODY_SECONDS"),
        ({"KTRT_DRAIN_SECONDS": "-1"}, "drain_seconds: expected 0 or more"),
    ],
)
def test_wrong_settings_are_named(environment: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(**environment)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"[1]," * 100_000, "values in 100000 lists"),
        (b'"",' * 1_100_000, "values"),
        (b"1," * 1_000_001, "values"),
        (b'"\\"[' * 300_000, None),
        (b'"' + b'\\"[[' * 300_000, None),
        (b'"' + b"[\\" * 300_000, None),
        (json.dumps({"text": "{x[1],y['\"']}\n" * 100_000}).encode(), None),
        (json.dumps({"text": "\U0001f600" * 1000}).encode(), None),
        (b"[" * 64 + b"]" * 64, None),
        (b"[" * 65 + b"]" * 65, "nested"),
        (b'{"a": "NaN Infinity 1e999"}', None),
        (b'{"\\udc00": 1}', "half a character"),
        (b'["\\ud83d\\ude00 \\ude00"]', "half a character"),
        (b"\xef\xbb\xbf{}", None),
        (b"\x00\xd8\x00\xd8", "UTF-8"),
    ],
)
def test_bodies_are_judged_in_linear_time(body: bytes, words: str | None) -> None:
    def check() -> str | None:
        try:
            check_json(body, "application/json", 100)
        except ApiError as error:
            return error.message
        return None

    start = time.process_time()
    found = check()
    assert time.process_time() - start < 2
    assert (found is None) if words is None else (found is not None and words in found)


def test_many_messages_are_read_in_linear_time() -> None:
    """4,000 neighbours of 2 KB took 2 s of the event loop."""
    messages = [{"role": "user", "content": "星" * 2000}] * 4000
    before = time.thread_time()
    (found,) = readable_messages(messages)
    assert time.thread_time() - before < 0.5
    assert found["content"] == "\n\n".join(["星" * 2000] * 4000)


def test_a_long_text_is_refused_before_it_is_tokenized(server_url: str) -> None:
    text = "word " * 200_000
    body: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": text}]}
    for path, each in (
        ("/v1/chat/completions", body),
        ("/v1/completions", {"model": "demo", "prompt": text}),
    ):
        found = httpx.post(server_url + path, json=each, timeout=60)
        assert found.status_code == 400
        assert "characters, the model's context holds 2048" in found.json()["error"]["message"]


def test_connections_get_open_files(caplog: pytest.LogCaptureFixture) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))
        allow_connections(1024)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (1536, hard)
        assert not caplog.records
        allow_connections(hard)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
        assert f"may have {hard}" in caplog.text
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
