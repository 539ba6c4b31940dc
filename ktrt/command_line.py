"""What the commands ``python -m ktrt.…`` share: environment, log lines, failures, exit codes."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING

from ktrt.errors import KtrtError

if TYPE_CHECKING:
    from collections.abc import Callable

EXIT_FAILURE = 2
EXIT_INTERRUPTED = 130


def set_environment(*, quiet: bool = True) -> None:
    """For torch and transformers, which read it once: before they are imported. ``quiet`` keeps
    their warnings to themselves."""
    # OpenMP's threads spin after every operation of torch, on cores that the engine's threads need:
    # with both on 2 busy cores the demo made 3 tokens/s, with sleeping ones 70.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Models are local, and the log is ours.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if quiet:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        warnings.simplefilter("ignore")


def run_command(body: Callable[[], int], *, level: int, interrupted: str = "interrupted") -> int:
    """Runs ``body`` and returns its exit code, 2 after a ``KtrtError`` and 130 after Ctrl-C, both
    with a line on standard error. ``level``: of ktrt's log lines, which go there too;
    ``interrupted``: what Ctrl-C leaves behind."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger = logging.getLogger("ktrt")
    before = logger.level
    logger.setLevel(level)
    try:
        return body()
    except KtrtError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_FAILURE
    except KeyboardInterrupt:
        sys.stderr.write(f"error: {interrupted}\n")
        return EXIT_INTERRUPTED
    finally:
        logger.setLevel(before)
