"""Chooses the weight format of every layer's experts: the checkpoint's own, or the user's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ktrt.engine.formats import AUTO, PLAIN, backend_of, format_named, format_of, joined, kt_name
from ktrt.errors import ConfigError
from ktrt.loading.inventory import EXPERTS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ktrt.checkpoint.experts import ExpertWeights
    from ktrt.loading.experts import ExpertSource
    from ktrt.loading.inventory import Inventory

_BF16, _INT8, _INT4, _OWN = "AMXBF16", "AMXInt8", "AMXInt4", "RAWINT4"
# Formats that only a checkpoint can have: nothing is quantised to them.
_NATIVE_ONLY = ("FP8", "MXFP4")


@dataclass(frozen=True)
class ExpertFormats:
    """``by_path``: the weight format of each experts module; ``kt_backend``: their name, ``auto``
    if there are several; ``notes``: lines on how they differ from the checkpoint's."""

    kt_backend: str
    by_path: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def kt_name(self) -> str:
        """In KTransformers' words, as in an adapter's manifest: ``fp8``."""
        return kt_name(self.kt_backend)


def own_formats(source: ExpertSource) -> ExpertFormats:
    """Returns the checkpoint's own formats; BF16 for what the engine cannot take in codes."""
    found = {spec.path: _own(source, spec.path) for spec in source.specs}
    return ExpertFormats(backend_of(found.values()), found, tuple(_dequantised(source)))


def choose_formats(kt_backend: str, source: ExpertSource) -> ExpertFormats:
    """Returns the formats to run in. ``ConfigError``: the checkpoint is not in the format."""
    if kt_backend == AUTO or (kt_backend in _NATIVE_ONLY and _is_native(kt_backend, source)):
        return own_formats(source)
    if kt_backend in _NATIVE_ONLY:
        raise ConfigError(_not_native(kt_backend, source))
    wanted = format_of(kt_backend).name
    found = {}
    for spec in source.specs:
        own = _own(source, spec.path)
        is_same = kt_backend == _OWN and format_named(own).kt_backend == _OWN
        found[spec.path] = own if is_same else wanted
    notes = tuple(_requantised(kt_backend, found, source))
    return ExpertFormats(backend_of(found.values()), found, notes)


def possible_formats(source: ExpertSource) -> list[ExpertFormats]:
    """Returns what this checkpoint can run in: its own format, then from exact to coarse."""
    own = own_formats(source)
    others = [_BF16, _INT8, _OWN, _INT4]
    if "mxfp4" in own.by_path.values():
        others.remove(_OWN)  # larger than what it would round a second time
    found = {own.kt_backend: own}
    for backend in others:
        found.setdefault(backend, choose_formats(backend, source))
    return list(found.values())


def saving_note(chosen: ExpertFormats, own: ExpertFormats, inventory: Inventory) -> str | None:
    """Returns a line on what the checkpoint's own format would save over BF16; None where it is
    not larger."""
    if chosen.kt_backend != _BF16 or own.kt_backend == _BF16:
        return None
    now, then = inventory.experts[_BF16], inventory.experts[own.kt_backend]
    return (
        f"kt_backend {_BF16}: {EXPERTS} stored in {own.kt_backend} are dequantised: "
        f"{now.held / 1e9:.2f} GB in place of {then.held / 1e9:.2f} GB, and decoding reads "
        f"{now.read / then.read:.1f} times as many bytes of them. kt_backend: auto keeps them as "
        "stored"
    )


def _own(source: ExpertSource, path: str) -> str:
    weights = source.weights.get(path)
    return (weights.coded if weights else None) or PLAIN


def _is_native(kt_backend: str, source: ExpertSource) -> bool:
    return own_formats(source).kt_backend == kt_backend


def _quantised(source: ExpertSource) -> dict[str, ExpertWeights]:
    return {path: each for path, each in source.weights.items() if each.is_quantized}


def _dequantised(source: ExpertSource) -> Iterator[str]:
    """Yields a line on layers whose experts are quantised but cannot stay so, and on plain ones
    next to quantised ones."""
    quantised = _quantised(source)
    lost = {path: each for path, each in quantised.items() if each.coded is None}
    if lost:
        path, weights = next(iter(lost.items()))
        yield (
            f"The experts of {len(lost)} of {len(source.specs)} layers are dequantised to BF16: "
            f"{path}: {weights.why_not_coded}"
        )
    plain = len(source.weights) - len(quantised)
    if quantised and plain:
        yield f"The experts of {plain} of {len(source.specs)} layers are not quantised: BF16"


def _requantised(
    kt_backend: str, formats: Mapping[str, str], source: ExpertSource
) -> Iterator[str]:
    if kt_backend == _BF16:
        return
    changed = [path for path, name in formats.items() if name != _own(source, path)]
    quantised = [path for path in changed if path in _quantised(source)]
    what = joined(formats[path] for path in changed)
    if quantised:
        own = {_own(source, path) for path in quantised}
        stored = "in a quantised form" if own == {PLAIN} else f"in {joined(own - {PLAIN}).upper()}"
        yield (
            f"kt_backend {kt_backend}: experts stored {stored} are quantised a second time while "
            f"they are packed, to {what.upper()}: an error that no adapter was trained with. "
            "kt_backend: auto keeps them as stored"
        )
    elif changed and kt_backend == _OWN:
        yield (
            f"kt_backend {kt_backend}: this checkpoint is not in INT4; its experts are quantised "
            f"while they are packed, to {what.upper()} with a searched scale for every 32 columns"
        )


def _not_native(kt_backend: str, source: ExpertSource) -> str:
    own = own_formats(source)
    state = f"are in {joined(own.by_path.values()).upper()}"
    lost = [each for each in _quantised(source).values() if each.coded is None]
    if lost:
        state = f"cannot stay quantised ({lost[0].why_not_coded})"
    advice = f"{_OWN} (4 bits, quantised while packing)"
    if kt_backend == "FP8":
        advice = f"{_INT8} (as small as FP8 and more exact), or {advice}"
    return (
        f"kt_backend {kt_backend}: the experts of {source.checkpoint.folder} {state}, and nothing "
        f"is converted to {kt_backend}. Set kt_backend: auto (the checkpoint's own format), "
        f"{advice}"
    )
