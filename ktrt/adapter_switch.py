"""A loaded session's adapter, switched off and on again, without loading anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def adapter_switch(session: Any) -> Callable[[bool], None]:
    """What switches LoRA on the experts and elsewhere off (False) and on; answers of the base model
    come from a new ``KvCache`` only. Without an adapter it does nothing."""
    adapters = getattr(session, "adapters", None)
    if adapters is not None:
        return lambda enabled: adapters.on() if enabled else adapters.off()
    return lambda enabled: _switch(session.model, enabled)


def _switch(model: Any, enabled: bool) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    from ktrt.moe import KTExperts

    for module in model.modules():
        if isinstance(module, KTExperts):
            module.layer.lora_enabled = enabled
        elif isinstance(module, BaseTunerLayer):
            module.enable_adapters(enabled)
    # PEFT makes the tensors of active adapters trainable.
    model.requires_grad_(False)
