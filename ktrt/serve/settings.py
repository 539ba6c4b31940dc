"""Settings of the server: the command line wins over the environment, which wins over defaults."""

from __future__ import annotations

import argparse
import ipaddress
import types
import typing
from dataclasses import dataclass, field, fields, replace
from math import isfinite
from typing import TYPE_CHECKING, Any

from ktrt.config.check import check_value
from ktrt.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ktrt.config import Config

_LOOPBACK, _EVERYWHERE = "127.0.0.1", "0.0.0.0"
# Bytes, seconds and counts beyond any use: a larger number is a typing error.
_MOST = 2**40


def _setting(default: Any, variable: str, text: str, least: float = 0) -> Any:
    return field(default=default, metadata={"variable": variable, "help": text, "least": least})


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Every field is an option, ``--max-waiting``, and an environment variable: LLaMA-Factory's
    where it has one.

    ``host`` None: loopback without a key, all addresses with one. ``api_key`` None: no key is asked
    for. ``admin_key`` None: the key, if there is one, suffices for an administrator's requests.
    ``model_name`` None: the name of the model's folder.
    """

    host: str | None = _setting(None, "API_HOST", "address to listen on; 127.0.0.1 without a key")
    port: int = _setting(8000, "API_PORT", "port to listen on; 0: a free one")
    api_key: str | None = _setting(None, "API_KEY", "key that requests must bring")
    admin_key: str | None = _setting(
        None, "KTRT_ADMIN_KEY", "key for loading and unloading adapters; without it the key does"
    )
    model_name: str | None = _setting(
        None, "API_MODEL_NAME", "the base model's name in requests; its folder's name"
    )
    root_path: str = _setting("", "FASTAPI_ROOT_PATH", "path before all paths, of a proxy")
    adapter_root: str | None = _setting(
        None, "KTRT_ADAPTER_ROOT", "folder below which adapters may be loaded at run time"
    )
    allowed_hosts: tuple[str, ...] = _setting(
        (), "KTRT_ALLOWED_HOSTS", "more names of this host that browsers may use, by commas"
    )
    cors_origins: tuple[str, ...] = _setting(
        (), "KTRT_CORS_ORIGINS", "origins of other sites' pages that may ask, by commas; * for all"
    )
    max_concurrent: int | None = _setting(
        None, "MAX_CONCURRENT", "answers that run at once; the configuration's max_num_seqs", 1
    )
    max_waiting: int = _setting(
        64, "KTRT_MAX_WAITING", "answers that may wait in addition to those that run"
    )
    max_client_share: float = _setting(
        0.75, "KTRT_MAX_CLIENT_SHARE", "share of answers and connections that one address may have"
    )
    max_connections: int = _setting(1024, "KTRT_MAX_CONNECTIONS", "open connections", 1)
    max_body_bytes: int = _setting(8 << 20, "KTRT_MAX_BODY_BYTES", "bytes of a request's body", 1)
    max_header_bytes: int = _setting(32 << 10, "KTRT_MAX_HEADER_BYTES", "bytes of its headers", 512)
    max_messages: int = _setting(4096, "KTRT_MAX_MESSAGES", "messages of a conversation", 1)
    header_seconds: float = _setting(10.0, "KTRT_HEADER_SECONDS", "time for a request's headers")
    body_seconds: float = _setting(60.0, "KTRT_BODY_SECONDS", "time for a request's body")
    write_seconds: float = _setting(
        30.0, "KTRT_WRITE_SECONDS", "time for a client to read what was sent"
    )
    request_seconds: float = _setting(
        3600.0, "KTRT_REQUEST_SECONDS", "time for a whole request, waiting included"
    )
    drain_seconds: float = _setting(
        30.0, "KTRT_DRAIN_SECONDS", "time for requests under way after SIGTERM"
    )
    access_log: bool = _setting(
        True, "KTRT_ACCESS_LOG", "a line of JSON per request on standard output"
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                least = each.metadata["least"]
                if not (isfinite(value) and least <= value <= _MOST):
                    raise ConfigError(f"{each.name}: expected {least} or more, found {value}")
        if self.port > 65535:
            raise ConfigError(f"port: expected 0 … 65535, found {self.port}")
        if not 0 < self.max_client_share <= 1:
            raise ConfigError(
                f"max_client_share: expected more than 0, at most 1, found {self.max_client_share}"
            )
        for name in ("api_key", "admin_key"):
            _check_key(name, getattr(self, name))
        if not (self.api_key or self.is_loopback):
            raise ConfigError(
                f"host: {self.address} lets everybody in the network use the model; set a key "
                "(API_KEY or --api-key), or listen on 127.0.0.1"
            )

    @property
    def address(self) -> str:
        """The address to listen on."""
        return self.host or (_EVERYWHERE if self.api_key else _LOOPBACK)

    @property
    def is_loopback(self) -> bool:
        """Whether only programs of this machine can connect."""
        return is_loopback(self.address)


def is_loopback(host: str) -> bool:
    """Returns whether a host's name or address means this machine."""
    host = host.strip("[]").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the settings' options to a command line."""
    group = parser.add_argument_group("server (option, environment variable, default)")
    for each in fields(ServeSettings):
        shown = each.default if each.default not in (None, "", ()) else "none"
        group.add_argument(
            "--" + each.name.replace("_", "-"), metavar="VALUE", default=argparse.SUPPRESS,
            help=f"{each.metadata['help']} ({each.metadata['variable']}, {shown})",
        )  # fmt: skip


def read_settings(args: argparse.Namespace, environment: Mapping[str, str]) -> ServeSettings:
    """Returns the settings of a command line and of the environment. An empty variable counts as
    unset. ``ConfigError`` names the option or the variable, what was found and what was
    expected."""
    hints = typing.get_type_hints(ServeSettings)
    values: dict[str, Any] = {}
    for each in fields(ServeSettings):
        variable = each.metadata["variable"]
        where, text = f"--{each.name.replace('_', '-')}", getattr(args, each.name, None)
        if text is None:
            where, text = variable, environment.get(variable) or None
        if text is not None:
            values[each.name] = _converted(text, hints[each.name], where)
    return ServeSettings(**values)


def settled(config: Config, settings: ServeSettings) -> tuple[Config, ServeSettings]:
    """Returns both with one number of answers at once (that of the settings, if they have one) and
    with a name of the base model."""
    if settings.max_concurrent is None:
        settings = replace(settings, max_concurrent=config.scheduler.max_num_seqs)
    else:
        scheduler = replace(config.scheduler, max_num_seqs=settings.max_concurrent)
        config = replace(config, scheduler=scheduler)
    if settings.model_name is None:
        settings = replace(settings, model_name=config.model.model_name_or_path.resolve().name)
    return config, settings


def _converted(text: str, hint: Any, where: str) -> Any:
    if hint == tuple[str, ...]:
        return tuple(part for each in text.split(",") if (part := each.strip()))
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if str in kinds:
        return text
    if bool in kinds:
        text = {"1": "true", "yes": "true", "0": "false", "no": "false"}.get(text.lower(), text)
    return check_value(where, text, hint, "serve")


def _check_key(name: str, key: str | None) -> None:
    """``ConfigError``: a key that no header can hold."""
    if key is not None and not (key.isascii() and key.isprintable() and key == key.strip() != ""):
        raise ConfigError(f"{name}: expected printable ASCII characters without spaces at the ends")
