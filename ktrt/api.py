"""``ktrt.load``: loads what a configuration names and returns a session."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ktrt.config import Config, ExpertArgs, load_config
from ktrt.errors import ConfigError
from ktrt.folders import check_model_folder
from ktrt.generate.scheduler import SchedulerLimits
from ktrt.loading.model import load_model
from ktrt.prompt.template.load import load_template
from ktrt.prompt.tokenizer.words import load_words, read_words
from ktrt.session import Session


def load(
    source: str | PathLike[str] | Mapping[str, object],
    *,
    adapter: str | PathLike[str] | Sequence[str | PathLike[str]] | None = None,
    **overrides: object,
) -> Session:
    """Loads a model, its adapters and its tokenizer; returns a session that answers.

    ``source``: a YAML file, a model's folder, or a mapping of the YAML's keys. ``adapter``: one
    folder or several, in place of the adapters that a YAML names. ``overrides``: keys of the YAML,
    which win over it; ``adapter_name_or_path=None`` loads the base model alone.

    ``ConfigError``, ``CheckpointError`` and ``AdapterError`` say what does not fit;
    ``EngineError``: the engine failed.
    """
    return open_session(load_config(source, _with_adapter(adapter, overrides)))


def _with_adapter(adapter: object, overrides: Mapping[str, object]) -> Mapping[str, object]:
    """Returns the overrides for which ``adapter`` replaces what a YAML says about adapters."""
    if adapter is None:
        return overrides
    folders = list(adapter) if isinstance(adapter, list | tuple) else [adapter]
    # An empty path, of an unset variable say, must not load the base alone.
    if not folders or any(each in ("", Path()) for each in folders):
        raise ConfigError(
            f"adapter: expected a folder or a list of folders, found {adapter!r}; the base model "
            "alone is adapter_name_or_path=None"
        )
    for key in ("adapter_name_or_path", "adapters"):
        if overrides.get(key) is not None:
            raise ConfigError(f"adapter and {key} are both given; keep one of them")
    of_the_yaml = dict.fromkeys(("adapters", "adapter_weights", "adapter_folder"))
    return {**of_the_yaml, **overrides, "adapter_name_or_path": adapter}


def open_session(config: Config) -> Session:
    """Like ``load``, from a checked configuration."""
    check_model_folder(
        config.model.model_name_or_path,
        experts_elsewhere=config.experts.kt_weight_path is not None,
    )
    # Before the model: a wrong tokenizer or template is then reported within a second.
    words = load_words(
        config.model, config.adapter.folders,
        own_template=config.template.template in (None, "", "auto"),
    )  # fmt: skip
    tokenizer = words.tokenizer
    template = load_template(config.template, tokenizer)
    loaded = load_model(
        config.model, config.adapter, _experts(config), check_vocabulary=words.check_rows
    )
    try:
        loaded.adapters.take_words = _WordsOfLoaded(tokenizer)
        limits = SchedulerLimits(
            rows=config.scheduler.max_num_seqs,
            min_tokens_per_second=config.scheduler.min_tokens_per_second,
            reproducible=config.scheduler.reproducible,
        )
        session = Session(
            loaded, tokenizer, template, config.sampling,
            cutoff_len=config.model.cutoff_len, limits=limits,
        )  # fmt: skip
        session.warm_up()
    except BaseException:
        loaded.close()
        raise
    return session


def _experts(config: Config) -> ExpertArgs:
    """Returns the engine's settings, with the kernels that ``reproducible`` needs."""
    if not config.scheduler.reproducible:
        return config.experts
    if torch.cuda.is_available():
        raise ConfigError(
            "reproducible: expected false with a GPU, whose last bits depend on how many answers "
            "share a step, found true; CUDA_VISIBLE_DEVICES= runs without the GPU"
        )
    return replace(config.experts, kt_fixed_kernels=True)


class _WordsOfLoaded:
    """Adds the words of adapters loaded later to the session's tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, name: str, folder: Path, rows: int) -> Callable[[], None]:
        """Checks the words against the ``rows`` of the embeddings; calling the result adds them."""
        words = read_words(name, folder, self._tokenizer)
        if words is None or not words.tokens:
            return lambda: None
        words.check_rows(rows)
        return lambda: words.add(self._tokenizer)
