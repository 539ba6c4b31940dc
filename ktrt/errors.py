"""The exceptions ktrt raises on purpose.

A message names the file, key or tensor, what was found, what was expected, and what to do. Entry
points print it and exit with code 2; any other exception is a defect in ktrt.
"""

from collections.abc import Iterator
from contextlib import contextmanager

# Types that the compiled engine raises, never their subclasses, and the packages that call it.
_RAISED = (ValueError, RuntimeError, MemoryError, TimeoutError)
_CALLERS = tuple(f"ktrt.{name}." for name in ("adapter", "engine", "experts", "layers", "loading"))


class KtrtError(Exception):
    """Base of every error ktrt raises on purpose."""


class ConfigError(KtrtError):
    """A configuration, a setting or a request that cannot be used."""


class CheckpointError(KtrtError):
    """A model directory that is incomplete, damaged or of an unsupported kind."""


class AdapterError(KtrtError):
    """An adapter that cannot be applied completely to the model."""


class AdapterBusyError(AdapterError):
    """An adapter that cannot be unloaded or replaced yet: it is active, or answers use it."""


class EngineError(KtrtError):
    """A call that the compiled engine refused or could not finish; ``__cause__`` is its own
    ``ValueError``, ``RuntimeError`` or ``MemoryError``, or the ``TimeoutError`` of a GPU's hand-off
    that got no answer."""


@contextmanager
def engine_errors() -> Iterator[None]:
    """Raises exceptions of the compiled engine within the block as ``EngineError``.

    Functions in C++ have no frame: the engine's exceptions end in the frame of the module that
    called it. Exceptions of torch's layers or of a caller's callback do not change.
    """
    try:
        yield
    except _RAISED as error:
        if type(error) not in _RAISED or not _comes_from_engine(error):
            raise
        reason = str(error) or (
            "no memory" if isinstance(error, MemoryError) else "no reason given"
        )
        raise EngineError(f"the engine failed: {reason}") from error


def _comes_from_engine(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return f"{module}.".startswith(_CALLERS)
