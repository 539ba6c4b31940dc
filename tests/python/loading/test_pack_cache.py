"""The pack cache: written once, mapped afterwards, and never used when it is not what it says."""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import logging
import os
import resource
import shutil
import signal
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.forks import KTRT, Fork
from helpers.tiny_models import save_adapter, save_model, token_ids
from safetensors.torch import load_file, save_file

import ktrt.loading.experts
import ktrt.loading.pack_cache
from ktrt import _core
from ktrt.checkpoint.kt_files import PROJECTIONS
from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.errors import ConfigError
from ktrt.loading.experts import cache_folder
from ktrt.loading.model import load_model
from ktrt.loading.pack_cache import PackCache, default_folder
from ktrt.loading.pack_manifest import MANIFEST, CacheKey
from ktrt.pack import __main__ as pack

ROOT = Path(__file__).resolve().parents[3]
PACKED = "Packed 32 experts of 2 layers"
CACHED = "Loaded 32 experts of 2 layers from the pack cache"


@pytest.fixture(autouse=True)
def _cache_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KTRT_CACHE")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder / "base", "deepseek_v2", 96)
    save_adapter(folder / "a", folder / "base", "a")
    return folder


@pytest.fixture
def base(original: Path, tmp_path: Path) -> Path:
    """A copy of the base to change."""
    return Path(shutil.copytree(original / "base", tmp_path / "base"))


class Loader:
    """Loads a model with its cache in one folder; ``log`` holds the last load's lines."""

    def __init__(self, base: Path, root: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.base, self.root, self._caplog = base, root, caplog
        self.log: list[str] = []

    def logits(self, adapter: Path | None = None, kt_backend: Any = "AMXBF16") -> torch.Tensor:
        self._caplog.clear()
        args = ExpertArgs(kt_backend, kt_num_threads=1, ktrt_cache_dir=self.root)
        with self._caplog.at_level(logging.INFO), torch.no_grad():
            loaded = load_model(ModelArgs(self.base), AdapterArgs(adapter), args)
            result: torch.Tensor = loaded.model(token_ids(1, 20)).logits
            loaded.close()
        self.log = self._caplog.messages.copy()
        return result

    def said(self, text: str) -> bool:
        return any(text in line for line in self.log)

    @property
    def folder(self) -> Path:
        (folder,) = (p for p in self.root.iterdir() if p.is_dir())
        return folder


@pytest.fixture
def loader(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Loader:
    return Loader(base, tmp_path / "cache", caplog)


@pytest.mark.parametrize("kt_backend", ["AMXBF16", "AMXInt8"])
def test_second_start_uses_the_cache(loader: Loader, original: Path, kt_backend: str) -> None:
    adapter = original / "a"
    first = loader.logits(adapter, kt_backend)
    assert loader.said(PACKED)
    assert loader.said("Wrote the pack cache")
    second = loader.logits(adapter, kt_backend)
    assert loader.said(CACHED)
    assert not loader.said(PACKED)
    assert torch.equal(first, second)
    # LoRA is the adapter's: the same cache serves the base.
    third = loader.logits(None, kt_backend)
    assert loader.said(CACHED)
    assert not torch.equal(first, third)


def test_formats_have_caches_of_their_own(loader: Loader) -> None:
    loader.logits(kt_backend="AMXBF16")
    loader.logits(kt_backend="AMXInt8")
    assert loader.said(PACKED)
    assert len([p for p in loader.root.iterdir() if p.is_dir()]) == 2


def test_int4_of_another_search_is_packed_again(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader.logits(kt_backend="RAWINT4")
    loader.logits(kt_backend="RAWINT4")
    assert loader.said(CACHED)
    monkeypatch.setattr(ktrt.loading.experts, "INT4_SEARCH", 10)
    loader.logits(kt_backend="RAWINT4")
    assert loader.said("its INT4 scales are of search 1, now 10")
    assert loader.said(PACKED)


def damage(path: Path, offset: int) -> None:
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("file", ["layer-0000.part-0", "layer-0001.part-0", MANIFEST])
@pytest.mark.parametrize("how", ["first byte", "last byte", "middle", "truncated", "gone"])
def test_damage_is_found_and_repaired(loader: Loader, file: str, how: str) -> None:
    expected = loader.logits()
    path = loader.folder / file
    size = path.stat().st_size
    if how == "gone":
        path.unlink()
    elif how == "truncated":
        path.chmod(0o644)
        os.truncate(path, size // 2)
    else:
        # The manifest's last byte is a brace, its first one too; INT8 scales would be at the end.
        damage(path, {"first byte": 0, "last byte": -1, "middle": size // 2}[how])
    assert torch.equal(loader.logits(), expected)
    assert loader.said("is damaged")
    assert loader.said(PACKED)
    assert torch.equal(loader.logits(), expected)
    assert loader.said(CACHED)


def test_a_replaced_source_file_is_noticed(loader: Loader) -> None:
    before = loader.logits()
    file = loader.base / "model.safetensors"
    status = file.stat()
    tensors = load_file(file)
    tensors = {k: v * 0.5 if ".experts." in k else v for k, v in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    # The same name, size and time, as `cp -p` of another fine-tune leaves it.
    assert file.stat().st_size == status.st_size
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = loader.logits()
    assert loader.said("is outdated (changed since: model.safetensors)")
    assert loader.said(PACKED)
    assert not torch.equal(before, after)
    assert torch.equal(loader.logits(), after)
    assert loader.said(CACHED)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_touched_source_file_is_noticed(loader: Loader, name: str) -> None:
    loader.logits()
    os.utime(loader.base / name)
    loader.logits()
    assert loader.said(f"changed since: {name}")
    assert loader.said(PACKED)


def test_another_layout_version_is_not_used(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = loader.logits()
    monkeypatch.setattr(ktrt.loading.pack_cache, "LAYOUT", "kt-9/image-2")
    assert torch.equal(loader.logits(), expected)
    assert loader.said("its layout is kt-0.7.2/image-1, now kt-9/image-2")
    assert loader.said(PACKED)


def test_switches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder(ExpertArgs(ktrt_cache=False), {}) is None
    assert cache_folder(ExpertArgs(), {"KTRT_CACHE": "0"}) is None
    assert cache_folder(ExpertArgs(), {"KTRT_CACHE_DIR": "/x"}) == Path("/x")
    given = ExpertArgs(ktrt_cache_dir=Path("/y"))
    assert cache_folder(given, {"KTRT_CACHE_DIR": "/x"}) == Path("/y")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "ktrt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "ktrt"


def test_too_little_room_is_known_beforehand(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(loader.base)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    loader.logits()
    assert loader.said("0.00 GB free on the disk")
    assert loader.said(PACKED)
    assert not [p for p in loader.root.iterdir() if p.is_dir()]


def test_a_full_disk_costs_the_cache_only(loader: Loader) -> None:
    expected = loader.logits()
    shutil.rmtree(loader.root)
    # The first image fits under the limit, the second one does not: 1.47 MB each.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        assert torch.equal(loader.logits(), expected)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert loader.said("cannot be written")
    assert loader.said(os.strerror(errno.EFBIG))
    assert loader.said("packed again at the next start")
    assert not [p for p in loader.root.iterdir() if p.is_dir()]


def test_no_space_left(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    """As /dev/full says it, at the second layer."""
    real, calls = os.open, []

    def fake(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if "layer-0001" in str(path):
            calls.append(path)
            return real("/dev/full", os.O_WRONLY)
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", fake)
    loader.logits()
    assert calls
    assert loader.said("No space left on device")
    assert not [p for p in loader.root.iterdir() if p.is_dir()]


def test_a_folder_that_cannot_be_made(loader: Loader) -> None:
    loader.root = loader.base / "config.json" / "cache"
    loader.logits()
    assert loader.said("No pack cache: Not a directory")
    assert loader.said(PACKED)


@pytest.mark.parametrize("mode", [0o777, 0o772, 0o707])
def test_a_cache_where_others_write_is_not_used(loader: Loader, mode: int) -> None:
    """Neither read nor written: their experts would be as good as ours."""
    expected = loader.logits()
    loader.root.chmod(mode)
    assert torch.equal(loader.logits(), expected)
    assert loader.said("No pack cache: other users can write to")
    assert sum("pack cache" in line for line in loader.log) == 1
    assert loader.said(PACKED)
    loader.root.chmod(0o1777)  # as /tmp: others cannot touch what is ours
    assert torch.equal(loader.logits(), expected)
    assert loader.said(CACHED)


@pytest.mark.parametrize("name", ["", MANIFEST, "layer-0001.part-0"])
@pytest.mark.parametrize("mode", [0o775, 0o777])
def test_what_others_could_have_written_is_packed_again(
    loader: Loader, name: str, mode: int
) -> None:
    expected = loader.logits()
    (loader.folder / name).chmod(mode)
    assert torch.equal(loader.logits(), expected)
    assert loader.said("other users can write to")
    assert loader.said("packing again")
    assert torch.equal(loader.logits(), expected)
    assert loader.said(CACHED)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("name", ["", MANIFEST, "layer-0001.part-0", "root"])
def test_what_belongs_to_others_is_not_used(loader: Loader, name: str) -> None:
    expected = loader.logits()
    path = loader.root if name == "root" else loader.folder / name
    os.chown(path, 12345, -1)
    assert torch.equal(loader.logits(), expected)
    assert loader.said(f"No pack cache: {path} belongs to user 12345, not to root")
    assert loader.said(PACKED)
    assert path.stat().st_uid == 12345


@pytest.mark.parametrize("name", ["", MANIFEST, "layer-0001.part-0"])
def test_links_are_not_followed(loader: Loader, tmp_path: Path, name: str) -> None:
    expected = loader.logits()
    path = loader.folder / name
    target = path.rename(tmp_path / "elsewhere")
    path.symlink_to(target)
    assert torch.equal(loader.logits(), expected)
    assert loader.said("is a link" if not name else "is damaged (Too many levels of symbolic links")
    assert loader.said(PACKED)
    assert target.exists()


def test_the_cache_folder_itself_may_be_a_link(loader: Loader, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    loader.root.symlink_to(tmp_path / "disk")
    loader.logits()
    loader.logits()
    assert loader.said(CACHED)


@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, '{"schema": 1}', '{"schema": 1, "key": 7}', "[]", "null", "\udcff", "", "{"],
)
def test_a_manifest_that_is_none(loader: Loader, text: str) -> None:
    expected = loader.logits()
    manifest = loader.folder / MANIFEST
    manifest.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert torch.equal(loader.logits(), expected)
    assert loader.said("is damaged")
    (entry,) = (pack.entries(loader.root),)
    assert [each["state"] for each in entry] == ["current"]


def test_no_home_is_no_reason_to_refuse(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", staticmethod(nobody))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder(ExpertArgs(), {}) is None
    assert "No pack cache: this user has no home folder" in caplog.text
    assert cache_folder(ExpertArgs(), {"KTRT_CACHE_DIR": "/x"}) == Path("/x")
    with pytest.raises(ConfigError, match="name one with --dir"):
        pack.prune(pack._folder(argparse.Namespace(dir=None)), everything=False)


CHILD = textwrap.dedent(
    """
    import logging, sys, time
    from pathlib import Path
    import ktrt.loading.pack_cache as pack_cache
    from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
    from ktrt.loading.model import load_model
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    seconds = float(sys.argv[3])
    add = pack_cache.CacheWriter.add
    def slow(*args):
        add(*args)
        print("layer written", flush=True)
        time.sleep(seconds)
    pack_cache.CacheWriter.add = slow
    args = ExpertArgs(kt_num_threads=1, ktrt_cache_dir=Path(sys.argv[2]))
    load_model(ModelArgs(Path(sys.argv[1])), AdapterArgs(), args).close()
    """
)


def start(loader: Loader, seconds: float) -> Fork:
    """A process that loads, and rests after every layer that it wrote."""
    return KTRT.start(CHILD, str(loader.base), str(loader.root), str(seconds))


def wait_for(process: Fork, text: str) -> None:
    assert any(text in line for line in process.stdout), f"it never said {text!r}"


@pytest.mark.slow
def test_killed_while_writing(loader: Loader) -> None:
    with start(loader, 600) as process:
        wait_for(process, "layer written")
    (left,) = (p for p in loader.root.iterdir() if p.is_dir())
    assert ".tmp-" in left.name
    expected = loader.logits()
    assert loader.said(PACKED)
    assert not left.exists()
    assert torch.equal(loader.logits(), expected)
    assert loader.said(CACHED)


@pytest.mark.slow
def test_two_processes_share_one_write(loader: Loader) -> None:
    with start(loader, 1.5) as process:
        wait_for(process, "layer written")
        loader.logits()
        assert loader.said("Another process packs these experts: waiting for it")
        assert loader.said(CACHED)
        assert not loader.said(PACKED)
        assert "Wrote the pack cache" in process.stdout.read()
        assert process.wait() == 0


def test_a_writer_that_stopped_is_not_waited_for(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = loader.logits()
    lock = loader.folder.with_name(f"{loader.folder.name}.lock")
    shutil.rmtree(loader.folder)
    monkeypatch.setattr(ktrt.loading.pack_cache, "_STALL_SECONDS", 0.3)
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        begin = time.monotonic()
        assert torch.equal(loader.logits(), expected)
        assert time.monotonic() - begin < 60
    assert loader.said("makes no progress")
    assert not [p for p in loader.root.iterdir() if p.is_dir()]


def test_one_image_per_numa_part(tmp_path: Path) -> None:
    """Images of several parts are copied, so that their pages lie on their nodes."""
    cpus = sorted(os.sched_getaffinity(0))
    engine = _core.Engine(num_threads=2, nodes=[[cpus[0]], [cpus[-1]]])

    def layer() -> _core.MoeLayer:
        return _core.MoeLayer(
            engine, num_experts=2, top_k=1, hidden_size=96, intermediate_size=160,
            weight_format="int8",
        )  # fmt: skip

    packed, w = layer(), torch.randn(160, 96, generator=torch.Generator().manual_seed(0))
    for expert in range(2):
        packed.load_expert(expert, w * (1 + expert), w, w.T.contiguous())
    sizes = list(packed.image_bytes)
    assert len(sizes) == 2
    key = CacheKey("/models/x", "int8", {"experts": sizes}, [])
    cache = PackCache(tmp_path, key)
    with cache.lock() as may_write:
        writer = cache.writer()
        assert may_write
        assert writer is not None
        writer.add("experts", packed)
        assert writer.finish()
    assert cache.folder.name.startswith("x-int8-2parts-")
    found = layer()
    assert cache.load({"experts": found}) == "copied"
    for projection in PROJECTIONS:
        assert found.packed_codes(1, projection) == packed.packed_codes(1, projection)
        assert found.packed_scales(1, projection) == packed.packed_scales(1, projection)
    one = CacheKey("/models/x", "int8", {"experts": [sum(sizes)]}, [])
    assert PackCache(tmp_path, one).folder != cache.folder
    engine.close()


def config(loader: Loader) -> str:
    file = loader.base.parent / "config.yaml"
    file.write_text(
        f"model_name_or_path: {loader.base}\nktrt_cache_dir: {loader.root}\nkt_num_threads: 1\n",
        "utf-8",
    )
    return str(file)


def test_command_line(loader: Loader, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack.main(["-q", config(loader)]) == 0
    assert "not there yet" in capsys.readouterr().out
    assert pack.main(["-q", config(loader)]) == 0
    assert "is there already" in capsys.readouterr().out
    loader.logits()
    assert loader.said(CACHED)

    listing = ["--list", "--json", "--dir", str(loader.root)]
    assert pack.main(listing) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["state"] == "current"
    assert entry["source"] == str(loader.base)
    assert (entry["weight_format"], entry["layers"], entry["parts"]) == ("bf16", 2, 1)
    assert entry["bytes"] == sum(f.stat().st_size for f in Path(entry["folder"]).iterdir())
    assert pack.main(["--list", "--dir", str(loader.root)]) == 0
    assert "current" in capsys.readouterr().out

    assert pack.main(["--prune", "--dir", str(loader.root)]) == 0
    assert "1 entries kept" in capsys.readouterr().out
    os.utime(loader.base / "config.json")
    leftover = loader.root / f"{loader.folder.name}.tmp-1"
    leftover.mkdir()
    assert pack.main(["--prune", "--dir", str(loader.root)]) == 0
    output = capsys.readouterr().out
    assert "outdated: the model's files have changed" in output
    assert "incomplete" in output
    assert not [p for p in loader.root.iterdir() if p.is_dir()]


def test_command_line_refusals(loader: Loader, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack.main([config(loader), "ktrt_cache=false"]) == 2
    assert "switched off" in capsys.readouterr().err
    assert pack.main([config(loader), "model_name_or_path=/no/such"]) == 2
    assert "/no/such" in capsys.readouterr().err
    for arguments in ([], ["--list", "x.yaml"]):
        with pytest.raises(SystemExit):
            pack.main(arguments)
