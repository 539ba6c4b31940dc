"""Makes the inputs of a verified layer and judges its outputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from ktrt.audit.reference.experts import to_bf16

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ktrt.audit.reference import Lora
    from ktrt.audit.reference.tensors import Float32

# Tokens of each kind for each expert.
_TOKENS = 4
KINDS = ("random", "read by gate and up", "read by down alone")


@dataclass(frozen=True)
class Limits:
    """The largest relative errors that pass. ``same``: of tuned and of base, against NumPy with the
    same roundings. ``difference``: of tuned − base, plus ``noise`` times the tuned output.
    ``float32``: of all tokens together, against float32."""

    same: float
    difference: float
    noise: float
    float32: float


@dataclass(frozen=True)
class Probe:
    """states [tokens, H], bfloat16 values in float32; ids int64 and weights float32 [tokens, k].
    ``groups``: slices of tokens that are judged separately, by name."""

    states: Float32
    ids: np.ndarray[tuple[int, int], np.dtype[np.int64]]
    weights: Float32
    groups: dict[str, slice]


@dataclass(frozen=True)
class Outputs:
    """NumPy's outputs [tokens, H], base and tuned: exact, and with the format's roundings.
    ``others``: with the roundings of the format's other kernels."""

    exact: tuple[Float32, Float32]
    rounded: tuple[Float32, Float32]
    others: tuple[tuple[Float32, Float32], ...] = ()

    @classmethod
    def empty(cls, shape: tuple[int, ...], kernels: int = 1) -> Outputs:
        """Returns zeros, to add outputs to; ``kernels``: with different roundings."""
        exact, rounded, *others = (
            (np.zeros(shape, np.float32), np.zeros(shape, np.float32)) for _ in range(1 + kernels)
        )
        return cls(exact, rounded, tuple(others))

    @property
    def all(self) -> tuple[tuple[Float32, Float32], ...]:
        """Returns exact, rounded and the others."""
        return (self.exact, self.rounded, *self.others)


@dataclass
class Check:
    """One comparison; all errors are relative. ``base`` and ``tuned``: error against NumPy in
    float32. ``apart``: distance of NumPy's tuned from its base. ``difference``: error of tuned −
    base, largest over groups. ``same``: the largest error of base or tuned against NumPy with the
    format's roundings. ``undecided`` of ``groups`` groups change too little to be judged."""

    name: str
    base: float
    tuned: float
    apart: float
    difference: float = 0.0
    same: float = 0.0
    groups: int = 1
    undecided: int = 0
    failures: list[str] = field(default_factory=list)


def single_probe(loras: Sequence[dict[str, Lora]], hidden_size: int, seed: int) -> Probe:
    """Returns tokens of every kind for every expert, each routed to one expert with weight 1."""
    rng = np.random.default_rng(seed)
    states: list[Float32] = []
    ids: list[int] = []
    groups = {}
    for expert, lora in enumerate(loras):
        directions = [lora[name].a for name in ("gate", "up") if name in lora]
        a = np.concatenate(directions) if directions else np.zeros((0, hidden_size), np.float32)
        for kind, x in zip(KINDS, _states(a, hidden_size, rng), strict=True):
            if x is not None:
                groups[f"expert {expert}, input {kind}"] = slice(len(ids), len(ids) + len(x))
                states.append(x)
                ids += [expert] * len(x)
    rows = np.concatenate(states)
    return Probe(rows, np.array(ids)[:, None], np.ones((len(rows), 1), np.float32), groups)


def _states(
    a: Float32, hidden_size: int, rng: np.random.Generator
) -> tuple[Float32, Float32 | None, Float32 | None]:
    """Returns random states; states in the row space of ``a``; states that ``a`` maps to 0."""
    shape = (_TOKENS, hidden_size)
    plain = _scaled(rng.standard_normal(shape, np.float32))
    if not a.any():
        return plain, None, None
    along = _scaled(rng.standard_normal((_TOKENS, len(a)), np.float32) @ a)
    if 2 * len(a) > hidden_size:
        return plain, along, None
    basis = np.linalg.qr(a.T.astype(np.float64))[0]
    across = rng.standard_normal(shape)
    across -= across @ basis @ basis.T
    return plain, along, _scaled(across.astype(np.float32))


def _scaled(x: Float32) -> Float32:
    """Scales to the length of a norm's output, rounded to bfloat16."""
    return to_bf16(x * (np.sqrt(x.shape[1]) / np.linalg.norm(x, axis=1, keepdims=True)))


def mixed_probe(num_experts: int, top_k: int, hidden_size: int, seed: int) -> Probe:
    """Returns random tokens for ``top_k`` experts each, with random weights; every expert gets
    several, and as many as any other: an engine may choose kernels by their number."""
    rng = np.random.default_rng(seed)
    rounds = next(n for n in count(_TOKENS) if n * num_experts % top_k == 0)
    tokens = rounds * num_experts // top_k
    ids = np.concatenate([rng.permutation(num_experts) for _ in range(rounds)])
    states = to_bf16(rng.standard_normal((tokens, hidden_size), np.float32))
    weights = rng.uniform(0.1, 1.0, (tokens, top_k)).astype(np.float32)
    return Probe(states, ids.reshape(tokens, top_k), weights, {"": slice(None)})


def compare(
    name: str,
    probe: Probe,
    wanted: Outputs,
    found: tuple[Float32, Float32],
    limits: Limits,
    *,
    may_be_small: bool = False,
) -> Check:
    """Judges ``found``, base and tuned. It is a failure if no group changes enough to be judged,
    unless the adapter ``may_be_small``."""
    exact = wanted.exact
    check = Check(
        name,
        base=error(found[0], exact[0]),
        tuned=error(found[1], exact[1], _norm(exact[1] - exact[0])),
        apart=error(exact[1], exact[0]),
        groups=len(probe.groups),
    )
    for what, value in (("base", check.base), ("tuned", check.tuned)):
        if not value <= limits.float32:
            check.failures.append(f"{what} is {value:.1%} off NumPy's float32")
    for group, rows in probe.groups.items():
        results = (found[0][rows], found[1][rows])
        kernels = [(base[rows], tuned[rows]) for base, tuned in (wanted.rounded, *wanted.others)]
        # Each kernel's roundings are one candidate; the base alone tells which one ran.
        nearest = min(kernels, key=lambda each: _without_worst(results[0] - each[0], each[0])[0])
        _judge(check, group, nearest, results, limits)
    if check.undecided == check.groups and not may_be_small:
        check.failures.append(
            f"the adapter changes too little to be verified ({check.apart:.1e} of the output)"
        )
    return check


def _judge(
    check: Check,
    group: str,
    wanted: tuple[Float32, Float32],
    found: tuple[Float32, Float32],
    limits: Limits,
) -> None:
    """Judges one group of tokens without its worst token: a number halfway between two codes may be
    rounded to either side, which changes a whole token.

    A change not well above the noise of base and tuned cannot be judged, but must not exceed that
    noise.
    """
    where = f" ({group})" if group else ""
    expected = wanted[1] - wanted[0]
    change = _without_worst(expected, expected)[1]
    for what, x, y, least in zip(("base", "tuned"), found, wanted, (0.0, change), strict=True):
        off, size = _without_worst(x - y, y)
        # Base and change may cancel, completely in a module with one output; both are rounded.
        size = max(size, least)
        check.same = max(check.same, off / size if size else off)
        if not off <= limits.same * size:
            check.failures.append(f"{what} is {_percent(off, size)} off NumPy's{where}")
    off, size = _without_worst(found[1] - found[0] - expected, expected)
    noise = limits.noise * max(map(_norm, (wanted[1], expected)))
    if size < 4 * noise:
        check.undecided += size > 0
    else:
        check.difference = max(check.difference, off / size)
    if not off <= limits.difference * size + noise:
        check.failures.append(f"tuned − base is {_percent(off, size)} off NumPy's{where}")


def _without_worst(off: Float32, wanted: Float32) -> tuple[float, float]:
    """Returns ‖off‖ and ‖wanted‖ of all tokens except the one with the largest ``off``. NaN counts
    as the largest; a second NaN makes ‖off‖ NaN."""
    keep = np.argsort(np.linalg.norm(off, axis=1))[:-1] if len(off) > 1 else [0]
    return float(np.linalg.norm(off[keep])), float(np.linalg.norm(wanted[keep]))


def _norm(x: Float32) -> float:
    return float(np.linalg.norm(x))


def _percent(off: float, size: float) -> str:
    return f"{off / size:.2%}" if size else "a change where NumPy has none,"


def error(found: Float32, expected: Float32, least: float = 0.0) -> float:
    """Returns ‖found − expected‖ / max(‖expected‖, ``least``); 0 if both are zero."""
    off, size = (float(np.linalg.norm(x.astype(np.float64))) for x in (found - expected, expected))
    size = max(size, least)
    return off / size if size else (0.0 if off == 0 else float("inf"))
