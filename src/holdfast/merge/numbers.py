"""The number formats of safetensors files, decoded to and encoded from numpy arrays.

bfloat16 has no numpy type; its bits live in uint16 arrays here, and a shift turns them into float32. That costs
0.3 ns a number and spares merging the seconds and the memory that importing torch takes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdfast.errors import UserError

Array = NDArray[Any]

# safetensors name -> (numpy storage type, bytes an element)
STORAGE: dict[str, tuple[type[np.generic], int]] = {
    "F64": (np.float64, 8),
    "F32": (np.float32, 4),
    "F16": (np.float16, 2),
    "BF16": (np.uint16, 2),
    "I64": (np.int64, 8),
    "I32": (np.int32, 4),
    "I16": (np.int16, 2),
    "I8": (np.int8, 1),
    "U64": (np.uint64, 8),
    "U32": (np.uint32, 4),
    "U16": (np.uint16, 2),
    "U8": (np.uint8, 1),
    "BOOL": (np.bool_, 1),
    "F8_E4M3": (np.uint8, 1),
    "F8_E5M2": (np.uint8, 1),
    "C64": (np.complex64, 8),
}
MERGEABLE = ("F64", "F32", "F16", "BF16")
TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64",
}  # fmt: skip
FROM_TORCH = {name: code for code, name in TORCH_NAMES.items()}


def storage(dtype: str) -> type[np.generic]:
    """Numpy type that holds one element's bits."""
    return STORAGE[dtype][0]


def itemsize(dtype: str) -> int:
    """Bytes an element."""
    return STORAGE[dtype][1]


def parse_dtype(name: str) -> str:
    """``float32``, ``torch.bfloat16`` or ``BF16`` -> the safetensors name of a mergeable type."""
    code = FROM_TORCH.get(name.removeprefix("torch."), name)
    if code not in MERGEABLE:
        options = ", ".join(TORCH_NAMES[known] for known in MERGEABLE)
        raise UserError(f"dtype '{name}' can't be merged into; valid: {options}.")
    return code


def working_type(dtype: str) -> type[np.floating[Any]]:
    """What formulas see: one precision above the result, float32 for 16-bit numbers, float64 for 32 and 64.

    With the spare bits a weighted mean of equal numbers rounds back to exactly that number (64-bit numbers have none).
    """
    return np.float32 if dtype in ("F16", "BF16") else np.float64


def decode(raw: Array, dtype: str, out: Array) -> Array:
    """Write the numbers stored in ``raw`` to ``out`` (float32 or float64) and return it."""
    if dtype != "BF16":
        np.copyto(out, raw, casting="unsafe")
        return out
    target = out if out.dtype == np.float32 else np.empty(raw.shape, np.float32)
    bits = target.view(np.uint32)
    bits[...] = raw
    np.left_shift(bits, 16, out=bits)
    if target is not out:
        out[...] = target
    return out


def encode(values: Array, dtype: str, out: Array, spare: Array | None = None) -> Array:
    """Round ``values`` to ``dtype``, to nearest, ties to even; write the result to ``out`` and return it.

    ``values`` may be overwritten. A finite number too large for ``dtype`` becomes infinite, as IEEE 754 has it.
    """
    if dtype != "BF16":
        with np.errstate(over="ignore"):
            np.copyto(out, values, casting="unsafe")
        return out
    if values.dtype != np.float32:
        values = _round_to_odd(values)
    bits = values.view(np.uint32)
    carry = np.empty_like(bits) if spare is None else spare.view(np.uint32)[: bits.size].reshape(bits.shape)
    np.right_shift(bits, 16, out=carry)
    np.bitwise_and(carry, 1, out=carry)
    np.add(carry, 0x7FFF, out=carry)
    np.add(bits, carry, out=bits)
    np.right_shift(bits, 16, out=bits)
    np.copyto(out, bits, casting="unsafe")
    return out


def _round_to_odd(values: Array) -> Array:
    """float64 -> float32 such that rounding on to bfloat16 equals rounding once (no double rounding)."""
    with np.errstate(over="ignore"):
        near = values.astype(np.float32)
    bits = near.view(np.uint32)
    inexact = near != values
    # Step back to the truncated value, then set the last bit: it now records that something was cut off.
    away = inexact & (np.abs(near.astype(np.float64)) > np.abs(values))
    bits[away] -= 1
    bits[inexact] |= 1
    return near


def finite(values: Array) -> bool:
    """Is every number finite? Without an array for the answers where the bits tell it: they rise with \\|x\\|."""
    if values.dtype != np.float32:
        return bool(np.isfinite(values).all())
    positive, any_sign = values.view(np.int32), values.view(np.uint32)  # as integers: the largest above 0, and below 0
    return bool(positive.max(initial=0) < 0x7F800000 and any_sign.max(initial=0) < 0xFF800000)


def magnitude_bits(values: Array, out: Array) -> Array:
    """Bits of \\|values\\| as float32 in a uint32 array: for floats without sign, bit order is number order."""
    if values.dtype == np.float32:
        return np.bitwise_and(values.view(np.uint32), 0x7FFFFFFF, out=out)
    with np.errstate(over="ignore"):
        np.copyto(out.view(np.float32), values, casting="unsafe")
    return np.bitwise_and(out, 0x7FFFFFFF, out=out)
