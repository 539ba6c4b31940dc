"""ktrt: chat with LoRA-tuned Mixture-of-Experts models whose routed experts run on the CPU.

``ktrt.load(config)`` gives a session. Importing the package loads neither torch nor the engine.
"""

from pkgutil import extend_path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ktrt.api import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

# `python -m ktrt.chat` in a checkout imports the source folder, which has no `_core`: the folder of
# the same name in site-packages joins the search path behind it and supplies the compiled module.
__path__ = extend_path(__path__, __name__)


def __getattr__(name: str) -> object:
    if name == "load":
        from ktrt.api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
