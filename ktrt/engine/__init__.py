"""The compiled engine ``ktrt._core``: the only package that imports it.

The classes below are ``_core``'s. ``build`` makes an engine from the user's settings, ``formats``
has the weight formats, ``threads`` and ``torch_threads`` the thread counts; ``recording`` replays a
step's calls, ``step_rows`` says what differs between its tokens, ``probes`` measures the machine.
Importing this package needs no torch.
"""

import ktrt
from ktrt.errors import KtrtError

try:
    from ktrt import _core
    from ktrt._core import (
        DenseLinear,
        Engine,
        GpuHandoff,
        HeadArray,
        LatentAttention,
        MoeLayer,
        PackedExpand,
        PackedLinear,
        PackedLora,
        PackedMatrix,
        PackedMemory,
        RmsNorm,
        RowProducts,
        SlotRows,
        TokenAttention,
        WeightFormat,
        release_file_pages,
        torch_exponentials,
    )
    from ktrt._core import isa as active_isa
except ImportError as error:
    raise KtrtError(
        f"the compiled engine ktrt._core cannot be imported ({error}). Build and install it with "
        "`pip install .` in the source folder of ktrt."
    ) from error
if _core.__version__ != ktrt.__version__:
    raise KtrtError(
        f"ktrt is version {ktrt.__version__}, but its compiled engine ktrt._core is version "
        f"{_core.__version__}. Install both together: `pip install .` in the source folder of ktrt."
    )

__all__ = [
    "DenseLinear",
    "Engine",
    "GpuHandoff",
    "HeadArray",
    "LatentAttention",
    "MoeLayer",
    "PackedExpand",
    "PackedLinear",
    "PackedLora",
    "PackedMatrix",
    "PackedMemory",
    "RmsNorm",
    "RowProducts",
    "SlotRows",
    "TokenAttention",
    "WeightFormat",
    "active_isa",
    "release_file_pages",
    "torch_exponentials",
]
