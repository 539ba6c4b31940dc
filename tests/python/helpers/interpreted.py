"""Triton's kernels on the CPU: ``conftest.py`` switches its interpreter on."""

from __future__ import annotations

import os
from typing import Any

import pytest


def interpreted() -> None:
    """Skips a test whose kernels cannot be interpreted; lets their loops over device numbers run
    with NumPy 2.4, which makes no int of an array [1]."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled with KTRT_TEST_GPU=1")
    from triton.runtime import interpreter

    module: Any = interpreter
    before = module._patch_lang_tensor
    if getattr(before, "kt_mended", False):
        return

    def patch(tensor: Any, *rest: Any) -> None:  # Triton 3.6 has a second one
        before(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    patch.kt_mended = True  # type: ignore[attr-defined]
    module._patch_lang_tensor = patch
