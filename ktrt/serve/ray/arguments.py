"""The arguments of the Ray application, from a deployment file or Python."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

from ktrt.config import Config, load_config
from ktrt.config.check import nearest
from ktrt.errors import ConfigError
from ktrt.serve.settings import ServeSettings, read_settings, settled

_ARGUMENTS = {"config", "overrides", "settings", "model_options", "router_options"}
_KEYS = {"api_key", "admin_key"}


def read_arguments(args: Mapping[str, Any]) -> tuple[Config, ServeSettings]:
    """Reads the arguments of ``build``, and this process's environment. ``ConfigError``: an unknown
    argument, a wrong value, a key in the arguments."""
    for name in args:
        if name not in _ARGUMENTS:
            raise ConfigError(
                f"args: unknown {name!r}{nearest(name, _ARGUMENTS)}; expected "
                f"{', '.join(sorted(_ARGUMENTS))}"
            )
    if "config" not in args:
        raise ConfigError("args: config: expected a YAML file or a model's folder, found nothing")
    given = args.get("settings") or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"args: settings: expected a mapping, found {given!r:.80}")
    known = set(ServeSettings.__dataclass_fields__)
    for name in given:
        if name in _KEYS:
            raise ConfigError(
                f"args: settings: {name}: Ray's dashboard shows arguments to everybody; set "
                "API_KEY (KTRT_ADMIN_KEY) in the environment of `ray start` instead"
            )
        if name not in known:
            raise ConfigError(f"args: settings: unknown {name!r}{nearest(name, known)}")
    texts = {name: _text(value) for name, value in given.items() if value is not None}
    config = load_config(args["config"], args.get("overrides") or {})
    settings = read_settings(argparse.Namespace(**texts), os.environ)
    return settled(config, settings)


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
