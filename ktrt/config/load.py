"""Makes a ``Config`` from a YAML file, a model's folder or a mapping, and overrides."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from ktrt.config.adapters import ADAPTER_KEYS, check_adapter_value, resolve_adapters
from ktrt.config.args import (
    SAMPLING_ALIASES,
    WEIGHT_FORMATS,
    AdapterArgs,
    Config,
    ExpertArgs,
    ModelArgs,
    SamplingArgs,
    SchedulerArgs,
    TemplateArgs,
)
from ktrt.config.arguments import Takes, convert_options
from ktrt.config.check import check_value, describe, nearest, shown
from ktrt.config.keys import IGNORED, MEANT, NOTED, REFUSED, TRAINING
from ktrt.config.kt_files import check_non_experts
from ktrt.config.source import (
    find_path,
    hub_advice,
    parse_overrides,
    read_source,
    read_yaml,
)
from ktrt.errors import ConfigError
from ktrt.folders import holds_adapter

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Switches:
    """Keys that are handled here and are in no part of ``Config``."""

    use_kt: bool = True
    infer_backend: str = "huggingface"
    cpu_infer: int | None = None
    kt_non_expert_weight_path: Path | None = None
    output_dir: Path | None = None
    finetuning_type: Literal["lora", "full", "freeze", "oft"] = "lora"
    adapter_folder: str | None = None
    new_special_tokens_config: Path | None = None


# Both mean ktrt: LLaMA-Factory 0.9.4 had a separate engine for KTransformers.
_INFER_BACKENDS = ("huggingface", "ktransformers")
# LLaMA-Factory also takes several tokens in one text, separated by commas.
_TOKEN_LISTS = ("add_tokens", "add_special_tokens")
_SECTIONS = (ModelArgs, AdapterArgs, ExpertArgs, TemplateArgs, SamplingArgs, SchedulerArgs)
_TYPES: dict[str, Any] = {
    each.name: each.type for section in (*_SECTIONS, _Switches) for each in fields(section)
}
_TEXT_KEYS = [key for key, hint in _TYPES.items() if hint in (Path, str, Path | None, str | None)]
_ALIASES = {
    "kt_lora_rank": "lora_rank",
    "kt_lora_alpha": "lora_alpha",
    # LLaMA-Factory's name until 0.9.2.
    "new_special_tokens": "add_special_tokens",
    **SAMPLING_ALIASES,
}
# Two keys of kt_kernel have the same meaning: the values of both, in lower case, as kt_backend.
_FORMAT_NAMES = {each: name for name, each in WEIGHT_FORMATS.items()}
_BACKENDS = {
    "kt_backend": {
        **{name.lower(): name for name in WEIGHT_FORMATS},
        **_FORMAT_NAMES,
        # Further names that kt_kernel 0.7.2 takes; the first two are its old ones.
        "amxfp8": "FP8",
        "amxint4_kgroup": "RAWINT4",
        "fp8_perchannel": "FP8",
        "gptq_int4": "RAWINT4",
    },
    "kt_expert_weight_format": _FORMAT_NAMES,
}
_ACTING = {*_TYPES, *_ALIASES, *_BACKENDS, "kt_config"}
_KNOWN = {*_ACTING, *IGNORED, *NOTED, *REFUSED}


def load_config(
    source: str | PathLike[str] | Mapping[str, object],
    overrides: Mapping[str, object] | Sequence[str] = (),
) -> Config:
    """Returns the configuration in ``source``: a YAML file, a model's folder, or a mapping of the
    same keys.

    ``overrides`` (a mapping, or ``key=value`` texts with YAML scalars) win over it; null resets a
    key to its default. Relative paths are looked up in the current directory, then in the YAML
    file's. Keys without effect are reported on this module's logger.

    ``ConfigError`` names the source, the key, what was found and what was expected: unknown keys,
    wrong types or ranges, contradicting spellings, and what ktrt cannot do or find.
    """
    given, where, folder = read_source(source)
    values = _normalise(given, where)
    _drop_cutoff_of_training(values)
    if not isinstance(overrides, Mapping):
        overrides = parse_overrides(overrides, _TEXT_KEYS)
    if overrides:
        replaced = _normalise(overrides, "override")
        if _takes_the_base_alone(replaced):
            for key in ("adapters", "adapter_weights", "adapter_folder"):
                values.pop(key, None)
        values |= replaced
        where = f"{where} with overrides"
    chosen = {"adapter_name_or_path", "adapters"}.intersection(values)
    values = {key: value for key, value in values.items() if value is not None}

    _check_switches(values, where)
    _map_threads(values)
    _check_unused(values, where)
    _resolve_paths(values, where, folder)
    if not chosen:
        _mention_output(values.get("output_dir"), where, folder)
    return Config(*(_section(section, values, where) for section in _SECTIONS))


def _takes_the_base_alone(overrides: Mapping[str, Any]) -> bool:
    """Whether overrides empty adapter_name_or_path and name no adapters: the file's adapters do not
    count, however it names them."""
    paths = overrides.get("adapter_name_or_path") or [Path()]
    empty = all(path == Path() for path in paths)
    return "adapter_name_or_path" in overrides and empty and not overrides.get("adapters")


def as_overrides(words: Sequence[str], options: Mapping[str, bool]) -> tuple[list[str], list[str]]:
    """Takes ``--key value`` out of a command line; see ``convert_options``."""

    def takes(key: str) -> Takes:
        name = key.removeprefix("kt_config.")
        hint = _TYPES.get(_ALIASES.get(name, name))
        if hint in (bool, bool | None):
            return "flag"
        return "any" if hint is None and name not in _BACKENDS else "value"

    return convert_options(words, options, _KNOWN, takes)


def names_key(argument: str) -> bool:
    """Returns whether ``argument`` starts with a configuration's key and an equals sign."""
    key, sign, _ = argument.partition("=")
    return bool(sign) and _is_known(key)


def _section(section: type[Any], values: Mapping[str, Any], where: str) -> Any:
    given = {each.name: values[each.name] for each in fields(section) if each.name in values}
    try:
        return section(**given)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _normalise(given: Mapping[str, object], where: str) -> dict[str, Any]:
    """Returns the values of one source by flat key, typed; two spellings of a key must agree."""
    values: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for spelling, raw in _flatten(given, where):
        key, value = _canonical(spelling, raw, where)
        if values.get(key) is None:
            values[key], spelled[key] = value, spelling
        elif value is not None and value != values[key]:
            raise ConfigError(
                f"{where}: {spelled[key]} and {spelling} contradict each other "
                f"({values[key]} and {value}); keep one of them"
            )
    return values


def _flatten(given: Mapping[str, object], where: str) -> list[tuple[str, object]]:
    """Returns (spelling, value) pairs; keys of the ``kt_config`` mapping as ``kt_config.key``."""
    pairs: list[tuple[str, object]] = []
    for key, value in given.items():
        if key != "kt_config":
            pairs.append((str(key), value))
        elif isinstance(value, Mapping):
            # LLaMA-Factory itself adds "enabled" to the user's keys.
            pairs += [(f"kt_config.{each}", value[each]) for each in value if each != "enabled"]
        elif value is not None:
            raise ConfigError(
                f"{where}: kt_config: expected a mapping of kt_* keys, found {describe(value)}"
            )
    unknown = [spelling for spelling, _ in pairs if not _is_known(spelling)]
    if unknown:
        hints = [f"{shown(each)}{_hint(each.removeprefix('kt_config.'))}" for each in unknown]
        raise ConfigError(f"{where}: unknown key {', '.join(hints)}")
    return pairs


def _hint(key: str) -> str:
    """Returns the key that may be meant; one without effect only if the words are nearly equal."""
    if meant := MEANT.get(key.lower().replace("-", "_")):
        return f" (did you mean {meant!r}?)"
    return nearest(key, _ACTING, 0.8) or nearest(key, _KNOWN, 0.85)


def _is_known(spelling: str) -> bool:
    key = spelling.removeprefix("kt_config.")
    return key in _KNOWN and (key == spelling or key.startswith("kt_"))


def _canonical(spelling: str, raw: object, where: str) -> tuple[str, Any]:
    """Returns the flat key that a spelling stands for, and its value with that key's type."""
    key = spelling.removeprefix("kt_config.")
    key = _ALIASES.get(key, key)
    if key in _BACKENDS:
        return "kt_backend", _backend(spelling, raw, _BACKENDS[key], where)
    if raw is None or key not in _TYPES:
        return key, raw
    if key in ADAPTER_KEYS:
        return key, check_adapter_value(key, raw, where)
    if key in _TOKEN_LISTS and isinstance(raw, str):
        return key, tuple(part for each in raw.split(",") if (part := each.strip()))
    return key, check_value(spelling, raw, _TYPES[key], where)


def _backend(spelling: str, raw: object, names: Mapping[str, str], where: str) -> str | None:
    """Returns the kt_backend that a value names; None, like an absent key, for null and "auto"."""
    name = raw.lower() if isinstance(raw, str) else raw
    if name is None or name == "auto":
        return None
    if isinstance(name, str) and name in names:
        return names[name]
    *others, last = dict.fromkeys(names.values()) if "amxbf16" in names else names
    expected = f"auto, {', '.join(others)} or {last}"
    raise ConfigError(f"{where}: {spelling}: expected {expected}, found {describe(raw)}")


def _check_switches(values: Mapping[str, Any], where: str) -> None:
    switches: _Switches = _section(_Switches, values, where)
    if not switches.use_kt:
        raise ConfigError(
            f"{where}: use_kt: expected true, found false: ktrt always runs the routed experts "
            "through its engine; without it use `llamafactory-cli chat`"
        )
    if switches.infer_backend not in _INFER_BACKENDS:
        raise ConfigError(
            f"{where}: infer_backend: expected {' or '.join(_INFER_BACKENDS)}, found "
            f"{switches.infer_backend!r}: ktrt runs the model itself; remove the key"
        )
    adapters = values.get("adapter_name_or_path") or values.get("adapters")
    if switches.finetuning_type != "lora" and adapters:
        raise ConfigError(
            f"{where}: finetuning_type: expected lora with an adapter, found "
            f"{switches.finetuning_type}; remove it, or the adapter"
        )


def _drop_cutoff_of_training(values: dict[str, Any]) -> None:
    """Drops cutoff_len from a training's YAML, where it cuts the samples and LLaMA-Factory's chat
    ignores it. In other YAMLs it bounds the conversation."""
    training = sorted(TRAINING.intersection(values))
    if training and values.pop("cutoff_len", None) is not None:
        _log.info(
            "Ignored cutoff_len: this is a training's YAML (it has %s), whose samples it cuts; "
            "cutoff_len=N on the command line bounds a conversation",
            training[0],
        )


def _map_threads(values: dict[str, Any]) -> None:
    """Takes cpu_infer, LLaMA-Factory 0.9.4's name, as kt_num_threads."""
    threads = values.pop("cpu_infer", None)
    if threads is None:
        return
    if "kt_num_threads" in values:
        _log.info("Ignored cpu_infer: kt_num_threads %s decides", values["kt_num_threads"])
        return
    values["kt_num_threads"] = threads
    _log.info("cpu_infer: %s is taken as kt_num_threads", threads)


def _mention_output(output: Path | None, where: str, folder: Path | None) -> None:
    """Warns that an adapter in output_dir, where a training's YAML has it, is not loaded."""
    for path in find_path("output_dir", output, where, folder) if output is not None else ():
        if path.is_dir() and (holds_adapter(path) or any(map(holds_adapter, path.iterdir()))):
            _log.warning(
                "No adapter is configured, though output_dir %s holds one: "
                "adapter_name_or_path=%s takes it",
                path, path,
            )  # fmt: skip
            return


def _check_unused(values: Mapping[str, Any], where: str) -> None:
    """Reports keys without effect; refuses keys that would change the answers."""
    for key, refusal in REFUSED.items():
        if key in values and values[key] not in refusal.neutral:
            raise ConfigError(
                f"{where}: {key}: {describe(values[key])} cannot be honoured: {refusal.advice}; "
                "remove the key"
            )
    ignored = sorted(IGNORED.intersection(values))
    if ignored:
        _log.info("Ignored keys of training and of other backends: %s", ", ".join(ignored))
    for key, reason in NOTED.items():
        if key in values:
            _log.info("Ignored %s: %s (%s)", key, values[key], reason)


def _resolve_paths(values: dict[str, Any], where: str, folder: Path | None) -> None:
    model = values.get("model_name_or_path")
    if model is None or model == Path():
        raise ConfigError(f"{where}: model_name_or_path is missing: the base model's directory")
    values["model_name_or_path"] = _directory("model_name_or_path", model, where, folder)

    packed = values.pop("kt_weight_path", None)
    if packed is not None and packed != Path():
        values["kt_weight_path"] = _directory("kt_weight_path", packed, where, folder)

    copy = values.pop("kt_non_expert_weight_path", None)
    if copy is not None and copy != Path():
        copy = _directory("kt_non_expert_weight_path", copy, where, folder)
        reason = check_non_experts(copy, values["model_name_or_path"], where)
        _log.info("kt_non_expert_weight_path %s is not read: %s", copy, reason)

    described = values.pop("new_special_tokens_config", None)
    if described is not None and described != Path():
        # Wins over add_special_tokens, as in LLaMA-Factory; the descriptions serve the training.
        file = find_path("new_special_tokens_config", described, where, folder)[0]
        values["add_special_tokens"] = tuple(read_yaml(file))

    resolve_adapters(values, where, lambda key, path: _directory(key, path, where, folder))


def _directory(key: str, given: Path, where: str, folder: Path | None) -> Path:
    """Returns an existing folder: from the current directory, else from the YAML file's."""
    tried = find_path(key, given, where, folder)
    for candidate in tried:
        if candidate.is_dir():
            return candidate
    found = f"{where}: {key}: no directory {' or '.join(str(each) for each in tried)}"
    if files := [candidate for candidate in tried if candidate.is_file()]:
        advice = f"it is a file, expected the directory that holds it, {files[0].parent}"
        if given.suffix.lower() == ".gguf":
            advice = "it is a GGUF file, expected a Hugging Face folder with safetensors"
        raise ConfigError(f"{found}: {advice}")
    raise ConfigError(f"{found}{hub_advice(given, f'set {key} to')}")
