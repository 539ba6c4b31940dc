"""Finds codes and scales that together are one tensor, by names and dtypes on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ktrt.audit.reference.formats import e4m3, e8m0, fits, int4, mxfp4, nibbles, spread
from ktrt.audit.reference.tensors import CannotVerifyError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from ktrt.audit.reference.formats import Codes
    from ktrt.audit.reference.tensors import Float32, RawFile

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
_BLOCK = (128, 128)


@dataclass(frozen=True)
class Stored:
    """One tensor, plain or with its scales. ``read``: all of it, or one row of the first dimension,
    in float32. ``family``: the codes' kind; empty for plain numbers. ``spent``: names of its
    tensors on disk besides its own."""

    file: Path
    shape: tuple[int, ...]
    read: Callable[[int | None], Float32]
    family: Family = ""
    spent: tuple[str, ...] = ()


def read_settings(config: Mapping[str, Any]) -> tuple[tuple[int, int], int]:
    """Returns rows and columns of one FP8 scale, and what GPTQ subtracts from zero points on disk:
    1, or 0 in its second version."""
    text = config.get("text_config") or {}
    claims = [each.get(key) for each in (config, text) for key in _KEYS]
    claim = next((each for each in claims if isinstance(each, dict)), {})
    weights = [group.get("weights") or {} for group in (claim.get("config_groups") or {}).values()]
    blocks = [claim.get("weight_block_size"), *(each.get("block_structure") for each in weights)]
    block = next((tuple(map(int, each)) for each in blocks if each), _BLOCK)
    return (block[0], block[1]), int(claim.get("checkpoint_format") != "gptq_v2")


_KEYS = ("quantization_config", "compression_config")


class _Finder:
    """Joins codes and scales; raises ``CannotVerifyError`` with the scheme for other forms."""

    def __init__(self, files: Mapping[str, RawFile], config: Mapping[str, Any]) -> None:
        self._files = files
        self._block, self._zero_offset = read_settings(config)

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
            return name, self._mxfp4(name, f"{stem}.scale")
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

    def _fp8(self, name: str) -> Stored:
        """DeepSeek-V3's weight_scale_inv, compressed-tensors' weight_scale, DeepSeek-V4's scale,
        Mistral's qscale_weight."""
        stem = name.removesuffix("weight")
        names = [f"{name}_scale_inv", f"{name}_scale"]
        names += [f"{stem}scale", f"{stem}qscale_weight"] if stem != name else []
        scale = next((each for each in names if each in self._files), None)
        if scale is None:
            raise self._refused(name, "FP8 without a scale")
        file, shape = self._files[name], self._files[name].shapes[name]
        scale_shape = self._files[scale].shapes[scale]
        if not fits(scale_shape, shape, self._block):
            raise self._refused(
                name, f"FP8 with scales {list(scale_shape)} in {scale}, no blocks of {self._block}"
            )
        is_one = int(np.prod(scale_shape)) == 1

        def read(row: int | None) -> Float32:
            values = e4m3(file.codes(name, row))
            scales = self._scales(scale, None if is_one else row)
            return _checked(name, values * spread(scales, values.shape, self._block))

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

    def _mxfp4(self, name: str, scale: str) -> Stored:
        """DeepSeek-V4's experts: [n, k / 2] and [n, k / 32]."""
        file = self._files[name]
        *outer, columns = file.shapes[name]
        columns *= 1 if file.dtype(name) == "F4" else 2
        scales = self._files.get(scale)
        if scales is None or scales.dtype(scale) not in ("U8", "F8_E8M0"):
            int8 = file.dtype(name) == "I8" and f"{name}_scale" in self._files
            other = "integers without scales of a known name"
            raise self._refused(name, "INT8 (compressed-tensors int-quantized)" if int8 else other)
        if scales.shapes[scale] != (*outer, columns // 32):
            raise self._refused(name, f"MXFP4 with scales {list(scales.shapes[scale])}")

        def read(row: int | None) -> Float32:
            return _checked(name, mxfp4(file.codes(name, row), scales.codes(scale, row)))

        return Stored(file.file, (*outer, columns), read, "mxfp4", (name, scale))

    def _packed(self, name: str) -> Stored:
        """compressed-tensors: words [n, k / 8] of codes + 8, weight_scale [n, groups]."""
        weight = name.removesuffix("_packed")
        scale, size, index = (f"{weight}_{word}" for word in ("scale", "shape", "g_idx"))
        file = self._files[name]
        if file.dtype(name) != "I32" or len(file.shapes[name]) != 2:
            raise self._refused(name, "compressed-tensors, not INT4 in words of 32 bits")
        rows, columns = file.shapes[name][0], 8 * file.shapes[name][1]
        scales = self._files.get(scale)
        groups = scales.shapes[scale][-1] if scales and scales.shapes[scale][:1] == (rows,) else 0
        if not groups or columns % groups:
            raise self._refused(name, f"compressed-tensors without scales [{rows}, groups]")

        def read(row: int | None) -> Float32:
            known = self._files[size].codes(size).tolist() if size in self._files else None
            if known not in (None, [rows, columns]):
                raise self._refused(name, f"compressed-tensors, other than 4 bits of {known}")
            values = int4(file.codes(name, row))
            each = self._groups(index, columns, columns // groups)
            return _checked(name, values * self._scales(scale, row)[..., each])

        spent = tuple(each for each in (scale, size, index) if each in self._files)
        return Stored(file.file, (rows, columns), read, "int4", (name, *spent))

    def _gptq(self, name: str, stem: str) -> Stored:
        """GPTQ: words [k / 8, n], scales [groups, n], zero points [groups, n / 8] in words."""
        scale, zeros, index = (f"{stem}.{word}" for word in ("scales", "qzeros", "g_idx"))
        file, scales = self._files[name], self._files.get(scale)
        columns, rows = 8 * file.shapes[name][0], file.shapes[name][-1]
        if scales is None or zeros not in self._files or scales.shapes[scale][-1] != rows:
            packs_outputs = scales is not None and scales.shapes[scale][-1] == 8 * rows
            raise self._refused(name, "AWQ" if packs_outputs else "GPTQ of another form")
        stored_index = self._files[index].shapes[index] if index in self._files else (columns,)
        if stored_index != (columns,) or columns % scales.shapes[scale][0]:
            raise self._refused(name, "GPTQ of other than 4 bits")
        size = columns // scales.shapes[scale][0]

        def read(row: int | None) -> Float32:
            points = nibbles(self._files[zeros].codes(zeros)) + self._zero_offset
            if not np.all(points == 8):
                raise self._refused(name, "GPTQ with zero points (not symmetric)")
            values = int4(file.codes(name).T)
            factors = self._scales(scale)[self._groups(index, columns, size)].T
            values = _checked(name, values * factors)
            return values if row is None else values[row]

        spent = tuple(each for each in (scale, zeros, index) if each in self._files)
        return Stored(file.file, (rows, columns), read, "int4", (name, *spent))

    def _groups(self, index: str, columns: int, size: int) -> Codes:
        """Returns each column's group: as the file says (activation order), or in order."""
        if index not in self._files:
            return np.arange(columns) // size
        return self._files[index].codes(index)


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
