"""Loading, unloading and auditing adapters at run time, over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from ktrt.serve.errors import ApiError
from ktrt.serve.names import Names
from ktrt.serve.vllm.runtime import RuntimeAdapters

if TYPE_CHECKING:
    from collections.abc import Iterator

    import openai
    from fastapi import FastAPI

    from ktrt.serve.server import Server
    from ktrt.session import Session

DEMO = Path(__file__).resolve().parents[3] / "examples" / "demo"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def server(serve_app: FastAPI) -> Server:
    found: Server = serve_app.state.server
    return found


@pytest.fixture
def root(server: Server, tmp_path: Path) -> Iterator[Path]:
    """Allows loading from a folder with copies of the demo's adapters, and unloads afterwards."""
    folder = tmp_path / "root"
    for name in ("adapter_a", "adapter_b"):
        shutil.copytree(DEMO / name, folder / name)
    # Answers nearly as the base.
    config = json.loads((DEMO / "adapter_a" / "adapter_config.json").read_text())
    shutil.copytree(DEMO / "adapter_a", folder / "weak")
    config["lora_alpha"] = 1e-6
    (folder / "weak" / "adapter_config.json").write_text(json.dumps(config))
    plain = server.runtime
    server.runtime = RuntimeAdapters(server.session, server.names, folder)
    yield folder
    server.runtime = plain
    for name in server.session.adapters.names:
        if name not in ("adapter_a", "adapter_b"):
            server.session.adapters.unload(name)


class Client:
    def __init__(self, url: str) -> None:
        self.url = url

    def load(self, name: Any, path: Any, **more: Any) -> httpx.Response:
        body = {"lora_name": name, "lora_path": path, **more}
        return httpx.post(f"{self.url}/v1/load_lora_adapter", json=body, timeout=60)

    def unload(self, name: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/unload_lora_adapter", json={"lora_name": name})

    def models(self) -> dict[str, Any]:
        found = httpx.get(f"{self.url}/v1/models").json()["data"]
        return {each["id"]: each for each in found}


@pytest.fixture
def client(server_url: str) -> Client:
    return Client(server_url)


def answer(openai_client: openai.OpenAI, model: str) -> str:
    found = openai_client.chat.completions.create(
        model=model, messages=QUESTION, max_tokens=24, temperature=0
    )
    return found.choices[0].message.content or ""


class TestLoading:
    def test_off_by_default(self, client: Client) -> None:
        for found in (client.load("x", "adapter_a"), client.unload("adapter_a")):
            assert found.status_code == 403
            assert "--adapter-root" in found.json()["error"]["message"]

    def test_load_answer_unload(
        self, client: Client, root: Path, openai_client: openai.OpenAI
    ) -> None:
        found = client.load("new", "adapter_b")
        assert (found.status_code, found.headers["content-type"]) == (
            200, "text/plain; charset=utf-8",
        )  # fmt: skip
        cards = client.models()
        assert cards["new"]["digest"] == cards["adapter_b"]["digest"]
        assert (cards["new"]["root"], cards["new"]["parent"]) == ("adapter_b", "demo")
        assert answer(openai_client, "new") == answer(openai_client, "adapter_b")
        assert client.unload("new").status_code == 200
        assert "new" not in client.models()
        assert client.unload("new").status_code == 404

    def test_in_place(self, client: Client, root: Path, openai_client: openai.OpenAI) -> None:
        """The name never lacks an adapter, and never answers with the old one's prefix."""
        assert client.load("new", str(root / "weak")).status_code == 200
        first = answer(openai_client, "new")
        assert client.load("new", "adapter_b").status_code == 409
        assert client.load("new", "adapter_b", load_inplace=True).status_code == 200
        assert answer(openai_client, "new") == answer(openai_client, "adapter_b")
        assert first == answer(openai_client, "demo")
        assert first != answer(openai_client, "new")

    def test_an_active_one_can_go(self, client: Client, root: Path, server: Server) -> None:
        """A YAML may have activated it; requests name theirs."""
        adapters = server.session.adapters
        client.load("new", "adapter_b")
        adapters.activate({"new": 1, "adapter_a": 0.5})
        try:
            assert client.load("new", "adapter_b", load_inplace=True).status_code == 200
            assert adapters.active == {"adapter_a": 0.5}
            adapters.activate("new")
            (root / "weak" / "adapter_config.json").write_text("{}")
            assert client.load("new", "weak", load_inplace=True).status_code == 400
            assert adapters.active == {"new": 1}
            assert client.unload("new").status_code == 200
            assert adapters.active == {}
        finally:
            adapters.activate("adapter_a")

    def test_in_use(self, client: Client, root: Path, server: Server) -> None:
        client.load("new", "adapter_b")
        with server.session.submit(QUESTION, adapter="new", max_new_tokens=2000) as handle:
            next(handle)
            handle.pause()
            for found in (
                client.unload("new"), client.load("new", "adapter_a", load_inplace=True)
            ):  # fmt: skip
                assert found.status_code == 409
                assert found.json()["error"]["code"] == "adapter_in_use"
        while client.unload("new").status_code == 409:
            time.sleep(0.01)
        assert "new" not in client.models()

    @pytest.mark.parametrize(
        ("name", "status"),
        [("demo", 409), ("adapter_a", 409), ("", 400), (" x", 400), ("a\nb", 400), ("x" * 300, 400),
         ("adapter_a*0.5", 400), ("adapter_a+adapter_b", 400), (None, 400), (7, 400)],
    )  # fmt: skip
    def test_names(self, client: Client, root: Path, name: Any, status: int) -> None:
        assert client.load(name, "adapter_a").status_code == status
        assert client.load("demo", "adapter_a", load_inplace=True).status_code == 409

    def test_unloading_the_base(self, client: Client, root: Path) -> None:
        assert client.unload("demo").status_code == 400

    @pytest.mark.parametrize(
        ("path", "status"),
        [("nothing", 404), ("..", 400), ("../..", 400), ("/etc", 400), ("adapter_a/../..", 400),
         ("a\0b", 400), ("x" * 5000, 400), ("link", 400), ("inside", 400), ("fifo", 400),
         ("circle", 400), ("~", 404), ("file", 404), ("", 400), (None, 400)],
    )  # fmt: skip
    def test_paths(self, client: Client, root: Path, path: Any, status: int) -> None:
        (root / "link").symlink_to(DEMO / "adapter_a")
        (root / "circle").symlink_to(root / "circle")
        (root / "file").write_text("x")
        # A folder below the root whose file lies elsewhere.
        shutil.copytree(DEMO / "adapter_a", root / "inside")
        weights = root / "inside" / "adapter_model.safetensors"
        weights.unlink()
        weights.symlink_to(DEMO / "adapter_a" / "adapter_model.safetensors")
        shutil.copytree(DEMO / "adapter_a", root / "fifo")
        os.mkfifo(root / "fifo" / "notes")
        found = client.load("new", path)
        assert found.status_code == status, found.text
        assert str(root) not in found.text
        assert "new" not in client.models()

    def test_links_within_the_root(self, client: Client, root: Path) -> None:
        """As in a hub's cache."""
        (root / "blobs").mkdir()
        weights = root / "adapter_a" / "adapter_model.safetensors"
        weights.rename(root / "blobs" / "x")
        weights.symlink_to(root / "blobs" / "x")
        assert client.load("new", "adapter_a").status_code == 200

    @pytest.mark.parametrize("damage", ["missing", "nan", "foreign", "config", "words"])
    def test_an_adapter_that_does_not_fit(
        self, client: Client, root: Path, damage: str, openai_client: openai.OpenAI
    ) -> None:
        before = answer(openai_client, "adapter_a")
        folder = root / "adapter_a"
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        first = next(key for key in tensors if "lora_A" in key)
        if damage == "missing":
            del tensors[first]
        elif damage == "nan":
            tensors[first][0, 0] = float("nan")
        elif damage == "foreign":
            tensors["base_model.model.model.layers.99.x.lora_A.weight"] = tensors[first].clone()
        save_file(tensors, file)
        if damage == "config":
            (folder / "adapter_config.json").write_text("{")
        elif damage == "words":
            for each in (DEMO / "model").glob("tokenizer*.json"):
                shutil.copy(each, folder)
            described = json.loads((folder / "tokenizer.json").read_text())
            ids = {each["id"] for each in described["added_tokens"]}
            ids |= set(described["model"]["vocab"].values())
            token = {**described["added_tokens"][0], "id": max(ids) + 1, "content": "<new>"}
            described["added_tokens"].append(token)
            (folder / "tokenizer.json").write_text(json.dumps(described))
        found = client.load("new", "adapter_a")
        assert found.status_code == 400
        words = {
            "missing": "expected ['lora_A', 'lora_B']", "nan": "NaN", "foreign": "layers.99",
            "config": "JSON", "words": "would change the prompts",
        }  # fmt: skip
        message = found.json()["error"]["message"]
        assert words[damage].lower() in message.lower()
        assert str(root.parent) not in message
        assert "new" not in client.models()
        assert answer(openai_client, "adapter_a") == before

    def test_answers_go_on_meanwhile(
        self, client: Client, root: Path, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A slow disk, or a slow check, keeps nobody waiting: neither answers nor other routes."""
        slow, going_on = threading.Event(), threading.Event()

        def read(*args: Any) -> Any:
            slow.set()
            assert going_on.wait(30)
            return plain(*args)

        from ktrt.adapter.files.read import read_adapter as plain

        monkeypatch.setattr("ktrt.adapter.plan.read_adapter", read)
        found: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: found.append(client.load("new", "adapter_a")))
        thread.start()
        assert slow.wait(30)
        assert "new" not in client.models()
        response = server.session.submit(QUESTION, adapter="adapter_b", max_new_tokens=8).result(30)
        assert response.generated_tokens > 0
        going_on.set()
        thread.join(30)
        assert found[0].status_code == 200


def test_without_a_root_nothing_is_read(serve_session: Session) -> None:
    runtime = RuntimeAdapters(serve_session, Names(serve_session, "demo"), None)
    with pytest.raises(ApiError, match="loading of adapters at run time is off"):
        asyncio.run(runtime.load("x", "/dev/zero"))


class TestAudit:
    def test_the_picture(self, server_url: str, server: Server) -> None:
        found = httpx.get(f"{server_url}/v1/adapters/adapter_a/audit", timeout=60).json()
        audit = server.session.adapters.audit("adapter_a")
        assert found["name"] == "adapter_a"
        assert found["tensors"]["found"] == audit.found
        assert found["tensors"]["not_applied"] == 0
        assert found["digest"] == server.names.card("adapter_a").digest
        kinds = {each["kind"]: (each["changed"], each["total"]) for each in found["kinds"]}
        for change in found["changes"]:
            assert change["kind"] in kinds
            assert change["layer"] in found["layers"]
            assert change["ratio"] == pytest.approx(change["delta"] / change["weight"])
        assert sum(changed for changed, _ in kinds.values()) == len(found["changes"])
        assert all(changed <= total for changed, total in kinds.values())
        assert kinds["mlp.experts.down_proj"][0] > 0
        assert any(not changed for changed, _ in kinds.values()), "columns without a change too"

    def test_norms_are_the_files(self, server_url: str) -> None:
        found = httpx.get(f"{server_url}/v1/adapters/adapter_a/audit", timeout=60).json()
        base = {
            key: value
            for file in (DEMO / "model").glob("*.safetensors")
            for key, value in load_file(file).items()
        }
        config = json.loads((DEMO / "adapter_a" / "adapter_config.json").read_text())
        tensors = load_file(DEMO / "adapter_a" / "adapter_model.safetensors")
        change = next(each for each in found["changes"] if ".self_attn." in each["module"])
        name = f"base_model.model.{change['module']}.lora_"
        delta = tensors[f"{name}B.weight"].float() @ tensors[f"{name}A.weight"].float()
        scaling = config["lora_alpha"] / config["r"]
        assert change["delta"] == pytest.approx(float(delta.norm()) * scaling, rel=1e-4)
        weight = base[f"{change['module']}.weight"].float()
        assert change["weight"] == pytest.approx(float(weight.norm()), rel=1e-3)

    def test_once_per_contents(
        self, server_url: str, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        url = f"{server_url}/v1/adapters/adapter_b/audit"
        first = httpx.get(url, timeout=60).json()
        monkeypatch.setattr(server.audits, "_compute", lambda *_: 1 / 0)
        assert httpx.get(url).json() == first

    def test_without_the_base(self, server_url: str) -> None:
        url = f"{server_url}/v1/adapters/adapter_a/audit?norms=false"
        assert {each["weight"] for each in httpx.get(url).json()["changes"]} == {None}

    def test_a_failure_is_not_kept(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        async def ask() -> Any:
            return await server.audits.audit("adapter_a", norms=False)

        server.audits._found.clear()
        with monkeypatch.context() as patch:
            patch.setattr(server.audits, "_compute", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                asyncio.run(ask())
        assert asyncio.run(ask()).tensors.found > 0
        server.audits._found.clear()

    @pytest.mark.parametrize("name", ["x", "demo", "adapter_a*0.5", "%2e%2e", "a/b"])
    def test_unknown(self, server_url: str, name: str) -> None:
        found = httpx.get(f"{server_url}/v1/adapters/{name}/audit")
        assert found.status_code == 404
