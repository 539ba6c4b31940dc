"""``python fake_chat.py [chat arguments]``: runs ktrt.chat on an echoing session, without torch.

Special messages: ``slow`` streams for ever, ``prefill`` reads its prompt for ever, ``stuck`` never
returns, ``fail`` fails in the middle of an answer, ``bug`` fails like a defect, ``silence`` answers
nothing, ``history`` prints the messages, ``settings`` prints the sampling arguments. With
``seed=13`` loading fails; with ``seed=14`` it lasts until the model's folder holds a file
``loaded``.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

from ktrt.chat.__main__ import main
from ktrt.config import Config, SamplingArgs, override_sampling
from ktrt.errors import AdapterError, ConfigError, KtrtError


@dataclass(frozen=True)
class FakeResponse:
    """Stand-in for ktrt.session.Response."""

    text: str
    token: int
    finish_reason: str | None
    generated_tokens: int
    prompt_tokens: int = 100
    reused_tokens: int = 60
    prefill_seconds: float = 0.5
    decode_seconds: float = 0.1
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()

    def summary(self) -> str:
        return "some tokens"


class FakeAdapters:
    """Stand-in for ktrt.adapter.residents.Adapters, without weights."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.active: dict[str, float] = dict.fromkeys(names[:1], 1.0)
        self._before = dict(self.active)

    def activate(self, wanted: str | Mapping[str, float]) -> None:
        weights = {wanted: 1.0} if isinstance(wanted, str) else dict(wanted)
        for name in weights:
            if name not in self.names:
                raise AdapterError(f"no adapter {name!r}; resident: {', '.join(self.names)}")
        self.active = self._before = weights

    def off(self) -> None:
        self._before, self.active = self.active or self._before, {}

    def on(self) -> None:
        self.active = dict(self._before)

    def scale(self, factor: float) -> None:
        self.active = dict.fromkeys(self.active, factor)


class EchoSession:
    """Stand-in for ktrt.session.Session."""

    def __init__(self, *adapters: str, context_limit: int = 10_000) -> None:
        self.closed = 0
        self.context_limit = context_limit
        self.sampling = SamplingArgs()
        self.template = SimpleNamespace(name="fake", thinking=None)
        self._configured: bool | None = None
        self.adapters = FakeAdapters(*adapters)
        self.tokenizer = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))
        self.bytes_per_token = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed += 1

    def set_thinking(self, thinking: bool | None) -> None:
        if self.template.thinking is None and thinking is not None:
            raise ConfigError("template 'fake' cannot switch thinking on or off")
        if self._configured is None:
            self._configured = self.template.thinking
        self.template.thinking = self._configured if thinking is None else thinking

    def count_tokens(self, messages: Sequence[Mapping[str, str]]) -> int:
        """Counts one token per character."""
        return sum(len(message["content"]) for message in messages)

    def fit(
        self, messages: Sequence[Mapping[str, str]], max_new_tokens: int | None = None
    ) -> tuple[list[Mapping[str, str]], int]:
        kept = list(messages)
        first = int(kept[0]["role"] == "system")
        room = self.context_limit - min(max_new_tokens or 0, self.context_limit // 2)
        dropped = 0
        while self.count_tokens(kept) > room and len(kept) - first > 1:
            del kept[first : first + 2]
            dropped += 1
        return kept, dropped

    def stream_responses(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        on_prefill: Callable[[int, int], None] | None = None,
        **sampling: Any,
    ) -> Iterator[FakeResponse]:
        """Streams the last message twice."""
        args = override_sampling(self.sampling, sampling)
        pieces = self._pieces(messages, on_prefill or (lambda _done, _total: None), args)
        logprob = -0.5 if args.logprobs else None
        top = ((65, -0.5), (66, -1.5)) if args.top_logprobs else ()
        count = 0
        for count, text in enumerate(pieces, start=1):
            yield FakeResponse(text, 65, None, count, logprob=logprob, top_logprobs=top)
        yield FakeResponse("", 66, "stop", count + 1, logprob=logprob)

    def _pieces(
        self,
        messages: Sequence[Mapping[str, str]],
        on_prefill: Callable[[int, int], None],
        args: SamplingArgs,
    ) -> Iterator[str]:
        on_prefill(0, 40)
        on_prefill(40, 40)
        text = messages[-1]["content"]
        if text == "history":
            yield " | ".join(f"{turn['role']}: {turn['content']}" for turn in messages[:-1])
        elif text == "settings":
            who = ", ".join(f"{name} {weight}" for name, weight in self.adapters.active.items())
            yield f"temperature {args.temperature} seed {args.seed} from {who or 'the base'}"
        elif text == "fail":
            yield "half an "
            raise KtrtError("the engine is out of order")
        elif text == "bug":
            raise ZeroDivisionError("by zero")
        elif text in ("slow", "prefill", "stuck"):
            yield from _without_end(text, on_prefill)
        elif text != "silence":
            yield from (text, " ", text)


def _without_end(text: str, on_prefill: Callable[[int, int], None]) -> Iterator[str]:
    for number in range(10_000):
        time.sleep(0.02)
        if text == "prefill":
            on_prefill(number, 10_000)
        elif text == "slow":
            yield f"{number} "
        elif number == 0:
            yield "waiting"


def open_session(config: Config) -> Any:
    """Stand-in for ktrt.api.open_session."""
    if config.sampling.seed == 13:
        raise KtrtError("no such luck")
    if config.sampling.seed == 14:
        print("Loading", flush=True)
        while not (Path(config.model.model_name_or_path) / "loaded").exists():
            time.sleep(0.02)
    return EchoSession("persona", "pirate")


if __name__ == "__main__":
    sys.exit(main(open_session=open_session))
