"""ktrt: chat with LoRA-tuned Mixture-of-Experts models whose routed experts run on the CPU.

``ktrt.load`` returns a ``Session``. Importing the package imports neither torch nor the engine;
the names below are imported when they are first used.
"""

from importlib import import_module
from pkgutil import extend_path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ktrt.api import load
    from ktrt.config import SamplingArgs, SamplingOptions
    from ktrt.errors import AdapterError, CheckpointError, ConfigError, EngineError, KtrtError
    from ktrt.generate.response import Response, TokenResponse
    from ktrt.generate.scheduler import Handle
    from ktrt.session import Session

__version__ = "0.1.0"
__all__ = [
    "AdapterError",
    "CheckpointError",
    "ConfigError",
    "EngineError",
    "Handle",
    "KtrtError",
    "Response",
    "SamplingArgs",
    "SamplingOptions",
    "Session",
    "TokenResponse",
    "__version__",
    "load",
]
_HOMES = {
    "load": "api",
    "Handle": "generate.scheduler",
    "Response": "generate.response",
    "SamplingArgs": "config",
    "SamplingOptions": "config",
    "Session": "session",
    "TokenResponse": "generate.response",
}

# `python -m ktrt.chat` in a checkout imports the source folder, which has no `_core`: the folder of
# the same name in site-packages follows on the search path and supplies the compiled module.
__path__ = extend_path(__path__, __name__)


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"ktrt.{_HOMES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
