"""A server whose model says what a test wrote: for replies that the demo model never gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

from ktrt.generate.response import TokenResponse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from ktrt.prompt.reply import ReplyFormat
    from ktrt.serve.generation import Asked

# Characters of a piece, so that marks come in parts.
_PIECE = 3


@dataclass
class ScriptedServer:
    """A ``Server`` of ``texts``, one for each choice. ``error`` follows the last token; ``reason``
    ends the answers. ``asked`` collects the requests, ``left`` counts the generations that were
    left."""

    inner: Any
    texts: Sequence[str]
    reply: ReplyFormat | None
    reply_start: str = ""
    reason: str = "stop"
    error: Exception | None = None
    asked: list[Asked] = field(default_factory=list)
    left: int = 0

    def __post_init__(self) -> None:
        self.names, self.settings = self.inner.names, self.inner.settings
        self.admission, self.grammars = self.inner.admission, self.inner.grammars
        self.token_texts, self.threads = self.inner.token_texts, self.inner.threads
        self.grammar_threads = self.inner.grammar_threads
        session = self.inner.session
        self.template = SimpleNamespace(
            name="scripted", reply=self.reply, reply_start=self.reply_start, thinking=True,
            stop_ids=session.template.stop_ids, shown_tokens={},
        )  # fmt: skip
        self.template.with_thinking = lambda _thinking: self.template
        self.session = SimpleNamespace(
            end_ids=frozenset(),
            template=self.template, tokenizer=session.tokenizer, sampling=session.sampling,
            model=session.model, context_limit=session.context_limit,
        )  # fmt: skip

    def generate(self, asked: Asked) -> ScriptedGeneration:
        """As ``Server.generate``."""
        self.asked.append(asked)
        return ScriptedGeneration(self, asked)


class ScriptedGeneration:
    """As ``ktrt.serve.generation.Generation``."""

    prompt_logprobs = None

    def __init__(self, server: ScriptedServer, asked: Asked) -> None:
        self._server, self._asked = server, asked

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.left += 1

    async def __aiter__(self) -> AsyncIterator[tuple[int, TokenResponse]]:
        for choice in range(self._asked.n):
            text = self._server.texts[choice % len(self._server.texts)]
            pieces = [text[at : at + _PIECE] for at in range(0, len(text), _PIECE)] or [""]
            for count, piece in enumerate(pieces, 1):
                last = count == len(pieces)
                error = self._server.error
                if last and error is not None:
                    raise error
                yield choice, token(piece, count, self._server.reason if last else None)


def token(text: str, count: int, reason: Any) -> TokenResponse:
    """Returns a token with this text."""
    return TokenResponse(
        text=text, token=5, finish_reason=reason, prompt_tokens=10, reused_tokens=4,
        generated_tokens=count, prefill_seconds=0.1, decode_seconds=0.1,
        logprob=-1.0, top_logprobs=((5, -1.0),),
    )  # fmt: skip
