"""One choice of an answer: tokens go in, events of thought, content and tool calls come out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ktrt.prompt.reply import Content, Reasoning, ToolArguments, ToolCallStart, joined
from ktrt.serve.openai.token_text import ShownTokens, chat_entry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ktrt.generate.response import TokenResponse
    from ktrt.prompt.reply import Event, ReplyParser
    from ktrt.serve.openai.token_text import TokenTexts


class Reply:
    """A choice as it grows.

    ``most_calls``: later tool calls are left out (OpenAI's parallel_tool_calls false). ``scored``:
    texts for the tokens' log probabilities; None: none are asked for. Tokens of ``stop_ids`` are
    not listed.
    """

    def __init__(
        self,
        parser: ReplyParser,
        *,
        most_calls: int | None = None,
        scored: TokenTexts | None = None,
        stop_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._parser, self._most_calls = parser, most_calls
        self._scored, self._stop_ids = scored, stop_ids
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.logprobs: list[dict[str, Any]] = []
        self._shown = ShownTokens[dict[str, Any]]()
        self._passed_on = 0
        self._unknown = 0
        self.reasoning_tokens = 0
        self.last: TokenResponse | None = None
        self._cut = False

    def push(self, token: TokenResponse) -> list[Event]:
        """Appends a token; returns the events that it completes, neighbours of a kind joined."""
        self.last = token
        self._score(token)
        found = self._parser.push(token.text) if token.text else []
        if token.finish_reason is not None:
            found = [*found, *self._parser.finish()]
        events = []
        for each in joined(found):
            if self._is_wanted(each):
                events.append(each)
            else:
                self._cut = True
        self._count(events)
        for each in events:
            self._add(each)
        return events

    def _is_wanted(self, event: Event) -> bool:
        if self._most_calls is None or not isinstance(event, ToolCallStart | ToolArguments):
            return True
        return event.index < self._most_calls

    def _score(self, token: TokenResponse) -> None:
        if self._scored is None or token.logprob is None:
            return
        if token.finish_reason == "stop" and token.token in self._stop_ids:
            self.logprobs += self._shown.rest()
            return
        entry = chat_entry(self._scored, token.token, token.logprob, token.top_logprobs)
        length = len(self._scored.of(token.token)[0])
        self.logprobs += self._shown.push(token, entry, length)

    def _count(self, events: Sequence[Event]) -> None:
        """Counts the tokens of thoughts: a token without an event belongs to the next event."""
        self._unknown += 1
        if events:
            if isinstance(events[0], Reasoning):
                self.reasoning_tokens += self._unknown
            self._unknown = 0

    def _add(self, event: Event) -> None:
        if isinstance(event, Reasoning):
            self._reasoning.append(event.text)
        elif isinstance(event, Content):
            self._content.append(event.text)
        elif isinstance(event, ToolCallStart):
            function = {"name": event.name, "arguments": ""}
            self.calls.append({"id": event.id, "type": "function", "function": function})
        else:
            self.calls[event.index]["function"]["arguments"] += event.text

    def new_logprobs(self) -> list[dict[str, Any]]:
        """Returns the entries of ``logprobs`` since the last call."""
        found = self.logprobs[self._passed_on :]
        self._passed_on = len(self.logprobs)
        return found

    @property
    def reasoning(self) -> str:
        """The thought."""
        return "".join(self._reasoning)

    @property
    def content(self) -> str:
        """The text after the thought, without tool calls."""
        return "".join(self._content)

    @property
    def finish_reason(self) -> str | None:
        """OpenAI's reason, None until the end."""
        if self._cut:
            return "tool_calls"
        reason = self.last.finish_reason if self.last is not None else None
        return "tool_calls" if reason == "stop" and self.calls else reason

    @property
    def ended(self) -> bool:
        """Whether nothing more is wanted."""
        return self.finish_reason is not None


def usage(replies: Sequence[Reply]) -> dict[str, Any]:
    """Returns the usage of a request's choices so far, in OpenAI's form. The first choice tells how
    much of the prompt was held: the others start from it."""
    last = [each.last for each in replies if each.last is not None]
    prompt = last[0].prompt_tokens if last else 0
    generated = sum(each.generated_tokens for each in last)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": last[0].reused_tokens if last else 0},
        "completion_tokens_details": {
            "reasoning_tokens": sum(each.reasoning_tokens for each in replies)
        },
    }
