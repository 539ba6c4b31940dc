"""How a module of transformers calls the attention interface, as its source says.

A function in the interface sees query, key, value and a mask. A module that changes the mask of the
model, or looks at the name of the function, means more than a call shows.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

# Arguments that ``AttentionForm`` knows, or that change nothing.
_KNOWN = {
    "attention_mask", "dropout", "is_causal", "position_ids", "s_aux", "scaling", "sliding_window",
    "softcap",
}  # fmt: skip
_NAME, _MASK, _FUNCTION = "_attn_implementation", "attention_mask", "get_interface"
_MASK_AT = 4  # after the module, query, key and value


def why_other(kind: type) -> str | None:
    """Returns what modules of this class do besides a call of the interface with the model's mask;
    None: nothing."""
    of: Any = kind
    name, forward = of.__name__, inspect.unwrap(of.forward)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return f"the source of {name} is not there"
    functions = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign) and _asks(node.value)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if node.func.id in functions
    ]
    if len(calls) != 1:
        return f"{name} calls transformers' attention interface {len(calls)} times, expected once"
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    if sum(isinstance(n, ast.Attribute) and n.attr == _NAME for n in ast.walk(tree)) > 1:
        return f"{name} looks at the attention's name"
    if _MASK in {n.id for n in names if isinstance(n.ctx, ast.Store)}:
        return f"{name} changes the mask"
    return _of_call(name, calls[0])


def _of_call(name: str, call: ast.Call) -> str | None:
    named = {each.arg: each.value for each in call.keywords if each.arg is not None}
    mask = named.get(_MASK) or (call.args[_MASK_AT] if len(call.args) > _MASK_AT else None)
    if mask is None or not _is_mask(mask):
        return f"{name} attends with another mask than the model's"
    more = sorted(set(named) - _KNOWN)
    return f"{name} attends with {', '.join(more)}" if more else None


def _asks(value: ast.expr | None) -> bool:
    function = getattr(value, "func", None)
    return isinstance(function, ast.Attribute) and function.attr == _FUNCTION


def _is_mask(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == _MASK
