"""Damaged adapter_config.json files: ``AdapterError``, or the same numbers as before the damage.

Real configurations (PEFT's own, with every key; Unsloth's; a Tinker-like one with few) are changed
at random with a fixed seed: values exchanged, nested, emptied, replaced by nonsense, keys dropped,
bytes of the file flipped or cut. Another valid strength (lora_alpha, alpha_pattern, use_rslora,
lora_B_layout) is no visible damage, and is left out.
"""

from __future__ import annotations

import json
import logging
import random
from typing import TYPE_CHECKING, Any

import pytest
from adapter.test_adapter_every_layout import assert_same, plan
from helpers.adapter_layouts import random_adapter, write_a, write_b
from helpers.adapter_names import UNSLOTH
from helpers.tiny_models import base_of, read_folder, save_model
from peft import LoraConfig

from ktrt.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ktrt.adapter import AdapterPlan, BaseModel

TOTAL = 300
# Another valid value of these keys makes another valid adapter.
_STRENGTH = {"lora_alpha", "alpha_pattern", "use_rslora", "lora_B_layout", "auto_mapping"}
# Keys with numbers and expressions.
_OFTEN = 4 * ("r", "rank_pattern", "target_modules", "exclude_modules", "layers_to_transform")
_HUGE = 10**400
_NONSENSE: list[Any] = [
    None, True, False, 0, 1, -1, 7, 0.5, -0.0, 1e308, _HUGE, -_HUGE, "", "x", "false", "true", "8",
    "(", "[", "*", "(?P<a", "a{99999999999}", "(?i)x", "\\", "\x00", "..", "/", "all-linear", [],
    [[]], [None], ["x"], [["x"]], [7], [True], ["x", None], [{"a": 1}], {}, {"": 1}, {"x": None},
    {"x": "y"}, {"(": 4}, {"x": {"y": 1}}, {".*": -1}, {".*": _HUGE}, {".*": True}, {".*": "4"},
    {"(?i).*": 4}, "ü€𝄞", "\ud800", "q_proj" * 500,
]  # fmt: skip


def _nested(depth: int) -> Any:
    value: Any = "x"
    for number in range(depth):
        value = [value] if number % 2 else {"x": value}
    return value


class Subjects:
    """Adapters with their configurations and plans."""

    def __init__(self, folder: Path) -> None:
        model = save_model(
            folder / "model", "mixtral", 24, hidden_size=56, num_local_experts=3,
            num_hidden_layers=1, num_experts_per_tok=2,
        )  # fmt: skip
        self.base: BaseModel = base_of(model)
        adapter = random_adapter(model)
        self.made: list[tuple[Path, dict[str, Any], AdapterPlan]] = []
        for writer in (write_a, write_b):
            for number, marks in enumerate((UNSLOTH, {})):
                target = writer(folder / f"{writer.__name__}{number}", adapter)
                config = read_folder(target)[1] | {"lora_B_layout": "rank_major"}
                if marks:
                    LoraConfig().save_pretrained(folder / "peft")
                    full = json.loads((folder / "peft" / "adapter_config.json").read_text())
                    config = full | config | marks
                text = json.dumps(config)
                (target / "adapter_config.json").write_text(text, encoding="utf-8")
                self.made.append((target, config, plan(target, self.base)))


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subjects]:
    logging.disable(logging.CRITICAL)
    yield Subjects(tmp_path_factory.mktemp("config_damage"))
    logging.disable(logging.NOTSET)


def damaged(rng: random.Random, config: dict[str, Any]) -> bytes:
    """Makes one to three changes of values, or of bytes."""
    changed = dict(config)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        keys = sorted(set(changed) - _STRENGTH)
        key = rng.choice([*keys, *(key for key in _OFTEN if key in changed)])
        kind = rng.random()
        if kind < 0.1:
            del changed[key]
        elif kind < 0.2:
            changed[key] = _nested(rng.choice([3, 60, 70, 500, 2000]))
        elif kind < 0.3:
            changed[key] = changed[rng.choice(sorted(changed))]
        elif kind < 0.4:
            changed[key] = [changed[key], rng.choice(_NONSENSE)]
        elif kind < 0.5:
            changed[f"{key}_2"] = rng.choice(_NONSENSE)
        else:
            changed[key] = rng.choice(_NONSENSE)
    try:
        data = bytearray(json.dumps(changed).encode())
    except RecursionError:
        data = bytearray(b'{"r": ' + b"[" * 5000 + b"]" * 5000 + b"}")
    if rng.random() < 0.2:
        position = rng.randrange(len(data))
        if rng.random() < 0.3:
            del data[position:]
        else:
            data[position] ^= 1 << rng.randrange(8)
    elif rng.random() < 0.1:
        data[:0] = rng.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b"version https://git-lfs"])
    return bytes(data)


def _has_other_strength(data: bytes, config: dict[str, Any]) -> bool:
    """Returns whether a flipped bit has made another valid adapter."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return any(found.get(key, config.get(key)) != config.get(key) for key in _STRENGTH)


def test_refused_or_the_same_numbers(subjects: Subjects) -> None:
    rng = random.Random(14)
    refused = 0
    for number in range(TOTAL):
        folder, config, expected = subjects.made[number % len(subjects.made)]
        file = folder / "adapter_config.json"
        data = damaged(rng, config)
        file.write_bytes(data)
        if _has_other_strength(data, config):
            continue
        try:
            found = plan(folder, subjects.base)
        except AdapterError as error:
            named = str(folder) in str(error)
            refused += 1
        except Exception as error:
            raise AssertionError(f"case {number}: {data[:2000]!r}") from error
        else:
            assert_same(found, expected)
            named = True
        assert named, data[:300]
    assert TOTAL * 0.3 < refused < TOTAL * 0.95


def test_a_deeply_nested_manifest_is_a_damaged_one(subjects: Subjects) -> None:
    folder, config, _ = subjects.made[0]
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    manifest = folder / "kt_adapter_manifest.json"
    for depth in (70, 900, 100_000):
        manifest.write_text(f'{{"version": 1, "lora": {"[" * depth}{"]" * depth}}}', "utf-8")
        with pytest.raises(AdapterError, match=r"kt_adapter_manifest\.json.*nested too deeply"):
            plan(folder, subjects.base)
    manifest.unlink()
