"""RMSNorm on a GPU in one kernel: torch's six to nine take 10 to 14 µs of a captured step (H200),
and a layer has 3 (DeepSeek) to 11 (Gemma 4) of them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from ktrt.layers.norm import Convention, convention_of, row_stride
from ktrt.utils.triton_kernels import runs_triton, triton_kernels

if TYPE_CHECKING:
    from collections.abc import Hashable

    from torch import nn

    from ktrt.utils.patches import Patches

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_NUMBERS_OF_A_WARP = 256


def kernels() -> Any:
    """Returns the module of Triton kernels; None: there is no Triton."""
    return triton_kernels(
        "ktrt.layers.gpu.norm_kernels", "RMSNorm on the GPU runs in torch, in more kernels"
    )


def accelerate_norms_on(model: nn.Module, device: torch.device, patches: Patches) -> int:
    """Runs the RMSNorm layers of ``model`` on ``device`` in one kernel each, until ``patches`` are
    undone; returns how many. As on the CPU (``layers.norm``), a probe decides."""
    if kernels() is None or not runs_triton(kernels().rms_norm_kernel, device):
        return 0
    # float32 does not tell conventions apart.
    dtypes = (parameter.dtype for parameter in model.parameters())
    dtype = next((each for each in dtypes if each == torch.float16), torch.bfloat16)
    count = 0
    known: dict[Hashable, Convention | None] = {}
    each: Any
    for each in model.modules():
        if not _may_be(each, device):
            continue
        kind = type(each), *_settings(each)
        if kind not in known:
            known[kind] = convention_of(each, device, rms_norm, dtype)
        found = known[kind]
        if found is not None:
            patches.set(each, "forward", _Forward(each, found))
            count += 1
    return count


def _may_be(module: Any, device: torch.device) -> bool:
    if not type(module).__name__.endswith("RMSNorm") or "forward" in module.__dict__:
        return False
    weights = list(module.parameters())
    return all(w.ndim == 1 and w.device.type == device.type for w in weights)


def _settings(module: Any) -> tuple[Hashable, ...]:
    """Returns the settings in which layers of one class may differ, except sizes."""
    plain = {n: v for n, v in vars(module).items() if isinstance(v, (bool, float, str))}
    return (*sorted(plain.items()), *module._parameters)


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, how: Convention) -> torch.Tensor:
    """Returns the norm of the rows of x [..., size]; weight [size], of any dtype."""
    size, stride = x.shape[-1], row_stride(x)
    if stride is None:
        x, stride = x.contiguous(), size
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = 1 << (size - 1).bit_length()
    kernels().rms_norm_kernel[(x.numel() // size,)](
        x, x if weight is None else weight, out, stride, how.eps, SIZE=size, BLOCK=block,
        WEIGHTED=weight is not None, TWICE=how.rounds_twice, OFFSET=how.offset,
        num_warps=min(16, max(1, block // _NUMBERS_OF_A_WARP)),
    )  # fmt: skip
    return out


class _Forward:
    """The kernel in place of one layer's forward, where it fits."""

    def __init__(self, module: Any, how: Convention) -> None:
        self._module, self._how, self._plain = module, how, module.forward

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._plain, memo)

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # A result of the experts is still under way, which kernels cannot know.
        if (ready := getattr(x, "ready", None)) is not None:
            x = ready()
        weight = self._module._parameters.get("weight")
        if args or kwargs or not self._takes(x, weight):
            plain: torch.Tensor = self._plain(x, *args, **kwargs)
            return plain
        return rms_norm(x, weight, self._how)

    @staticmethod
    def _takes(x: torch.Tensor, weight: torch.Tensor | None) -> bool:
        fits = weight is None or (
            weight.dtype == x.dtype and weight.device == x.device and weight.shape == x.shape[-1:]
        )
        trains = x.requires_grad or (weight is not None and weight.requires_grad)
        grad = torch.is_grad_enabled() and trains
        return fits and x.dtype in _DTYPES and x.numel() > 0 and not grad
