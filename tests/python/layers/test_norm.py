"""RMSNorm in the engine: every convention's bits, and only layers that compute one of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ktrt.engine import Engine, RmsNorm
from ktrt.layers.norm import NormForward, accelerate_norms


class LlamaRMSNorm(nn.Module):
    """As most families have it: rounded before the weight."""

    rounds_twice, offset = True, 0.0

    def __init__(self, size: int, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size).to(dtype), requires_grad=False)
        self.variance_epsilon = 1e-6
        self.calls = 0

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * self.normed(x).to(x.dtype)).to(x.dtype)


class OnceRMSNorm(LlamaRMSNorm):
    """gpt_oss."""

    rounds_twice = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * self.normed(x)).to(x.dtype)


class GemmaRMSNorm(LlamaRMSNorm):
    """Gemma, Qwen3-Next."""

    rounds_twice, offset = False, 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.normed(x) * (1.0 + self.weight.float())).to(x.dtype)


class HalvedRMSNorm(LlamaRMSNorm):
    """Not a norm that the engine has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 0.5


class GroupedRMSNorm(LlamaRMSNorm):
    """Takes something more."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x * gate)


KINDS = (LlamaRMSNorm, OnceRMSNorm, GemmaRMSNorm)


def units(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Distance in units of the last place."""
    return (a.view(torch.int16).int() - b.view(torch.int16).int()).abs()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1, 31, 128, 576, 2049])
def test_equals_the_module(kind: type[LlamaRMSNorm], dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(size)
    module = kind(size, dtype)
    norm = RmsNorm(module.weight, 1e-6, rounds_twice=kind.rounds_twice, offset=kind.offset)
    assert norm.size == size
    x = torch.randn(9, 2 * size)[:, :size].to(torch.bfloat16)
    wide = torch.zeros(9, size + 5, dtype=torch.bfloat16)
    wide[:, :size] = x
    out = torch.empty(9, size, dtype=torch.bfloat16)
    norm.forward(wide.data_ptr(), wide.numel(), 9, size + 5, out.data_ptr(), out.numel())
    expected = module(x)
    assert units(out, expected).max() <= 1
    assert (out == expected).float().mean() > 0.98
    in_place = x.contiguous()
    norm.forward(in_place.data_ptr(), in_place.numel(), 9, size, in_place.data_ptr(), 9 * size)
    assert torch.equal(in_place, out)


def test_refuses_what_does_not_fit() -> None:
    weight, x = torch.ones(8), torch.ones(4, 8, dtype=torch.bfloat16)
    norm = RmsNorm(weight, 1e-6, rounds_twice=True)
    at = x.data_ptr()
    with pytest.raises(ValueError, match=r"out has 31 elements, expected 4 rows of 8"):
        norm.forward(at, 32, 4, 8, at, 31)
    with pytest.raises(ValueError, match=r"x has 31 elements, expected 4 rows of 8, 8 elements"):
        norm.forward(at, 31, 4, 8, at, 32)
    with pytest.raises(ValueError, match=r"x has 32 elements, expected 4 rows of 8, 9 elements"):
        norm.forward(at, 32, 4, 9, at, 32)
    with pytest.raises(ValueError, match=r"x is no multiple of 2"):
        norm.forward(at + 1, 32, 4, 8, at, 32)
    with pytest.raises(ValueError, match=r"null pointer"):
        norm.forward(0, 32, 4, 8, at, 32)
    with pytest.raises(ValueError, match=r"weight is float16, expected bfloat16 or float32"):
        RmsNorm(weight.half(), 1e-6, rounds_twice=True)
    with pytest.raises(ValueError, match=r"weight has shape \[2, 4\], expected \[any\]"):
        RmsNorm(weight.view(2, 4), 1e-6, rounds_twice=True)
    with pytest.raises(ValueError, match=r"eps is -1, expected at least 0"):
        RmsNorm(weight, -1.0, rounds_twice=True)


def test_takes_what_computes_the_same_and_nothing_else() -> None:
    torch.manual_seed(0)
    modules = [kind(64) for kind in (*KINDS, HalvedRMSNorm, GroupedRMSNorm)]
    model = nn.ModuleList([*modules, nn.LayerNorm(64)])
    assert accelerate_norms(model) == 3
    assert accelerate_norms(model) == 0, "all are taken already"
    taken = [isinstance(m.__dict__.get("forward"), NormForward) for m in model]
    assert taken == [True, True, True, False, False, False]
    x = torch.randn(1, 3, 64).to(torch.bfloat16)
    for module in modules[:3]:
        calls = module.calls
        found = module(x)
        assert module.calls == calls
        assert units(found, type(module).forward(module, x)).max() <= 1
        copied = copy.deepcopy(module)
        copied(x)
        assert copied.calls == calls + 2, "a copy is torch's"


def test_other_inputs_take_the_ordinary_path() -> None:
    module = LlamaRMSNorm(64)
    assert accelerate_norms(nn.ModuleList([module])) == 1
    for x in (torch.randn(2, 64), torch.empty(0, 64, dtype=torch.bfloat16)):
        calls = module.calls
        module(x)
        assert module.calls == calls + 1
    module.weight.requires_grad_(True)
    assert module(torch.ones(2, 64, dtype=torch.bfloat16)).requires_grad


def test_any_number_of_rows_in_any_layout() -> None:
    """Each has the bits that it has alone, also on the engine's threads."""
    module, engine = LlamaRMSNorm(64), Engine(num_threads=2)
    assert accelerate_norms(nn.ModuleList([module]), engine=engine) == 1
    calls, numbers = module.calls, torch.randn(2, 4100, 3, 128).to(torch.bfloat16)
    for x in (numbers[0, :, 0, :64].contiguous(), numbers[0, :, :2, :64], numbers[..., ::2]):
        found = module(x)
        assert found.shape == x.shape
        for place in ((0,), (1,), (-1,)):
            assert torch.equal(found[place], module(x[place].contiguous()))
        expected = type(module).forward(module, x)
        assert units(found, expected).max() <= 1
        calls += 1
    assert module.calls == calls
    engine.close()


def test_another_weight_is_noticed() -> None:
    module = LlamaRMSNorm(64)
    accelerate_norms(nn.ModuleList([module]))
    x = torch.randn(2, 64).to(torch.bfloat16)
    before, calls = module(x), module.calls
    with torch.no_grad():
        module.weight.mul_(2)
    assert torch.equal(module(x), 2 * before), "in place"
    module.weight = nn.Parameter(module.weight.detach() * 2, requires_grad=False)
    assert torch.equal(module(x), 4 * before), "another parameter"
    assert module.calls == calls
    module.weight.data = torch.zeros(64, dtype=torch.bfloat16)
    assert not module(x).any(), "the parameter's memory"
    assert module.calls == calls + 1


def test_rows_of_slices_and_into() -> None:
    module = LlamaRMSNorm(16)
    accelerate_norms(nn.ModuleList([module]))
    forward: NormForward = module.__dict__["forward"]
    states = torch.randn(1, 1, 6, 32).to(torch.bfloat16)
    half = states[..., :16]
    out = torch.empty(1, 1, 6, 16, dtype=torch.bfloat16)
    forward.into(half, out)
    assert units(out, LlamaRMSNorm.forward(module, half)).max() <= 1
    step = forward.bind(half, out)
    states.mul_(3)
    step()
    assert units(out, LlamaRMSNorm.forward(module, half)).max() <= 1
    with pytest.raises(ValueError, match=r"x is torch.float32 .* expected bfloat16 rows of 16"):
        forward.into(half.float(), out)
    with pytest.raises(ValueError, match=r"out is .*expected bfloat16 \[1, 1, 6, 16\], contiguous"):
        forward.into(half, half)
