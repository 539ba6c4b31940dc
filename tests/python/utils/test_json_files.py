"""Foreign JSON: every fault is one error with file, key, the value found and the type expected."""

from pathlib import Path

import pytest

from ktrt.errors import CheckpointError
from ktrt.utils.json_files import (
    JsonObject,
    read_json,
    read_json_as,
    typed,
)


class _Settings(JsonObject):
    r: int
    use: bool = False
    names: list[str] | str | None = None
    pattern: dict[str, float] = {}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"r": "8"}, "r: found '8', expected a valid integer"),
        ({"r": True}, "r: found True, expected a valid integer"),
        ({"r": 8, "use": "false"}, "use: found 'false', expected a valid boolean"),
        ({"r": 8, "names": [1]}, "names.0: found 1, expected a valid string"),
        ({"r": 8, "pattern": {"a": "x"}}, "pattern.a: found 'x', expected a valid number"),
        ({}, "the key 'r' is missing"),
        ([1], "found [1], expected an object"),
    ],
)
def test_a_wrong_type_names_key_and_value(content: object, said: str) -> None:
    with pytest.raises(CheckpointError, match="a.json") as caught:
        typed(content, _Settings, "a.json", CheckpointError)
    assert said in str(caught.value)


def test_unknown_keys_pass_and_integers_are_numbers() -> None:
    content = {"r": 8, "newer": 1, "pattern": {"q": 2}}
    found = typed(content, _Settings, "a.json", CheckpointError)
    assert (found.r, found.pattern) == (8, {"q": 2.0})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no valid JSON"),
        (b'{"a": 1', "no valid JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    ],
)
def test_damage_is_one_error(tmp_path: Path, data: bytes, said: str) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="a.json") as caught:
        read_json(file, CheckpointError)
    assert said in str(caught.value)


def test_missing_files_and_dangling_links_are_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    with pytest.raises(CheckpointError, match="no such file.*Look there"):
        read_json(file, CheckpointError, "Look there.")
    file.symlink_to(tmp_path / "blobs" / "0")
    with pytest.raises(CheckpointError, match="interrupted download"):
        read_json(file, CheckpointError)
    with pytest.raises(CheckpointError, match="directory"):
        read_json(tmp_path, CheckpointError)


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b'\xef\xbb\xbf{"r": 8}')
    assert read_json_as(file, _Settings, CheckpointError).r == 8
