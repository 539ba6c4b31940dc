"""Products of rows in the engine: torch's numbers, and the same bits for any number of rows."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ktrt.engine import Engine
from ktrt.engine.recording import Recorder
from ktrt.layers.row_products import FixedProducts, use_row_products
from ktrt.utils.patches import Patches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FLOATS = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(num_threads=2, fixed_kernels=True)
    yield engine
    engine.close()


def tensor(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


PRODUCTS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "linear": F.linear,
    "bias": lambda x, w: F.linear(x, w, w[:, 0].contiguous()),
    "matmul": lambda x, w: torch.matmul(x, w.t()),
    "mm": lambda x, w: x @ w.t(),
    "transposed": lambda x, w: x.matmul(w.t().contiguous()),
    "module": lambda x, w: _module(w)(x),
}


def _module(weight: torch.Tensor) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    module.weight = nn.Parameter(weight, requires_grad=False)
    module.bias = nn.Parameter(weight[:, 1].contiguous(), requires_grad=False)
    return module


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("columns", [1, 64, 300])
def test_rows_have_the_bits_of_each_alone(
    engine: Engine, dtype: torch.dtype, name: str, columns: int
) -> None:
    x, weight = tensor(37, 520, dtype=dtype), tensor(columns, 520, dtype=dtype)
    product = PRODUCTS[name]
    expected = product(x.double(), weight.double())
    with FixedProducts(engine):
        together = product(x, weight)
        alone = [product(x[row : row + 1], weight) for row in range(len(x))]
    assert together.dtype == dtype
    assert together.shape == expected.shape
    error = (together.double() - expected).norm() / expected.norm()
    assert error < (1e-6 if dtype == torch.float32 else 3e-3)
    assert torch.equal(together, torch.cat(alone))


FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu, "gelu": lambda x: F.gelu(x, approximate="tanh"), "sigmoid": torch.sigmoid,
    "tanh": lambda x: x.tanh(), "cos": lambda x: x.cos(), "softplus": F.softplus,
}  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("threads", [1, 3])
def test_functions_of_rows(engine: Engine, dtype: torch.dtype, name: str, threads: int) -> None:
    """Torch's numbers, and a row's bits alone, in any number of rows and of torch's threads."""
    function, before = FUNCTIONS[name], torch.get_num_threads()
    x = 3 * tensor(700, 209, dtype=dtype)
    try:
        torch.set_num_threads(threads)
        with FixedProducts(engine):
            together = function(x)
            for rows in (1, 7, 157, 500):
                assert torch.equal(function(x[:rows]), together[:rows]), rows
            for row in (1, 313, 699):
                assert torch.equal(function(x[row]), together[row])
            apart = x.view(350, 2, 209)[:, 1]
            assert torch.equal(function(apart), together.view(350, 2, 209)[:, 1])
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(together, function(x))


def test_leaves_other_products_to_torch(engine: Engine) -> None:
    x, weight = tensor(3, 40, dtype=torch.float32), tensor(8, 40, dtype=torch.float32)
    half = x.half(), weight.half()
    batch = tensor(2, 3, 40, dtype=torch.float32), tensor(2, 40, 5, dtype=torch.float32)
    expected = F.linear(*half), batch[0] @ batch[1], x[0] @ weight.t()
    learning = weight.clone().requires_grad_()
    with FixedProducts(engine):
        found = F.linear(*half), batch[0] @ batch[1], x[0] @ weight.t()
        F.linear(x, learning).sum().backward()
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            F.linear(x, weight[:, :7])
        assert F.linear(x[:0], weight).shape == (0, 8)
    assert all(map(torch.equal, found, expected))
    assert learning.grad is not None


def test_recorded_products_run_again(engine: Engine) -> None:
    """Also where the matrix is converted in the step, which is done once."""
    weight = tensor(8, 40, dtype=torch.bfloat16)
    with torch.inference_mode(False):
        x, out = tensor(2, 40, dtype=torch.bfloat16), torch.zeros(2, 8)
    recorder = Recorder()
    with recorder.recording(), FixedProducts(engine):
        recorder.describe([x], torch.ones(1), None)
        out.copy_(F.linear(x.float(), weight.float()))
    x.mul_(2)
    calls = recorder.calls()
    assert len(calls) == 3
    for call in calls:
        call.run()
    torch.testing.assert_close(out, x.float() @ weight.float().t())


def test_a_models_forwards_use_them(engine: Engine) -> None:
    """And nothing else does; ``undo`` takes it back."""
    calls: list[Any] = []

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(tensor(8, 40, dtype=torch.float32), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(torch.overrides._get_current_function_mode())
            if len(x) == 7:
                raise ValueError("no")
            return F.linear(x, self.weight)

    model, patches = Router(), Patches()
    use_row_products(model, engine, patches)
    x = tensor(33, 40, dtype=torch.float32)
    found = model(x)
    assert torch.equal(found[:1], model(x[:1]))
    with pytest.raises(ValueError, match="no"):
        model(x[:7])
    assert all(isinstance(mode, FixedProducts) for mode in calls)
    assert torch.overrides._get_current_function_mode() is None
    patches.undo()
    model(x)
    assert calls[-1] is None


@pytest.mark.parametrize("where", ["before", "in it", "after"])
def test_an_interrupt_leaves_no_mode(engine: Engine, where: str) -> None:
    """No hook is called after ``KeyboardInterrupt``, not even those that always are."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    model, patches = nn.Sequential(nn.Linear(40, 8)).requires_grad_(requires_grad=False), Patches()
    use_row_products(model, engine, patches)
    if where == "before":
        hook = model.register_forward_pre_hook(interrupt)
    elif where == "in it":
        hook = model[0].register_forward_hook(interrupt)
    else:
        hook = model.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(3, 40))
    assert torch.overrides._get_current_function_mode() is None
    hook.remove()
    model(torch.ones(3, 40))
    patches.undo()


@pytest.mark.parametrize("end", ["__enter__", "__exit__"])
def test_an_interrupt_of_the_mode_itself(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """Python checks for signals between its own instructions too."""
    plain = getattr(FixedProducts, end)

    def interrupted(self: FixedProducts, *args: object) -> None:
        if end == "__enter__":
            plain(self, *args)
        raise KeyboardInterrupt

    model, patches = nn.Linear(40, 8).requires_grad_(requires_grad=False), Patches()
    use_row_products(model, engine, patches)
    monkeypatch.setattr(FixedProducts, end, interrupted)
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(3, 40))
    assert torch.overrides._get_current_function_mode() is None
    patches.undo()


def test_nothing_remains_after_close() -> None:
    """Also closed within a forward, and with a forward that others have wrapped since."""
    engine, patches = Engine(num_threads=1), Patches()

    def close(*_: Any) -> None:
        patches.undo()
        engine.close()

    model = nn.Sequential(nn.Linear(40, 8), nn.Linear(8, 4)).requires_grad_(requires_grad=False)
    x = torch.ones(3, 40)
    expected = model(x)
    use_row_products(model, engine, patches)
    vars(model)["forward"] = partial(model.forward)
    hook = model[0].register_forward_hook(close)
    assert torch.allclose(model(x), expected, atol=1e-6)
    hook.remove()
    assert torch.overrides._get_current_function_mode() is None
    assert torch.equal(model(x), expected)


def test_a_copy_runs_its_own_weights() -> None:
    engine, patches = Engine(num_threads=1), Patches()
    model = nn.Sequential(nn.Linear(40, 8, bias=False)).requires_grad_(requires_grad=False)
    use_row_products(model, engine, patches)
    other = copy.deepcopy(model)
    nn.init.zeros_(other.get_parameter("0.weight"))
    x = torch.ones(3, 40)
    assert not other(x).any()
    assert model(x).any()
    patches.undo()
    engine.close()
