"""The form of a named chat template."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Thought:
    """How a reasoning template marks thoughts: they are dropped from earlier replies, and with
    ``enable_thinking: false`` the prompt ends with ``empty`` (if not given: both marks).
    """

    begin: str = "<think>\n"
    end: str = "\n</think>\n\n"
    empty: str = ""

    def __post_init__(self) -> None:
        if not self.empty:
            object.__setattr__(self, "empty", self.begin + self.end)


@dataclass(frozen=True)
class TemplateSpec:
    """The slots of a template. The prompt is prefix, system (unless empty), then the turns.

    Marks in a slot: ``{c}`` is the content; ``{bos}`` and ``{eos}`` are the tokenizer's ids,
    ``{bos?}`` the same or nothing where the tokenizer has none; ``{token X}`` is the id of the
    token X; ``{|}`` is nothing. The texts between marks other than ``{c}`` are encoded one by one,
    without special tokens added.

    ``stop_words`` are tokens that end the reply, as eos does. The tokenizer must know them, but for
    ``optional_stop_words``: a part of the template's models lacks these. Encoding takes all of them
    as special tokens, even where the tokenizer does not. ``replaces_eos``: eos is the first stop
    word. ``tokens`` are further texts that the tokenizer must know as one token each; of those, X
    in ``{token X}`` may be encoded otherwise as a text.
    ``system_in_user`` puts the system slot before the first user text. ``models`` says for people
    what the template is for.
    """

    user: str
    assistant: str = "{c}{eos}"
    system: str = "{c}"
    prefix: str = ""
    default_system: str = ""
    stop_words: tuple[str, ...] = ()
    optional_stop_words: tuple[str, ...] = ()
    replaces_eos: bool = False
    tokens: tuple[str, ...] = ()
    system_in_user: bool = False
    thought: Thought | None = None
    models: str = field(default="", compare=False)
