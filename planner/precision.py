"""Precision policies: which dtype the parameters, gradients, master weights and optimizer state have."""

from __future__ import annotations

import msgspec

from optplan.planner.dtypes import Dtype


class PrecisionPolicy(msgspec.Struct, frozen=True):
    """The dtypes of the resident tensors under one `--precision`.

    Attributes:
        parameter_dtype: Dtype of the parameters that forward and backward use.
        gradient_dtype: Dtype of the gradients that backward leaves in `p.grad`.
        master_dtype: Dtype of the master weights that the optimizer updates instead of the parameters, or None.
        summary: The policy in words.
    """

    parameter_dtype: Dtype
    gradient_dtype: Dtype
    master_dtype: Dtype | None
    summary: str

    @property
    def updated_dtype(self) -> Dtype:
        """Dtype of the tensors that the optimizer updates."""
        return self.master_dtype or self.parameter_dtype


FULLY_SHARDED_MIXED = PrecisionPolicy(
    "float32", "float32", None, "fp32 shards, gradients and state; parameters gathered and used in bf16"
)
"""What `mixed` means where parameters are sharded: `MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=fp32)`."""

PRECISIONS: dict[str, PrecisionPolicy] = {
    "bf16": PrecisionPolicy("bfloat16", "bfloat16", None, "parameters, gradients and state in bf16"),
    "fp32": PrecisionPolicy("float32", "float32", None, "everything in fp32"),
    "amp": PrecisionPolicy("float32", "float32", None, "fp32 parameters, gradients and state under bf16 autocast"),
    "mixed": PrecisionPolicy(
        "bfloat16", "bfloat16", "float32", "bf16 parameters and gradients; fp32 master weights and state"
    ),
    "fp16-amp": PrecisionPolicy("float32", "float32", None, "fp32 parameters, gradients and state under fp16 autocast"),
}
