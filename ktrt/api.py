"""``ktrt.load``: from a configuration to a session that answers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ktrt.config import Config, load_config
from ktrt.folders import check_model_folder
from ktrt.loading.model import load_model
from ktrt.prompt.template.load import load_template
from ktrt.prompt.tokenizer.words import load_words, read_words
from ktrt.session import Session


def load(source: str | Path | Mapping[str, object], **overrides: object) -> Session:
    """Loads the model, the adapter and the tokenizer that a configuration names.

    ``source``: the path of a YAML file, or a mapping of the same keys; ``overrides`` win over it.
    ``ConfigError``, ``CheckpointError`` and ``AdapterError`` say what does not fit.
    """
    return open_session(load_config(source, overrides))


def open_session(config: Config) -> Session:
    """Like ``load``, from a checked configuration."""
    check_model_folder(
        config.model.model_name_or_path,
        experts_elsewhere=config.experts.kt_weight_path is not None,
    )
    # Before the model: a tokenizer or template that does not fit is known after a second.
    words = load_words(
        config.model, config.adapter.folders,
        own_template=config.template.template in (None, "", "auto"),
    )  # fmt: skip
    tokenizer = words.tokenizer
    template = load_template(config.template, tokenizer)
    loaded = load_model(
        config.model, config.adapter, config.experts, check_vocabulary=words.check_rows
    )
    loaded.adapters.take_words = _WordsOfLoaded(tokenizer)
    session = Session(
        loaded, tokenizer, template, config.sampling, cutoff_len=config.model.cutoff_len
    )
    try:
        session.warm_up()
    except BaseException:
        session.close()
        raise
    return session


class _WordsOfLoaded:
    """Puts the words of adapters that are loaded later into the session's tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, name: str, folder: Path, rows: int) -> Callable[[], None]:
        """Checks them against ``rows`` of embeddings; calling the result adds them."""
        words = read_words(name, folder, self._tokenizer)
        if words is None or not words.tokens:
            return lambda: None
        words.check_rows(rows)
        return lambda: words.add(self._tokenizer)
