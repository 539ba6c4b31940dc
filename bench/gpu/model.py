"""Makes decode.py's model: DeepSeek-V2-Lite's shape with random weights, in place."""

from __future__ import annotations

import gc
import math
import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ktrt.config import ExpertArgs
from ktrt.config.args import WEIGHT_FORMATS
from ktrt.engine.active_set import ActiveSet
from ktrt.engine.build import build_engine
from ktrt.engine.rank_masks import RankMasks
from ktrt.engine.step_rows import RunningStep
from ktrt.experts import (
    GpuExperts,
    KTExperts,
    build_gpu_experts,
    experts_replaced,
    new_hand_off,
    new_layer,
)
from ktrt.experts.spec import ExpertsSpec
from ktrt.generate.graphs import CudaGraphs, DecodeGraphs, NoHandOff
from ktrt.generate.row_graphs import RowGraphs
from ktrt.generate.runner import KvCache, ModelRunner
from ktrt.layers.attention import accelerate_attention
from ktrt.layers.cuda_linear import FusedLora
from ktrt.layers.embedding import tables_to_host
from ktrt.layers.latent import use_latents
from ktrt.loading.inventory import experts_row
from ktrt.utils.patches import Patches

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ktrt._core import MoeLayer
    from ktrt.config.args import KtBackend
    from ktrt.engine import Engine
    from ktrt.experts import HandOff
    from ktrt.generate.graphs import GraphMaker

RANK, ALPHA = 8, 16
V2_LITE: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
    "num_hidden_layers": 27, "first_k_dense_replace": 1, "num_attention_heads": 16,
    "num_key_value_heads": 16, "n_routed_experts": 64, "num_experts_per_tok": 6,
    "n_shared_experts": 2, "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "topk_method": "greedy", "vocab_size": 102400,
    "max_position_embeddings": 163840, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
SMALL: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 64, "vocab_size": 1024,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
}  # fmt: skip


class Experts:
    """The routed experts' weights and LoRA: windows of one random pool, since drawing 14 billion
    numbers takes longer than all measurements."""

    def __init__(self, config: Any) -> None:
        self.count = config.n_routed_experts
        self.hidden, self.inner = config.hidden_size, config.moe_intermediate_size
        generator = torch.Generator().manual_seed(0)
        self._pool = torch.randn(24_000_000, generator=generator).to(torch.bfloat16)

    def _window(self, index: int, rows: int, columns: int, scale: float) -> torch.Tensor:
        start = index * 7919 * 32 % (self._pool.numel() - rows * columns)
        return self._pool[start : start + rows * columns].view(rows, columns) * scale

    def weights(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns gate, up [inner, hidden] and down [hidden, inner], bfloat16."""
        at = 3 * (layer * self.count + expert)
        into, out = (1.2 / math.sqrt(size) for size in (self.hidden, self.inner))
        return (
            self._window(at, self.inner, self.hidden, into),
            self._window(at + 1, self.inner, self.hidden, into),
            self._window(at + 2, self.hidden, self.inner, out),
        )

    def lora(self, layer: int, number: int = 0) -> dict[str, torch.Tensor]:
        """Returns ``MoeLayer.load_lora``'s arguments, float32, with the scaling in B."""
        arguments, at = {}, 100_000 + 6 * layer + 10_007 * number
        sizes = {"gate": (self.hidden, self.inner), "up": (self.hidden, self.inner)}
        for index, (name, (size_in, size_out)) in enumerate(
            {**sizes, "down": (self.inner, self.hidden)}.items()
        ):
            rows, scale = self.count * RANK, 0.3 / math.sqrt(RANK)
            a = self._window(at + 2 * index, rows, size_in, 1 / math.sqrt(size_in))
            b = self._window(at + 2 * index + 1, self.count * size_out, RANK, scale)
            arguments[f"{name}_a"] = a.reshape(self.count, RANK, size_in).float()
            arguments[f"{name}_b"] = b.reshape(self.count, size_out, RANK).float()
        return arguments


def make_config(moe_layers: int, *, small: bool = False) -> Any:
    """Returns V2-Lite's configuration with fewer layers; ``small``: for a trial without a GPU."""
    from transformers import AutoConfig

    sizes = {**V2_LITE, **(SMALL if small else {}), "num_hidden_layers": moe_layers + 1}
    return AutoConfig.for_model("deepseek_v2", **sizes)


def make_torch_model(config: Any, device: torch.device) -> Any:
    """Creates all but the routed experts, random, in bfloat16, on ``device``."""
    # The class must be imported to be replaced.
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2ForCausalLM

    with torch.device("meta"), experts_replaced(["DeepseekV2Experts"]):
        model = DeepseekV2ForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.to_empty(device=device)
    # The constructor computes its buffers; checkpoints do not hold them.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1)
                continue
            gain = 4.0 if name.endswith("mlp.gate.weight") else 1.0
            gain = math.sqrt(parameter.shape[-1]) if "embed" in name else gain
            parameter.normal_(0, gain / math.sqrt(parameter.shape[-1]), generator=generator)
    tables_to_host(model)
    return model.eval().requires_grad_(False)


def experts_of(model: Any) -> Iterator[tuple[int, KTExperts]]:
    """Yields (layer, module) of every routed experts module."""
    for index, layer in enumerate(model.model.layers):
        if isinstance(module := getattr(layer.mlp, "experts", None), KTExperts):
            yield index, module


def add_torch_lora(model: Any, adapter: str = "default") -> None:
    """Adds PEFT's LoRA to every Linear except the head: attention, dense MLP, shared experts."""
    from peft import LoraConfig, inject_adapter_in_model

    names = [
        name.removesuffix(".base_layer") for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head" and ".lora_" not in name
    ]  # fmt: skip
    state = {f"{name}.lora_{part}.weight": None for name in names for part in "AB"}
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["none"], inference_mode=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        warnings.simplefilter("ignore", UserWarning)
        inject_adapter_in_model(lora, model, adapter, state_dict=state)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".lora_A.{adapter}." in name:
                parameter.normal_(0, 1 / math.sqrt(parameter.shape[1]))
            elif f".lora_B.{adapter}." in name:
                parameter.normal_(0, 0.3 / (ALPHA / RANK * math.sqrt(RANK)))
    model.eval().requires_grad_(False)


@dataclass
class Bench:
    """One model with one weight format of its experts."""

    model: Any
    engine: Engine
    hand_off: HandOff | None
    experts: Experts
    layers: list[tuple[int, MoeLayer]]
    running: RunningStep
    masks: RankMasks
    active_set: ActiveSet = field(default_factory=ActiveSet)
    # Dropped, they are undone.
    patches: Patches = field(default_factory=Patches)
    gpu: GpuExperts | None = None
    fused_lora: FusedLora | None = None

    @classmethod
    def make(
        cls, config: Any, backend: KtBackend, threads: int | None, *, fixed_kernels: bool = False
    ) -> Bench:
        running = RunningStep()
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        model = make_torch_model(config, device)
        engine = build_engine(ExpertArgs(backend, threads, kt_fixed_kernels=fixed_kernels))
        hand_off = new_hand_off(engine, device)
        experts, layers = Experts(config), []
        for index, module in experts_of(model):
            spec = ExpertsSpec(
                f"model.layers.{index}.mlp.experts", index, "DeepseekV2Experts", experts.count,
                experts.hidden, experts.inner, config.num_experts_per_tok,
            )  # fmt: skip
            layer = new_layer(engine, spec, WEIGHT_FORMATS[backend])
            for expert in range(experts.count):
                layer.load_expert(expert, *experts.weights(index, expert))
            module.attach(layer, engine.max_qlen, hand_off, spec.path, running)
            layers.append((index, layer))
        assert len(layers) == config.num_hidden_layers - config.first_k_dense_replace
        if hand_off is not None:
            hand_off.guard(model, Patches())
        return cls(model, engine, hand_off, experts, layers, running, RankMasks(running))

    def add_lora(self) -> None:
        """Adds LoRA to everything."""
        add_torch_lora(self.model)
        self.fused_lora = FusedLora(self.model)
        for index, layer in self.layers:
            layer.load_lora(0, **self.experts.lora(index))
            layer.activate_loras([0], [1.0])

    def add_loras(self, count: int) -> None:
        """Adds ``count`` LoRAs to everything, for rows that choose theirs by number; none is
        active."""
        for number in range(count):
            add_torch_lora(self.model, f"adapter{number}" if number else "default")
            for index, layer in self.layers:
                layer.load_lora(number, **self.experts.lora(index, number))
        for module in self.model.modules():
            if "lora_A" in module._modules:
                module._active_adapter = []
        masks, patches = self.masks, self.patches
        masks.watch(self.model, patches)
        accelerate_attention(self.model, self.engine, patches, self.running)
        use_latents(self.model, self.engine, patches, self.running)
        self.fused_lora = FusedLora(self.model, self.active_set, patches, masks)

    def share_resident(self, number: int) -> None:
        """Puts ``number`` experts of each layer on the GPU, for later runners."""
        layers = {f"layers.{index}": layer for index, layer in self.layers}
        device = self.model.get_input_embeddings().weight.device
        self.gpu = GpuExperts(layers, device, running=self.running, masks=self.masks)
        self.gpu.select(number)
        for index, module in experts_of(self.model):
            module.gpu = self.gpu.layers[f"layers.{index}"]

    def runner(self, maker: GraphMaker) -> ModelRunner:
        """Returns a runner whose steps of many rows are captured by ``maker``."""
        hand_off = self.hand_off or NoHandOff()
        return ModelRunner(
            self.model, gpu=self.gpu, active_set=self.active_set, running=self.running,
            linears=self.fused_lora,
            row_graphs=partial(RowGraphs, self.model, handoff=hand_off, maker=maker),
        )  # fmt: skip

    def cache(self, *, graph: bool) -> KvCache:
        """Returns the cache of a new conversation, decoded by CUDA graphs or the host."""
        model, hand_off = self.model, self.hand_off
        if not graph or hand_off is None:
            return KvCache(model, gpu=self.gpu)
        return KvCache(
            model, lambda kv: DecodeGraphs(model, kv, hand_off, CudaGraphs()), gpu=self.gpu
        )

    def share(self, number: int) -> None:
        """Puts ``number`` experts of each layer on the GPU and streams long prompts if that is
        faster, for later caches."""
        if self.gpu is not None:
            self.gpu.close()
        modules = {f"layers.{index}": module for index, module in experts_of(self.model)}
        device = self.model.get_input_embeddings().weight.device
        args = ExpertArgs(kt_num_gpu_experts=number)
        self.gpu = build_gpu_experts(modules, device, args, self.engine.max_qlen)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of packed expert weights that decoding one token reads."""
        return experts_row(layer for _, layer in self.layers).read

    def close(self) -> None:
        self.patches.undo()
        if self.hand_off is not None:
            self.hand_off.close()
        if self.gpu is not None:
            self.gpu.close()
        self.engine.close()
        # Modules form reference cycles, and the next model needs the memory.
        self.model = self.fused_lora = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
