"""``ktrt.load``: from a configuration to a session that answers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ktrt.config import Config, ModelArgs, load_config
from ktrt.errors import CheckpointError
from ktrt.folders import check_model_folder
from ktrt.model import load_model
from ktrt.session import Session
from ktrt.template import load_template


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
    tokenizer = _load_tokenizer(config.model)
    template = load_template(config.template, tokenizer)
    loaded = load_model(config.model, config.adapter, config.experts)
    session = Session(
        model=loaded.model,
        tokenizer=tokenizer,
        template=template,
        sampling=config.sampling,
        audit=loaded.audit,
        adapters=loaded.adapters,
        close=loaded.close,
        graphs=loaded.graphs,
        weight_bytes=loaded.bytes_per_token,
        cutoff_len=config.model.cutoff_len,
    )
    try:
        session.warm_up()
    except BaseException:
        session.close()
        raise
    return session


def _load_tokenizer(args: ModelArgs) -> Any:
    """The tokenizer beside the model, of the library's own classes where those can read it."""
    path = args.model_name_or_path
    trusts = [False, True] if args.trust_remote_code else [False]
    for trust in trusts:
        try:
            return AutoTokenizer.from_pretrained(
                path, trust_remote_code=trust, local_files_only=True
            )
        except (OSError, ValueError, ImportError, KeyError) as error:
            failure = error
    raise CheckpointError(f"{path}: cannot load its tokenizer: {failure}") from failure
