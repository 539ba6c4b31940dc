"""Tells config.json's quantisation which modules are plain now.

Each method has its own key for exceptions. Names on disk and in the model are both listed, since
readers match either; experts are one module in transformers, vLLM and sglang.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

# config.json's keys for the description of a quantisation.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
_LISTS = {"compressed-tensors": "ignore", "modelopt": "exclude_modules"}
_LIST = "modules_to_not_convert"
# vLLM's name for the same list; it takes precedence there.
_OTHER_LIST = "ignored_layers"
_EXPERTS = re.compile(r"(.*\.experts)(?:\..*)?")


def plain_modules(tensors: Iterable[str]) -> list[str]:
    """Returns the modules of weights by name, a layer's experts as one."""
    modules: dict[str, None] = {}
    for tensor in tensors:
        module = tensor.removesuffix(".weight")
        match = _EXPERTS.fullmatch(module)
        modules[match[1] if match else module] = None
    return list(modules)


def with_exceptions(claim: dict[str, Any], modules: Iterable[str]) -> dict[str, Any]:
    """Returns a quantization_config that leaves ``modules`` plain; the same one for none."""
    result, modules = dict(claim), list(modules)
    method = str(claim.get("quant_method", "")).replace("_", "-")
    if not modules:
        return result
    if method == "gptq":
        patterns: dict[str, Any] = {f"-:^{_pattern(module)}": {} for module in modules}
        result["dynamic"] = {**(claim.get("dynamic") or {}), **patterns}
    elif method == "auto-round":
        plain = {"bits": 16, "data_type": "float"}
        own = {_pattern(m) if _is_experts(m) else m: plain for m in modules}
        result["extra_config"] = {**(claim.get("extra_config") or {}), **own}
    elif method == "compressed-tensors":
        # A name here is one module; experts are many.
        named = [f"re:{_pattern(m)}" if _is_experts(m) else m for m in modules]
        result["ignore"] = _joined(claim.get("ignore"), named)
    else:
        key = _LISTS.get(method, _LIST)
        result[key] = _joined(claim.get(key), modules)
        if _OTHER_LIST in claim:
            result[_OTHER_LIST] = _joined(claim[_OTHER_LIST], modules)
    return result


def _joined(before: Any, new: Iterable[str]) -> list[Any]:
    return list(dict.fromkeys([*(before or []), *new]))


def _is_experts(module: str) -> bool:
    return module.endswith(".experts")


def _pattern(module: str) -> str:
    """Returns a regular expression for the module and what is inside."""
    return rf"{re.escape(module)}(\..*)?$"
