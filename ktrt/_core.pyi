"""The compiled engine: routed experts of Mixture-of-Experts layers on the CPU.

Arrays are passed by DLPack: any object with ``__dlpack__`` whose data lies in CPU memory
(``torch.Tensor``, ``numpy.ndarray``), with the last dimension contiguous. Every size is checked;
a mismatch raises ``ValueError`` naming the argument, what was found and what was expected.
Addresses come with a number of elements; the caller guarantees that the memory is there.

Nothing can be copied or pickled (``TypeError``). After ``fork()``, every call in the child that
would use an object's threads or memory raises ``RuntimeError``; ``Engine.close`` and
``GpuHandoff.close`` do nothing there, and the engine's ``closed`` is true.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

__version__: str

# Not in the module.
WeightFormatName: TypeAlias = Literal[
    "bf16", "int8", "int4", "fp8", "fp8_channel", "int4_g32", "int4_g64", "int4_g128", "mxfp4"
]

class Engine:
    """A pool of pinned threads and the scratch memory that the layers of one model share.

    ``forward`` calls of layers on one engine are serialised; two engines are independent.
    """

    def __init__(
        self,
        *,
        num_threads: int,
        max_qlen: int = 1024,
        nodes: Sequence[Sequence[int]] | None = None,
        fixed_kernels: bool = False,
    ) -> None:
        """``num_threads`` includes the calling thread, which works too and is never pinned.
        ``nodes``: CPUs by NUMA node (see ``numa_cpus``). The threads are spread over them evenly,
        and every expert is cut into one shard per node, in that node's memory; the results have the
        same bits as with one node. Without ``nodes``, experts are whole and threads take the
        allowed CPUs in order, one hardware thread per core first. ``max_qlen`` bounds the tokens of
        one ``forward``. ``fixed_kernels``: a row's bits do not depend on the other rows of a
        forward on AMX either. ``ValueError``: a count below 1, fewer CPUs than threads;
        ``ktrt.errors.ConfigError``: a ``KTRT_ISA`` that is unknown or above the machine's level."""

    @property
    def parts(self) -> int:
        """Shards of every expert: 1, or the number of ``nodes``."""

    @property
    def num_threads(self) -> int: ...
    @property
    def max_qlen(self) -> int: ...
    @property
    def fixed_kernels(self) -> bool:
        """Whether a row's bits do not depend on the other rows of a forward: always below AMX."""

    @property
    def workspace_bytes(self) -> int:
        """Bytes of scratch memory for the layers made so far."""

    @property
    def closed(self) -> bool: ...
    def close(self) -> None:
        """Stops the threads and frees the scratch memory and all expert weights of its layers;
        weights under a ``PackedMemory`` stay. Idempotent. A later ``forward`` or ``load_expert``
        raises ``RuntimeError``."""

class ReadProbe:
    """A block of memory to be read: measures the bandwidth that bounds decoding."""

    def __init__(self, nbytes: int) -> None:
        """Reserves ``nbytes``; take several times the L3 cache. The first ``seconds`` fills them,
        each thread the range that it will read. ``ValueError``: more than a process can address.
        ``MemoryError``."""

    @property
    def nbytes(self) -> int: ...
    def seconds(self, engine: Engine) -> float:
        """Wall time of reading everything once on the engine's threads, without the GIL."""

class DenseLinear:
    """A linear layer outside the routed experts on an engine's threads: y = x Wᵀ + bias + LoRA.

    The weight is read in place. Every output is summed in float32 in one order: a row's bits depend
    neither on the other rows nor on the number of threads; on a processor with AMX, the number of
    rows picks the kernel unless the engine's kernels are fixed.
    """

    def __init__(self, engine: Engine, weight: Any, bias: Any = None) -> None:
        """``weight`` [out_features, in_features], bfloat16, contiguous: kept, not copied. ``bias``
        [out_features], float32, float16 or bfloat16: copied."""

    max_rank: int
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def lora_bytes(self) -> int:
        """Memory of all LoRAs that are held, in whole pages."""

    def load_lora(self, number: int, a: Any = None, b: Any = None) -> None:
        """Keeps a LoRA under a number (0 or more; one of this number is replaced): ``a`` [rank,
        in_features], ``b`` [out_features, rank], float32, the scaling folded into ``b``; each is
        rounded to bfloat16 once. Neither: a LoRA that adds nothing. ``ValueError``: other shapes,
        or a rank above ``max_rank``."""

    def unload_lora(self, number: int) -> None:
        """``ValueError``: there is none of this number, or it is active."""

    def activate_loras(self, ids: Sequence[int], weights: Sequence[float]) -> None:
        """Sets the sum of LoRAs, each times its weight, that forwards add; none: the base. A
        ``ValueError`` changes nothing."""

    def forward(
        self,
        x: int,
        x_count: int,
        out: int,
        out_count: int,
        adapter_ids: int = 0,
        adapter_count: int = 0,
    ) -> None:
        """Reads ``x`` and writes ``out``: addresses and element counts of contiguous bfloat16
        arrays in CPU memory, rows of ``in_features`` and as many rows of ``out_features``. (DLPack
        would take longer than small layers do.) ``adapter_ids``, int32: each row's LoRA, a number
        that is held, -1 for none or -2 for the active sum; 0: the active sum for all. A row's bits
        are the same alone and next to rows of other LoRAs (with AMX: if the engine's kernels are
        fixed). Runs without the GIL. ``ValueError``: sizes, and a number that is not held;
        ``RuntimeError``: the engine is closed."""

class HeadArray:
    """An array [heads, tokens, size] in CPU memory: number (h, t, i) lies at ``address`` plus
    h · ``head_stride`` + t · ``token_stride`` + i elements. Or one [slots, heads, tokens, size],
    slots ``slot_stride`` elements apart. The caller keeps the memory alive.

    (DLPack would take longer than attention of a few tokens does.)
    """

    def __init__(
        self,
        address: int,
        count: int,
        head_stride: int,
        token_stride: int = 0,
        float32: bool = False,
        slot_stride: int = 0,
    ) -> None:
        """``count``: elements from ``address`` on; every use is checked against it. Strides are in
        elements. The dtype is float32 or bfloat16. ``ValueError``: an address that is not aligned
        to the dtype, a negative number."""

class SlotRows:
    """Which sequence each row of a forward attends to, in arrays [slots, heads, tokens, size]."""

    def __init__(
        self,
        slots: int,
        lengths: int,
        rows: int,
        slot_count: int,
        capacity: int,
        window: int = 0,
    ) -> None:
        """``slots`` and ``lengths``: addresses of int64 [``rows``], read by every forward: a row's
        slot, below ``slot_count``, and how many tokens of it the row attends to, ``capacity`` at
        most. A row of length 0 gives zeros, whatever its slot. With a ``window`` a row attends to
        its last ``window`` tokens alone, token t lies at t modulo ``capacity``, and, of a capacity
        that is a multiple of 64 and no smaller than the window, a length may be any. The caller
        keeps the memory alive. ``ValueError``: an address that is not aligned, a number below 1."""

class TokenAttention:
    """Attention of one token over cached keys and values, on an engine's threads.

    ``out[h] = Σ_t p[h, t] · values[g, t]``, p the softmax over t of ``cap(scaling · query[h] ·
    keys[g, t]) + mask[t]``, g = h · groups / heads; ``cap(s) = softcap · tanh(s / softcap)`` where
    softcap is not 0. All sums are float32, no input is rounded; the bits do not depend on the
    number of threads.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        heads: int,
        groups: int,
        key_size: int,
        value_size: int,
        scaling: float,
        second_key_size: int = 0,
        softcap: float = 0.0,
        sinks: Any | None = None,
    ) -> None:
        """``heads`` of the query, a multiple of the ``groups`` of keys and values. Keys may lie in
        two arrays: the first ``key_size`` numbers of a key, and the ``second_key_size`` after them
        (latents and positions). ``sinks`` [heads], float32, float16 or bfloat16: one more logit per
        head, which only adds to the softmax's denominator; copied. ``ValueError``: sizes below 1 or
        above 4096, heads that are no multiple of groups, a scaling that is not finite."""

    def forward(
        self,
        query: HeadArray,
        second_query: HeadArray | None,
        keys: HeadArray,
        second_keys: HeadArray | None,
        values: HeadArray,
        start: int,
        end: int,
        out: HeadArray,
        mask: int = 0,
        mask_count: int = 0,
        ring: int = 0,
    ) -> None:
        """Attends to the tokens ``start`` … ``end`` - 1 of keys [groups, tokens, key_size],
        second_keys [groups, tokens, second_key_size] and values [groups, tokens, value_size], all
        bfloat16 (values may be the memory of keys); a sliding window is a ``start`` above 0. query
        [heads, 1, key_size], second_query [heads, 1, second_key_size] and out [heads, 1,
        value_size] are bfloat16 or float32 each. ``mask``: address of float32 [``mask_count``],
        added to the scores of tokens 0 … of all heads; 0: none. ``ring``: token t lies at t
        modulo it, a multiple of 64 and no less than the tokens. Runs without the GIL.
        ``ValueError``: an array too small, ``end`` not above ``start``. ``RuntimeError``: the
        engine is closed."""

    def forward_rows(
        self,
        query: HeadArray,
        keys: HeadArray,
        values: HeadArray,
        out: HeadArray,
        rows: SlotRows,
    ) -> None:
        """The same for a token of each of many sequences, over the first tokens of its slot: query
        [heads, rows, key_size], keys [slots, groups, capacity, key_size], values [slots, groups,
        capacity, value_size], out [heads, rows, value_size]. A row's bits are those that it has
        alone. Only for keys in one array. ``ValueError``: also a slot or length that is not
        there."""

    @property
    def takes_prompts(self) -> bool:
        """Whether the processor has a kernel for ``forward_prompt``: AVX-512 BF16."""

    def forward_prompt(
        self,
        query: HeadArray,
        keys: HeadArray,
        values: HeadArray,
        out: HeadArray,
        *,
        start: int,
        tokens: int,
        first: int = 0,
        window: int = 0,
    ) -> None:
        """Attends with the queries [heads, tokens, key_size] of positions ``start`` and on, each to
        its own and those before it, ``window`` in all (0: any number): keys [groups, n, key_size]
        and values [groups, n, value_size] of positions ``first`` and on; out [heads, tokens,
        value_size]. All bfloat16; weights are rounded to it too, sums are float32. A query's bits
        depend neither on the other queries nor on the number of threads. Only for keys in one
        array. ``ValueError``: also no kernel, or a window that begins before ``first``."""

class LatentAttention:
    """One token's multi-head latent attention over cached latents, on an engine's threads.

    kv_b_proj makes a head's keys U c and values V c from a latent c. This layer gives the same
    numbers without making them: ``out[h] = V Σ_t p[h, t] c_t``, p the softmax over t of ``scaling ·
    ((query[h, : nope] U) · c_t + query[h, nope :] · position_t)``. Sums are float32, Σ p c is
    rounded to bfloat16 before V; the bits do not depend on the number of threads.
    """

    def __init__(
        self, engine: Engine, keys: Any, values: Any, *, heads: int, rope: int, scaling: float
    ) -> None:
        """``keys`` [heads · kv_lora_rank, nope], Uᵀ of every head, and ``values`` [heads · v,
        kv_lora_rank], V of every head: bfloat16, contiguous, kept, not copied. ``ValueError``:
        shapes that do not fit, sizes above 4096."""

    max_rank: int
    @property
    def lora_bytes(self) -> int:
        """Memory of all LoRAs that are held, in whole pages."""

    def load_lora(self, number: int, a: Any = None, b: Any = None) -> None:
        """Keeps a LoRA of kv_b_proj: ``a`` [rank, kv_lora_rank], ``b`` [heads · (nope + v), rank].
        See ``DenseLinear.load_lora``."""

    def unload_lora(self, number: int) -> None: ...
    def activate_loras(self, ids: Sequence[int], weights: Sequence[float]) -> None: ...
    def forward(
        self,
        query: HeadArray,
        latents: HeadArray,
        positions: HeadArray | None,
        out: HeadArray,
        tokens: int,
    ) -> None:
        """Reads query [heads, 1, nope + rope] and the first ``tokens`` of latents [1, tokens,
        kv_lora_rank] and positions [1, tokens, rope]; writes out [heads, 1, v]; all bfloat16. The
        rest is as in ``TokenAttention.forward``."""

    def forward_rows(
        self,
        query: HeadArray,
        latents: HeadArray,
        positions: HeadArray | None,
        out: HeadArray,
        rows: SlotRows,
        adapter_ids: int = 0,
    ) -> None:
        """The same for a token of each of many sequences, over the first tokens of its slot: query
        [heads, rows, nope + rope], latents [slots, 1, capacity, kv_lora_rank], positions [slots, 1,
        capacity, rope], out [heads, rows, v]. ``adapter_ids``: address of int32 [rows], each row's
        LoRA: its number, -1 or -3 for none, -2 for the active ones; 0: these for all. A row's bits
        are those that it has alone. ``ValueError``: also a LoRA that is not held."""

class TokenArray:
    """An array [sequences, tokens, heads, size] in CPU memory, bfloat16 or float32: number (s, t,
    h, i) lies at ``address`` plus s · ``sequence_stride`` + t · ``token_stride`` + h ·
    ``head_stride`` + i elements. The caller keeps the memory alive."""

    def __init__(
        self,
        address: int,
        count: int,
        sequence_stride: int,
        token_stride: int,
        head_stride: int = 0,
        float32: bool = False,
    ) -> None:
        """``count``: elements from the address on. ``ValueError``: no aligned address."""

class LinearAttention:
    """Linear attention on an engine's threads, in float32: for each token, ``S = e^decay · S``,
    ``S += key ⊗ beta · (value - keyᵀ S)``, ``out = scaling · queryᵀ S``.

    The bits depend neither on the number of threads nor on how tokens are cut into calls.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        heads: int,
        key_heads: int,
        key_size: int,
        value_size: int,
        scaling: float,
        subtracts: bool,
        unit_keys: bool,
        decay_per_key: bool,
        transposed_state: bool,
    ) -> None:
        """``heads`` of values, decays and the state, a multiple of the ``key_heads`` of queries and
        keys. ``subtracts``: without, values are added as they are. ``unit_keys``: queries and keys
        are divided by √(Σ x² + 1e-6). ``decay_per_key``: a decay for each number of a key.
        ``transposed_state``: [value size, key size] of each head. ``ValueError``: sizes above
        256."""

    def forward(
        self,
        query: TokenArray,
        key: TokenArray,
        value: TokenArray,
        decay: TokenArray,
        beta: TokenArray | None,
        state: int,
        state_count: int,
        state_stride: int,
        out: TokenArray,
        sequences: int,
        tokens: int,
    ) -> None:
        """``state``: address of float32 [sequences][heads, key size, value size], ``state_stride``
        elements apart, changed in place. Without ``beta``: 1. ``ValueError``: arrays that are too
        small. ``RuntimeError``: the engine is closed."""

class ShortConv:
    """A causal convolution of each channel over a few tokens on an engine's threads."""

    def __init__(self, engine: Engine, *, channels: int, taps: int, silu: bool) -> None:
        """``silu``: applied to the result. ``ValueError``: more than 16 taps."""

    def forward(
        self,
        x: TokenArray,
        weight: TokenArray,
        bias: TokenArray | None,
        state: TokenArray | None,
        state_tokens: int,
        out: TokenArray,
        sequences: int,
        tokens: int,
    ) -> None:
        """``weight`` [channels, taps], ``bias`` [channels]; ``state`` [sequences][channels,
        state_tokens]: the last inputs, changed in place; zeros without. All of one dtype.
        ``ValueError``: arrays that are too small. ``RuntimeError``: the engine is closed."""

class SelectiveScan:
    """Mamba's state space on an engine's threads, in float32: for each token and channel,
    ``S[n] = e^(dt · a[n]) · S[n] + dt · x · b[n]``, ``out = Σ S[n] · c[n]``."""

    def __init__(self, engine: Engine, *, channels: int, size: int) -> None:
        """``size``: numbers of a channel's state. ``ValueError``: above 256."""

    def forward(
        self,
        x: TokenArray,
        dt: TokenArray,
        a: TokenArray,
        b: TokenArray,
        c: TokenArray,
        state: int,
        state_count: int,
        state_stride: int,
        out: TokenArray,
        sequences: int,
        tokens: int,
    ) -> None:
        """``a``: float32 [channels, size]; ``state``: as ``LinearAttention.forward``, [channels,
        size]. ``ValueError``: arrays that are too small. ``RuntimeError``: the engine is
        closed."""

class RmsNorm:
    """RMSNorm of rows of bfloat16: ``x / √(mean(x²) + eps)``, in float32, times a weight.

    ``rounds_twice``: the normed x is rounded to bfloat16 before it is multiplied (Llama, Qwen,
    DeepSeek); otherwise the product is rounded alone (Gemma, gpt_oss).
    """

    def __init__(
        self,
        weight: Any,
        eps: float,
        *,
        rounds_twice: bool,
        offset: float = 0.0,
        engine: Engine | None = None,
    ) -> None:
        """``weight`` [size], bfloat16 or float32, contiguous: kept, not copied. ``offset`` is added
        to it in float32 (Gemma's 1 + w). ``engine``: shares many rows among its threads.
        ``ValueError``: eps below 0."""

    @property
    def size(self) -> int: ...
    def forward(
        self, x: int, x_count: int, rows: int, row_stride: int, out: int, out_count: int
    ) -> None:
        """``x``: address of ``rows`` rows of ``size`` bfloat16 numbers, ``row_stride`` elements
        apart, in ``x_count`` elements of CPU memory; ``out``: address of [rows, size], contiguous,
        which may be ``x``. A few rows run on the calling thread, and many without an engine; a
        row's bits are the same. ``ValueError``: counts that do not fit; ``RuntimeError``: the
        engine is closed."""

class PackedLinear:
    """``DenseLinear`` with the weight in INT8, a scale per output, and inputs quantised row by row:
    the numbers and the packed layout of the INT8 experts. LoRA stays bfloat16. ``of_codes``: in a
    coded format, whose inputs stay bfloat16.

    A row's bits depend neither on the other rows nor on the number of threads; on a processor with
    AMX, the number of rows picks the kernel, and with LoRA the last bits.
    """

    def __init__(self, engine: Engine, weight: Any, bias: Any = None) -> None:
        """``weight`` [out_features, in_features], bfloat16, contiguous, in_features at most 65536:
        packed, without the GIL, and not kept. ``bias``: see ``DenseLinear``. ``ValueError`` for
        NaN and infinity too; ``RuntimeError``: the engine is closed."""

    @staticmethod
    def of_codes(
        engine: Engine,
        weight_format: WeightFormatName,
        codes: Any,
        scales: Any,
        in_features: int,
        bias: Any = None,
    ) -> PackedLinear:
        """Packs a weight [out_features, in_features] as checkpoints ship it, see
        ``MoeLayer.load_coded_expert``. ``ValueError`` and ``RuntimeError`` as the constructor."""

    max_rank: int
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def packed_bytes(self) -> int:
        """Bytes that a forward reads: codes, scales and sums of codes."""

    @property
    def lora_bytes(self) -> int:
        """Memory of all LoRAs that are held, in whole pages."""

    def load_lora(self, number: int, a: Any = None, b: Any = None) -> None:
        """See ``DenseLinear.load_lora``."""

    def unload_lora(self, number: int) -> None: ...
    def activate_loras(self, ids: Sequence[int], weights: Sequence[float]) -> None: ...
    def forward(
        self,
        x: int,
        x_count: int,
        out: int,
        out_count: int,
        adapter_ids: int = 0,
        adapter_count: int = 0,
    ) -> None:
        """See ``DenseLinear.forward``."""

    def kernel_name(self, rows: int) -> str:
        """Returns the GEMM kernel for this number of rows."""

class RowProducts:
    """x · Wᵀ + bias for any matrix in CPU memory, on an engine's threads, with float32 sums. Every
    output is summed in one order: a row's bits depend neither on the other rows nor on the number
    of threads."""

    def __init__(self, engine: Engine) -> None: ...
    def multiply_f32(
        self,
        x: int,
        x_count: int,
        weight: int,
        weight_count: int,
        bias: int,
        out: int,
        out_count: int,
        in_features: int,
    ) -> None:
        """Writes ``out`` [rows, out_features] for ``x`` [rows, in_features], ``weight``
        [out_features, in_features] and ``bias`` [out_features], or 0 without: addresses and element
        counts of contiguous float32 arrays. Runs without the GIL. ``ValueError``: counts that do
        not fit; ``RuntimeError``: the engine is closed."""

    def multiply_bf16(
        self,
        x: int,
        x_count: int,
        weight: int,
        weight_count: int,
        bias: int,
        out: int,
        out_count: int,
        in_features: int,
    ) -> None:
        """The same in bfloat16, rounded once, after the bias."""

class PackedMemory:
    """Read-only memory of the engine: buffer protocol, no copy, page-aligned.

    It keeps the memory alive, also after ``Engine.close``.
    """

    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

class PackedMatrix:
    """Position of one part of a projection inside every expert's memory of that part."""

    @property
    def rows(self) -> int:
        """Output rows in this part, without padding."""

    @property
    def columns(self) -> int: ...
    @property
    def first_row(self) -> int:
        """Number of this part's first row in the whole matrix; a multiple of 32."""

    @property
    def code_offset(self) -> int:
        """Bytes from the start of an expert's codes."""

    @property
    def scale_offset(self) -> int:
        """Numbers from the start of an expert's scales."""

class PackedPart:
    """One part of a layer's packed experts: ``codes`` is [num_experts, expert_code_bytes] bytes,
    ``scales`` [num_experts, expert_scales] float32 (None where the format has none outside of the
    codes' tiles)."""

    @property
    def expert_code_bytes(self) -> int: ...
    @property
    def expert_scales(self) -> int: ...
    @property
    def codes(self) -> PackedMemory: ...
    @property
    def scales(self) -> PackedMemory | None: ...
    @property
    def gate(self) -> PackedMatrix: ...
    @property
    def up(self) -> PackedMatrix: ...
    @property
    def down(self) -> PackedMatrix: ...

class PackedShrink:
    """A layer's A: bfloat16 [num_experts, ranks / 16, columns / 2, 16, 2], zero-padded; ``a`` is
    None if there is nothing to shrink."""

    @property
    def ranks(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def a(self) -> PackedMemory | None: ...

class PackedExpand:
    """B of a projection: bfloat16 [num_experts, rows / 32, ranks / 2, 2, 16, 2], zero-padded, for
    ranks ``first_rank`` … of the shrunk rows; ``b`` is None without LoRA."""

    @property
    def ranks(self) -> int: ...
    @property
    def first_rank(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def b(self) -> PackedMemory | None: ...

class PackedLora:
    """A layer's LoRA in the engine's layout. ``input`` shrinks the inputs of gate and up,
    ``intermediate`` down's inputs."""

    @property
    def input(self) -> PackedShrink: ...
    @property
    def intermediate(self) -> PackedShrink: ...
    @property
    def gate(self) -> PackedExpand: ...
    @property
    def up(self) -> PackedExpand: ...
    @property
    def down(self) -> PackedExpand: ...

class BoundForward:
    """A layer's forward between fixed arrays (``MoeLayer.bind``)."""

    def run(self) -> None:
        """Runs without the GIL. Raises what ``MoeLayer.forward`` raises."""

class MoeLayer:
    """The routed experts of one MoE layer: ``y = Σ_slots w · down(f(gate x) · up x)``, with biases
    where they are set; ``down(f(up x))`` without gate.

    ``f(min(g, gate_limit)) · (clamp(u, ± up_limit) + up_offset)`` makes an intermediate activation
    of the outputs g and u of gate and up; ``activation`` names f: ``silu`` is g · sigmoid(alpha ·
    g), ``gelu``, ``gelu_tanh``, ``relu``, ``relu2`` its square. ``softcap_silu`` bends instead:
    gate_limit · tanh(g / gate_limit) · sigmoid(g), and up likewise.

    Weights have kt_kernel's packed layout; sizes that it refuses are zero-padded.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        num_experts: int,
        top_k: int,
        hidden_size: int,
        intermediate_size: int,
        weight_format: WeightFormatName,
        has_gate: bool = True,
        activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "softcap_silu"] = "silu",
        alpha: float = 1.0,
        gate_limit: float = ...,
        up_limit: float = ...,
        up_offset: float = 0.0,
        down_slices: int = 1,
    ) -> None:
        """Takes no memory before experts are loaded. The limits are infinite by default.
        ``down_slices``: number of slices of down's columns, each with its own scales (activations
        likewise), as in kt_kernel on several NUMA nodes; quantised formats only. Results depend on
        it; they do not depend on the engine's parts. ``ValueError``: sizes below 1, a limit that is
        not above 0, an unknown name."""

    @property
    def num_experts(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def weight_format(self) -> str: ...
    @property
    def packed_bytes(self) -> int:
        """Bytes of packed weights and scales of all experts, without LoRA."""

    @property
    def has_gate(self) -> bool: ...
    @property
    def activation(self) -> dict[str, Any]:
        """The arguments of ``__init__`` from ``activation`` to ``up_offset``."""

    @property
    def unusual_form(self) -> list[str]:
        """Differences of the experts from ``down(silu(gate x) · up x)``, in words."""

    def load_expert(self, expert: int, gate: Any, up: Any, down: Any) -> None:
        """Packs (and for int8, int4 quantises) one expert. gate (None where the experts have none)
        and up [intermediate_size, hidden_size], down [hidden_size, intermediate_size]; float32,
        float16 or bfloat16, rounded to bfloat16 first. The arrays are not kept. Runs without the
        GIL, on the pool."""

    def set_biases(
        self, *, gate: Any | None = None, up: Any | None = None, down: Any | None = None
    ) -> None:
        """Replaces the biases of all experts: gate, up [num_experts, intermediate_size], down
        [num_experts, hidden_size], float32; None: no bias on that projection. They are added in
        float32: gate's and up's before the activation, down's before the routing weight."""

    def load_packed_expert(
        self,
        expert: int,
        gate: Sequence[tuple[Any, Any]],
        up: Sequence[tuple[Any, Any]],
        down: Sequence[tuple[Any, Any]],
    ) -> None:
        """Loads one expert from kt_kernel's packed matrices, each as (codes uint8 [bytes], scales
        float32 [rows]): gate and up in shards of equally many rows, down in ``down_slices`` slices
        of columns. Bytes are copied unchanged. Runs without the GIL, on the pool."""

    def load_coded_expert(
        self,
        expert: int,
        gate: tuple[Any, Any] | None,
        up: tuple[Any, Any],
        down: tuple[Any, Any],
    ) -> None:
        """Loads one expert of a coded format from matrices [n, k] as checkpoints ship them, each
        (codes, scales), packed without a rounding. Codes: uint8 [n, k] (FP8) or [n, k / 2], the
        first column in the low half. Scales: fp8 float32 [n / 32, k / 128] (rounded up),
        fp8_channel float32 [n], int4_g* bfloat16 [n, k / group], mxfp4 uint8 [n, k / 32].
        ``ValueError``: shapes, dtypes, NaN codes, scales that are not finite, or whose products
        with the largest code are not."""

    @property
    def image_bytes(self) -> list[int]:
        """Bytes of each part's image: all results of packing. Empty once closed."""

    def write_image(self, part: int, fd: int) -> int:
        """Appends a part's image to the open file ``fd``; returns its digest (64 bits).
        ``OSError``; ``ValueError`` if an expert is not loaded."""

    def use_images(
        self,
        fds: Sequence[int],
        digests: Sequence[int],
        *,
        use: Literal["auto", "map", "copy"] = "auto",
    ) -> bool:
        """Takes all experts from image files, one per part, after checking their digests on the
        pool. Returns True if the files stay mapped (they must not be changed, only replaced),
        False if they were copied. "auto" maps where the page cache holds the file in huge pages and
        there is one part; pages of several parts are copied to their NUMA nodes. ``ValueError``: a
        file of another size or digest; the layer is then unchanged. ``OSError``."""

    def load_lora(
        self,
        number: int,
        *,
        gate_a: Any | None = None,
        gate_b: Any | None = None,
        up_a: Any | None = None,
        up_b: Any | None = None,
        down_a: Any | None = None,
        down_b: Any | None = None,
    ) -> None:
        """Keeps a LoRA under a number (0 or more; one of this number is replaced); it acts once it
        is activated. Per projection A [num_experts, rank, in], B [num_experts, out, rank], float32,
        the scaling already folded into B; rounded to bfloat16 once. A projection without both is
        left without LoRA. ``up_b`` with ``up_a=None`` and ``gate_a`` given: up uses gate's A (one
        shrink serves both). Ranks 1 … 256 and may differ per projection."""

    def unload_lora(self, number: int) -> None:
        """``ValueError``: there is none of this number, or it is active."""

    def activate_loras(self, ids: Sequence[int], weights: Sequence[float]) -> None:
        """Makes the sum of these LoRAs, each times its weight, the active one from the next forward
        on; none: the base. Costs nothing; ranks may sum to anything. Weights scale the shrunk rows,
        which are then rounded to bfloat16 again; weights of 1 change no bit. ``ValueError``: a
        number that is not held or named twice, a weight that is not finite; nothing changes
        then."""

    @property
    def loras(self) -> list[int]:
        """The numbers of the LoRAs that are held, ascending."""

    @property
    def active_loras(self) -> list[tuple[int, float]]:
        """Numbers and weights, in the order of ``activate_loras``."""
    def forward(
        self,
        hidden_states: Any,
        expert_ids: Any,
        routing_weights: Any,
        out: Any,
        adapter_ids: Any | None = None,
    ) -> None:
        """hidden_states, out [qlen, hidden_size], one dtype of float32, float16, bfloat16;
        expert_ids [qlen, k ≤ top_k] int32 or int64; routing_weights [qlen, k] float32, float16 or
        bfloat16. A slot whose id lies outside [0, num_experts) contributes nothing. Writes ``out``.
        ``adapter_ids`` [qlen], int32 or int64: each token's LoRA, with the bits that it has alone:
        the number of any that is held (at weight 1), -1 for none, -2 for the active sum, -3 for a
        token that adds nothing and costs nothing. None: the active sum for all. Runs without the
        GIL. ``ValueError``: qlen > max_qlen, an expert not loaded, shapes, dtypes, an adapter id
        that is not held.
        """

    def bind(
        self,
        hidden_states: Any,
        expert_ids: Any,
        routing_weights: Any,
        out: Any,
        adapter_ids: Any | None = None,
    ) -> BoundForward:
        """Returns ``forward`` between these arrays. It keeps them alive; they must not move. Every
        ``run`` reads and checks them again."""

    def last_kernels(self) -> dict[str, str]:
        """Returns the ISA variants of the last ``forward``, e.g. ``{"gemm": "amx",
        "gemm_few_rows": "avx512_bf16", "lora_shrink": "amx", "lora_shrink_few_rows": "avx512_bf16",
        "elementwise": "avx512"}``; a kernel that did not run is missing."""

    @property
    def last_experts(self) -> int:
        """How many experts the last ``forward`` read. Never waits for a forward."""

    def packed_codes(self, expert: int, projection: Literal["gate", "up", "down"]) -> bytes:
        """Copies the packed codes of one matrix (kt_kernel's byte order), shard by shard."""

    def packed_scales(self, expert: int, projection: Literal["gate", "up", "down"]) -> bytes:
        """Copies the float32 scales, one per padded output row; empty for bf16."""

    def packed_parts(self) -> list[PackedPart]:
        """Returns the packed memory itself, one item per part of the engine. A later
        ``load_expert`` writes into it. ``ValueError`` while an expert is missing, ``RuntimeError``
        once closed."""

    def bias_views(self) -> dict[str, PackedMemory]:
        """Returns the memory of the biases by projection, of those that have one: float32
        [num_experts, rows], rows padded to 32. Biases set later have other memory."""

    def lora_view(self, number: int) -> PackedLora:
        """Returns the memory of a LoRA. A LoRA loaded later under the same number has other memory.
        ``ValueError``: there is none of this number."""

    @property
    def lora_version(self) -> int:
        """Changes when a LoRA is loaded, replaced or unloaded, and when others, or other weights,
        become active. Never waits for a forward."""

class DeviceRegion:
    """Addresses on the device of the current CUDA context that never move, of which only what is
    committed has memory, in granules. Calls release the GIL; not for several threads at once.
    """

    def __init__(self, size: int, *, driver: str = "libcuda.so.1") -> None:
        """Reserves addresses for at least ``size`` bytes. ``RuntimeError``: no driver, no context,
        no virtual memory, no room for that many addresses."""

    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int:
        """The size, rounded up to granules."""

    @property
    def granularity(self) -> int:
        """Bytes of a granule: 2 MB."""

    @property
    def committed_bytes(self) -> int: ...
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """All bytes, uint8."""

    def commit(self, first: int, end: int) -> int:
        """Gives bytes ``first`` … ``end`` - 1 and the rest of their granules memory, which holds
        anything; returns how many got some. ``RuntimeError`` (out of memory, say): nothing has
        changed. ``ValueError``: not a range of the region."""

    def decommit(self, first: int, end: int) -> int:
        """Takes the memory of all granules that lie wholly in bytes ``first`` … ``end`` - 1, after
        waiting for the device if there are any; returns how many bytes had some."""

class GpuHandoff:
    """Pinned slots through which a CUDA stream starts the engine and waits for it, without the host
    in between; the stream's work can be captured into a graph and replayed.

    All slots of one hand-off run one after the other: on one stream, or on streams ordered by
    events. They share memory. Calls release the GIL.

    After a failure (a ``forward`` that raised or took longer than ``timeout``, a slot that started
    though no slot or another one was expected, Ctrl-C in ``synchronize``, ``close``) no stream
    waits any longer: later slots are skipped, and they copy stale data to the device. ``submit``,
    ``expect`` and ``synchronize`` raise the failure until a ``synchronize`` finds the stream
    drained; the next use starts clean.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        timeout: float = 30.0,
        driver: str = "libcuda.so.1",
        mechanism: Literal["auto", "stream_memory_ops", "host_functions"] = "auto",
    ) -> None:
        """Uses the current CUDA context; not during a capture. ``timeout``: seconds. ``auto``: host
        functions where driver or device cannot run and capture stream memory operations.
        ``RuntimeError``: library or entry point missing, driver too old, no current context,
        mechanism not available."""

    @property
    def mechanism(self) -> str:
        """Way to start and await slots: ``stream_memory_ops`` or ``host_functions``."""

    @property
    def closed(self) -> bool: ...
    @property
    def pinned_bytes(self) -> int:
        """Page-locked memory: the largest slot, and a cache line per slot. If slots are added in
        ascending order of size, each one needs its own memory."""

    def add_slot(
        self,
        layer: MoeLayer,
        *,
        tokens: int,
        top_k: int,
        dtype: Literal["float32", "float16", "bfloat16"],
        name: str = "",
        adapters: bool = False,
    ) -> int:
        """Adds a slot for ``tokens`` rows: hidden_states and out [tokens, hidden_size] (``dtype``),
        expert_ids int64 and routing_weights float32 [tokens, top_k]; with ``adapters``, adapter_ids
        int32 [tokens] (see ``MoeLayer.forward``), else all rows have the active LoRAs. Keeps the
        layer. ``name`` names the layer in error messages. Not during a capture. ``ValueError``: a
        layer of another engine, tokens > max_qlen, top_k > the layer's."""

    def submit(
        self,
        slot: int,
        stream: int,
        hidden_states: int,
        expert_ids: int,
        routing_weights: int,
        adapter_ids: int = 0,
    ) -> None:
        """Enqueues the copies of contiguous arrays (device addresses; ``adapter_ids`` where the
        slot has them) and the start on a stream (``torch.cuda.Stream.cuda_stream``). Outside a
        capture it also expects the slot.
        ``RuntimeError``: the last submitted slot has no ``wait`` yet, an earlier failure."""

    def wait(self, slot: int, stream: int, out: int) -> None:
        """Enqueues the wait for the slot submitted last and the copy of its result to ``out``."""

    def expect(self, slots: Sequence[int]) -> None:
        """Announces the launch of a graph in which these slots start in this order."""

    def synchronize(self, stream: int) -> None:
        """Returns once the stream has drained. ``RuntimeError``: a failure since the last call; it
        names slot and layer. ``TimeoutError``: a forward took longer than ``timeout``, or the
        stream is busy though no slot has moved for that long. Ctrl-C interrupts it."""

    def close(self) -> None:
        """Releases and awaits the device, ends the threads, frees the pinned memory. Graphs that
        captured a slot must not be launched afterwards. Idempotent; the end of the interpreter
        does it too."""

def torch_exponentials(state: Any, draws: int, indices: Any, out: Any) -> None:
    """Sets ``out[i]`` (float32) to ``torch.empty(draws).exponential_(1, generator=g)[indices[i]]``
    of a generator with this ``state``: ``g.get_state()`` as uint64, which moves on by as many
    draws. Holds where torch draws serially: not in its builds with MKL on Intel's CPUs.
    ``indices``: ascending, int64. Without the GIL. ``ValueError``: arrays or indices do not fit."""

def release_file_pages(path: str) -> int:
    """Releases the memory of this process's mappings of a file that were never written to. They
    stay valid and are read again on use. Returns the number of mappings."""

def isa() -> str:
    """Returns the ISA level in use: ``portable``, ``avx2``, ``avx_vnni``, ``avx512`` or ``amx``.
    ``KTRT_ISA`` lowers it. ``ktrt.errors.ConfigError``: another value of ``KTRT_ISA``, or one that
    this machine does not have."""

def detected_isa() -> str:
    """Returns the highest ISA level that this machine and build can run."""

def bf16_arithmetic() -> str:
    """Returns what AVX-512 multiplies BF16 by where the processor has both: ``"dot"``
    (VDPBF16PS) or ``"float32"`` (multiply-adds), by a measurement of half a millisecond, or
    ``KTRT_BF16``.
    ``ktrt.errors.ConfigError``: another value of ``KTRT_BF16``."""

def numa_cpus() -> list[list[int]]:
    """Returns the process's allowed CPUs by NUMA node, one hardware thread per core first."""

def num_cores() -> int:
    """Returns the number of physical cores among the process's allowed CPUs."""

def arithmetic_loops() -> list[tuple[str, str, str]]:
    """Returns (name, instruction, operands) of every loop of multiply-adds that runs at this ISA
    level, slowest first, e.g. ``("avx512_bf16", "vdpbf16ps zmm", "bf16")``; operands are
    ``float32``, ``bf16`` or ``int8``. Empty below AVX2."""

def arithmetic_rate(name: str, seconds: float) -> float:
    """Returns the multiplications and additions per second of the calling thread in one of these
    loops, which stay in registers. Runs for about ``seconds``, without the GIL. ``ValueError``: an
    unknown name."""

class WeightFormat:
    """A format of packed weights: codes of ``bits`` bits, in blocks of ``block_rows`` ×
    ``block_columns`` and tiles of 32 × ``tile_columns``, whose codes ``tile_scale_bytes`` of scales
    may follow. ``coded``: as checkpoints ship it (csrc/layout/coded.h)."""

    @property
    def name(self) -> WeightFormatName: ...
    @property
    def kt_backend(self) -> str:
        """Its name in a configuration: ``AMXBF16``."""

    @property
    def kernel_family(self) -> str:
        """Its key in ``kernels()``."""

    @property
    def bits(self) -> int: ...
    @property
    def quantizes_rows(self) -> bool:
        """Whether activations are multiplied as INT8 codes."""

    @property
    def coded(self) -> bool: ...
    @property
    def group(self) -> int:
        """Columns of one scale; 0: of all of a row, or none."""

    @property
    def tile_scale_bytes(self) -> int: ...
    @property
    def block_rows(self) -> int: ...
    @property
    def block_columns(self) -> int: ...
    @property
    def tile_columns(self) -> int: ...
    def code_bytes(self, rows: int, columns: int) -> int:
        """Returns the bytes of a packed matrix's tiles, padding included."""

    def scale_bytes(self, rows: int, columns: int) -> int:
        """Returns the bytes of its scales outside of the tiles."""

    def sum_bytes(self, rows: int, columns: int) -> int:
        """Returns the bytes of its rows' sums of codes, which are in addition to packed_bytes."""

def weight_formats() -> list[WeightFormat]:
    """Returns the engine's weight formats."""

def kernels() -> dict[str, str]:
    """Returns the variant of every kernel family at this ISA level, e.g.
    ``{"gemm_bf16": "amx", "gemm_bf16_few_rows": "avx512_bf16", …}``."""
