"""Finds codes and scales that together are one tensor, by names and dtypes on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ktrt.audit.reference.experts import to_bf16
from ktrt.audit.reference.formats import e4m3, e8m0, fits, int4, mxfp4, nibbles, spread
from ktrt.audit.reference.tensors import CannotVerifyError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from ktrt.audit.reference.formats import Codes
    from ktrt.audit.reference.tensors import Float32, RawFile

    _Rounding = Callable[[Float32], Float32]

Family = Literal["", "fp8", "int4", "mxfp4"]

# Last word of a tensor's name → scheme that cannot be read, if its module holds codes.
_UNREAD = {
    "weight_scale_2": "NVFP4 (TensorRT Model Optimizer)",
    "weight_global_scale": "NVFP4 (compressed-tensors)",
    "weight_zero_point": "compressed-tensors with zero points",
    "absmax": "bitsandbytes, 4 bits",
    "quant_map": "bitsandbytes, 4 bits",
    "SCB": "bitsandbytes, 8 bits",
    "W_q": "HQQ",
    "codebooks": "AQLM",
    "weight_scales": "EETQ",
    "biases": "MLX",
    "input_scale": "FP8 with static activation scales",
    "activation_scale": "FP8 with static activation scales",
}
_FLOATS = ("F64", "F32", "F16", "BF16")
_KEYS = ("quantization_config", "compression_config")
_BLOCK = (128, 128)
# Engines' groups are multiples of it.
_GROUP = 32
# checkpoint_format → the zero point 8 on disk: the first version subtracts 1.
_ZEROS: dict[object, tuple[int, ...]] = {"gptq": (7,), "gptq_v2": (8,)}


@dataclass(frozen=True)
class Stored:
    """One tensor, plain or with its scales. ``read``: all of it, or one row of the first dimension,
    in float32. ``family``: the codes' kind; empty for plain numbers. ``spent``: names of its
    tensors on disk besides its own. ``read_packed``: the same with INT4's scales in BF16, as an
    engine keeps them."""

    file: Path
    shape: tuple[int, ...]
    read: Callable[[int | None], Float32]
    family: Family = ""
    spent: tuple[str, ...] = ()
    read_packed: Callable[[int | None], Float32] | None = None


@dataclass(frozen=True)
class Settings:
    """Settings that config.json alone knows: rows and columns of one FP8 scale, columns of one INT4
    scale (0: unknown), GPTQ's zero points on disk that mean 8."""

    block: tuple[int, int]
    group: int
    zeros: tuple[int, ...]


def read_settings(config: Mapping[str, Any]) -> Settings:
    """Returns the settings of the first quantisation in config.json."""
    text = config.get("text_config") or {}
    claims = [each.get(key) for each in (config, text) for key in _KEYS]
    claim = next((each for each in claims if isinstance(each, dict)), {})
    groups = (claim.get("config_groups") or {}).values()
    weights = [claim, *(group.get("weights") or {} for group in groups)]
    blocks = [claim.get("weight_block_size"), *(each.get("block_structure") for each in weights)]
    block = next((tuple(map(int, each)) for each in blocks if each), _BLOCK)
    sizes = (each.get("group_size") for each in weights)
    return Settings(
        (block[0], block[1]),
        next((int(size) for size in sizes if isinstance(size, int) and size > 0), 0),
        _ZEROS.get(claim.get("checkpoint_format"), (7, 8)),
    )


def _unrounded(scales: Float32) -> Float32:
    return scales


class _Finder:
    """Joins codes and scales; raises ``CannotVerifyError`` with the scheme for other forms."""

    def __init__(self, files: Mapping[str, RawFile], config: Mapping[str, Any]) -> None:
        self._files = files
        self._settings = read_settings(config)
        # Shape of compressed-tensors' words → shape of the matrix, by the first one's weight_shape.
        self._shapes: dict[tuple[int, ...], tuple[int, int]] = {}

    def find(self, name: str) -> tuple[str, Stored]:
        """Returns the joined tensor and its name without the codes' own ending."""
        file, dtype = self._files[name], self._files[name].dtype(name)
        stem = name.rpartition(".")[0]
        if name.endswith("_blocks") and dtype == "U8":
            return name.removesuffix("_blocks"), self._mxfp4_stack(name)
        if name.endswith(".weight_packed"):
            return f"{stem}.weight", self._packed(name)
        if name.endswith(".qweight"):
            return f"{stem}.weight", self._gptq(name, stem)
        if dtype.startswith("F8_E4M3"):
            return name, self._fp8(name)
        if dtype in ("I8", "U8", "F4") and name.endswith(".weight"):
            return name, self._mxfp4(name)
        if dtype == "F8_E5M2":
            raise self._refused(name, "FP8 E5M2")
        return name, Stored(file.file, file.shapes[name], lambda row: file.read(name, row))

    def check_schemes(self) -> None:
        """Refuses schemes of other names."""
        for name in self._files:
            module, _, word = name.rpartition(".")
            if word in _UNREAD and self._is_coded(module):
                raise self._refused(name, _UNREAD[word])

    def _is_coded(self, module: str) -> bool:
        """``module``: or a weight, which bitsandbytes' statistics are named after."""
        words = ("weight", "weight_packed", "qweight", "W_q", "codes")
        names = (module, *(f"{module}.{word}" for word in words))
        return any(n in self._files and self._files[n].dtype(n) not in _FLOATS for n in names)

    def _refused(self, name: str, scheme: str) -> CannotVerifyError:
        file = self._files[name]
        return CannotVerifyError(
            f"{file.file}: {name} ({file.dtype(name)}, {list(file.shapes[name])}) is quantised as "
            f"{scheme}, which cannot be verified."
        )

    def _scales(self, name: str, row: int | None = None) -> Float32:
        """Returns scales in any dtype: U8 and E8M0 are powers of two."""
        file = self._files[name]
        plain = file.dtype(name) in _FLOATS
        return file.read(name, row) if plain else e8m0(file.codes(name, row))

    def _scale_name(self, name: str) -> str | None:
        """DeepSeek-V3's weight_scale_inv, compressed-tensors' weight_scale, DeepSeek-V4's scale,
        Mistral's qscale_weight."""
        stem = name.removesuffix("weight")
        names = [f"{name}_scale_inv", f"{name}_scale"]
        names += [f"{stem}scale", f"{stem}qscale_weight"] if stem != name else []
        return next((each for each in names if each in self._files), None)

    def _fp8(self, name: str) -> Stored:
        scale = self._scale_name(name)
        if scale is None:
            raise self._refused(name, "FP8 without a scale")
        file, shape = self._files[name], self._files[name].shapes[name]
        scale_shape = self._files[scale].shapes[scale]
        if not fits(scale_shape, shape, self._settings.block):
            rows, columns = self._settings.block
            form = f"FP8 with scales {list(scale_shape)} in {scale}"
            raise self._refused(name, f"{form}, which are no blocks of {rows} x {columns}")
        is_one = int(np.prod(scale_shape)) == 1

        def read(row: int | None) -> Float32:
            values = e4m3(file.codes(name, row))
            scales = self._scales(scale, None if is_one else row)
            return _checked(name, values * spread(scales, values.shape, self._settings.block))

        return Stored(file.file, shape, read, "fp8", (name, scale))

    def _mxfp4_stack(self, name: str) -> Stored:
        """gpt-oss: [E, out, in / 32, 16] and [E, out, in / 32]."""
        scale = f"{name.removesuffix('_blocks')}_scales"
        file, shape = self._files[name], self._files[name].shapes[name]
        if scale not in self._files or self._files[scale].shapes[scale] != shape[:3]:
            raise self._refused(name, f"MXFP4 without scales {list(shape[:3])} in {scale}")

        def read(row: int | None) -> Float32:
            pairs, scales = file.codes(name, row), self._files[scale].codes(scale, row)
            return _checked(name, mxfp4(pairs.reshape(*pairs.shape[:-2], -1), scales))

        return Stored(file.file, (*shape[:2], 32 * shape[2]), read, "mxfp4", (name, scale))

    def _mxfp4(self, name: str) -> Stored:
        """Two codes in a byte [n, k / 2] and powers of two [n, k / 32]: DeepSeek-V4's experts,
        compressed-tensors' mxfp4-pack-quantized."""
        file, scale = self._files[name], self._scale_name(name.removesuffix("_packed"))
        *outer, columns = file.shapes[name]
        columns *= 1 if file.dtype(name) == "F4" else 2
        scales = self._files.get(scale or "")
        if scale is None or scales is None or scales.dtype(scale) not in ("U8", "F8_E8M0"):
            int8 = file.dtype(name) == "I8" and scale == f"{name}_scale"
            other = "integers without scales of a known kind"
            raise self._refused(name, "INT8 (compressed-tensors int-quantized)" if int8 else other)
        if scales.shapes[scale] != (*outer, columns // 32):
            raise self._refused(name, f"MXFP4 with scales {list(scales.shapes[scale])}")

        def read(row: int | None) -> Float32:
            return _checked(name, mxfp4(file.codes(name, row), scales.codes(scale, row)))

        return Stored(file.file, (*outer, columns), read, "mxfp4", (name, scale))

    def _packed(self, name: str) -> Stored:
        """compressed-tensors: words [n, ⌈k / 8⌉] of codes + 8, weight_scale [n, groups]."""
        weight = name.removesuffix("_packed")
        scale, size, index = (f"{weight}_{word}" for word in ("scale", "shape", "g_idx"))
        file = self._files[name]
        if file.dtype(name) == "U8":
            return self._mxfp4(name)
        if file.dtype(name) != "I32" or len(file.shapes[name]) != 2:
            raise self._refused(name, "compressed-tensors, not INT4 in words of 32 bits")
        rows, columns = self._matrix(name, size)
        scales = self._files.get(scale)
        found = scales.shapes[scale] if scales else ()
        group = self._group(columns, found[-1]) if found[:1] == (rows,) else 0
        if not group:
            raise self._refused(name, f"compressed-tensors without scales [{rows}, groups]")

        def read(row: int | None, rounded: _Rounding = _unrounded) -> Float32:
            if size in self._files and self._files[size].codes(size).tolist() != [rows, columns]:
                raise self._refused(name, f"compressed-tensors, unlike [{rows}, {columns}]")
            values = int4(file.codes(name, row))[..., :columns]
            each = self._groups(index, columns, group)
            return _checked(name, values * rounded(self._scales(scale, row))[..., each])

        spent = tuple(each for each in (scale, size, index) if each in self._files)
        return _int4(file, (rows, columns), read, group, (name, *spent))

    def _matrix(self, name: str, size: str) -> tuple[int, int]:
        """Returns rows and columns, which a matrix's first words of this shape tell."""
        rows, words = form = self._files[name].shapes[name]
        if form not in self._shapes:
            known = self._files[size].codes(size).tolist() if size in self._files else []
            self._shapes[form] = (rows, int(known[1])) if len(known) == 2 else (rows, 8 * words)
        columns = self._shapes[form][1]
        if -(-columns // 8) != words:
            raise self._refused(name, f"compressed-tensors, other than 4 bits of {columns} columns")
        return rows, columns

    def _group(self, columns: int, groups: int) -> int:
        """Returns the columns of one scale; 0 if the groups do not fit."""
        claimed = self._settings.group
        if claimed and -(-columns // claimed) == groups:
            return claimed
        return columns // groups if groups and not columns % groups else 0

    def _gptq(self, name: str, stem: str) -> Stored:
        """GPTQ: words [k / 8, n], scales [groups, n], zero points [groups, n / 8] in words."""
        scale, zeros, index = (f"{stem}.{word}" for word in ("scales", "qzeros", "g_idx"))
        file, scales = self._files[name], self._files.get(scale)
        columns, rows = 8 * file.shapes[name][0], file.shapes[name][-1]
        if scales is None or zeros not in self._files or scales.shapes[scale][-1] != rows:
            packs_outputs = scales is not None and scales.shapes[scale][-1] == 8 * rows
            raise self._refused(name, "AWQ" if packs_outputs else "GPTQ of another form")
        stored_index = self._files[index].shapes[index] if index in self._files else (columns,)
        size = self._group(columns, scales.shapes[scale][0])
        if stored_index != (columns,) or not size:
            raise self._refused(name, "GPTQ of other than 4 bits")

        def read(row: int | None, rounded: _Rounding = _unrounded) -> Float32:
            points = nibbles(self._files[zeros].codes(zeros))[:, :rows]
            if not any(np.all(points == zero) for zero in self._settings.zeros):
                raise self._refused(name, "GPTQ with zero points (not symmetric)")
            values = int4(file.codes(name).T)
            factors = rounded(self._scales(scale))[self._groups(index, columns, size)].T
            values = _checked(name, values * factors)
            return values if row is None else values[row]

        spent = tuple(each for each in (scale, zeros, index) if each in self._files)
        return _int4(file, (rows, columns), read, size, (name, *spent))

    def _groups(self, index: str, columns: int, size: int) -> Codes:
        """Returns each column's group: as the file says (activation order), or in order."""
        if index not in self._files:
            return np.arange(columns) // size
        return self._files[index].codes(index)


def _int4(
    file: RawFile,
    shape: tuple[int, int],
    read: Callable[..., Float32],
    group: int,
    spent: tuple[str, ...],
) -> Stored:
    """Groups that the engine has no format for are plain numbers."""
    if group % _GROUP:
        return Stored(file.file, shape, read, "", spent)
    return Stored(file.file, shape, read, "int4", spent, lambda row: read(row, to_bf16))


def find_tensors(files: Mapping[str, RawFile], config: Mapping[str, Any]) -> dict[str, Stored]:
    """Returns the tensors of a checkpoint by name; quantised ones under the name of the weight,
    without their scales. ``files``: by the names on disk. ``config``: config.json's content.

    Raises ``CannotVerifyError`` with the name of a scheme that cannot be read.
    """
    finder = _Finder(files, config)
    finder.check_schemes()
    found: dict[str, Stored] = {}
    spent: set[str] = set()
    for name in files:
        if name in spent:
            continue
        plain, stored = finder.find(name)
        spent |= set(stored.spent)
        found[plain] = stored
    return {name: each for name, each in found.items() if name not in spent or each.family}


def _checked(name: str, values: Codes) -> Float32:
    result: Float32 = values.astype(np.float32, copy=False)
    if not np.isfinite(result).all():
        raise CannotVerifyError(f"{name} has codes or scales that are no finite numbers.")
    return result
