"""Tests of ktrt.errors: one base for everything raised on purpose, the engine's errors included."""

import pytest
from helpers.raising import raising_in

from ktrt import errors
from ktrt.errors import EngineError, engine_errors


@pytest.mark.parametrize(
    "kind", [errors.ConfigError, errors.CheckpointError, errors.AdapterError, EngineError]
)
def test_one_except_clause_catches_all(kind: type[errors.KtrtError]) -> None:
    with pytest.raises(errors.KtrtError, match="what to do"):
        raise kind("what to do")
    assert not issubclass(kind, ValueError | OSError | RuntimeError)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("rank: expected 8, found 4"), "the engine failed: rank: expected 8, found 4"),
        (RuntimeError(), "the engine failed: no reason given"),
        (MemoryError(), "the engine failed: no memory"),
        (TimeoutError("no answer"), "the engine failed: no answer"),
    ],
)
def test_engine_errors(error: Exception, message: str) -> None:
    """The error is wrapped once, in nested blocks too."""
    with pytest.raises(EngineError) as caught, engine_errors(), engine_errors():
        raising_in("ktrt.experts.module", error)()
    assert str(caught.value) == message
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    ("error", "module"),
    [
        (ValueError("x"), "ktrt.prompt.fit"),
        (ValueError("x"), "ktrt.experts_elsewhere"),
        (RuntimeError("x"), "torch.nn.modules.linear"),
        (KeyError("x"), "ktrt.experts.module"),
        (NotImplementedError("x"), "ktrt.experts.module"),
        (errors.AdapterError("x"), "ktrt.adapter.plan"),
    ],
)
def test_other_errors_pass(error: Exception, module: str) -> None:
    with pytest.raises(type(error)) as caught, engine_errors():
        raising_in(module, error)()
    assert caught.value is error
