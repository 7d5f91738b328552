"""Dtypes of PyTorch and numpy, as safetensors files name them."""

from __future__ import annotations

from typing import Any

# As PyTorch and numpy name dtypes, and as safetensors files do.
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


def dtype_name(name: str, dtype: Any) -> str:
    """A dtype of PyTorch or numpy, as safetensors files name it."""
    text = getattr(dtype, "name", None) or str(dtype).rpartition(".")[2]
    if text not in DTYPES:
        raise ValueError(
            f"tensor `{name}`: {dtype} cannot be stored in safetensors files: name it in `leave_out`, or convert it"
        )
    return DTYPES[text]


def stored_name(dtype: Any) -> str | None:
    """A dtype of PyTorch or numpy, or its name, as safetensors files have it.

    Raises:
        ValueError: for one that averages cannot have.
    """
    if dtype is None:
        return None
    text = str(getattr(dtype, "__name__", None) or getattr(dtype, "name", None) or dtype).rpartition(".")[2]
    short = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "f64": "float64"}
    stored = DTYPES.get(short.get(text.lower(), text), text)
    if stored not in ("F32", "F16", "BF16", "F64"):
        raise ValueError(f"dtype {dtype}: averages can be float32, bfloat16, float16 or float64")
    return stored
