"""The bytes of a model: what it holds in memory and what decoding a token reads, row by row.

``planned_inventory`` counts before the first weight is read, from the model on the meta device and
the engine's empty layers; ``loaded_inventory`` counts what is there afterwards, and a test compares
the two. The memory plan, the doctor, the chat's status line and the benches are views of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ktrt.adapter.apply.router import RouterLora
from ktrt.engine.formats import STRIP_ROWS, backend_of, joined, round_up
from ktrt.experts import KTExperts
from ktrt.kv.size import KvSize, kv_size
from ktrt.layers import linear as linears
from ktrt.layers.coded import CodedLinear, coded_linears
from ktrt.layers.embedding import host_tables
from ktrt.layers.int8 import INT8, int8_bytes, int8_layers
from ktrt.loading.lora_sizes import linear_lora_bytes

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

    from ktrt.engine import MoeLayer, PackedLora
    from ktrt.experts import ExpertsSpec
    from ktrt.loading.lora_sizes import LoraSize

EXPERTS = "routed experts"
EXPERT_BIASES = "biases of the experts"
EXPERT_LORA = "LoRA of the experts"
ATTENTION = "attention"
MLP = "dense and shared MLP, routers"
HEAD = "head"
# A token looks up one row of either. Tables are the large ones, which stay in RAM with a GPU, too.
TABLES = "tables of embeddings"
EMBEDDINGS = "embeddings"
BUFFERS = "buffers"
# The engine's, without a GPU, and PEFT's parameters.
LINEAR_LORA = "LoRA of the linear layers"
LORA = "LoRA elsewhere"
WORKSPACE = "workspace of the experts"
# The base model without its routed experts.
BASE = (ATTENTION, MLP, HEAD, TABLES, EMBEDDINGS, BUFFERS)

_ATTENTION = re.compile(r"attn|attention|mixer|ssm|mamba")


@dataclass(frozen=True)
class Row:
    """Bytes of one kind of thing in one ``form``, which is a weight format or a dtype.

    ``held`` bytes are in memory, on the GPU if ``gpu``. Decoding a token reads ``read`` bytes and
    multiplies ``values`` numbers; of the experts it reads the ``share`` that acts on it. Of
    ``held``, ``mapped`` bytes are pages of the checkpoint's files, which take memory once they are
    read; ``replaced`` counts further pages of the files, which nobody reads after packing.
    """

    kind: str
    form: str
    held: int = 0
    read: float = 0.0
    values: float = 0.0
    mapped: int = 0
    replaced: int = 0
    gpu: bool = False
    share: float = 1.0


_NUMBERS = ("held", "read", "values", "mapped", "replaced")


@dataclass(frozen=True)
class Inventory:
    """``rows`` has everything but the routed experts, which ``experts`` has by kt_backend, and the
    KV cache, whose arrays are ``kv``."""

    rows: tuple[Row, ...]
    experts: Mapping[str, Row]
    kv: KvSize = field(default_factory=KvSize)

    def of(self, *kinds: str) -> list[Row]:
        """Returns the rows of these kinds."""
        return [row for row in self.rows if row.kind in kinds]

    def held(self, *kinds: str) -> int:
        """Returns the bytes that rows of these kinds hold."""
        return sum(row.held for row in self.of(*kinds))

    def read(self, *kinds: str) -> float:
        """Returns the bytes that decoding a token reads of rows of these kinds."""
        return sum(row.read for row in self.of(*kinds))

    def values(self, *kinds: str) -> float:
        """Returns the numbers that decoding a token multiplies of rows of these kinds."""
        return sum(row.values for row in self.of(*kinds))


# ---- before loading


def planned_inventory(
    skeleton: nn.Module,
    specs: Sequence[ExpertsSpec],
    layers: Mapping[str, Mapping[str, MoeLayer]],
    *,
    infer_dtype: str = "auto",
    int8: bool = False,
    dequantised: Container[int] = (),
    gpu: bool = False,
    coded: Mapping[str, tuple[str, int]] = MappingProxyType({}),
    loras: Iterable[LoraSize] = (),
    workspace: int = 0,
) -> Inventory:
    """Counts a model on the meta device.

    ``layers``: the engine's layer of every experts module by path, by kt_backend; ``int8``: the
    linear layers outside the experts are packed (``quantization_bit: 8``); weights whose dtype does
    not change stay pages of the checkpoint's files, but for ``dequantised`` ones (ids); ``gpu``:
    everything but the experts and ``TABLES`` is on the GPU; ``coded``: format and bytes, by path,
    of layers that keep the checkpoint's codes.
    """
    dtype = None if infer_dtype == "auto" else getattr(torch, infer_dtype)
    paths = [spec.path for spec in specs]
    packed = {}
    if int8:
        packed = {id(each.weight): int8_bytes(each) for each in int8_layers(skeleton, paths, dtype)}
    base = _Base(skeleton, packed, dequantised, dtype=dtype, mapped=not gpu, gpu=gpu)
    weights = {f"{path}.weight" for path in coded}
    rows = [
        *base.rows((n, p) for n, p in _outside(skeleton, specs) if n not in weights),
        *(
            base.coded_row(path, form, size, _linear(skeleton, path))
            for path, (form, size) in coded.items()
        ),
        *(_bias_row(spec) for spec in specs if spec.has_bias),
        *_lora_rows(loras, skeleton, specs, dtype, int8=int8, coded=coded, gpu=gpu),
        Row(WORKSPACE, "float32", workspace),
    ]
    experts = {
        backend: _experts_row(of.values(), weights_of(specs)) for backend, of in layers.items()
    }
    return Inventory(_summed(rows), experts, kv_size(skeleton, paths, dtype))


def _linear(skeleton: nn.Module, path: str) -> nn.Linear:
    found = skeleton.get_submodule(path)
    assert isinstance(found, nn.Linear)
    return found


def _outside(
    skeleton: nn.Module, specs: Iterable[ExpertsSpec]
) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields the parameters except the routed experts'; a norm after each expert is included."""
    inside = {f"{spec.path}.{name}" for spec in specs for name in (*spec.parameters, *spec.biases)}
    for name, parameter in skeleton.named_parameters():
        if name not in inside:
            yield name, parameter


def weights_of(specs: Iterable[ExpertsSpec]) -> float:
    """Returns the number of routed experts' weights that act on one token."""
    return sum(spec.num_weights / spec.num_experts * spec.top_k for spec in specs)


def _bias_row(spec: ExpertsSpec) -> Row:
    """The engine keeps biases in float32, padded to whole strips (csrc/moe/expert_biases.cc)."""
    each = 4 * sum(round_up(spec.features(p)[1], STRIP_ROWS) for p in spec.projections)
    return Row(EXPERT_BIASES, "float32", each * spec.num_experts, each * spec.top_k)


def _lora_rows(
    loras: Iterable[LoraSize],
    skeleton: nn.Module,
    specs: Sequence[ExpertsSpec],
    dtype: torch.dtype | None,
    *,
    int8: bool,
    coded: Container[str],
    gpu: bool,
) -> Iterator[Row]:
    """PEFT's matrices have the dtype of the weights that they are added to, ``RouterLora``'s are
    float32. A token reads PEFT's or the engine's, which are as large but for padding."""
    total = sum(spec.num_weights for spec in specs)
    share = weights_of(specs) / total if total else 0.0
    for lora in loras:
        acts = 1.0 if lora.active else 0.0
        yield Row(
            EXPERT_LORA, "bfloat16", lora.expert_bytes, acts * share * lora.expert_bytes,
            acts * share * lora.expert_values,
        )  # fmt: skip
        peft = lora.values - lora.router_values
        for values, each in (
            (peft, dtype or _dtype(skeleton)), (lora.router_values, torch.float32)
        ):  # fmt: skip
            size = each.itemsize * values
            yield Row(LORA, _form(each), size, acts * size, acts * values, gpu=gpu)
        if not gpu:
            held = linear_lora_bytes(skeleton, lora.linears, dtype, int8=int8, coded=coded)
            yield Row(LINEAR_LORA, "bfloat16", held)


# ---- after loading


def loaded_inventory(
    model: nn.Module, specs: Sequence[ExpertsSpec] = (), *, mapped: bool = True, workspace: int = 0
) -> Inventory:
    """Counts a loaded model, with LoRA as it is switched now. Leaves out the KV cache and
    ``EXPERT_BIASES``, and the ``values`` of experts without ``specs``. ``mapped``: weights that
    were packed were the checkpoint's pages."""
    modules = [module for module in model.modules() if isinstance(module, KTExperts)]
    layers = [module.layer for module in modules]
    lora = _lora_parameters(model)
    base = _Base(model, linears.int8_bytes(model), dtype=None, mapped=mapped, gpu=None)
    others = ((n, p) for n, p in model.named_parameters() if id(p) not in lora)
    rows = [*base.rows(others), Row(WORKSPACE, "float32", workspace)]
    for path, linear in coded_linears(model):
        size = linear.device_bytes or linears.packed_bytes(linear)
        rows.append(base.coded_row(path, linear.weight_format, size, linear))
    for parameter in model.parameters():
        if (active := lora.get(id(parameter))) is not None:
            read = parameter.nbytes if active else 0
            values = parameter.numel() if active else 0
            on_gpu = parameter.device.type == "cuda"
            form = _form(parameter.dtype)
            rows.append(Row(LORA, form, parameter.nbytes, read, values, gpu=on_gpu))
    rows += [_expert_lora_row(layer) for layer in layers]
    rows.append(Row(LINEAR_LORA, "bfloat16", linears.lora_bytes(model)))
    experts = {}
    if layers:
        backend = backend_of(layer.weight_format for layer in layers)
        experts[backend] = _experts_row(layers, weights_of(specs))
    return Inventory(_summed(rows), experts)


def _lora_parameters(model: nn.Module) -> dict[int, bool]:
    """Returns whether its adapter acts, by the id of each parameter of LoRA in torch."""
    found: dict[int, bool] = {}
    for module in model.modules():
        if isinstance(module, RouterLora):
            for arrays in (module.lora_A, module.lora_B):
                found |= {id(each): name in module.factors for name, each in arrays.items()}
        if isinstance(module, BaseTunerLayer):
            active = [] if module.disable_adapters else module.active_adapters
            for kind in module.adapter_layer_names:
                for name, part in getattr(module, kind).items():
                    single = isinstance(part, torch.nn.Parameter)
                    for parameter in [part] if single else part.parameters():
                        found[id(parameter)] = name in active
    return found


def _expert_lora_row(layer: MoeLayer) -> Row:
    sizes = {number: _lora_bytes(layer.lora_view(number)) for number in layer.loras}
    read = sum(sizes[number] for number, weight in layer.active_loras if weight)
    held = sum(sizes.values())
    return Row(EXPERT_LORA, "bfloat16", held, read * layer.top_k / layer.num_experts)


def _lora_bytes(lora: PackedLora) -> int:
    arrays = (lora.input.a, lora.intermediate.a, lora.gate.b, lora.up.b, lora.down.b)
    return sum(array.nbytes for array in arrays if array is not None)


# ---- both


def experts_row(layers: Iterable[MoeLayer]) -> Row:
    """Counts the packed experts of these layers, which need not be loaded yet."""
    return _experts_row(layers, 0.0)


def _experts_row(layers: Iterable[MoeLayer], values: float) -> Row:
    each = list(layers)
    read = sum(layer.packed_bytes * layer.top_k / layer.num_experts for layer in each)
    return Row(
        EXPERTS,
        joined(layer.weight_format for layer in each),
        held=sum(sum(layer.image_bytes) for layer in each),
        read=read,
        values=values,
        share=read / (sum(layer.packed_bytes for layer in each) or 1),
    )


class _Base:
    """Counts the base model's parameters and buffers outside the routed experts."""

    def __init__(
        self,
        model: Any,
        packed: Mapping[int, int],
        dequantised: Container[int] = (),
        *,
        dtype: torch.dtype | None,
        mapped: bool,
        gpu: bool | None,
    ) -> None:
        """``packed``: bytes in INT8 by the id of the parameter; ``dtype``: the weights' once they
        are loaded, None: their present one; ``gpu`` None: the tensors' present device."""
        head, table = model.get_output_embeddings(), model.get_input_embeddings()
        self._model, self._packed, self._dtype = model, packed, dtype
        self._mapped, self._gpu, self._dequantised = mapped, gpu, dequantised
        self._head: Any = getattr(head, "weight", None)
        self._table: Any = getattr(table, "weight", None)
        self._tables = {id(each.weight) for each in host_tables(model)}
        # Input embeddings that are the head too are read whole, unless that is packed.
        self._whole = self._table is self._head and id(self._table) not in packed

    def rows(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> Iterator[Row]:
        for name, parameter in parameters:
            yield from self._of_parameter(name, parameter)
        for buffer in self._model.buffers():
            size = buffer.numel() * buffer.element_size()
            yield Row(BUFFERS, _form(buffer.dtype), size, gpu=self._on_gpu(buffer))

    def coded_row(self, path: str, form: str, size: int, linear: nn.Linear) -> Row:
        """Counts a linear layer that keeps the checkpoint's codes."""
        on_gpu = isinstance(linear, CodedLinear) and linear.device.type == "cuda"
        gpu = on_gpu if self._gpu is None else self._gpu
        kind = ATTENTION if _ATTENTION.search(path) else MLP
        return Row(kind, form, size, size, linear.in_features * linear.out_features, gpu=gpu)

    def _of_parameter(self, name: str, parameter: nn.Parameter) -> Iterator[Row]:
        dtype = self._dtype or parameter.dtype
        count, size = parameter.numel(), parameter.numel() * dtype.itemsize
        is_page = dtype == parameter.dtype and id(parameter) not in self._dequantised
        mapped = size if self._mapped and is_page else 0
        kind, gpu = self._kind(name, parameter), self._on_gpu(parameter)
        packed = self._packed.get(id(parameter))
        if packed is not None:
            replaced = 0 if parameter is self._table else mapped
            yield Row(
                HEAD if parameter is self._head else kind, INT8.name, packed, packed, count,
                replaced=replaced,
            )  # fmt: skip
            if replaced:
                return
        if id(parameter) in self._tables:
            yield Row(TABLES, _form(dtype), size, size // parameter.shape[0], mapped=mapped)
        elif parameter is self._table and not self._whole:
            one = size // parameter.shape[0]
            yield Row(EMBEDDINGS, _form(dtype), size, one, mapped=mapped, gpu=gpu)
        elif packed is not None:
            yield Row(kind, _form(dtype), size, mapped=mapped, gpu=gpu)  # kept, but not read
        else:
            yield Row(kind, _form(dtype), size, size, count, mapped=mapped, gpu=gpu)

    def _kind(self, name: str, parameter: nn.Parameter) -> str:
        if parameter is self._head:
            return HEAD
        return ATTENTION if _ATTENTION.search(name) else MLP

    def _on_gpu(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cuda" if self._gpu is None else self._gpu


def _dtype(model: nn.Module) -> torch.dtype:
    found = (p.dtype for p in model.parameters() if p.dtype.is_floating_point)
    return next(found, torch.float32)


def _form(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _summed(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Sums the rows of each kind, form and side; drops empty ones."""
    sums: dict[tuple[str, str, bool], Row] = {}
    for row in rows:
        key = row.kind, row.form, row.gpu
        if key in sums:
            before = sums[key]
            sums[key] = replace(row, **{n: getattr(before, n) + getattr(row, n) for n in _NUMBERS})
        else:
            sums[key] = row
    return tuple(row for row in sums.values() if row.held or row.replaced)
