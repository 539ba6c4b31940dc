"""Models and adapters for tests of ``--verify``, and a call of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from helpers.tiny_models import save_adapter, save_model

from ktrt.audit.verify.model import LayerReport, verify
from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs

Backend = Literal["auto", "AMXBF16", "AMXInt8", "AMXInt4", "RAWINT4"]
Folders = tuple[Path, Path]

DEMO = Path(__file__).parents[3] / "examples" / "demo"


class Made:
    """Tiny models with adapters, made once, and the demo's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, family: str, layout: Literal["a", "b"]) -> Folders:
        if family == "demo":
            return DEMO / "model", DEMO / f"adapter_{layout}"
        model, adapter = self.folder / family, self.folder / f"{family}-{layout}"
        if not model.exists():
            save_model(model, family, 96)
        if not adapter.exists():
            save_adapter(adapter, model, layout)
        return model, adapter


def check(
    folders: Folders,
    backend: Backend = "AMXBF16",
    bits: int | None = None,
    packing: Any = None,
    **options: Any,
) -> list[LayerReport]:
    """Verifies an adapter; ``bits``: quantization_bit; ``packing``: lora_B_layout."""
    model, adapter = folders
    experts = ExpertArgs(kt_backend=backend, kt_num_threads=1)
    base = ModelArgs(model, quantization_bit=bits)
    return verify(base, AdapterArgs(adapter, lora_B_layout=packing), experts, **options)
