"""References of decode.py: float32 logits, and transformers + PEFT with offloading."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
from model import Experts, add_torch_lora, make_torch_model
from torch import nn

if TYPE_CHECKING:
    from model import Bench


def reference_model(bench: Bench, config: Any) -> Any:
    """Returns the same model in transformers' classes, float32 on the CPU, with merged LoRA."""
    from transformers import AutoModelForCausalLM

    # Every parameter is copied below; drawing them first would take longest.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            path, _, leaf = name.rpartition(".")
            if path.endswith(".experts"):
                continue
            module: Any = bench.model.get_submodule(path)
            if hasattr(module, "base_layer"):
                value = module.base_layer.weight.float() + _delta(module)
            else:
                value = getattr(module, leaf).float()
            parameter.copy_(value)
        for index, _ in bench.layers:
            _fill_experts(model.model.layers[index].mlp.experts, bench.experts, index)
    return model


def _delta(module: Any) -> torch.Tensor:
    a, b = module.lora_A["default"].weight.float(), module.lora_B["default"].weight.float()
    delta: torch.Tensor = module.scaling["default"] * (b @ a)
    return delta


def _fill_experts(module: Any, experts: Experts, index: int) -> None:
    lora = {name: value.to(torch.bfloat16).float() for name, value in experts.lora(index).items()}
    for expert in range(experts.count):
        gate, up, down = (each.float() for each in experts.weights(index, expert))
        gate += lora["gate_b"][expert] @ lora["gate_a"][expert]
        up += lora["up_b"][expert] @ lora["up_a"][expert]
        down += lora["down_b"][expert] @ lora["down_a"][expert]
        module.gate_up_proj[expert] = torch.cat([gate, up])
        module.down_proj[expert] = down


def offloaded_seconds_per_token(config: Any, moe_layers: int) -> float:
    """Returns seconds per decoded token of transformers + PEFT with experts in CPU memory, copied
    to the GPU layer by layer (accelerate); extrapolated from the layers of ``config``."""
    from accelerate import cpu_offload
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    model = make_torch_model(config, device)
    add_torch_lora(model)
    pool = Experts(config)
    config._experts_implementation = "eager"
    sparse = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    for index, block in enumerate(sparse):
        with torch.device("cpu"):
            module: Any = DeepseekV2Experts(config).to(torch.bfloat16).requires_grad_(False)
        for expert in range(pool.count):
            gate, up, down = pool.weights(index, expert)
            module.gate_up_proj[expert] = torch.cat([gate, up])
            module.down_proj[expert] = down
        block.experts = module
        cpu_offload(module, execution_device=device)
    with_experts = _decode_seconds(model, device)
    for block in sparse:
        block.experts = _Nothing()
    without = _decode_seconds(model, device)
    return without + (with_experts - without) / len(sparse) * moe_layers


class _Nothing(nn.Module):
    def forward(self, states: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(states)


def _decode_seconds(model: Any, device: torch.device) -> float:
    from transformers import DynamicCache

    from ktrt.kv.static import cache_argument

    cache, times = {cache_argument(model): DynamicCache(config=model.config)}, []
    ids = torch.arange(2, 66, device=device).unsqueeze(0)
    with torch.inference_mode():
        for _ in range(8):
            start = time.perf_counter()
            ids = model(ids, **cache).logits[:, -1:].argmax(-1)
            ids.tolist()
            times.append(time.perf_counter() - start)
    return statistics.median(times[2:])
