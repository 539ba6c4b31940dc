"""Damages foreign files of all kinds: each one loads, or raises a ``KtrtError``.

A *kind* is one file in an otherwise undamaged folder. Inputs are the undamaged file, the files of
``tests/fuzz/corpus/KIND``, and mutations of both: bits and bytes, and for JSON values and keys. Of
weight files only the header is kept and mutated; zeros replace the rest.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.tiny_models import save_adapter, save_model

from ktrt.chat.conversation import Conversation, read_conversation, write_conversation
from ktrt.config import AdapterArgs, ModelArgs, load_config
from ktrt.errors import KtrtError
from ktrt.loading.pack_manifest import MANIFEST, checksum_of, read_manifest
from ktrt.loading.plan import base_of_adapters, open_adapter, open_base
from ktrt.utils.owned_folder import OwnedFolder

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

CORPUS = Path(__file__).resolve().parents[2] / "fuzz" / "corpus"
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.5, 1e999, float("nan"), "", "false", "0",
    "../../etc", "x" * 5000, "\0", "\ud800", "[", [], {}, [None], [[[[]]]], {"": {}}, [1, "a"],
)  # fmt: skip
BYTES = (b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"{", b"[" * 5000, b'"', b"\n", b"99999999999", b"-")


@dataclass
class Kind:
    """``read`` takes the path of the file; ``whole`` is the undamaged content."""

    name: str
    path: Path
    whole: bytes
    read: Callable[[Path], object]
    is_json: bool = True
    is_header: bool = False

    def inputs(self) -> list[bytes]:
        folder = CORPUS / self.name
        kept = [path.read_bytes() for path in sorted(folder.glob("*"))] if folder.is_dir() else []
        return [self.whole, *kept]

    def run(self, data: bytes) -> str | None:
        """Reads a file of these bytes; returns the error's message, None without an error."""
        whole = self.path.read_bytes() if self.path.exists() else None
        self.path.unlink(missing_ok=True)
        self.path.write_bytes(data)
        if self.is_header and whole is not None:
            os.truncate(self.path, max(len(data), len(whole)))
        try:
            self.read(self.path)
        except KtrtError as error:
            return str(error)
        finally:
            self.path.unlink()
            if whole is not None:  # another kind may lie in the same folder
                self.path.write_bytes(whole)
        return None


def header_of(file: Path) -> bytes:
    with file.open("rb") as opened:
        size = opened.read(8)
        return size + opened.read(int.from_bytes(size, "little"))


def make_kinds(folder: Path) -> list[Kind]:
    """Makes all kinds in ``folder``, which must be empty."""
    base = save_model(folder / "base", "deepseek_v2", 96)
    adapter = save_adapter(folder / "adapter", base, "a")
    whole = base_of_adapters(open_base(ModelArgs(base)))
    spoiled = shutil.copytree(base, folder / "spoiled")
    other = shutil.copytree(adapter, folder / "other")
    cache = folder / "cache"
    cache.mkdir(0o755)
    settings = folder / "chat.yaml"
    settings.write_text(
        f"model_name_or_path: {base}\nadapter_name_or_path: {adapter}\nkt_num_threads: 2\n"
        "template: default\ntemperature: 1e-1\nenable_thinking: false\n"
    )
    talk = Conversation("Be brief.", settings={"temperature": 0.5}, model="m", adapter="a")
    talk.add("Hello", "Hi.")
    write_conversation(folder / "turns.json", talk)

    def read_base(_: Path) -> object:
        return open_base(ModelArgs(spoiled))

    def read_adapter(_: Path) -> object:
        return open_adapter(AdapterArgs(other), whole)

    def read_cache(path: Path) -> object:
        path.chmod(0o644)
        with OwnedFolder(os.open(cache, os.O_RDONLY), cache) as opened:
            return read_manifest(opened)

    def weights(name: str, file: Path, read: Callable[[Path], object]) -> Kind:
        return Kind(name, file, header_of(file), read, is_header=True)

    def text(name: str, file: Path, read: Callable[[Path], object]) -> Kind:
        return Kind(name, file, file.read_bytes(), read)

    return [
        text("config", spoiled / "config.json", read_base),
        weights("weights", spoiled / "model.safetensors", read_base),
        text("adapter_config", other / "adapter_config.json", read_adapter),
        weights("adapter_weights", other / "adapter_model.safetensors", read_adapter),
        Kind("settings", settings, settings.read_bytes(), lambda p: load_config(p, []), False),
        text("conversation", folder / "turns.json", read_conversation),
        Kind("manifest", cache / MANIFEST, json.dumps(_manifest()).encode(), read_cache),
    ]


def _manifest() -> dict[str, Any]:
    manifest: dict[str, Any] = {
        "schema": 1, "layout": "kt", "created": "2026", "ktrt": "0",
        "key": {"source": "/m", "weight_format": "bf16", "layers": {"a": [8]}, "files": [{}]},
        "images": {"a": [{"file": "layer-0", "bytes": 8, "digest": "00"}]},
    }  # fmt: skip
    manifest["sha256"] = checksum_of(manifest)
    return manifest


def mutate(kind: Kind, data: bytes, rng: random.Random) -> bytes:
    """Returns a damaged copy."""
    start = 8 if kind.is_header else 0
    if (kind.is_json and rng.random() < 0.7) and (changed := _mutate_json(data[start:], rng)):
        if kind.is_header and rng.random() < 0.9:
            return len(changed).to_bytes(8, "little") + changed
        return data[:start] + changed
    for _ in range(rng.choice([1, 1, 2, 8])):
        at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        data = rng.choice([
            data[:at] + rng.choice(BYTES) + data[at:],
            data[:at] + data[end:],
            data[:at],
            data[:end] + data[at:end] + data[end:],
            data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
        ])  # fmt: skip
    return data


def _mutate_json(data: bytes, rng: random.Random) -> bytes | None:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return None
    for _ in range(rng.choice([1, 1, 2])):
        places = list(_places(content))
        if not places:
            break
        owner, key = rng.choice(places)
        action = rng.randrange(4)
        if action == 0:
            del owner[key]
        elif action == 1 and isinstance(owner, dict):
            owner[rng.choice(["", "x", key + "2", "\ud800"])] = owner.pop(key)
        elif action == 2:
            owner[key] = copy.deepcopy(rng.choice(places)[0])
        else:
            owner[key] = copy.deepcopy(rng.choice(HOSTILE))
    if isinstance(content, dict) and "sha256" in content and rng.random() < 0.8:
        content.pop("sha256", None)
        content["sha256"] = checksum_of(content)
    return json.dumps(content).encode()


def _places(content: Any) -> list[tuple[Any, Any]]:
    """Returns every value as (owner, key); few near the root count as often as many below."""
    found: list[tuple[Any, Any]] = []
    level = [content]
    while level and len(found) < 5000:
        keys = [
            (owner, key)
            for owner in level
            for key in (list(owner) if isinstance(owner, dict) else range(len(owner)))
        ]
        found += keys * max(1, 200 // max(1, len(keys)))
        level = [owner[key] for owner, key in keys if isinstance(owner[key], dict | list)]
    return found
