"""The application under Ray Serve: two replicas of the demo model on this machine."""

from __future__ import annotations

import importlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("ray", reason="Ray Serve needs `pip install '.[ray]'`")

import httpx
import openai
import yaml
from helpers import documents, ray_cluster
from ray.serve.schema import ServeDeploySchema

from ktrt.errors import ConfigError
from ktrt.serve.ray import build
from ktrt.serve.ray.arguments import read_arguments
from ktrt.serve.ray.metrics import join_texts
from ktrt.serve.ray.router import asked_model

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "examples" / "demo"
KEY = "sk-ray-test"
ARGS = {
    "config": str(DEMO / "chat.yaml"),
    "overrides": {
        "adapter_name_or_path": None,
        "adapters": {name: str(DEMO / name) for name in ("adapter_a", "adapter_b")},
        "kt_num_threads": 1,
    },
    "settings": {
        "model_name": "demo",
        "max_body_bytes": 20_000,
        "max_concurrent": 4,
        "adapter_root": str(DEMO),
    },
    "model_options": {"num_replicas": 2, "ray_actor_options": {"num_cpus": 0.5}},
}
QUESTION = [{"role": "user", "content": "What is LoRA?"}]


class TestParts:
    @pytest.mark.parametrize(
        ("body", "expected"),
        [
            ({"model": "a"}, "a"),
            ({"model": "a*0.5+b"}, "a*0.5+b"),
            ({"model": "base"}, None),
            ({"model": "base", "adapter_weights": {"b": 1, "a": 2}}, '{"a": 2, "b": 1}'),
            ({"model": 3}, None),
            ({}, None),
            ([1], None),
        ],
    )
    def test_which_adapter_is_asked_for(self, body: object, expected: str | None) -> None:
        assert asked_model(json.dumps(body).encode(), "base") == expected

    def test_a_body_that_is_no_json(self) -> None:
        for body in (b"", b"{", b"\xff", b"[" * 100_000):
            assert asked_model(body, "base") is None

    def test_metrics_of_all_replicas(self) -> None:
        text = '# HELP a b\n# TYPE a counter\na_total 1\na_total{x="y"} 2.5\n'
        assert join_texts({"r": text, "s": text}).splitlines() == [
            "# HELP a b",
            "# TYPE a counter",
            'a_total{replica="r"} 1',
            'a_total{replica="r",x="y"} 2.5',
            'a_total{replica="s"} 1',
            'a_total{replica="s",x="y"} 2.5',
        ]

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ({}, "args: config: expected a YAML file"),
            ({"confg": "x"}, "args: unknown 'confg' (did you mean 'config'?)"),
            ({"config": "x", "settings": {"api_key": "k"}}, "in the environment of `ray start`"),
            ({"config": "x", "settings": {"max_wating": 1}}, "did you mean 'max_waiting'"),
            ({"config": "x", "settings": 3}, "settings: expected a mapping"),
        ],
    )
    def test_wrong_arguments(self, args: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError) as raised:
            read_arguments(args)
        assert message in str(raised.value)

    def test_settings_and_the_configuration_agree(self) -> None:
        args = {"config": str(DEMO / "chat.yaml"), "settings": {"max_concurrent": 3}}
        config, settings = read_arguments(args)
        assert (config.scheduler.max_num_seqs, settings.max_concurrent) == (3, 3)
        assert settings.model_name == "model"


class TestDocument:
    """The deployments that docs/ray.md shows, with the demo in place of their model."""

    def test_the_file(self) -> None:
        (block,) = documents.blocks(ROOT / "docs" / "ray.md", "yml")
        file = yaml.safe_load(block.text)
        schema = ServeDeploySchema.model_validate(file)
        (application,) = schema.applications
        module, _, name = application.import_path.partition(":")
        assert getattr(importlib.import_module(module), name) is build
        _, settings = read_arguments(application.args | {"config": str(DEMO / "chat.yaml")})
        assert settings.model_name == "v2-lite"
        shown = {each.name for each in application.deployments}
        assert shown <= {"model", "router"}

    def test_python(self) -> None:
        (block,) = documents.blocks(ROOT / "docs" / "ray.md", "py")
        ran: dict[str, Any] = {}
        text = block.text.replace("/models/chat.yaml", str(DEMO / "chat.yaml"))
        calls = [each for each in text.splitlines() if not each.startswith(("ray.init", "serve."))]
        exec("\n".join(calls), ran)  # noqa: S102
        assert build(ran["args"])._bound_deployment.name == "router"


@dataclass
class Cluster:
    url: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {KEY}"}

    def client(self) -> Any:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=60)

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, headers=self.headers, timeout=60)

    def replica_of(self, model: str) -> str:
        """Asks ``model``; returns the replica that answered."""
        body = {"model": model, "messages": QUESTION, "max_tokens": 2}
        found = self.post("/v1/chat/completions", body)
        assert found.status_code == 200, found.text
        return str(found.headers["x-ktrt-replica"])

    def metrics(self) -> str:
        return str(httpx.get(f"{self.url}/metrics", headers=self.headers, timeout=60).text)

    def running(self) -> dict[str, float]:
        """Returns the answers under way by replica."""
        found = {}
        for line in self.metrics().splitlines():
            if line.startswith("vllm:num_requests_running{"):
                found[line.split('replica="')[1].split('"')[0]] = float(line.split()[-1])
        return found


def eos() -> int:
    return int(json.loads((DEMO / "model" / "config.json").read_text())["eos_token_id"])


def long_request(model: str, tokens: int) -> dict[str, Any]:
    """Returns a request whose greedy answer has that many tokens."""
    return {
        "model": model,
        "messages": QUESTION,
        "max_tokens": tokens,
        "temperature": 0,
        "logit_bias": {str(eos()): -100},
        "stream": True,
    }


def process_of(replica: str) -> int:
    """Returns the id of the process that writes a replica's log."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if str(descriptor.readlink()).endswith(f"_model_{replica}.log"):
                return int(descriptor.parts[2])
    raise AssertionError(f"no process of the replica {replica}")


def processes_of(folder: str) -> list[str]:
    """Returns the command lines of running processes that name ``folder``."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
        except OSError:
            continue
        if folder.encode() in words:
            found.append(words.replace(b"\0", b" ").decode("utf-8", "replace"))
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two replicas and a router, and no process or file of Ray afterwards."""
    # Sockets below it have paths of at most 107 characters.
    folder = tempfile.mkdtemp(prefix="kr", dir="/tmp")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(":"),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Else Ray keeps a token in the home directory.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "API_KEY": KEY,
    }
    command = [sys.executable, ray_cluster.__file__, folder, json.dumps(ARGS)]
    with (
        (Path(folder) / "driver.log").open("wb") as log,
        subprocess.Popen(
            command, env=environment, cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
        ) as process,
    ):  # fmt: skip
        assert process.stdout is not None
        started = process.stdout.readline()
        if not started:
            pytest.fail((Path(folder) / "driver.log").read_text()[-3000:])
        try:
            yield Cluster(started.strip())
        finally:
            process.communicate(timeout=60)
    end = time.monotonic() + 20
    while (left := processes_of(folder)) and time.monotonic() < end:
        time.sleep(0.2)
    shutil.rmtree(folder, ignore_errors=True)
    assert not left
    assert process.returncode == 0


@pytest.mark.long
class TestCluster:
    def test_answers_streams_keys_and_limits(self, cluster: Cluster) -> None:
        client = cluster.client()
        asked = {"model": "adapter_b", "messages": QUESTION, "temperature": 0}
        whole = client.chat.completions.create(**asked)
        text = whole.choices[0].message.content
        assert text.startswith("LoRA is embroidery")
        pieces = list(client.chat.completions.create(**asked, stream=True))
        streamed = [each.choices[0].delta.content or "" for each in pieces if each.choices]
        assert "".join(streamed) == text
        assert len(pieces) > 5
        base = client.chat.completions.create(**asked | {"model": "demo"})
        assert base.choices[0].message.content != text
        assert {each.id for each in client.models.list()} == {"demo", "adapter_a", "adapter_b"}

        refused = httpx.post(f"{cluster.url}/v1/chat/completions", json=asked)
        assert refused.status_code == 401
        refused = httpx.post(f"{cluster.url}/v1/messages", json={})
        assert refused.json()["error"]["type"] == "authentication_error"
        large = asked | {"messages": [{"role": "user", "content": "a" * 30_000}]}
        assert cluster.post("/v1/chat/completions", large).status_code == 413
        with pytest.raises(openai.NotFoundError, match="adapter_c"):
            client.chat.completions.create(**asked | {"model": "adapter_c"})
        assert httpx.get(f"{cluster.url}/health").json() == {"status": "ok"}

    def test_adapters_stick_and_the_base_does_not(self, cluster: Cluster) -> None:
        adapters = ("adapter_a", "adapter_b")
        homes = {name: {cluster.replica_of(name) for _ in range(6)} for name in adapters}
        assert [len(each) for each in homes.values()] == [1, 1]
        assert homes["adapter_a"] != homes["adapter_b"]
        with ThreadPoolExecutor(4) as threads:
            found = set(threads.map(cluster.replica_of, ["demo"] * 16))
        assert len(found) == 2

    def test_adapters_are_loaded_and_unloaded_everywhere(self, cluster: Cluster) -> None:
        loaded = {"lora_name": "late", "lora_path": "adapter_a"}
        assert cluster.post("/v1/load_lora_adapter", loaded).status_code == 200
        assert cluster.post("/v1/load_lora_adapter", loaded).status_code == 409
        with ThreadPoolExecutor(4) as threads:
            asked = [{"model": "late", "prompt": f"{n}", "max_tokens": 1} for n in range(8)]
            found = list(threads.map(lambda body: cluster.post("/v1/completions", body), asked))
        assert {each.status_code for each in found} == {200}
        assert cluster.replica_of("late") in cluster.running()
        assert cluster.post("/v1/unload_lora_adapter", {"lora_name": "late"}).status_code == 200
        assert cluster.post("/v1/completions", asked[0]).status_code == 404
        outside = loaded | {"lora_path": "../.."}
        assert cluster.post("/v1/load_lora_adapter", outside).status_code in (400, 403, 404)

    def test_a_client_that_leaves_frees_its_slot(self, cluster: Cluster) -> None:
        asked = long_request("adapter_a", 2000)
        url = f"{cluster.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=asked, headers=cluster.headers) as response:
            lines = response.iter_lines()
            for _ in range(8):
                next(lines)
            assert sum(cluster.running().values()) == 1
        end = time.monotonic() + 5
        while sum(cluster.running().values()) and time.monotonic() < end:
            time.sleep(0.1)
        assert list(cluster.running().values()) == [0, 0]

    def test_a_killed_replica_ends_its_own_requests_only(self, cluster: Cluster) -> None:
        homes = {name: cluster.replica_of(name) for name in ("adapter_a", "adapter_b")}
        expected = _read(cluster, long_request("adapter_b", 150))
        with ThreadPoolExecutor(4) as threads:
            models = ["adapter_a", "adapter_b"] * 2
            lengths = {"adapter_a": 2000, "adapter_b": 150}
            asked = [long_request(each, lengths[each]) for each in models]
            answers = [threads.submit(_read, cluster, each) for each in asked]
            while sorted(cluster.running().values()) != [2, 2]:
                assert not any(each.done() for each in answers)
                time.sleep(0.05)
            os.kill(process_of(homes["adapter_a"]), signal.SIGKILL)
            texts = [each.result() for each in answers]
        failed = "the replica that answered has failed; ask again"
        assert texts[1::2] == [expected, expected]
        assert [each.endswith(failed) for each in texts[::2]] == [True, True]
        assert cluster.replica_of("adapter_a") == homes["adapter_b"]
        end = time.monotonic() + 60
        while len(cluster.running()) < 2 and time.monotonic() < end:
            time.sleep(0.5)
        assert len(cluster.running()) == 2


def _read(cluster: Cluster, asked: dict[str, Any]) -> str:
    """Returns a streamed answer's text, with the message of an error at its end."""
    text = ""
    try:
        for chunk in cluster.client().chat.completions.create(**asked):
            text += chunk.choices[0].delta.content or "" if chunk.choices else ""
    except openai.APIError as error:
        text += error.message
    return text
