"""One choice of a completion: its text, and its tokens with their log probabilities."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ktrt.generate.text_stream import TextStream
from ktrt.serve.openai.token_text import ShownTokens, completion_token, finite

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ktrt.generate.response import TokenResponse
    from ktrt.serve.openai.prompts import Prompt
    from ktrt.serve.server import Server

# The token's log probability, and (id, log probability) of the likeliest.
Score = tuple[float, Iterable[tuple[int, float]]]

_FIELDS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


class TextMaker:
    """Makes the texts of a request. ``echo``: they begin with the prompt; ``scored``: with log
    probabilities."""

    def __init__(self, server: Server, *, echo: bool, scored: bool) -> None:
        session = server.session
        self.tokenizer = session.tokenizer
        self.shown = session.template.shown_tokens
        self.echo, self.scored = echo, scored
        self.texts = server.token_texts

    def text(self, prompt: Prompt) -> Text:
        """Returns the text of a choice, empty so far."""
        return Text(self, prompt)

    def stream(self) -> TextStream:
        """Returns a decoder of token ids, as the engine decodes an answer's."""
        return TextStream(self.tokenizer, skip_special_tokens=True, shown=self.shown)


class Text:
    """A choice as it grows."""

    def __init__(self, maker: TextMaker, prompt: Prompt) -> None:
        self._maker, self.prompt = maker, prompt
        self._stream, self._offset = maker.stream(), 0
        self._pieces: list[str] = []
        self._scores: dict[str, list[Any]] = {name: [] for name in _FIELDS}
        self._shown = ShownTokens[tuple[int, Score]]()
        self._begun = False
        self._passed_on = (0, 0)
        self.generated = self.reused = 0
        self.finish_reason: str | None = None

    def push(self, token: TokenResponse, prompt_scores: Sequence[Score | None] | None) -> None:
        """Appends a token; ``prompt_scores`` are the prompt's, for an echo."""
        self._begin(prompt_scores)
        self.generated, self.reused = token.generated_tokens, token.reused_tokens
        self.finish_reason = token.finish_reason
        self._pieces.append(token.text)
        if self._maker.scored and token.logprob is not None:
            length = len(self._maker.texts.of(token.token)[0])
            score = token.logprob, token.top_logprobs
            for each in self._shown.push(token, (token.token, score), length):
                self._add(*each)

    def end(self, prompt_scores: Sequence[Score | None] | None) -> None:
        """Ends a text that nothing follows."""
        self._begin(prompt_scores)
        self.finish_reason = "length"

    def _begin(self, scores: Sequence[Score | None] | None) -> None:
        if self._begun or not self._maker.echo:
            return
        self._begun = True
        text = self.prompt.text
        if text is None:
            stream = self._maker.stream()
            text = "".join(map(stream.push, self.prompt.ids))
        self._pieces.append(text)
        if self._maker.scored:
            for token, score in zip(self.prompt.ids, scores or (), strict=True):
                self._add(token, score)
            # A prompt's last token may be half a character, which never becomes part of the text.
            self._offset, self._stream = len(text), self._maker.stream()

    def _add(self, token: int, score: Score | None) -> None:
        """Appends a token's log probabilities. The chosen token is always among the top ones; of
        two tokens with one text the likelier is."""
        texts, found = self._maker.texts, self._scores
        name = completion_token(texts, token)
        found["tokens"].append(name)
        found["text_offset"].append(self._offset)
        self._offset += len(self._stream.push(token))
        if score is None:
            found["token_logprobs"].append(None)
            found["top_logprobs"].append(None)
            return
        value, likeliest = score
        top: dict[str, float] = {}
        for other, each in (*likeliest, (token, value)):
            top.setdefault(completion_token(texts, other), finite(each))
        found["token_logprobs"].append(finite(value))
        found["top_logprobs"].append(top)

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._pieces)

    def logprobs(self) -> dict[str, list[Any]] | None:
        """Returns OpenAI's ``logprobs``; None: none were asked for."""
        return self._scores if self._maker.scored else None

    def news(self) -> dict[str, Any]:
        """Returns text and log probabilities since the last call."""
        pieces, scores = self._passed_on
        self._passed_on = len(self._pieces), len(self._scores["tokens"])
        new = {name: each[scores:] for name, each in self._scores.items()}
        return {
            "text": "".join(self._pieces[pieces:]),
            "logprobs": new if new["tokens"] else None,
        }
