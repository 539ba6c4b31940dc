"""LLaMA-Factory's prompts of conversations, for every one of its templates.

`llamafactory_prompts.json` holds them. `python tests/python/helpers/llamafactory_prompts.py` writes
it again if llamafactory is installed (`pip install --no-deps llamafactory==0.9.5`, in an
environment with torch and transformers; empty modules replace its imports for sound and data sets).
`… --real` does the same with tokenizers of real models, see real_tokenizers.py.
"""

import hashlib
import importlib
import importlib.machinery
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from helpers import real_tokenizers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EXPECTED = Path(__file__).with_suffix(".json")
EXPECTED_REAL = EXPECTED.with_name("llamafactory_prompts_real.json")

Turns = list[dict[str, str]]


def conversations(begin: str, end: str) -> list[Turns]:
    """Returns conversations; ``begin`` and ``end`` mark a thought. The first one is also kept as
    text."""

    def turns(*texts: str, system: str | None = None) -> Turns:
        head = [] if system is None else [{"role": "system", "content": system}]
        roles = ("user", "assistant")
        return head + [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)]

    thought = f"{begin}Hm, 嗯…{end}"
    return [
        turns("你好\n", f"{thought}Hello :)", "再见", system="Be brief."),
        turns("Hello"),
        turns("Hello", "我是 ktrt", "再见"),
        turns("Hello", system="Sei kurz.\n"),
        turns("你好", f"{thought}\n\nA {thought} B", "?", f"{thought}{thought}C", " again "),
        turns("\n\n leading", "\n\n both \n\n", "\ttrailing \n"),
        turns("<|im_end|> in </s> text <|end|>\n", "### <think> {c}", "{eos} {{content}} %s"),
        turns("Hello", system=""),
    ]


def cases(begin: str, end: str) -> Iterator[tuple[Turns, bool | None]]:
    """Yields conversations, and whether to think (None: not set)."""
    for turns in conversations(begin, end):
        for thinking in (None, True, False):
            yield turns, thinking


def digest(ids: list[int]) -> str:
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()[:8]


def byte_tokenizer(
    special: list[str], *, hidden: str = "", loose: bool = False, bos: str | None = "<s>"
) -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token per byte and a few pairs. The pairs join across the edges
    of a template's slots unless the slots are encoded one by one.

    ``loose``: special tokens swallow the white space after them, like Phi-3's, and ``hidden`` is an
    ordinary entry of the vocabulary.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = ["Ċ", "Ġ", ":", ">", "]", "n", "t", "H"]
    pairs = [(left, right) for left in ends for right in ends]
    vocabulary = [*letters, *(left + right for left, right in pairs), *([hidden] if hidden else [])]
    tokenizer = Tokenizer(
        models.BPE(vocab={name: at for at, name in enumerate(vocabulary)}, merges=pairs)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    added = ["<s>", "</s>", *(each for each in special if each != hidden)]
    tokenizer.add_special_tokens(
        [AddedToken(each, normalized=False, special=True, rstrip=loose) for each in added]
    )
    marks = {"eos_token": "</s>"} | ({} if bos is None else {"bos_token": bos})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks)


def tokenizers(special: list[str], stop_words: list[str]) -> dict[str, Callable[[], Any]]:
    hidden = stop_words[-1] if stop_words else ""
    return {
        "plain": lambda: byte_tokenizer(special),
        "loose": lambda: byte_tokenizer(special, hidden=hidden, loose=True),
        "no bos": lambda: byte_tokenizer(special, bos=None),
    }


# The rest runs only if llamafactory is installed.


def import_templates() -> Any:
    """Imports llamafactory's module of templates; empty modules replace missing ones."""
    os.environ["DISABLE_VERSION_CHECK"] = "1"
    while True:
        try:
            return importlib.import_module("llamafactory.data.template")
        except ModuleNotFoundError as error:
            name = str(error.name)
            if name.startswith("llamafactory"):
                raise
            sys.modules[name] = _Empty(name)
            for each in [each for each in sys.modules if each.startswith("llamafactory")]:
                del sys.modules[each]


class _Empty(ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def prompt(module: Any, name: str, tokenizer: Any, turns: Turns, thinking: bool | None) -> Any:
    """Returns the prompt's ids, and the template."""
    arguments = SimpleNamespace(
        template=name,
        train_on_prompt=False,
        tool_format=None,
        default_system=None,
        enable_thinking=thinking is not False,
        preserve_thinking=False,
    )
    template = module.get_template_and_fix_tokenizer(tokenizer, arguments)
    system = turns[0]["content"] if turns[0]["role"] == "system" else None
    messages = [*turns[system is not None :], {"role": "assistant", "content": ""}]
    return template.encode_oneturn(tokenizer, messages, system)[0], template


def describe(module: Any, name: str, makers: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    template = module.TEMPLATES[name]
    begin, end = template.thought_words
    reasoning = isinstance(template, module.ReasoningTemplate)
    row: dict[str, Any] = {"thought": [begin, end] if reasoning else None}
    row["stop words"] = template.stop_words
    for maker, make in makers.items():
        tokenizer = make()
        size = len(tokenizer)
        prompts = [prompt(module, name, tokenizer, *case)[0] for case in cases(begin, end)]
        stops = template.get_stop_token_ids(tokenizer)
        row.setdefault("stops", sorted(tokenizer.convert_ids_to_tokens(stops)))
        if len(tokenizer) != size:
            added = tokenizer.convert_ids_to_tokens(list(range(size, len(tokenizer))))
            row.setdefault("adds", {})[maker] = added
        row.setdefault("text", tokenizer.decode(prompts[0], skip_special_tokens=False))
        digests = [digest(each) for each in prompts]
        if not reasoning and digests[::3] == digests[1::3] == digests[2::3]:
            digests = digests[::3]
        row[maker] = " ".join(digests)
    if row["no bos"] == row["plain"]:
        del row["no bos"]
    return row


def special_tokens(module: Any) -> list[str]:
    """Returns the texts that look like special tokens in any template, and the stop words."""
    from ktrt.prompt.template.table import TEMPLATES

    found = {word for row in module.TEMPLATES.values() for word in row.stop_words}
    return sorted(found.union(*(spec.tokens for spec in TEMPLATES.values())))


def describe_real(module: Any, names: list[str], make: Callable[[], Any]) -> dict[str, str]:
    rows = {}
    for name in names:
        tokenizer = make()
        ids = [
            prompt(module, name, tokenizer, *case)[0]
            for case in cases(*module.TEMPLATES[name].thought_words)
        ]
        rows[name] = " ".join(map(digest, ids))
    return rows


def write(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    module = import_templates()
    if "--real" in sys.argv[1:]:
        found = {
            folder: describe_real(module, names.split(), partial(real_tokenizers.published, folder))
            for folder, names in real_tokenizers.PUBLISHED.items()
        }
        write(EXPECTED_REAL, found)
        return
    special = special_tokens(module)
    rows = {
        name: describe(module, name, tokenizers(special, template.stop_words))
        for name, template in sorted(module.TEMPLATES.items())
    }
    write(EXPECTED, {"special": special, "templates": rows})


if __name__ == "__main__":
    main()
