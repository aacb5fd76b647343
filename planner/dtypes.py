"""Element types by name and their sizes."""

from __future__ import annotations

from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16", "float8_e4m3fn", "int64", "int32", "int16", "int8", "uint8", "bool"]

ITEMSIZE_BYTES: dict[str, int] = {
    "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip

SHORT_NAMES: dict[str, Dtype] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""How `--precision` and `--state-dtype` abbreviate the floating types."""
