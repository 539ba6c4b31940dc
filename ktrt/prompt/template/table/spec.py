"""The form of a named chat template."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Thought:
    """The marks around a reasoning template's thoughts. Thoughts are dropped from earlier replies;
    with ``enable_thinking: false`` the prompt ends with ``empty`` (default: both marks).
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

    Marks in a slot: ``{c}`` is the content; ``{bos}`` and ``{eos}`` are the tokenizer's ids;
    ``{bos?}`` is the same, or nothing if the tokenizer has none; ``{token X}`` is the id of the
    token X; ``{|}`` is nothing. The texts between marks other than ``{c}`` are encoded one by one,
    without added special tokens.

    ``stop_words`` are tokens that end the reply, like eos. The tokenizer must know them, except
    ``optional_stop_words``, which some of the template's models lack. Encoding treats all of them
    as special tokens, even if the tokenizer does not. ``replaces_eos``: eos is the first stop
    word. ``tokens`` are further texts that the tokenizer must know as one token each; the text X
    of a ``{token X}`` may still encode to something else.
    ``system_in_user`` puts the system slot before the first user text. ``models`` tells people
    which models the template is for.
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
