"""Names of dtypes in PyTorch, NumPy and safetensors files."""

from __future__ import annotations

from typing import Any

DTYPES = {
    "float32": "F32",
    "float64": "F64",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
}
"""Names of dtypes in PyTorch and NumPy, each with its name in safetensors files."""

PAIRS = {"complex32": "F16", "complex64": "F32", "complex128": "F64"}
"""Dtype of the real and the imaginary part, which are stored along a last dimension of size 2."""

_AVERAGED = ("F32", "F16", "BF16", "F64")
_SHORT = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "f64": "float64"}


def dtype_name(name: str, dtype: Any) -> str:
    """Returns the name of a tensor's dtype in safetensors files.

    Args:
        name: The tensor's name, for the error.
        dtype: A dtype of PyTorch or NumPy.

    Raises:
        ValueError: If safetensors files have no such dtype.
    """
    text = dtype_text(dtype)
    if text not in DTYPES:
        raise ValueError(
            f"tensor `{name}`: {dtype} cannot be stored in safetensors files: name it in `leave_out`, or convert it"
        )
    return DTYPES[text]


def lent_dtype_name(name: str, dtype: Any, is_native: bool = False) -> str:
    """Returns the name of the dtype in which a tensor is lent.

    Args:
        name: The tensor's name, for the error.
        dtype: A dtype of PyTorch or NumPy.
        is_native: Lend complex numbers as such if safetensors files have them, not as pairs of reals.

    Raises:
        ValueError: If safetensors files have no such dtype.
    """
    text = dtype_text(dtype)
    return PAIRS[text] if text in PAIRS and not (is_native and text in DTYPES) else dtype_name(name, dtype)


def dtype_text(dtype: Any) -> str:
    """Returns the name of a dtype of PyTorch or NumPy, such as `float32`."""
    return getattr(dtype, "name", None) or str(dtype).rpartition(".")[2]


def average_dtype_name(dtype: Any) -> str | None:
    """Returns the name in safetensors files of a dtype that averages can have.

    Args:
        dtype: A dtype of PyTorch or NumPy, or its name; None stays None.

    Raises:
        ValueError: If averages cannot have the dtype.
    """
    if dtype is None:
        return None
    text = str(getattr(dtype, "__name__", None) or getattr(dtype, "name", None) or dtype).rpartition(".")[2]
    stored = DTYPES.get(_SHORT.get(text.lower(), text), text)
    if stored not in _AVERAGED:
        raise ValueError(f"dtype {dtype}: averages can be float32, bfloat16, float16 or float64")
    return stored
