"""The configuration dataclasses; field names are LLaMA-Factory's keys, each default stated once."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from math import isfinite
from pathlib import Path
from typing import Any, Literal, TypedDict

from ktrt.config.check import check_value, nearest, shown
from ktrt.errors import ConfigError

InferDtype = Literal["auto", "bfloat16", "float16", "float32"]
# "auto": as the checkpoint stores its experts.
KtBackend = Literal["auto", "AMXBF16", "AMXInt8", "AMXInt4", "FP8", "RAWINT4", "MXFP4"]
# KTransformers' kt_expert_weight_format for each; a test compares it with the engine's.
WEIGHT_FORMATS: Mapping[KtBackend, str] = {
    "AMXBF16": "bf16", "AMXInt8": "int8", "AMXInt4": "int4", "FP8": "fp8", "RAWINT4": "rawint4",
    "MXFP4": "mxfp4",
}  # fmt: skip
# Beyond any machine (Linux ends at 8192 CPUs) and any model; a larger number is a typing error.
_MAX_THREADS = 8192
_MOST_STOPS, _LONGEST_STOP = 256, 1000
_MAX_COUNT = 2**31


@dataclass(frozen=True)
class ModelArgs:
    """The base model: its folder, and the dtype of everything but the routed experts.

    ``cutoff_len``: maximum tokens of a conversation, below the model's own limit.
    ``quantization_bit`` 8: on the CPU the linear layers outside the routed experts are INT8, with a
    scale per output row (``ktrt.layers.int8`` says which); layers on a GPU keep their dtype.
    ``add_tokens`` and ``add_special_tokens`` were added to the tokenizer before training, in this
    order; ``resize_vocab``: the embeddings were resized to the tokenizer.
    """

    model_name_or_path: Path
    trust_remote_code: bool = False
    infer_dtype: InferDtype = "auto"
    cutoff_len: int | None = None
    quantization_bit: int | None = None
    resize_vocab: bool = False
    add_tokens: tuple[str, ...] = ()
    add_special_tokens: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        bits, dtype = self.quantization_bit, self.infer_dtype
        _require(
            self, "quantization_bit", bits in (None, 8),
            "8 (INT8 for linear layers on the CPU) or null; the experts' format is kt_backend's",
        )  # fmt: skip
        fits = bits is None or dtype in ("auto", "bfloat16")
        _require(self, "quantization_bit", fits, f"null with infer_dtype {dtype}, not bfloat16")
        _require(self, "cutoff_len", self.cutoff_len is None or self.cutoff_len >= 2, "at least 2")


@dataclass(frozen=True)
class AdapterArgs:
    """The LoRA adapters: a single one, or several ``adapters`` by name; none means the base model.

    ``adapter_weights``: the adapters that start active, as a weighted sum; without it the first one
    starts, as trained. ``lora_rank`` and ``lora_alpha`` repeat values of adapter_config.json, which
    decides; the reader of both raises an error if they differ. ``lora_B_layout``: packing of
    stacked lora_B, for files that do not say.
    """

    adapter_name_or_path: Path | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_B_layout: Literal["grouped_by_expert", "rank_major"] | None = None  # noqa: N815
    adapters: Mapping[str, Path] = field(default_factory=dict)
    adapter_weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(self, "lora_rank", self.lora_rank is None or self.lora_rank >= 1, "at least 1")
        _require(self, "lora_alpha", isfinite(self.lora_alpha or 0), "a finite number")
        finite = all(map(isfinite, self.adapter_weights.values()))
        _require(self, "adapter_weights", finite, "finite numbers")

    @property
    def folders(self) -> dict[str, Path]:
        """All adapters by name; a single one has its folder's name."""
        if self.adapter_name_or_path is None:
            return dict(self.adapters)
        name = self.adapter_name_or_path.resolve().name
        return {name: self.adapter_name_or_path, **self.adapters}

    def single(self) -> Path | None:
        """Returns the folder of the only adapter; None for the base alone. ``ConfigError``: there
        are several, or its weight is not 1."""
        folders = list(self.folders.values())
        if len(folders) > 1 or any(weight != 1 for weight in self.adapter_weights.values()):
            raise ConfigError(
                f"one adapter, as it was trained, can be taken here; found {list(self.folders)}, "
                f"adapter_weights {dict(self.adapter_weights)}. Give the one as "
                "adapter_name_or_path, without adapters and adapter_weights"
            )
        return folders[0] if folders else None

    @property
    def start_weights(self) -> dict[str, float]:
        """The adapters that start active, with their weights."""
        return dict(self.adapter_weights) or dict.fromkeys(list(self.folders)[:1], 1.0)


@dataclass(frozen=True)
class ExpertArgs:
    """Settings of the routed experts' engine. ``kt_backend``: their weight format, by default the
    checkpoint's own. ``kt_num_threads`` None: the engine chooses.

    With a GPU: ``kt_num_gpu_experts`` of every layer live there, and forwards of at least
    ``kt_gpu_prefill_token_threshold`` tokens (0: none) get all experts streamed there.
    ``kt_enable_dynamic_expert_update``: which experts live there follows the conversation.
    ``kt_use_cuda_graph``: on a GPU, a decode step is one CUDA graph where the model allows it.
    ``kt_fixed_kernels``: with AMX, one kernel for any number of tokens, so that a token's bits do
    not depend on its company; other machines do that anyway.
    ``kt_weight_path``: experts packed by kt_kernel, used in place of the model's.
    ``ktrt_cache`` keeps packed experts on disk, in ``ktrt_cache_dir`` (None: the environment
    decides).
    """

    kt_backend: KtBackend = "auto"
    kt_num_threads: int | None = None
    kt_tp_enabled: bool = False
    kt_use_cuda_graph: bool = True
    kt_fixed_kernels: bool = False
    kt_num_gpu_experts: int | Literal["auto"] = 0
    kt_gpu_prefill_token_threshold: int | Literal["auto"] = "auto"
    kt_enable_dynamic_expert_update: bool = False
    kt_weight_path: Path | None = None
    ktrt_cache: bool = True
    ktrt_cache_dir: Path | None = None

    def __post_init__(self) -> None:
        threads = self.kt_num_threads
        _require(self, "kt_num_threads", threads is None or threads >= 1, "at least 1")
        _require(self, "kt_num_threads", (threads or 1) <= _MAX_THREADS, f"at most {_MAX_THREADS}")
        for name in ("kt_num_gpu_experts", "kt_gpu_prefill_token_threshold"):
            value = getattr(self, name)
            holds = value == "auto" or 0 <= value < _MAX_COUNT
            _require(self, name, holds, "0 or more, or auto")


@dataclass(frozen=True)
class TemplateArgs:
    """The chat template; None and "auto" mean the tokenizer's.

    ``default_system`` None keeps the template's default system prompt, "" means none.
    ``enable_thinking`` applies to reasoning templates only; None and True let the model decide.
    """

    template: str | None = None
    default_system: str | None = None
    enable_thinking: bool | None = None


@dataclass(frozen=True)
class SamplingArgs:
    """How tokens are chosen, and when an answer ends.

    ``temperature`` 0 or ``do_sample`` false is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0
    switch those filters off; ``seed`` None gives another answer each time. ``repetition_penalty``
    counts tokens of the prompt too, ``presence_penalty`` and ``frequency_penalty`` (OpenAI's) only
    the answer's; ``logit_bias`` is added to the logits of the token ids that it names.
    ``stop_strings`` end an answer before their first character, ``stop_token_ids`` are added to the
    template's. ``logprobs``: report the log probability of each token, and of the ``top_logprobs``
    likeliest tokens.
    """

    do_sample: bool = True
    temperature: float = 0.95
    top_p: float = 0.7
    top_k: int = 50
    min_p: float = 0.0
    max_new_tokens: int = 1024
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    skip_special_tokens: bool = True
    seed: int | None = None
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        finite = float("inf")
        _require(self, "temperature", 0 <= self.temperature < finite, "0 or more")
        _require(self, "top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        _require(self, "top_k", 0 <= self.top_k < _MAX_COUNT, "0 (off) or more")
        _require(self, "min_p", 0 <= self.min_p <= 1, "0 (off) … 1")
        _require(self, "max_new_tokens", self.max_new_tokens >= 1, "at least 1")
        holds = self.max_new_tokens < _MAX_COUNT
        _require(self, "max_new_tokens", holds, f"less than {_MAX_COUNT}")
        # Beyond these, logits divided by it leave float32's range.
        factor = self.repetition_penalty
        _require(self, "repetition_penalty", 1e-4 <= factor <= 1e4, "0.0001 … 10000")
        _require(self, "presence_penalty", -2 <= self.presence_penalty <= 2, "-2 … 2")
        _require(self, "frequency_penalty", -2 <= self.frequency_penalty <= 2, "-2 … 2")
        self._check_bias()
        _require(self, "seed", self.seed is None or 0 <= self.seed < 2**63, "0 … 2^63 - 1")
        _require(self, "stop_strings", all(self.stop_strings), "texts that are not empty")
        self._check_stops()
        ids = self.stop_token_ids
        _require(
            self,
            "stop_token_ids",
            all(0 <= each < _MAX_COUNT for each in ids),
            "token ids, 0 or more",
        )
        _require(self, "top_logprobs", 0 <= self.top_logprobs <= 20, "0 … 20")
        holds = self.logprobs or self.top_logprobs == 0
        _require(self, "top_logprobs", holds, "0 while logprobs is false")

    def _check_stops(self) -> None:
        """Every token is compared with all of them, in the thread of all answers."""
        count, longest = len(self.stop_strings), max(map(len, self.stop_strings), default=0)
        if count > _MOST_STOPS or longest > _LONGEST_STOP:
            raise ConfigError(
                f"stop_strings: expected at most {_MOST_STOPS} of at most {_LONGEST_STOP} "
                f"characters, found {count} of up to {longest}"
            )

    def _check_bias(self) -> None:
        ids, biases = self.logit_bias.keys(), self.logit_bias.values()
        _require(self, "logit_bias", all(0 <= each < _MAX_COUNT for each in ids), "token ids")
        # OpenAI's range; NaN is in none.
        _require(self, "logit_bias", all(-100 <= each <= 100 for each in biases), "-100 … 100")


@dataclass(frozen=True)
class SchedulerArgs:
    """How many answers are computed at once: at most ``max_num_seqs``, and no more than leave each
    stream ``min_tokens_per_second`` by predictions (0: no floor).

    ``reproducible``: an answer depends on its request alone, to the last bit: not on its company
    (``kt_fixed_kernels``), nor on what earlier answers left in the KV cache."""

    max_num_seqs: int = 32
    min_tokens_per_second: float = 1.0
    reproducible: bool = False

    def __post_init__(self) -> None:
        _require(self, "max_num_seqs", self.max_num_seqs >= 1, "at least 1")
        _require(self, "max_num_seqs", self.max_num_seqs < _MAX_COUNT, f"less than {_MAX_COUNT}")
        holds = 0 <= self.min_tokens_per_second < float("inf")
        _require(self, "min_tokens_per_second", holds, "0 (off) or more")


# OpenAI's name.
SAMPLING_ALIASES = {"stop": "stop_strings"}
_Texts = str | list[str] | tuple[str, ...]
_Ids = int | list[int] | tuple[int, ...]


class SamplingOptions(TypedDict, total=False):
    """Keywords that replace ``SamplingArgs`` for one answer; None keeps the configured value."""

    do_sample: bool | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    max_new_tokens: int | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    skip_special_tokens: bool | None
    seed: int | None
    stop_strings: _Texts | None
    stop: _Texts | None
    stop_token_ids: _Ids | None
    logprobs: bool | None
    top_logprobs: int | None


@dataclass(frozen=True)
class Config:
    """The whole configuration of a chat, one part for each consumer."""

    model: ModelArgs
    adapter: AdapterArgs = field(default_factory=AdapterArgs)
    experts: ExpertArgs = field(default_factory=ExpertArgs)
    template: TemplateArgs = field(default_factory=TemplateArgs)
    sampling: SamplingArgs = field(default_factory=SamplingArgs)
    scheduler: SchedulerArgs = field(default_factory=SchedulerArgs)


def override_sampling(defaults: SamplingArgs, overrides: Mapping[str, object]) -> SamplingArgs:
    """Returns ``defaults`` with some fields replaced; None keeps the default.

    ``ConfigError``: an unknown name, a value of the wrong type or range, two spellings of a name
    that contradict each other.
    """
    types = {each.name: each.type for each in fields(SamplingArgs)}
    changes: dict[str, Any] = {}
    for spelling, value in overrides.items():
        name = SAMPLING_ALIASES.get(spelling, spelling)
        if name not in types:
            raise ConfigError(f"unknown sampling argument {name!r}{nearest(name, types)}")
        if value is None:
            continue
        checked = check_value(spelling, value, types[name], "sampling")
        if changes.setdefault(name, checked) != checked:
            raise ConfigError(
                f"sampling: two spellings of {name} contradict each other ({changes[name]} and "
                f"{checked}); keep one of them"
            )
    return replace(defaults, **changes)


def _require(args: object, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{name}: expected {expected}, found {shown(getattr(args, name), str)}")
