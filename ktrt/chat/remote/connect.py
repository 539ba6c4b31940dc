"""Connects ``ktrt chat --url``: finds the key, sorts the settings."""

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ktrt.chat.remote.http import Address
from ktrt.chat.remote.models import shown_names
from ktrt.chat.remote.session import RemoteSession
from ktrt.config import SamplingArgs, names_key
from ktrt.config.args import SAMPLING_ALIASES
from ktrt.config.check import check_value, nearest
from ktrt.config.source import parse_overrides
from ktrt.errors import ConfigError

_log = logging.getLogger("ktrt.chat")

# In this order; the first is what OpenAI's clients read, the second what `ktrt serve` and
# LLaMA-Factory's server read.
KEY_VARIABLES = ("OPENAI_API_KEY", "API_KEY")
_SAMPLING = {each.name for each in fields(SamplingArgs)} | set(SAMPLING_ALIASES)
_TEMPLATE = {"default_system": str, "enable_thinking": bool}


def open_server(args: argparse.Namespace) -> RemoteSession:
    """Connects to the server of ``--url``. ``KtrtError``: see ``RemoteSession``."""
    key, source = api_key(args.api_key, os.environ)
    address = Address.of(args.url, key)
    settings, template = split_overrides(args.overrides)
    if address.exposes_key:
        _log.warning(
            "The API key of %s goes to %s without encryption; https protects it.",
            source, address.host,
        )  # fmt: skip
    session = RemoteSession(
        address,
        model=args.model,
        settings=settings,
        system=template.get("default_system") or "",
        thinking=template.get("enable_thinking"),
    )
    adapters = ", ".join(session.adapters.names)
    _log.info("%s%s", session.name, f"; adapters: {adapters}" if adapters else "")
    _log.debug("models of the server: %s", shown_names(session.models))
    return session


def api_key(given: str | None, environment: Mapping[str, str]) -> tuple[str | None, str]:
    """Returns the key to send, if any, and its source. An empty --api-key sends none."""
    if given is not None:
        return given or None, "--api-key"
    for name in KEY_VARIABLES:
        if value := environment.get(name):
            return value, name
    return None, ""


def split_overrides(pairs: Sequence[str]) -> tuple[dict[str, object], dict[str, Any]]:
    """Returns the sampling settings, and the template's, of ``key=value`` arguments.
    ``ConfigError``: a setting that only the server could have, an unknown one, a wrong value."""
    settings: dict[str, object] = {}
    template: dict[str, Any] = {}
    for key, value in parse_overrides(pairs, ["default_system"]).items():
        if key in _SAMPLING:
            settings[key] = value
        elif key in _TEMPLATE:
            template[key] = check_value(key, value, _TEMPLATE[key] | None, "override")
        elif names_key(f"{key}="):
            raise ConfigError(
                f"{key}: a setting of the server's model; with --url expected sampling arguments, "
                f"{' or '.join(_TEMPLATE)}"
            )
        else:
            raise ConfigError(f"unknown key {key!r}{nearest(key, _SAMPLING | set(_TEMPLATE))}")
    return settings, template
