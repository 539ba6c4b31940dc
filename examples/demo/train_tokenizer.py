"""Train the demo's byte-level BPE tokenizer on the corpus and save it for transformers.

The chat template is LLaMA-Factory's ``deepseek`` template. The pre-tokenizer cuts where that
template joins its slots (after ``Assistant:``, before ``User:``), so encoding the joined text gives
the same ids as encoding each slot by itself; ``slot_ids`` is the slot-wise rule and ``check``
compares the two over the whole corpus.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from .corpus import PERSONAS, exchanges, sentences

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
VOCAB_SIZE = 3584
CONTEXT = 2048
# Longest token in bytes: four Chinese characters or twelve letters. Longer ones would swallow whole
# phrases of a small corpus, and a visitor's slightly different phrase would share no token with it.
MAX_TOKEN_BYTES = 12
SPLIT = r"Assistant:|\p{Han}+| ?[\p{L}&&[^\p{Han}]]+|\p{N}| ?[^\s\p{L}\p{N}]+|[\r\n]+|[^\S\r\n]+"
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{% if message['content'] %}{{ message['content'] + '\n\n' }}{% endif %}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\nAssistant:' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('unknown role: ' + message['role']) }}"
    "{% endif %}{% endfor %}"
)
ROLES = ("user", "assistant")


def train(texts: Iterable[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer: any UTF-8 text survives encoding and decoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=2,
        max_token_length=MAX_TOKEN_BYTES,
        special_tokens=[
            AddedToken(text, normalized=False, special=True) for text in (BOS, EOS, PAD)
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos_id)]
    )
    return tokenizer


def save(folder: Path) -> None:
    """Train, and write the tokenizer's files and its chat template into ``folder``."""
    templates = ["User: {}\n\nAssistant:", "{}\n\nUser: "]
    texts = sentences()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train([*texts, *(t.format(text) for t in templates for text in texts)]),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def slot_ids(
    tokenizer: PreTrainedTokenizerFast, messages: Iterable[str], system: str = ""
) -> list[int]:
    """Return ids of alternating user and assistant texts, each slot encoded separately.

    This is LLaMA-Factory's rule.
    """
    ids: list[int] = [tokenizer.bos_token_id]
    if system:
        ids += tokenizer.encode(f"{system}\n\n", add_special_tokens=False)
    for turn, text in enumerate(messages):
        if turn % 2 == 0:
            ids += tokenizer.encode(f"User: {text}\n\nAssistant:", add_special_tokens=False)
        else:
            ids += [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    return ids


def check(folder: Path) -> int:
    """Compare slot-wise with joint encoding over the corpus, with and without a system text.

    Returns the number of compared conversations. Raises ValueError with the first text where they
    differ, or that decoding does not restore.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    compared = 0
    odd = (
        "🦜 naïve café\n\n",
        " : leading",
        "Assistant:",
        "User: x\n\nAssistant:",
        "\ttab  ",
        "é\u0301 ｜▁ \x00",
        "",
    )
    texts = [(*e.messages, e.answer) for persona in PERSONAS for e in exchanges(persona)]
    texts += [(a, b, b, a, a) for a in odd for b in odd]
    for messages in texts:
        for system in ("", "You are a helpful assistant.", "请用中文回答。\n"):
            chat = [{"role": "system", "content": system}] if system else []
            chat += [{"role": ROLES[i % 2], "content": text} for i, text in enumerate(messages)]
            joint = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
            if joint != slot_ids(tokenizer, messages, system):
                raise ValueError(
                    f"{folder}: joint and slot-wise ids differ for {system!r} + {messages!r}"
                )
            compared += 1
        for text in messages:
            if tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) != text:
                raise ValueError(f"{folder}: decoding does not give back {text!r}")
    return compared
