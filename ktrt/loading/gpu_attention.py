"""The attention of a model on a GPU, before and while its experts are loaded."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from ktrt.generate.warm_up import kernels_loaded_beside
from ktrt.layers.attention import accelerate_attention
from ktrt.layers.latent import use_latents
from ktrt.layers.linear_attention import accelerate_linear_attention
from ktrt.utils.patches import Patches

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from ktrt.engine import Engine
    from ktrt.engine.rank_masks import RankMasks
    from ktrt.engine.step_rows import RunningStep


def accelerate_on_gpu(
    model: nn.Module, engine: Engine, patches: Patches, running: RunningStep, masks: RankMasks
) -> None:
    """Patches the layers that take neither experts nor adapters, until ``patches`` are undone."""
    accelerate_linear_attention(model, engine, patches)
    masks.watch(model, patches)
    accelerate_attention(model, engine, patches, running)
    use_latents(model, engine, patches, running)


@contextmanager
def kernels_beside(
    model: nn.Module, engine: Engine, limit: int, running: RunningStep, masks: RankMasks
) -> Iterator[None]:
    """``kernels_loaded_beside`` with the attention that the loaded model will have: its kernels
    are compiled on a machine that has not run them yet."""
    with Patches() as patches:
        if next(model.parameters()).device.type == "cuda":
            accelerate_on_gpu(model, engine, patches, running, masks)
        with kernels_loaded_beside(model, limit, running):
            yield
