"""A tiny tokenizer, dense model and session, for tests above the engine."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ktrt.adapter.residents import Adapters
from ktrt.config import SamplingArgs, TemplateArgs
from ktrt.loading.model import LoadedModel
from ktrt.prompt.template.load import load_template
from ktrt.session import Session
from ktrt.utils.patches import Patches

TEXT = [
    "你好，请介绍一下你自己。我是一个混合专家模型，很高兴见到你！",
    "User: hello, who are you?\n\nAssistant: I am a tiny model 🙂 made of bytes 🚀.",
    "Human: 专家混合\nAssistant: 路由器选择专家。",
]
BOS, EOS = "<s>", "</s>"


def make_tokenizer(
    special: tuple[str, ...] = (), vocab_size: int = 400, **options: Any
) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE trained on ``TEXT``: most other Chinese and emoji are several
    tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokens = {"bos_token": BOS, "eos_token": EOS} | options
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)


def make_model(tokenizer: PreTrainedTokenizerFast, **options: Any) -> LlamaForCausalLM:
    """Returns a model with random weights, large enough that greedy decoding does not loop at
    once."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "initializer_range": 0.4,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        | options
    )
    return LlamaForCausalLM(config).eval()


def make_loaded(model: Any, close: Callable[[], None] = lambda: None) -> LoadedModel:
    """A model without an engine; ``close`` is called in its place."""
    engine: Any = SimpleNamespace(close=close)
    return LoadedModel(model, Adapters(), engine, Patches())


def make_session(
    *,
    template: str = "default",
    close: Callable[[], None] = lambda: None,
    model_options: dict[str, Any] | None = None,
    **sampling: Any,
) -> Session:
    """Returns a session; by default greedy, with at most 40 tokens."""
    tokenizer = make_tokenizer()
    args = SamplingArgs(**{"do_sample": False, "max_new_tokens": 40} | sampling)
    loaded = make_loaded(make_model(tokenizer, **(model_options or {})), close)
    return Session(loaded, tokenizer, load_template(TemplateArgs(template), tokenizer), args)
