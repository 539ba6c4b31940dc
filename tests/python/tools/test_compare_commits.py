"""The comparison of two commits, without building any."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tools.compare_commits import builds
from tools.compare_commits.__main__ import main, parse
from tools.compare_commits.builds import ROOT, Build
from tools.compare_commits.differences import (
    bits_rows,
    first_difference,
    missing_names,
    speed_rows,
)
from tools.compare_commits.speed import CPU_DECODE, KT_KERNEL, decode_row, find_script, layer_row

if TYPE_CHECKING:
    from collections.abc import Sequence


def logits() -> np.ndarray:
    return np.linspace(-2, 2, 12, dtype=np.float32).reshape(3, 4)


def test_equal_bits_are_no_difference() -> None:
    assert first_difference(logits(), logits()) is None
    unknown = np.full((2, 2), np.nan, np.float32)
    assert first_difference(unknown, unknown.copy()) is None


def test_the_first_difference_is_described() -> None:
    new = logits()
    new[1, 2] = np.nextafter(new[1, 2], np.float32(9))
    new[2, 3] += 0.5
    text = first_difference(logits(), new)
    assert text is not None
    assert text.startswith("token 1, id 2: 0.18181")
    assert text.endswith("(2 of 12 values, by up to 0.5)")


def test_the_sign_of_zero_and_other_shapes_are_differences() -> None:
    zero = np.zeros((1, 1), np.float32)
    assert first_difference(zero, -zero) is not None
    assert (
        first_difference(zero, np.zeros((1, 2), np.float32)) == "float32[1, 1] became float32[1, 2]"
    )
    assert first_difference(zero, zero.astype(np.float64)) is not None


def test_rows_join_the_forwards_of_a_format_and_an_adapter() -> None:
    old = {f"BF16/{name}/{forward}": logits() for name in "ab" for forward in ("prompt", "steps")}
    new = {key: each.copy() for key, each in old.items()}
    assert [(row.adapter, row.difference) for row in bits_rows("avx2", old, new)] == [
        ("a", None), ("b", None),
    ]  # fmt: skip
    new["BF16/b/steps"][0, 0] = 1
    first, second = bits_rows("avx2", old, new)
    assert first.difference is None
    assert (second.isa, second.format, second.adapter) == ("avx2", "BF16", "b")
    assert str(second.difference).startswith("steps, token 0, id 0: -2.0 became 1.0")


def test_a_missing_forward_is_a_difference() -> None:
    both, one = {"BF16/a/prompt": logits(), "BF16/a/steps": logits()}, {"BF16/a/prompt": logits()}
    assert bits_rows("amx", both, one)[0].difference == "steps: only in the old commit"
    assert bits_rows("amx", one, both)[0].difference == "steps: only in the new commit"


def test_medians_are_compared_and_flagged() -> None:
    old = [{"a": 1.0, "b": 2.0, "c": 1.0}, {"a": 1.0, "b": 2.0}, {"a": 50.0, "b": 2.0}]
    new = [{"a": 1.02, "b": 1.9}, {"a": 9.0, "b": 1.9}, {"a": 1.0, "b": 1.9}]
    a, b = speed_rows(old, new)
    assert (a.name, a.old, a.new, a.flagged) == ("a", 1.0, 1.02, False)
    assert b.ratio == pytest.approx(0.95)
    assert b.flagged
    assert missing_names(old, new) == ["c"]


def test_answers_of_the_benches_become_rows() -> None:
    answer: Any = {"results": {"INT8": {"ms": 3.0, "lora_ms": 4.0, "limit_ms": 2.0}}}
    assert decode_row(answer) == {"decode INT8, x limit": 1.5, "decode INT8 + LoRA, x limit": 2.0}
    layer = {"method": "int8+lora8", "ktrt_ms": 0.5, "bandwidth_fraction": 0.8}
    answer = {"rows": [layer | {"qlen": 1}, layer | {"qlen": 256}]}
    assert layer_row(answer) == {
        "layer int8+lora8, 1 tokens, x limit": 1.25,
        "layer int8+lora8, 256 tokens, ms": 0.5,
    }


def test_scripts_are_found_where_a_commit_has_them(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="has none of bench/cpu_decode.py"):
        find_script(tmp_path, CPU_DECODE)
    for name in reversed(KT_KERNEL):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
        assert find_script(tmp_path, KT_KERNEL) == tmp_path / name


def test_this_checkout_has_the_benches() -> None:
    for candidates in (CPU_DECODE, KT_KERNEL):
        assert find_script(ROOT, candidates).is_file()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_an_unknown_commit_is_refused_before_anything_is_built() -> None:
    with pytest.raises(SystemExit, match="no-such-commit"):
        main(["no-such-commit"])


def test_an_installation_that_fails_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Build("c0ffee", tmp_path / "source", tmp_path / "kept/c0ffee", tmp_path / "cache")

    def fake_pip(command: Sequence[str | Path], *, fails: bool) -> str:
        Path(command[command.index("--target") + 1], "ktrt").mkdir(parents=True)
        if fails:
            raise SystemExit("no compiler")
        return ""

    monkeypatch.setattr(builds, "run", partial(fake_pip, fails=True))
    with pytest.raises(SystemExit):
        builds.install(build, tmp_path / "build")
    assert not build.site.exists()
    monkeypatch.setattr(builds, "run", partial(fake_pip, fails=False))
    builds.install(build, tmp_path / "build")
    assert [path.name for path in build.site.parent.iterdir()] == ["c0ffee"]
    assert (build.site / "ktrt").is_dir()


def test_builds_share_neither_packages_nor_caches(tmp_path: Path) -> None:
    build = Build("c0ffee", tmp_path / "source", tmp_path / "site", tmp_path / "cache")
    found = build.environment(KTRT_ISA="avx2")
    assert found["PYTHONPATH"] == str(tmp_path / "site")
    assert found["XDG_CACHE_HOME"] == str(tmp_path / "cache")
    assert found["KTRT_ISA"] == "avx2"


def test_the_new_commit_is_head_by_default() -> None:
    assert (parse(["old"]).new, parse(["old"]).check) == ("HEAD", "bits")
