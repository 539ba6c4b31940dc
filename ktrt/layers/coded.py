"""Linear layers outside the routed experts whose weights stay as the checkpoint ships them.

DeepSeek-V3's attention, shared experts and dense MLPs take 17 GB in FP8 and 33 in BF16, which every
token reads. Without a GPU the engine has a packed copy of the codes; with one the codes lie there,
and each forward dequantises the layer that it needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import nn
from torch.nn import functional as F

from ktrt.layers.int8 import is_int8

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


class Codes(Protocol):
    """A weight as the checkpoint ships it: ``ktrt.checkpoint.codes.Codes``."""

    @property
    def format(self) -> Any: ...
    @property
    def codes(self) -> torch.Tensor: ...
    @property
    def scales(self) -> torch.Tensor: ...
    def to(self, device: torch.device) -> Self: ...
    def dequantized(self, dtype: torch.dtype) -> torch.Tensor: ...


class CodedLinear(nn.Linear):
    """A linear layer without a weight parameter: ``weight`` is dequantised whenever it is read, in
    ``dtype``. It is right for all readers, and nobody can change it."""

    def __init__(self, linear: nn.Linear, read: Callable[[], Codes], dtype: torch.dtype) -> None:
        """Takes the place of ``linear``, whose bias it has. ``read`` gives the codes; it is called
        again whenever they are needed on the CPU: views of the mapped file."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("bias", linear.bias)
        self.dtype = dtype
        self.read_codes = read
        self.origin = ""  # file and tensor, for messages
        self._on_device: Codes | None = None
        self.training = linear.training

    def place(self, device: torch.device) -> None:
        """Moves codes and scales to a GPU; forwards run there from now on."""
        codes = self.read_codes()
        self._on_device = codes.to(device)

    @property
    def on_cpu(self) -> bool:
        return self._on_device is None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self._on_device is None else self._on_device.codes.device

    @property
    def device_bytes(self) -> int:
        """Bytes of codes and scales on a GPU."""
        held = self._on_device
        return 0 if held is None else held.codes.nbytes + held.scales.nbytes

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """[out_features, in_features], a new tensor."""
        codes = self._on_device or self.read_codes()
        return codes.dequantized(self.dtype)

    @property
    def weight_format(self) -> str:
        """The engine's."""
        codes = self._on_device or self.read_codes()
        return str(codes.format)

    def as_linear(self) -> nn.Linear:
        """Returns a plain layer with the same numbers."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, coded"


def may_stay_coded(path: str, module: nn.Module) -> bool:
    """Returns whether a linear layer of this name can do without its weight in BF16."""
    return is_int8(path, module)


def put_coded(
    model: nn.Module, readers: Mapping[str, Callable[[], Codes]], dtype: torch.dtype
) -> None:
    """Replaces the linear layers at these paths."""
    for path, read in readers.items():
        parent, _, name = path.rpartition(".")
        linear: Any = model.get_submodule(path)
        setattr(model.get_submodule(parent), name, CodedLinear(linear, read, dtype))


def coded_linears(model: nn.Module) -> Iterator[tuple[str, CodedLinear]]:
    """Yields the layers that are coded, by path."""
    for path, module in model.named_modules():
        if isinstance(module, CodedLinear):
            yield path, module
