"""Any damage to a YAML file is an error with file and reason: never an exception of PyYAML or
Python, never a message of a megabyte."""

import random
from pathlib import Path
from typing import Any

import pytest

from ktrt.config import load_config
from ktrt.errors import ConfigError, KtrtError

YAML = """\
# a chat
model_name_or_path: model
adapters: {first: adapter, second: &a adapter}
adapter_weights: {first: 0.5}
template: qwen3
default_system: "You are 你."
trust_remote_code: true
use_kt: true
cpu_infer: 2
kt_config:
  kt_backend: AMXInt8
  kt_num_threads: 3
stop: ["###", 'b']
stop_token_ids: [1, 2]
temperature: 1.0e-1
top_k: 5
learning_rate: 1e-4
dataset: identity
"""
# Values that are difficult for YAML, Python or a type.
VALUES = [
    "", "~", "null", "[]", "{}", "[a, b]", "{a: b}", "[[[]]]", "true", "no", "-1", "0", "1.5",
    "'1'", ".nan", ".inf", "-.inf", "1e30", "1e999", "1" * 30, "9" * 5000, "0x" + "f" * 5000,
    "0b" + "1" * 999, "0o99", "1_000", "190:20:30", "1:99999999999999999999", "2024-13-45",
    "2024-01-01", "0000-00-00", "2001-12-14t21:59:43.10-05:00", "99:99:99",
    "2001-12-14T99:99:99Z", "!!int x", "!!int ''", "!!float x", "!!bool x", "!!null x",
    "!!timestamp x", "!!timestamp 2024-99-99", "!!binary x", "!!binary aGk=", "!!set {a, b}",
    "!!omap [a: b]", "!!omap x", "!!pairs [a]", "!!str [a]", "!!seq x", "!!map x",
    "!!python/object:os.system x", "!!python/name:os.system", "!unknown x", "!<tag:x> y", "*none",
    "&x [*x]", "&x {a: *x}", "&x", "{? [a] : b}", "{[a]: b}", "{{a: b}: c}", "{a: b, a: c}",
    "{<<: x}", "{<<: [x]}", "{<<: {a: b}}", "<<", "=", "[" * 999, "{a: " * 999, "- - - a", "|",
    ">", "|\n  text", '"\\ud800"', '"\\x00"', '"\\uZZZZ"', "'", '"', "%", "@a", "`", "\t", "a: b",
    ": :", "--- a", "...", "#", "\x00", "\x07", "\ufeff", "\x85", "\u2028", "a" * 5_000, "~/x",
    "~nobody/x", "/" + "a" * 300, "a/" * 3000, "\\", "..", ".", "/dev/null", "/proc/self/mem",
]  # fmt: skip
# A few lines, 9^12 texts: each list holds the previous one nine times.
LAUGHS = "&a0 [x]"
for number in range(1, 13):
    LAUGHS = f"&a{number} [{LAUGHS}{f', *a{number - 1}' * 8}]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage")
    (folder / "model").mkdir()
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_config.json").write_text("{}")
    return folder


def attempt(folder: Path, data: bytes) -> str | None:
    """Returns the error's message; None if the file is valid."""
    file = folder / "chat.yaml"
    file.write_bytes(data)
    try:
        load_config(file)
    except KtrtError as error:
        message = str(error)
        assert len(message) < 2500, message
        assert str(file) in message or "adapter" in message
        return message
    return None


def mutate(text: str, dice: random.Random) -> bytes:
    lines = text.splitlines()
    at = dice.randrange(len(lines))
    kind = dice.randrange(6)
    if kind == 0:
        lines[at] = f"{lines[at].partition(':')[0]}: {dice.choice(VALUES)}"
    elif kind == 1:
        lines.insert(at, dice.choice(lines))
    elif kind == 2:
        column = dice.randrange(len(lines[at]) + 1)
        lines[at] = lines[at][:column] + dice.choice(VALUES)[:200] + lines[at][column:]
    elif kind == 3:
        lines[at] = " " * dice.randrange(5) + lines[at].strip()
    data = bytearray("\n".join(lines).encode("utf-8", "surrogatepass"))
    if kind == 4:
        del data[dice.randrange(len(data)) :]
    elif kind == 5:
        for _ in range(dice.randrange(1, 4)):
            data[dice.randrange(len(data))] = dice.randrange(256)
    return bytes(data)


def test_the_undamaged_one(folder: Path) -> None:
    assert attempt(folder, YAML.encode()) is None


def test_seeded_damage(folder: Path) -> None:
    dice = random.Random(14)
    found = [attempt(folder, mutate(YAML, dice)) for _ in range(300)]
    assert 100 < sum(message is not None for message in found) < 300


@pytest.mark.parametrize(
    "text",
    [
        "adapters: {x: {}}",
        "output_dir: {}",
        "adapter_name_or_path: adapter\nadapter_folder: {}",
        "kt_config: {}",
        "top_k: {}",
        "{}: 1",
    ],
)
def test_every_value(folder: Path, text: str) -> None:
    for value in VALUES:
        attempt(folder, f"model_name_or_path: model\n{text.replace('{}', value)}\n".encode())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        YAML.encode("utf-16"),
        YAML.encode("gbk"),
        b"[" * 9_999,
        b"- " * 9_999,
        b"a: &a\n  <<: *a\n",
        f"model_name_or_path: {LAUGHS}\n".encode(),
        f"kt_config: {{kt_backend: {LAUGHS}}}\n".encode(),
        b"? " * 5000,
        b"%YAML 9.9\n---\na: b\n",
        b"--- a\n--- b\n",
    ],
    ids=range(12),
)
def test_whole_files(folder: Path, data: bytes) -> None:
    assert attempt(folder, data) is not None


@pytest.mark.parametrize("key", ["top_k", "template", "adapter_name_or_path", ""])
def test_overrides_too(folder: Path, key: str) -> None:
    message = ""
    for value in VALUES:
        try:
            load_config({"model_name_or_path": folder / "model"}, [f"{key or value}={value}"])
        except KtrtError as error:
            message = str(error)
        assert len(message) < 2500


@pytest.mark.parametrize("source", [None, 3, ["model_name_or_path=x"]])
def test_neither_path_nor_mapping(source: Any) -> None:
    with pytest.raises(
        ConfigError, match="expected the path of a YAML file, a model.s folder or a mapping"
    ):
        load_config(source)
