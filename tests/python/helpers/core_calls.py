"""Random calls of the compiled module, most of them wrong in one argument.

``python core_calls.py SEED CALLS`` runs a sequence in this process. It prints every call before
making it, so the last line of a crashed process names the culprit. A call may return, or raise an
exception of a kind in ``EXPECTED``.

Addresses belong to arrays that stay alive, or are impossible in a process: the module cannot check
whether the memory of a valid-looking address exists.
"""

from __future__ import annotations

import copy
import gc
import pickle
import random
import resource
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch

from ktrt import _core
from ktrt.errors import ConfigError

EXPECTED = (
    TypeError, ValueError, RuntimeError, MemoryError, OverflowError, BufferError, OSError,
    AttributeError, ConfigError, pickle.PicklingError,
)  # fmt: skip
E, K, H, INTERMEDIATE, QLEN = 4, 2, 64, 96, 8
FORMATS = ("bf16", "int8", "int4")
ADDRESS_SPACE = 64 << 30
CLASSES = [value for value in vars(_core).values() if isinstance(value, type)]

INTEGERS = (
    0, 1, -1, 2, 7, 31, 33, 1 << 15, 65_537, (1 << 31) - 1, 1 << 31, -(1 << 31), 1 << 40, 1 << 62,
    (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, -(1 << 63), -(1 << 70),
)  # fmt: skip
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-30, 1e30, 1e308, float("nan"), float("inf"), -float("inf"))
# Counts and addresses that no array can have, or that are too small.
COUNTS = (0, -1, 1, 3, 1 << 62, (1 << 63) - 1, -(1 << 63), 1 << 64, None, "1", 1.5)
ADDRESSES = (0, (1 << 64) - 1, (1 << 64) - 64, 1 << 63, -1, 1 << 64, None, "0", 1.5)

Call = Callable[[], object]


class StrangeArray:
    """An object that is no array, and fails as one in several ways."""

    def __init__(self, kind: int) -> None:
        self._kind = kind

    def __dlpack__(self) -> object:
        if self._kind == 0:
            return None
        if self._kind == 1:
            raise KeyError("no array after all")
        capsule = torch.zeros(2, 2).__dlpack__()
        if self._kind == 2:
            torch.utils.dlpack.from_dlpack(capsule)  # used up
        return capsule if self._kind == 2 else [capsule]


class Calls:
    """A population of the module's objects, and random calls of them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.kept: list[torch.Tensor] = []  # arrays whose addresses are in use
        self.file = tempfile.TemporaryFile()  # noqa: SIM115
        self.engines = [self.engine()]
        self.objects: list[Any] = [self.layer(), self.dense(), self.packed(), *self.engines]

    # Arguments

    def pick(self, *values: Any) -> Any:
        return values[self.random.randrange(len(values))]

    def array(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        values = torch.randn(*shape, generator=self.generator) / 8
        return values.to(dtype)

    def ids(self, *shape: int, high: int = E) -> torch.Tensor:
        return torch.randint(-1, high, shape, generator=self.generator)

    def strange(self) -> Any:
        """Returns a wrong argument for any parameter."""
        kind = self.random.randrange(9)
        if kind == 0:
            return None
        if kind == 1:
            return self.pick(*INTEGERS)
        if kind == 2:
            return self.pick(*FLOATS)
        if kind == 3:
            return self.pick("", "bf16", "x" * 100_000, b"\0\xff", "\ud800", "gate\0", [], {}, [[]])
        if kind == 4:
            dtype = self.pick(torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8)
            shape = self.pick((), (0,), (1,), (H,), (0, H), (QLEN, H), (E, 2, H), (1, 1, 1, 1))
            tensor = torch.zeros(shape).to(dtype)
            return self.pick(
                tensor, tensor.expand(*tensor.shape), tensor.flip(0) if shape else tensor
            )
        if kind == 5:
            return torch.full((QLEN, H), self.pick(*FLOATS[4:]))
        if kind == 6:
            return self.pick(*self.objects)
        if kind == 7:
            return StrangeArray(self.random.randrange(4))
        cls = self.pick(*CLASSES)
        return self.pick(cls, cls.__new__(cls))

    def spoil(self, arguments: dict[str, Any], **special: tuple[Any, ...]) -> dict[str, Any]:
        """Replaces at most two arguments; ``special``: name → possible replacements."""
        for name in self.random.sample(
            sorted(arguments), min(self.random.randrange(3), len(arguments))
        ):
            arguments[name] = self.pick(*special[name]) if name in special else self.strange()
        return arguments

    def addressed(self, tensor: torch.Tensor) -> tuple[int, int]:
        self.kept.append(tensor)
        return tensor.data_ptr(), tensor.numel()

    # Objects

    def any_engine(self) -> Any:
        return self.pick(*self.engines)

    def engine(self) -> Any:
        nodes = self.pick(None, None, None, [[0]], [[0], [0]])
        arguments = {
            "num_threads": len(nodes) if nodes else self.pick(1, 1, 2),
            "max_qlen": self.pick(1, QLEN, 64),
            "nodes": nodes,
        }
        return _core.Engine(**arguments)

    def layer(self) -> Any:
        weight_format = self.pick(*FORMATS)
        arguments = {
            "num_experts": E, "top_k": K, "hidden_size": H, "intermediate_size": INTERMEDIATE,
            "weight_format": weight_format, "has_gate": self.pick(True, True, False),
            "activation": self.pick("silu", "gelu", "relu2"),
        }  # fmt: skip
        layer = _core.MoeLayer(self.any_engine(), **arguments)
        for expert in range(E):
            gate = self.array(INTERMEDIATE, H) if arguments["has_gate"] else None
            layer.load_expert(
                expert, gate, self.array(INTERMEDIATE, H), self.array(H, INTERMEDIATE)
            )
        return layer

    def dense(self) -> Any:
        return _core.DenseLinear(
            self.any_engine(), self.array(INTERMEDIATE, H, dtype=torch.bfloat16)
        )

    def packed(self) -> Any:
        weight = self.array(INTERMEDIATE, H, dtype=torch.bfloat16)
        return _core.PackedLinear(self.any_engine(), weight)

    def attention(self) -> Any:
        return _core.TokenAttention(
            self.any_engine(), heads=4, groups=2, key_size=32, value_size=16, scaling=0.2
        )

    def latent(self) -> Any:
        keys = self.array(4 * 32, 16, dtype=torch.bfloat16)
        values = self.array(4 * 16, 32, dtype=torch.bfloat16)
        return _core.LatentAttention(self.any_engine(), keys, values, heads=4, rope=8, scaling=0.2)

    def norm(self) -> Any:
        return _core.RmsNorm(torch.ones(H), 1e-6, rounds_twice=True)

    def heads(self, heads: int, tokens: int, size: int) -> Any:
        address, count = self.addressed(self.array(heads, tokens, size, dtype=torch.bfloat16))
        arguments = {
            "address": address, "count": count, "head_stride": tokens * size, "token_stride": size,
        }  # fmt: skip
        if self.random.randrange(3):
            return _core.HeadArray(**arguments, float32=False)
        spoiled = self.spoil(arguments, address=ADDRESSES, count=COUNTS)
        return _core.HeadArray(**spoiled, float32=False)

    def slots(self, heads: int, tokens: int, size: int) -> Any:
        """An array of two sequences."""
        numbers = self.array(2, heads, tokens, size, dtype=torch.bfloat16)
        address, count = self.addressed(numbers)
        arguments = {
            "address": address, "count": count, "head_stride": tokens * size, "token_stride": size,
            "slot_stride": heads * tokens * size,
        }  # fmt: skip
        return _core.HeadArray(**self.spoil(arguments, address=ADDRESSES, count=COUNTS))

    # Calls

    def make(self) -> tuple[str, Call]:
        """Calls a constructor with up to two wrong arguments."""
        sizes = {
            "num_experts": E, "top_k": K, "hidden_size": H, "intermediate_size": INTERMEDIATE,
            "weight_format": "int8", "has_gate": True, "activation": "silu", "alpha": 1.0,
            "gate_limit": 7.0, "up_limit": 7.0, "up_offset": 0.0, "down_slices": 1,
        }  # fmt: skip
        engine = {"engine": self.any_engine()}
        form = {"heads": 4, "groups": 2, "key_size": 32, "value_size": 16, "scaling": 0.1,
                "second_key_size": 8, "softcap": 1.0, "sinks": self.array(4)}  # fmt: skip
        bf16 = torch.bfloat16
        latent = {"keys": self.array(128, 16, dtype=bf16), "values": self.array(64, 32, dtype=bf16),
                  "heads": 4, "rope": 8, "scaling": 0.1}  # fmt: skip
        linear = {
            "weight": self.array(INTERMEDIATE, H, dtype=bf16),
            "bias": self.array(INTERMEDIATE),
        }
        norm = {"weight": self.array(H), "eps": 1e-6, "rounds_twice": True, "offset": 0.0}
        cls, arguments = self.pick(
            (_core.Engine, {"num_threads": 1, "max_qlen": 4, "nodes": [[0]]}),
            (_core.MoeLayer, engine | sizes),
            (_core.DenseLinear, engine | linear),
            (_core.PackedLinear, engine | linear),
            (_core.TokenAttention, engine | form),
            (_core.LatentAttention, engine | latent),
            (_core.RmsNorm, norm),
            (_core.ReadProbe, {"nbytes": 1 << 16}),
            (_core.GpuHandoff, engine | {"timeout": 0.1, "driver": "/nowhere.so"}),
        )
        arguments = self.spoil(arguments)

        def call() -> object:
            made = cls(**arguments)
            self.objects[self.random.randrange(4) if len(self.objects) > 40 else 0 : 0] = [made]
            del self.objects[40:]
            return made

        return f"{cls.__name__}({_shown(arguments)})", call

    def method(self) -> tuple[str, Call]:
        """Calls any member of any object, with wrong arguments."""
        owner = self.pick(*self.objects, self.attention(), self.latent(), self.norm())
        cls: Any = type(owner)
        name = self.pick(*[n for n in dir(cls) if not n.startswith("__")] or ["__class__"])
        if cls in SAFE_ONLY or name in FORWARDS:
            return "nothing", lambda: None
        member: Any = getattr(cls, name)
        empty: Any = cls.__new__(cls)
        owner = self.pick(owner, owner, owner, None, empty, self.strange())
        if isinstance(member, property):
            if self.random.randrange(4) == 0:
                value = self.strange()
                return f"{cls.__name__}.{name} = …", lambda: setattr(owner, name, value)
            return f"{cls.__name__}.{name}", lambda: member.__get__(owner)
        arguments = [self.strange() for _ in range(self.random.randrange(7))]
        return f"{cls.__name__}.{name}{_shown(arguments)}", lambda: member(owner, *arguments)

    def protocol(self) -> tuple[str, Call]:
        """Applies Python's protocols to an object: pickle, copy, hash, …"""
        owner = self.pick(*self.objects)
        chosen: tuple[str, Call] = self.pick(
            ("pickle", lambda: pickle.dumps(owner, self.random.randrange(6))),
            ("copy", lambda: copy.copy(owner)),
            ("deepcopy", lambda: copy.deepcopy(owner)),
            ("__class__", lambda: setattr(owner, "__class__", self.pick(*CLASSES))),
            ("memoryview", lambda: bytes(memoryview(owner))),
            ("__init__", lambda: owner.__init__(self.strange())),
            ("hash", lambda: (hash(owner), repr(owner), owner == self.strange())),
        )
        return chosen

    def _only(self, cls: type) -> Any:
        return self.pick(*[each for each in self.objects if type(each) is cls])

    def forward(self) -> tuple[str, Call]:
        layer, rows = self._only(_core.MoeLayer), self.random.randrange(QLEN + 1)
        arguments = {
            "hidden_states": self.array(rows, H), "expert_ids": self.ids(rows, K),
            "routing_weights": self.array(rows, K), "out": torch.empty(rows, H),
            "adapter_ids": self.pick(None, torch.full((rows,), self.pick(-3, -2, -1, 0, 1))),
        }  # fmt: skip
        spoiled = self.spoil(arguments)
        if self.random.randrange(3) == 0:
            return f"bind({_shown(spoiled)}).run()", lambda: layer.bind(**spoiled).run()
        return f"MoeLayer.forward({_shown(spoiled)})", lambda: layer.forward(**spoiled)

    def change(self) -> tuple[str, Call]:
        """Changes weights, LoRA and images of a layer."""
        layer, rank = self._only(_core.MoeLayer), self.pick(1, 3, 16)
        lora = {
            "gate_a": self.array(E, rank, H), "gate_b": self.array(E, INTERMEDIATE, rank),
            "down_a": self.array(E, rank, INTERMEDIATE), "down_b": self.array(E, H, rank),
        }  # fmt: skip
        weights = {
            "expert": self.random.randrange(E), "gate": self.array(INTERMEDIATE, H),
            "up": self.array(INTERMEDIATE, H), "down": self.array(H, INTERMEDIATE),
        }  # fmt: skip
        codes = torch.zeros(INTERMEDIATE * H, dtype=torch.uint8)
        shards = [(codes, torch.ones(INTERMEDIATE))]
        packed = {"expert": 0, "gate": shards, "up": shards, "down": [(codes, torch.ones(H))]}
        descriptors = (self.file.fileno(), -1, 1 << 20, (1 << 31) - 1, None, "0", 2.5)
        descriptor = self.pick(*descriptors)
        images = {
            "fds": [descriptor],
            "digests": [self.pick(*INTEGERS)],
            "use": self.pick("map", "copy"),
        }
        name, arguments = self.pick(
            ("load_lora", lora | {"number": self.random.randrange(3)}),
            ("unload_lora", {"number": self.random.randrange(3)}),
            ("activate_loras", {"ids": [0, 1], "weights": [1.0, 0.5]}),
            ("activate_loras", {"ids": [], "weights": []}),
            ("load_expert", weights),
            ("load_packed_expert", packed),
            ("set_biases", {"gate": self.array(E, INTERMEDIATE), "down": self.array(E, H)}),
            ("packed_codes", {"expert": 1, "projection": "up"}),
            ("packed_scales", {"expert": 1, "projection": "down"}),
            ("packed_parts", {}),
            ("lora_view", {"number": self.random.randrange(3)}),
            ("write_image", {"part": self.pick(0, 1, -1), "fd": descriptor}),
            ("use_images", images),
        )
        spoiled = self.spoil(arguments, fd=descriptors, fds=([], [descriptor] * 3, None, 7))
        return f"MoeLayer.{name}({_shown(spoiled)})", lambda: getattr(layer, name)(**spoiled)

    def linear(self) -> tuple[str, Call]:
        """Runs a dense layer on addresses."""
        layer, rows = self._only(self.pick(_core.DenseLinear, _core.PackedLinear)), self.pick(1, 5)
        x, x_count = self.addressed(self.array(rows, H, dtype=torch.bfloat16))
        out, out_count = self.addressed(torch.empty(rows, INTERMEDIATE, dtype=torch.bfloat16))
        ids = torch.tensor([self.pick(-1, -2, 0, 7) for _ in range(rows)], dtype=torch.int32)
        adapters, adapter_count = self.addressed(ids)
        arguments = {
            "x": x, "x_count": x_count, "out": out, "out_count": out_count,
            "adapter_ids": adapters, "adapter_count": adapter_count,
        }  # fmt: skip
        if self.random.randrange(2):
            del arguments["adapter_ids"], arguments["adapter_count"]
        spoiled = self.spoil(
            arguments, x=ADDRESSES, out=ADDRESSES, x_count=COUNTS, out_count=COUNTS,
            adapter_ids=ADDRESSES, adapter_count=COUNTS,
        )  # fmt: skip
        return f"{type(layer).__name__}.forward({_shown(spoiled)})", lambda: layer.forward(
            **spoiled
        )

    def multiply(self) -> tuple[str, Call]:
        """Multiplies arrays by address."""
        rows, dtype = self.pick(1, 5), self.pick(torch.float32, torch.bfloat16)
        products = _core.RowProducts(self.any_engine())
        name = "multiply_f32" if dtype == torch.float32 else "multiply_bf16"
        x, x_count = self.addressed(self.array(rows, H, dtype=dtype))
        weight, weight_count = self.addressed(self.array(INTERMEDIATE, H, dtype=dtype))
        bias, _ = self.addressed(self.array(INTERMEDIATE, dtype=dtype))
        out, out_count = self.addressed(torch.empty(rows, INTERMEDIATE, dtype=dtype))
        arguments = {
            "x": x, "x_count": x_count, "weight": weight, "weight_count": weight_count,
            "bias": self.pick(0, bias), "out": out, "out_count": out_count, "in_features": H,
        }  # fmt: skip
        spoiled = self.spoil(
            arguments, x=ADDRESSES, weight=ADDRESSES, bias=ADDRESSES, out=ADDRESSES,
            x_count=COUNTS, weight_count=COUNTS, out_count=COUNTS, in_features=COUNTS,
        )  # fmt: skip
        return f"RowProducts.{name}({_shown(spoiled)})", lambda: getattr(products, name)(**spoiled)

    def attend(self) -> tuple[str, Call]:
        mask, mask_count = self.addressed(self.array(70))
        arguments = {
            "query": self.heads(4, 1, 32), "second_query": None, "keys": self.heads(2, 70, 32),
            "second_keys": None, "values": self.heads(2, 70, 16), "start": self.pick(0, 3),
            "end": 70, "out": self.heads(4, 1, 16), "mask": mask, "mask_count": mask_count,
            "ring": self.pick(0, 0, 0, 64, 128, -64, 1 << 62),
        }  # fmt: skip
        owner: Any = self.attention()
        if self.random.randrange(3) == 0:
            owner = self.latent()
            arguments = {
                "query": self.heads(4, 1, 24), "latents": self.heads(1, 70, 32),
                "positions": self.heads(1, 70, 8), "out": self.heads(4, 1, 16), "tokens": 70,
            }  # fmt: skip
        spoiled = self.spoil(arguments, mask=ADDRESSES, mask_count=COUNTS)
        return f"{type(owner).__name__}.forward({_shown(spoiled)})", lambda: owner.forward(
            **spoiled
        )

    def attend_rows(self) -> tuple[str, Call]:
        """Runs tokens of sequences that are not all there."""
        slots, _ = self.addressed(torch.tensor([self.pick(0, 1, 2, -1), 0]))
        lengths, _ = self.addressed(torch.tensor([self.pick(0, 1, 35, 36, -1, 1 << 62), 2]))
        places = {
            "slots": slots, "lengths": lengths, "rows": 2, "slot_count": 2, "capacity": 35,
            "window": self.pick(0, 0, 9, -1, 1 << 62),
        }  # fmt: skip
        spoiled = self.spoil(places, slots=ADDRESSES, lengths=ADDRESSES, rows=(0, -1, None, 1))
        rows = _core.SlotRows(**spoiled)
        arguments = {
            "query": self.heads(4, 2, 32), "keys": self.slots(2, 35, 32),
            "values": self.slots(2, 35, 16), "out": self.heads(4, 2, 16), "rows": rows,
        }  # fmt: skip
        owner: Any = self.attention()
        if self.random.randrange(2):
            owner = self.latent()
            ids, _ = self.addressed(torch.tensor([self.pick(-3, 0, 7), -2], dtype=torch.int32))
            arguments = {
                "query": self.heads(4, 2, 24), "latents": self.slots(1, 35, 32),
                "positions": self.slots(1, 35, 8), "out": self.heads(4, 2, 16), "rows": rows,
                "adapter_ids": ids,
            }  # fmt: skip
        spoiled = self.spoil(arguments, adapter_ids=ADDRESSES)
        return f"{type(owner).__name__}.forward_rows({_shown(spoiled)})", (
            lambda: owner.forward_rows(**spoiled)
        )

    def attend_prompt(self) -> tuple[str, Call]:
        """Runs a prompt's tokens at places that may not be there."""
        arguments = {
            "query": self.heads(4, 5, 32), "keys": self.heads(2, 35, 32),
            "values": self.heads(2, 35, 16), "out": self.heads(4, 5, 16),
            "start": self.pick(0, 30, 31, -1, 1 << 62), "tokens": self.pick(5, 1, 0, 1 << 62),
            "first": self.pick(0, 0, 3, 1 << 62), "window": self.pick(0, 9, -1, (1 << 63) - 1),
        }  # fmt: skip
        spoiled, owner = self.spoil(arguments), self.attention()
        return f"TokenAttention.forward_prompt({_shown(spoiled)})", (
            lambda: owner.forward_prompt(**spoiled)
        )

    def normalise(self) -> tuple[str, Call]:
        x, x_count = self.addressed(self.array(5, H, dtype=torch.bfloat16))
        out, out_count = self.addressed(torch.empty(5, H, dtype=torch.bfloat16))
        arguments = {
            "x": x, "x_count": x_count, "rows": 5, "row_stride": H, "out": out,
            "out_count": out_count,
        }  # fmt: skip
        spoiled = self.spoil(
            arguments, x=ADDRESSES, out=ADDRESSES, x_count=COUNTS, out_count=COUNTS
        )
        norm = self.norm()
        return f"RmsNorm.forward({_shown(spoiled)})", lambda: norm.forward(**spoiled)

    def tokens(self, *shape: int) -> Any:
        """An array [sequences, tokens, heads, size]."""
        numbers = self.array(*shape)
        address, count = self.addressed(numbers)
        arguments = dict(
            zip(("sequence_stride", "token_stride", "head_stride"), numbers.stride(), strict=False),
            address=address, count=count,
        )  # fmt: skip
        spoiled = self.spoil(arguments, address=ADDRESSES, count=COUNTS)
        return _core.TokenArray(**spoiled, float32=True)

    def keep_state(self) -> tuple[str, Call]:
        """Calls an operator of layers with a state."""
        rows, state, count = (2, 3), *self.addressed(self.array(2, 4 * 8 * 20))
        held = {"state": state, "state_count": count, "state_stride": 4 * 8 * 20}
        form = {"heads": 4, "key_heads": 2, "key_size": 8, "value_size": 20, "scaling": 0.5,
                "subtracts": True, "unit_keys": True, "decay_per_key": False,
                "transposed_state": False}  # fmt: skip
        chosen: tuple[Any, dict[str, Any], dict[str, Any]] = self.pick(
            (_core.LinearAttention, form, held | {
                "query": self.tokens(*rows, 2, 8), "key": self.tokens(*rows, 2, 8),
                "value": self.tokens(*rows, 4, 20), "decay": self.tokens(*rows, 4, 1),
                "beta": self.tokens(*rows, 4, 1), "out": self.tokens(*rows, 4, 20)}),
            (_core.ShortConv, {"channels": 9, "taps": 4, "silu": True}, {
                "x": self.tokens(*rows, 1, 9), "weight": self.tokens(1, 1, 1, 36),
                "bias": self.tokens(1, 1, 1, 9), "state": self.tokens(2, 1, 1, 27),
                "state_tokens": 3, "out": self.tokens(*rows, 1, 9)}),
            (_core.SelectiveScan, {"channels": 40, "size": 16}, held | {
                "x": self.tokens(*rows, 1, 40), "dt": self.tokens(*rows, 1, 40),
                "a": self.tokens(1, 1, 1, 640), "b": self.tokens(*rows, 1, 16),
                "c": self.tokens(*rows, 1, 16), "out": self.tokens(*rows, 1, 40)}),
        )  # fmt: skip
        kind, sizes, arrays = chosen
        spoiled = (
            self.spoil(sizes),
            self.spoil(arrays | {"sequences": 2, "tokens": 3}, state=ADDRESSES, state_count=COUNTS),
        )
        engine = self.any_engine()
        return f"{kind.__name__}{_shown(spoiled)}", (
            lambda: kind(engine, **spoiled[0]).forward(**spoiled[1])
        )

    def function(self) -> tuple[str, Call]:
        engine = self.any_engine()
        chosen: tuple[str, Call] = self.pick(
            ("arithmetic_rate", lambda: _core.arithmetic_rate(self.strange(), 1e-4)),
            ("release_file_pages", lambda: _core.release_file_pages(self.strange())),
            ("ReadProbe.seconds", lambda: _core.ReadProbe(self.pick(1, 4096, 100)).seconds(
                self.pick(engine, self.strange()))),
            ("kernels", _core.kernels),
            ("arithmetic_loops", _core.arithmetic_loops),
            ("Engine.close", self.pick(*[engine.close] + 9 * [lambda: None])),
            ("share", lambda: self._only(_core.PackedLinear).share()),
        )  # fmt: skip
        return chosen

    def one(self) -> tuple[str, Call]:
        kinds = [
            self.make, self.method, self.method, self.protocol, self.forward, self.forward,
            self.change, self.change, self.linear, self.multiply, self.attend, self.attend_rows,
            self.attend_prompt,
            self.normalise, self.keep_state,
            self.function,
        ]  # fmt: skip
        chosen: tuple[str, Call] = self.pick(*kinds)()
        return chosen

    def renew(self) -> None:
        """Makes new objects: the engines of the old ones may be closed."""
        self.engines = [self.engine(), self.engine()]
        self.objects = [self.layer(), self.layer(), self.dense(), self.packed(), *self.engines]
        self.kept.clear()
        gc.collect()


# Methods that take addresses; separate calls know valid ones.
FORWARDS = ("forward", "forward_rows", "forward_prompt", "write_image", "seconds")
# Classes whose members take addresses or streams; only specific calls know valid ones.
SAFE_ONLY = (_core.HeadArray, _core.TokenArray, _core.GpuHandoff, torch.Tensor, StrangeArray)


def _shown(arguments: Any) -> str:
    text = repr(arguments) if len(repr(arguments)) < 400 else repr(arguments)[:400] + "…"
    return " ".join(text.split())


def right_answer() -> bool:
    """Returns whether a new layer still agrees with torch."""
    calls = Calls(0)
    layer = _core.MoeLayer(
        _core.Engine(num_threads=2), num_experts=1, top_k=1, hidden_size=H,
        intermediate_size=INTERMEDIATE, weight_format="bf16",
    )  # fmt: skip
    gate, up = (calls.array(INTERMEDIATE, H).bfloat16().float() for _ in range(2))
    down, x = calls.array(H, INTERMEDIATE).bfloat16().float(), calls.array(3, H).bfloat16().float()
    layer.load_expert(0, gate, up, down)
    out = torch.empty(3, H)
    layer.forward(x, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), out)
    expected = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)).bfloat16().float() @ down.T
    return bool(torch.allclose(out, expected, atol=0.02, rtol=0.02))


def main(seed: int, count: int) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    torch.set_num_threads(1)
    calls = Calls(seed)
    for index in range(count):
        if index % 100 == 99:
            calls.renew()
        try:
            text, call = calls.one()
            print(index, text.encode("utf-8", "replace").decode(), flush=True)
            call()
        except EXPECTED:
            continue
        except KeyError as error:
            if "no array after all" not in str(error):
                raise
    return 0 if right_answer() else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
