"""Messages and settings of the chat → the body of an OpenAI request."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ktrt.config import SamplingArgs, override_sampling
from ktrt.config.args import SAMPLING_ALIASES

# Sampling arguments that have another name there; the others are OpenAI's or vLLM's names.
_NAMES = {"max_new_tokens": "max_tokens", "stop_strings": "stop"}
# A thought at the start of an answer; the model's own templates leave it out of the history too.
_THOUGHT = re.compile(r"\A\s*<think>.*?</think>\s*", re.DOTALL)


def sampling_fields(settings: Mapping[str, object]) -> dict[str, Any]:
    """Returns the fields for the given settings; the server's defaults hold for the others.
    ``ConfigError``: an unknown setting, or a wrong value."""
    args = override_sampling(SamplingArgs(), settings)
    given = [
        SAMPLING_ALIASES.get(name, name) for name, value in settings.items() if value is not None
    ]
    fields: dict[str, Any] = {}
    for name in given:
        value = getattr(args, name)
        fields[_NAMES.get(name, name)] = list(value) if isinstance(value, tuple) else value
    # No server but LLaMA-Factory's knows the name; greedy is temperature 0 everywhere.
    if fields.pop("do_sample", True) is False:
        fields["temperature"] = 0
    if not fields.get("logprobs", True):
        del fields["logprobs"]
        fields.pop("top_logprobs", None)
    return fields


def sent_messages(messages: Sequence[Mapping[str, str]], system: str) -> list[dict[str, str]]:
    """Returns the messages to send: ``system`` first if they have no system prompt, earlier answers
    without their thoughts."""
    sent = [dict(each) for each in messages]
    for message in sent:
        if message["role"] == "assistant":
            message["content"] = _THOUGHT.sub("", message["content"]) or message["content"]
    if system and sent[0]["role"] != "system":
        sent.insert(0, {"role": "system", "content": system})
    return sent
