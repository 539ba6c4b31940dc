"""Checks out commits and installs each one's package, compiled module included, into a folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Build:
    """A commit's checkout, its installed package, and a folder for its caches."""

    commit: str
    source: Path
    site: Path
    cache: Path

    def environment(self, **variables: str) -> dict[str, str]:
        """Environment of a process that imports this build's ktrt and shares no cache."""
        fixed = {
            "PYTHONPATH": str(self.site),
            "XDG_CACHE_HOME": str(self.cache),
            "HF_HUB_OFFLINE": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        return {**os.environ, **fixed, **variables}


def run(command: Sequence[str | Path], **options: object) -> str:
    """Returns stdout; stops with the command and its last lines if it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
        raise SystemExit(f"{' '.join(words)}\nfailed with exit code {done.returncode}:\n{tail}")
    return str(done.stdout)


def commit_of(name: str) -> str:
    return run(
        ["git", "-C", ROOT, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"]
    ).strip()


def title_of(commit: str) -> str:
    return run(["git", "-C", ROOT, "log", "-1", "--format=%h %s", commit]).strip()


@contextmanager
def built(names: Sequence[str], work: Path, kept: Path | None) -> Iterator[list[Build]]:
    """Builds of these commits below ``work``; their worktrees are removed at the end.

    ``kept``: folder of installed packages by commit; one that is there is not built again.
    """
    commits = [commit_of(name) for name in names]
    builds = [
        Build(
            commit,
            source=work / f"source-{number}",
            site=(kept / commit if kept else work / f"site-{number}").resolve(),
            cache=work / f"cache-{number}",
        )
        for number, commit in enumerate(commits)
    ]
    try:
        for build in builds:
            run(["git", "-C", ROOT, "worktree", "add", "--detach", build.source, build.commit])
            if not build.site.is_dir():
                print(f"building {title_of(build.commit)}", file=sys.stderr, flush=True)
                install(build, work / "build")
        yield builds
    finally:
        for build in builds:
            if build.source.is_dir():
                run(["git", "-C", ROOT, "worktree", "remove", "--force", build.source])


def install(build: Build, build_folder: Path) -> None:
    """Installs the package alone; torch and the rest come from this interpreter's environment."""
    # Complete or not there at all: an interrupted installation must not be taken for a kept one.
    unfinished = build.site.with_name(build.site.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(build_folder, ignore_errors=True)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    options += ["-C", f"build-dir={build_folder}", "--target", str(unfinished)]
    if shutil.which("ccache"):
        options += ["-C", "cmake.define.CMAKE_CXX_COMPILER_LAUNCHER=ccache"]
    run([sys.executable, "-m", "pip", "install", *options, build.source])
    unfinished.rename(build.site)
