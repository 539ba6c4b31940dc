"""A loaded session's adapter, switched off and on again, without loading anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def has_adapter(session: Any) -> bool:
    """Whether any tensor of an adapter was applied."""
    return session.audit is not None and bool(session.audit.rows)


def adapter_switch(session: Any) -> Callable[[bool], None]:
    """What switches LoRA on the experts and elsewhere off (False) and on. KV caches made before
    hold the other model's keys and values. Without an adapter it does nothing."""
    adapters = getattr(session, "adapters", None)
    if adapters is not None:
        return lambda enabled: adapters.on() if enabled else adapters.off()
    if not has_adapter(session):
        return lambda _: None
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
