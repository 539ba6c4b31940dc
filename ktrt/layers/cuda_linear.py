"""LoRA of a GPU's Linears in few kernels: PEFT's layer takes four for each adapter, and at one
token each costs its launch: on an H100, with LoRA on DeepSeek-V2-Lite's 189 Linears, 1.8 ms of a
decode step.

Where all tokens have the active adapters, A's rows follow the base weight's in one matrix, so that
one GEMM gives W x and A x; the expand, scaling folded into B, is then added in place. Where tokens
have separate adapters (``engine.step_rows``), W x is the base's product, and the A and B of all
resident adapters lie side by side: one shrink, a mask that leaves each token its
adapter's ranks (``engine.rank_masks``), one expand. The same is done for a ``CodedLinear``, which
has no matrix that A's rows could follow.

PEFT stays the owner of the adapters: before a forward of the model, ``FusedLora`` compares the
version of the active set, and after a change reads PEFT's layers again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from ktrt.engine.active_set import ActiveSet
from ktrt.engine.rank_masks import NOBODY, RankMasks
from ktrt.engine.step_rows import RunningStep
from ktrt.errors import KtrtError
from ktrt.layers.coded import CodedLinear

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ktrt.engine.rank_masks import RankMask, RankOwners
    from ktrt.engine.step_rows import StepRows
    from ktrt.utils.patches import Patches

# Rows of the joint matrix are padded to this, so that every output row keeps 16-byte alignment.
_RANK_STEP = 8
# LoRA states of each layer whose matrices are kept ready.
_KNOWN_STATES = 4


class FusedLora:
    """The fused LoRA Linears of a model; all other layers keep PEFT's forward.

    ``version`` changes when memory that a captured graph knows has been replaced, or a layer takes
    another path: capture again. Call ``follow`` before comparing it.
    """

    def __init__(
        self,
        model: nn.Module,
        active_set: ActiveSet | None = None,
        patches: Patches | None = None,
        masks: RankMasks | None = None,
    ) -> None:
        """Takes over every Linear that PEFT has wrapped, now and later, until ``patches`` are
        undone. Weights move, in memory, one by one. Without ``masks`` all tokens have the active
        adapters."""
        self._model = model
        self._active_set = ActiveSet() if active_set is None else active_set
        self._masks = RankMasks(RunningStep()) if masks is None else masks
        self._linears: dict[nn.Module, _FusedLinear] = {}
        self._by_row = masks is not None
        self.version = 0
        self.find()
        if patches is not None:
            patches.add(self._give_back)
            patches.add(model.register_forward_pre_hook(lambda *_: self.follow()).remove)
            patches.add(self._active_set.on_modules(self.find))

    def follow(self) -> None:
        """Looks at the version of the active adapters; costs one comparison."""
        if self._changes != self._active_set.changes:
            self.refresh()

    def _give_back(self) -> None:
        for linear in self._linears.values():
            linear.give_back()

    def find(self) -> None:
        """Takes over the layers that PEFT has wrapped since."""
        found = [module for module in self._model.modules() if _is_peft_linear(module)]
        known = self._linears
        self._linears = {
            each: known.get(each) or _FusedLinear(each, self._masks, by_row=self._by_row)
            for each in found
        }
        self.refresh()
        if torch.cuda.is_available():
            # The weights' first places, which the allocator would keep for itself.
            torch.cuda.empty_cache()

    def refresh(self) -> None:
        """Reads PEFT's adapters, which are active, and their scaling."""
        self._changes = self._active_set.changes
        # No inference tensors, which could not be written to outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            replaced = [linear.refresh() for linear in self._linears.values()]
        self.version += any(replaced)


def _is_peft_linear(module: nn.Module) -> bool:
    if "lora_A" not in module._modules:
        return False
    from peft.tuners.lora.layer import Linear

    return isinstance(module, Linear)


def _number_of(name: str) -> int:
    """The engine's number of PEFT's adapter ``name``, as ``adapter.residents`` names them."""
    return 0 if name == "default" else int(name.removeprefix("adapter"))


def _trained_scaling(layer: Any, name: str) -> float:
    """PEFT's scaling at weight 1; ``layer.scaling`` has the last weight in it."""
    alpha, rank = layer.lora_alpha[name], layer.r[name]
    scaling: float = alpha / (math.sqrt(rank) if layer.use_rslora.get(name, False) else rank)
    return scaling


@dataclass(frozen=True)
class Factors:
    """A linear layer without a bias as ``weight`` x + ``expand``ᵀ mask(``a`` x): weight [out, in],
    a [ranks, in], expand [ranks, out] with the scaling in it. ``a`` and ``expand`` None: no LoRA;
    ``mask`` None: all of it acts on every token, else on each token of the step its ranks."""

    weight: torch.Tensor
    a: torch.Tensor | None = None
    expand: torch.Tensor | None = None
    mask: RankMask | None = None


def factors_of(layer: Any) -> Factors | None:
    """Returns what a forward of ``layer``, a Linear that PEFT may have wrapped, computes now; None:
    something else than factors can say, as with DoRA or a bias."""
    fused = getattr(layer.forward, "__self__", None)
    if isinstance(fused, _FusedLinear):
        return fused.factors()
    if not _is_peft_linear(layer):
        return _base_factors(layer)
    return _base_factors(layer.get_base_layer()) if _acts_as_base(layer) else None


def _acts_as_base(layer: Any) -> bool:
    """Whether PEFT's layer adds nothing to its base."""
    active = any(name in layer.lora_A for name in layer.active_adapters)
    return not layer.merged and (layer.disable_adapters or not active)


def _base_factors(base: Any) -> Factors | None:
    plain = type(base) in (nn.Linear, CodedLinear) and base.bias is None
    return Factors(base.weight) if plain else None


@dataclass(frozen=True)
class _Lora:
    """Adapters side by side: ``a`` [ranks, in]; ``expand`` [ranks, out], the scaling in it, rounded
    once. Ranks are padded with zeros."""

    a: torch.Tensor
    expand: torch.Tensor


def _side_by_side(layer: Any, scalings: dict[str, float], dtype: torch.dtype) -> _Lora:
    a = torch.cat([layer.lora_A[name].weight.to(dtype) for name in scalings])
    scaled = [layer.lora_B[name].weight.float() * scaling for name, scaling in scalings.items()]
    pad = -a.shape[0] % _RANK_STEP
    expand = F.pad(torch.cat(scaled, dim=1).T, (0, 0, 0, pad)).to(dtype).contiguous()
    return _Lora(F.pad(a, (0, 0, 0, pad)), expand)


class _FusedLinear:
    def __init__(self, layer: Any, masks: RankMasks, *, by_row: bool) -> None:
        """``layer``: a ``peft.tuners.lora.layer.Linear``."""
        self._layer = layer
        self._base: nn.Linear = layer.get_base_layer()
        self._coded = self._base if isinstance(self._base, CodedLinear) else None
        self._peft_forward = layer.forward
        self._masks = masks
        self._by_row = by_row
        # [out + ranks, in] and, if the base has one, its bias followed by zeros; of a coded base A.
        self._joint: torch.Tensor | None = None
        self._joint_bias: torch.Tensor | None = None
        self._expand: torch.Tensor | None = None
        self._state: tuple[object, ...] | None = None
        # The LoRA of the last states: switching back and forth copies only a few rows.
        self._known: dict[tuple[object, ...], _Lora] = {}
        # All resident adapters, for tokens with separate adapters, and who owns the ranks.
        self._residents: _Lora | None = None
        self._owners: RankOwners | None = None
        self._residents_state: tuple[object, ...] = ()

    def refresh(self) -> bool:
        """Returns whether memory that a captured graph knows has been replaced."""
        layer = self._layer
        replaced = self._refresh_residents() if self._by_row else False
        active = [name for name in layer.active_adapters if name in layer.lora_A]
        before = self._state is not None
        if active and self._plain(active):
            replaced |= self._refresh_active(active)
        else:
            self._state = None
        replaced |= before != (self._state is not None)
        fused = self._state is not None or self._residents is not None
        layer.forward = self._forward if fused else self._peft_forward
        return replaced

    def _refresh_active(self, active: Sequence[str]) -> bool:
        layer = self._layer
        memory = [self._weight, self._base.bias, *self._tensors(active)]
        state = (*((name, layer.scaling[name]) for name in active), *map(_identity, memory))
        if state == self._state:
            return False
        replaced = self._take(self._lora(state, active))
        # The weight may have moved meanwhile.
        first = _identity(self._weight)
        self._state = (*state[: len(active)], first, *state[len(active) + 1 :])
        return replaced

    def _refresh_residents(self) -> bool:
        layer = self._layer
        names = sorted((n for n in layer.lora_A if self._plain([n], casts=True)), key=_number_of)
        scalings = {name: _trained_scaling(layer, name) for name in names}
        tensors = map(_identity, self._tensors(names))
        state = (*names, *self._place, *tensors)
        replaced = state != self._residents_state
        if replaced:
            self._residents_state, self._residents, self._owners = state, None, None
        if replaced and names:
            self._residents = _side_by_side(layer, scalings, self._place[0])
            owners = [(_number_of(name), layer.lora_A[name].weight.shape[0]) for name in names]
            pad = self._residents.a.shape[0] - sum(ranks for _, ranks in owners)
            self._owners = self._masks.owners((*owners, (NOBODY, pad)), self._place[1])
        if self._owners is not None:
            # A trained scaling of 0 has no weight that could be told, and adds nothing.
            active = [n for n in layer.active_adapters if scalings.get(n)]
            weights = tuple((_number_of(n), layer.scaling[n] / scalings[n]) for n in active)
            replaced |= self._owners.weigh(weights)
        return replaced

    def factors(self) -> Factors | None:
        """Returns what the forward computes for the running step."""
        if self._base.bias is not None:
            return None
        rows = self._masks.rows if self._by_row else None
        if rows is not None:
            lora, owners = self._residents, self._owners
            if lora is None or owners is None:
                return None
            mask = self._masks.of(owners, rows.on_device)
            return Factors(self._base.weight, lora.a, lora.expand, mask)
        joint, expand = self._joint, self._expand
        if self._state is None or joint is None or expand is None:
            return _base_factors(self._base) if _acts_as_base(self._layer) else None
        a = joint if self._coded is not None else joint[expand.shape[1] :]
        return Factors(self._base.weight, a, expand)

    @property
    def _weight(self) -> torch.Tensor | None:
        """The base's parameter; None: it is coded."""
        return None if self._coded is not None else self._base.weight

    @property
    def _place(self) -> tuple[torch.dtype, torch.device]:
        if self._coded is not None:
            return self._coded.dtype, self._coded.device
        return self._base.weight.dtype, self._base.weight.device

    def _tensors(self, names: Sequence[str]) -> list[torch.Tensor]:
        layer = self._layer
        return [part[name].weight for name in names for part in (layer.lora_A, layer.lora_B)]

    def give_back(self) -> None:
        """Restores PEFT's forward; the weight keeps its place."""
        self._layer.__dict__.pop("forward", None)

    def _plain(self, names: Sequence[str], *, casts: bool = False) -> bool:
        """Whether these adapters add B A x times the scaling, and nothing else, to a plain Linear;
        ``casts``: also in other dtypes than the base's, and if PEFT's switch is off."""
        layer, base = self._layer, self._base
        dtypes = {self._place[0], *(layer.lora_A[name].weight.dtype for name in names)}
        return (
            type(base) in (nn.Linear, CodedLinear)
            and (casts or (len(dtypes) == 1 and not layer.disable_adapters))
            and not layer.merged
            and not layer.fan_in_fan_out
            and not any(name in layer.lora_variant for name in names)
            and all(layer.lora_B[name].bias is None for name in names)
        )

    def _lora(self, state: tuple[object, ...], active: Sequence[str]) -> _Lora:
        key = (*state[: len(active)], *state[len(active) + 2 :])  # the base's memory is no part
        if key in self._known:
            return self._known[key]
        scalings = {name: self._layer.scaling[name] for name in active}
        while len(self._known) >= _KNOWN_STATES:
            del self._known[next(iter(self._known))]
        lora = self._known[key] = _side_by_side(self._layer, scalings, self._place[0])
        return lora

    def _take(self, lora: _Lora) -> bool:
        """Appends A to the weight's rows. Memory of the right size is written, not replaced, so
        that captured graphs go on; returns whether any was replaced."""
        if self._coded is not None:
            return self._take_alone(lora)
        weight, ranks = self._base.weight, lora.a.shape[0]
        size_out, size_in = weight.shape
        joint, expand, bias = self._joint, self._expand, self._base.bias
        moved = joint is None or weight.data_ptr() != joint.data_ptr()
        if moved := moved or joint is None or joint.shape[0] != size_out + ranks:
            self._joint = joint = weight.new_empty(size_out + ranks, size_in)
            joint[:size_out] = weight
            weight.data = joint[:size_out]
        assert joint is not None
        joint[size_out:] = lora.a
        if expand is None or expand.shape != lora.expand.shape or expand.dtype != weight.dtype:
            moved, self._expand = True, lora.expand.clone()
        else:
            expand.copy_(lora.expand)
        joint_bias = None if bias is None else F.pad(bias, (0, ranks))
        if moved or joint_bias is None or self._joint_bias is None:
            self._joint_bias = joint_bias
        else:
            self._joint_bias.copy_(joint_bias)
        return moved

    def _take_alone(self, lora: _Lora) -> bool:
        """The same where A has its own matrix."""
        joint, expand = self._joint, self._expand
        fits = joint is not None and joint.shape == lora.a.shape
        if joint is None or expand is None or not fits:
            self._joint, self._expand = lora.a.clone(), lora.expand.clone()
            return True
        joint.copy_(lora.a)
        expand.copy_(lora.expand)
        return False

    def _forward(self, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        rows = self._masks.rows if self._by_row else None
        if rows is not None and self._residents is not None:
            return self._forward_by_row(x, self._residents, rows)
        if args or options or self._state is None:
            result: torch.Tensor = self._peft_forward(x, *args, **options)
            return result
        return self._forward_active(x)

    def _forward_active(self, x: torch.Tensor) -> torch.Tensor:
        joint, expand = self._joint, self._expand
        assert joint is not None
        assert expand is not None
        size_out = expand.shape[1]
        y: torch.Tensor
        if self._coded is not None:
            y, shrunk = self._coded(x), F.linear(x, joint)
        elif x.numel() == x.shape[-1]:
            both = F.linear(x, joint, self._joint_bias)
            y, shrunk = both[..., :size_out], both[..., size_out:]
        else:
            # Rows that lie apart are not what every model's views expect.
            y = F.linear(x, joint[:size_out], self._base.bias)
            shrunk = F.linear(x, joint[size_out:])
        y.view(-1, size_out).addmm_(shrunk.reshape(-1, expand.shape[0]), expand)
        return y

    def _forward_by_row(self, x: torch.Tensor, lora: _Lora, rows: StepRows) -> torch.Tensor:
        size_out, ranks = lora.expand.shape[1], lora.a.shape[0]
        base = self._base
        coded = self._coded is not None
        y: torch.Tensor = base(x) if coded else F.linear(x, base.weight, base.bias)
        shrunk = F.linear(x, lora.a).reshape(-1, ranks)
        own = self._own(rows, shrunk, x.shape[0])
        # Zeros add nothing: a base row keeps its bits.
        y.view(-1, size_out).addmm_(own, lora.expand)
        return y

    def _own(self, rows: StepRows, shrunk: torch.Tensor, sequences: int) -> torch.Tensor:
        """``shrunk`` [rows, ranks] with zeros where a rank is not of the row's adapter."""
        assert self._owners is not None
        mask, wanted, count = self._masks.of(self._owners, rows.on_device), rows.logits, len(shrunk)
        if count == rows.tokens:
            return mask(shrunk)
        if wanted is not None and count == len(wanted):
            return mask.take(wanted.to(shrunk.device))(shrunk)
        if rows.batch and sequences == rows.tokens:  # of whole sequences: latents
            each = shrunk.view(sequences, count // sequences, -1)
            return mask.of_sequences()(each).view(count, -1)
        raise KtrtError(
            f"a linear layer with LoRA is given {count} rows in a step of {rows.tokens} tokens, so "
            "its rows cannot have separate adapters; use one adapter for all"
        )


def _identity(tensor: torch.Tensor | None) -> tuple[int, int] | None:
    return None if tensor is None else (tensor.data_ptr(), tensor._version)
