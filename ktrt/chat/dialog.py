"""A conversation with a session on a terminal: asks, shows and saves."""

import json
import logging
import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktrt.chat import status
from ktrt.chat.conversation import (
    Conversation,
    ConversationFile,
    exists,
    new_autosave,
    read_conversation,
    read_text,
)
from ktrt.chat.terminal import Terminal
from ktrt.config import SamplingArgs, override_sampling
from ktrt.errors import ConfigError, KtrtError
from ktrt.utils.signals import Terminated, shielded

if TYPE_CHECKING:
    from ktrt.chat.partner import Partner, PartnerAdapters, Piece
    from ktrt.chat.remote.session import RemoteSession

_log = logging.getLogger(__name__)

# Limit of a file for a message: more than any context holds.
MAX_FILE_BYTES = 4 << 20


@dataclass
class Answer:
    """``last`` is the last token; None if there was none. ``logprobs``: one row per token, if the
    settings ask for them."""

    text: str = ""
    last: "Piece | None" = None
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether the answer ended by itself."""
        return self.last is not None and self.last.finish_reason is not None


@dataclass
class Keeping:
    """The files that a conversation is saved in after every turn, and its model and adapter."""

    model: str = ""
    adapter: str = ""
    autosave: ConversationFile | None = None
    save: ConversationFile | None = None


class Talk:
    """A session, the conversation with it, and the files attached to the next message."""

    def __init__(
        self,
        session: "Partner",
        terminal: Terminal,
        conversation: Conversation,
        *,
        server: "RemoteSession | None" = None,
        keeping: Keeping | None = None,
        stream: bool = True,
        as_json: bool = False,
        limit: Callable[[], float | None] = lambda: None,
    ) -> None:
        """``server``: the session, if it is remote. ``limit`` returns the limit in tokens per
        second that the memory's bandwidth sets; it is called after an answer. ``ConfigError``: the
        conversation's settings do not suit the session."""
        self.session = session
        self.server = server
        self.terminal = terminal
        self.keeping = keeping or Keeping()
        self.stream = stream
        self.as_json = as_json
        self.totals = status.Totals()
        self.last: Piece | None = None
        self.attachments: dict[str, str] = {}
        self._limit = limit
        self._left_out = 0
        self._reported: set[str] = set()
        self.use(conversation)

    @property
    def sampling(self) -> SamplingArgs:
        """The configured sampling, with the conversation's settings."""
        return override_sampling(self.session.sampling, self.conversation.settings)

    def use(self, conversation: Conversation) -> None:
        """Continues another conversation. ``ConfigError``: its settings do not suit the session."""
        override_sampling(self.session.sampling, conversation.settings)
        self._use_thinking(conversation)
        conversation.model, conversation.adapter = self.keeping.model, self.keeping.adapter
        self.conversation = conversation
        self._left_out = 0

    def keep_with(self, model: str) -> None:
        """Notes another model as the conversation's partner."""
        self.keeping.model = self.conversation.model = model
        self.save()

    def _use_thinking(self, conversation: Conversation) -> None:
        try:
            self.session.set_thinking(conversation.thinking)
        except ConfigError:
            conversation.thinking = None
            self.session.set_thinking(None)
            self.terminal.note("This model's template has no switch for thinking.")

    @property
    def adapters(self) -> "PartnerAdapters":
        """The adapters to choose from. ``KtrtError``: there are none."""
        if not self.session.adapters.names:
            if self.server is not None:
                raise KtrtError(f"the server lists no adapter of {self.server.name}")
            raise KtrtError("no adapter is loaded; name one in the configuration")
        return self.session.adapters

    def attach(self, path: str) -> int:
        """Adds a file's text to the next message; returns its characters. ``KtrtError``."""
        text = read_text(Path(path), MAX_FILE_BYTES)
        self.attachments[path] = text
        return len(text)

    def ask(self, text: str) -> None:
        """Sends ``text`` with the files attached, shows the answer and keeps both.

        After Ctrl-C or SIGTERM the partial answer is kept. A message whose answer is empty or
        failed waits in ``unanswered``; earlier turns do not change.
        """
        text = with_files(text, self.attachments)
        self.attachments.clear()
        self.resend(text)

    def resend(self, text: str) -> None:
        """Like ``ask``, without files."""
        self.conversation.unanswered = text
        self.save()
        answer = Answer()
        try:
            self.generate(self.fitted(text), self._show, answer)
        except (KeyboardInterrupt, Terminated):
            self._keep(text, answer)
            raise
        self._keep(text, answer)
        self._report(answer)
        if not answer.text.strip():
            self._note_nothing_kept(answer, "")

    def _keep(self, text: str, answer: Answer) -> None:
        if answer.text.strip():
            self.conversation.unanswered = None
            self.conversation.add(text, answer.text)
            if answer.complete:
                self.conversation.undone.clear()
        self.save()

    def retry(self) -> None:
        """Answers the last message again.

        The old answer stays, also on disk, until the new one is complete; Ctrl-C, a failure or a
        kill does not lose it. ``KtrtError``: there is no message yet.
        """
        conversation = self.conversation
        if conversation.unanswered is not None:
            self.resend(conversation.unanswered)
            return
        if not conversation.turns:
            raise KtrtError("/retry: nothing was asked yet")
        text = conversation.turns[-2]["content"]
        answer = self.generate(self.fitted(text, again=True), self._show)
        complete = bool(answer.text.strip()) and answer.complete
        if complete:
            conversation.turns[-1] = conversation.turns[-1] | {"content": answer.text}
            conversation.undone.clear()
            self.save()
        self._report(answer)
        if not complete:
            self._note_nothing_kept(answer, "; the answer before stays")

    def _show(self, pieces: Iterable[str]) -> None:
        if self.stream and not self.as_json:
            self.terminal.answer(pieces)
            return
        text = self.terminal.collect(pieces, "answering")
        if not self.as_json:
            self.terminal.answer([text])

    def _report(self, answer: Answer) -> None:
        last = answer.last
        if self.as_json:
            self.record(answer)
        elif self.terminal.interactive and last is not None:
            self.terminal.status(status.status_line(last, self.limit()))
        if last is not None:
            _log.debug("%s", last.summary())

    def _note_nothing_kept(self, answer: Answer, more: str) -> None:
        if not self.terminal.interactive:
            return
        what = "Stopped" if answer.text.strip() else "Stopped before a word"
        if answer.complete:
            what = "The answer is empty"
        self.terminal.note(f"{what}: nothing was kept{more}. /retry asks again.")

    def record(self, answer: Answer, **more: Any) -> None:
        """Prints an answer as one line of JSON."""
        record: dict[str, Any] = {"text": answer.text} | more
        if answer.last is not None:
            record |= status.as_dict(answer.last, self.limit())
        record["dropped_turns"] = self._left_out
        if answer.logprobs:
            record["logprobs"] = answer.logprobs
        self.terminal.record(json.dumps(record, ensure_ascii=False))

    def limit(self) -> float | None:
        """Returns the tokens per second that the memory's bandwidth allows; None if unknown."""
        return self._limit()

    def generate(
        self,
        messages: Sequence[Mapping[str, str]],
        show: Callable[[Iterable[str]], object],
        answer: Answer | None = None,
        **settings: Any,
    ) -> Answer:
        """Answers ``messages``; ``show`` consumes the pieces. ``answer`` is filled as they come, so
        that it holds the partial answer after an interruption. ``settings`` win over the
        conversation's."""
        answer = answer or Answer()
        with closing(self._pieces(messages, answer, settings)) as pieces:
            show(pieces)
        if answer.last is not None:
            self.last = answer.last
            self.totals.add(answer.last)
        return answer

    def _pieces(
        self, messages: Sequence[Mapping[str, str]], answer: Answer, settings: Mapping[str, Any]
    ) -> Generator[str]:
        responses = self.session.stream_responses(
            messages,
            on_prefill=self.terminal.show_prefill,
            **(self.conversation.settings | dict(settings)),
        )
        for response in responses:
            answer.last = response
            answer.text += response.text
            if response.logprob is not None:
                answer.logprobs.append(self._logprob_row(response))
            yield response.text

    def _logprob_row(self, response: "Piece") -> dict[str, Any]:
        top = [
            self._token(token) | {"logprob": value} for token, value in response.top_logprobs or ()
        ]
        row = self._token(response.token) | {"logprob": response.logprob}
        return row | ({"top": top} if top else {})

    def _token(self, token: int | str) -> dict[str, Any]:
        if isinstance(token, str):
            return {"token": token}
        return {"id": token, "token": self.session.tokenizer.decode([token])}

    def fitted(self, text: str, *, again: bool = False) -> Sequence[Mapping[str, str]]:
        """Returns the conversation and ``text``, cut to the model's context; notes when turns are
        left out for the first time. ``again``: ``text`` replaces the last turn."""
        conversation = self.conversation
        if again:
            conversation = replace(conversation, turns=conversation.turns[:-2])
        self._left_out = min(self._left_out, len(conversation.turns) // 2)
        messages = conversation.messages(text, self._left_out)
        fitted, dropped = self.session.fit(messages, max_new_tokens=self.sampling.max_new_tokens)
        if dropped:
            # Makes room for several turns: without the oldest turn all others are computed again.
            fitted, dropped = self.session.fit(
                messages, max_new_tokens=self.session.context_limit // 2
            )
            self._left_out += dropped
            self.terminal.note(
                f"The conversation is too long for the model's context: its {self._left_out} "
                "oldest turns are kept but not sent any more."
            )
        return fitted

    def save(self) -> None:
        """Saves the conversation in its files. A failure is reported once to a person, and raised
        otherwise."""
        with shielded():
            for file in (self.keeping.autosave, self.keeping.save):
                if file is not None:
                    self._save_in(file)

    def _save_in(self, file: ConversationFile) -> None:
        try:
            if self.conversation.empty:
                file.remove()
            else:
                file.save(self.conversation)
        except KtrtError as error:
            if not self.terminal.interactive:
                raise
            if str(error) not in self._reported:
                self._reported.add(str(error))
                self.terminal.error(str(error))

    def save_as(self, path: Path) -> None:
        """Saves the conversation in ``path`` as well. ``KtrtError``: it holds something else."""
        kept = self.keeping.save
        if kept is not None and _same(kept.path, path):
            kept.save(self.conversation)
            return
        if exists(path):
            read_conversation(path)  # raises for other files
        ConversationFile(path).save(self.conversation)

    def load(self, path: Path) -> None:
        """Continues the conversation saved in ``path``. The old one stays in its files: ``--save``
        stops, with a note, unless it names this file. ``KtrtError``."""
        self.use(read_conversation(path))
        kept = self.keeping.save
        if kept is not None and _same(kept.path, path):
            self.keeping.save = ConversationFile(kept.path)
        elif kept is not None and exists(kept.path):
            self.keeping.save = None
            self.terminal.note(
                f"{kept.path} keeps the conversation before and is not written any more; "
                "/save FILE saves this one."
            )
        if self.keeping.autosave is not None:
            self.start_autosave()
        self.save()

    def start_autosave(self) -> None:
        """Saves in a new file from now on; the old file keeps the earlier conversation."""
        try:
            self.keeping.autosave = new_autosave()
        except KtrtError as error:
            self.keeping.autosave = None
            self.terminal.error(f"{error}; --resume will not find this conversation")


def _same(path: Path, other: Path) -> bool:
    return os.path.realpath(path) == os.path.realpath(other)


def with_files(text: str, files: Mapping[str, str]) -> str:
    """Returns the contents of ``files``, each by name between fences, followed by ``text``."""
    parts = []
    for name, content in files.items():
        fence = "```"
        while fence in content:
            fence += "`"
        parts.append(f"{Path(name).name}:\n{fence}\n{content.rstrip()}\n{fence}\n")
    return "\n".join([*parts, text])
