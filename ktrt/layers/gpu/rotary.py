"""Rotary positions on a GPU in one kernel for queries and keys: torch's 5 to 14 take 8 to 17 µs of
a layer in a captured step (H200)."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ktrt.utils.triton_kernels import runs_triton, triton_kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from ktrt.utils.patches import Patches

# transformers' names: of queries and keys, or one of both, with cosines and sines; with complex
# numbers.
_NAMES = ("apply_rotary_pos_emb", "apply_rotary_emb")
_SIZE, _TOKENS, _HEADS = 32, 5, 3


def kernels() -> Any:
    """Returns the module of Triton kernels; None: there is no Triton."""
    return triton_kernels(
        "ktrt.layers.gpu.rotary_kernels",
        "Rotary positions on the GPU run in torch, in more kernels",
    )


@dataclass(frozen=True)
class Form:
    """The arguments of a function: ``vectors`` at once (queries and keys, or one of both). Cosines
    for all numbers of a head (``whole``), for its first ones (``part``), or for half of all
    (``half``); ``pairs``: complex numbers for neighbours."""

    vectors: int
    whole: bool = False
    part: bool = False
    half: bool = False
    pairs: bool = False

    def rotated(self, size: int, width: int) -> tuple[int, int] | None:
        """Returns how many of a head's ``size`` numbers are rotated, and from the first cosine of
        the ``width`` the second half's; None: the function has to say."""
        if self.half or self.pairs:
            return (size, 0) if 2 * width == size else None
        if (width == size and self.whole) or (width < size and self.part and not width % 2):
            return width, width // 2
        return None


def use_rotary_kernel(model: nn.Module, device: torch.device, patches: Patches) -> int:
    """Has the attention modules of ``model`` rotate on ``device`` by one kernel, until ``patches``
    are undone; returns how many functions it stands for. A probe decides."""
    if kernels() is None or not runs_triton(kernels().rotary_kernel, device):
        return 0
    found = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
    count = 0
    for each in sorted({type(module).__module__ for module in found}):
        module = vars(sys.modules[each])
        for name in _NAMES:
            function = getattr(module.get(name), "kt_plain", module.get(name))
            if function is not None and (form := _form_of(function, device)) is not None:
                patches.entry(module, name, _Rotary(function, form))
                count += 1
    return count


class _Rotary:
    """The kernel in place of one function, where it fits."""

    def __init__(self, plain: Callable[..., Any], form: Form) -> None:
        self.kt_plain, self.form = plain, form

    def __call__(self, *args: Any, unsqueeze_dim: int = 1, **options: Any) -> Any:
        form, count = self.form, self.form.vectors
        vectors, rest = args[:count], args[count:]
        if len(rest) == (1 if form.pairs else 2) and not options and unsqueeze_dim in (1, 2):
            found = rotate(vectors, rest, form, unsqueeze_dim)
            if found is not None:
                return found if count > 1 else found[0]
        if unsqueeze_dim != 1:
            options["unsqueeze_dim"] = unsqueeze_dim
        return self.kt_plain(*args, **options)


def rotate(
    vectors: Sequence[torch.Tensor], numbers: Sequence[torch.Tensor], form: Form, heads_at: int
) -> tuple[torch.Tensor, ...] | None:
    """Returns the rotated vectors [rows, heads, tokens, size], or with heads and tokens the other
    way round (``heads_at`` 2). ``numbers``: cosines and sines [rows, tokens, width], or complex
    ones. None: the kernel does not take them."""
    x, y = vectors[0], vectors[-1]
    cos = numbers[0]
    if not all(_fits(each, x) for each in vectors) or cos.ndim != 3 or cos.device != x.device:
        return None
    rows, tokens, size = x.shape[0], x.shape[3 - heads_at], x.shape[-1]
    rotated = form.rotated(size, cos.shape[-1])
    if rotated is None or cos.shape[0] not in (1, rows) or cos.shape[1] != tokens:
        return None
    if form.pairs:
        both = torch.view_as_real(cos)
        cos, sin, steps = both[..., 0], both[..., 1], 2
    else:
        sin, steps = numbers[1], 1
    if cos.stride() != sin.stride() or cos.stride(-1) != steps:
        return None
    outs = [torch.empty_like(each) for each in vectors]
    heads = [each.shape[heads_at] for each in vectors]
    order = (0, heads_at, 3 - heads_at)
    strides = [t.stride(at) for t in (x, y, outs[0], outs[-1]) for at in order]
    kernels().rotary_kernel[rows * tokens, sum(heads)](
        x, y, outs[0], outs[-1], cos, sin, tokens, heads[0], *strides,
        0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1), steps, rotated[1], SIZE=size,
        ROTATED=rotated[0], BLOCK=max(16, 1 << (rotated[0] // 2 - 1).bit_length()),
        PAIRS=form.pairs, num_warps=1,
    )  # fmt: skip
    return tuple(outs)


def _fits(vector: torch.Tensor, first: torch.Tensor) -> bool:
    same = (vector.dtype, vector.device, vector.ndim) == (first.dtype, first.device, 4)
    rotates = runs_triton(kernels().rotary_kernel, vector.device) and vector.is_floating_point()
    grad = torch.is_grad_enabled() and vector.requires_grad
    shapes = same and vector.shape[-1] == first.shape[-1] and vector.shape[0] == first.shape[0]
    return rotates and shapes and not grad and vector.stride(-1) == 1 and vector.numel() > 0


def _form_of(function: Callable[..., Any], device: torch.device) -> Form | None:
    """Returns the form in which the kernel computes what ``function`` does; None: in none."""
    widths = {"whole": _SIZE, "part": _SIZE // 2, "half": _SIZE // 2, "pairs": _SIZE // 2}
    for vectors in (2, 1):
        held = {
            n: True for n, width in widths.items() if _same(function, vectors, n, width, device)
        }
        if held:
            return Form(vectors, **held)
    return None


def _same(
    function: Callable[..., Any], count: int, kind: str, width: int, device: torch.device
) -> bool:
    generator = torch.Generator().manual_seed(0)
    made = [
        torch.randn(1, heads, _TOKENS, _SIZE, generator=generator).to(device)
        for heads in (_HEADS, 1)[:count]
    ]
    numbers = [torch.randn(1, _TOKENS, width, generator=generator).to(device) for _ in range(2)]
    if kind == "pairs":
        numbers = [torch.complex(*numbers)]
    found = rotate(made, numbers, Form(count, **{kind: True}), 1)
    try:
        with torch.no_grad():
            expected = function(*made, *numbers)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
    given = expected if isinstance(expected, tuple) else (expected,)
    return (
        found is not None
        and len(given) == count
        and all(
            isinstance(e, torch.Tensor) and e.shape == f.shape
            for e, f in zip(given, found, strict=True)
        )
        and all(torch.allclose(e, f, atol=1e-5) for e, f in zip(given, found, strict=True))
    )
