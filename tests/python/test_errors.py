"""Tests of ktrt.errors: one base for everything raised on purpose."""

import pytest

from ktrt import errors


@pytest.mark.parametrize("kind", [errors.ConfigError, errors.CheckpointError, errors.AdapterError])
def test_one_except_clause_catches_all(kind: type[errors.KtrtError]) -> None:
    with pytest.raises(errors.KtrtError, match="what to do"):
        raise kind("what to do")
    assert not issubclass(kind, ValueError | OSError)
