"""Autocast's rules for CUDA, applied to tensors without contents.

Source: pytorch `aten/src/ATen/autocast_mode.h` (the lists of operations), `autocast_mode.cpp` (`cached_cast`: fp32
parameters are cast once until autocast is left). Arguments are cast from the last to the first, as the compiler of the
released builds evaluates them.
"""

from __future__ import annotations

from typing import Any

import torch

_LOWER = (
    "_convolution conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d.input conv_transpose3d.input "
    "convolution prelu addmm addmv addr matmul einsum mm mv linalg_vecdot linear addbmm baddbmm bmm chain_matmul "
    "linalg_multi_dot _thnn_fused_lstm_cell _thnn_fused_gru_cell lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell "
    "scaled_dot_product_attention"
)
_FLOAT = (
    "acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow.Tensor_Scalar "
    "pow.Tensor_Tensor pow.Scalar softplus layer_norm native_layer_norm group_norm frobenius_norm.dim nuclear_norm "
    "nuclear_norm.dim cosine_similarity poisson_nll_loss cosine_embedding_loss nll_loss nll_loss2d "
    "hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss mse_loss margin_ranking_loss "
    "multilabel_margin_loss soft_margin_loss triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits "
    "dist pdist cdist renorm logsumexp upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d "
    "upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d"
)
_FLOAT_RESULT = (
    "prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm linalg_matrix_norm sum "
    "sum.dim_IntList"
)
_WIDEST = "addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add"

CAST_LISTS: dict[str, tuple[str, ...]] = {
    "lower": tuple(_LOWER.split()),
    "float": tuple(_FLOAT.split()),
    "float result": tuple(_FLOAT_RESULT.split()),
    "widest": tuple(_WIDEST.split()),
}
"""Operations by what autocast does to their arguments: casts to the lower dtype or to fp32, asks for an fp32 result, or
casts to the widest dtype among them."""

_cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}


def autocast_dtype() -> torch.dtype:
    """The lower dtype of the current autocast."""
    return torch.get_autocast_dtype("cuda")


def clear_cache() -> None:
    """Forget the parameters that were cast, as the end of the outermost autocast does."""
    _cache.clear()


def cast_arguments(
    policy: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of an operation as autocast hands them on."""
    if policy == "float result":
        return args, _with_float_result(args, kwargs)
    dtype = {"lower": autocast_dtype(), "float": torch.float32}.get(policy) or _widest(args)
    named = {key: _cast(value, dtype) for key, value in reversed(kwargs.items())}
    return tuple(_cast(value, dtype) for value in reversed(args))[::-1], named


def _with_float_result(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if not _is_eligible(args[0]) or any(isinstance(value, torch.dtype) for value in (*args, *kwargs.values())):
        return kwargs
    return {**kwargs, "dtype": torch.float32}


def _widest(args: tuple[Any, ...]) -> torch.dtype:
    tensors = [x for value in args for x in (value if isinstance(value, list | tuple) else (value,))]
    widths = {x.dtype for x in tensors if _is_eligible(x)}
    return torch.float32 if torch.float32 in widths else autocast_dtype()


def _is_eligible(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.device.type == "meta"
        and value.dtype != torch.float64
    )


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list | tuple):
        return [_cast(part, dtype) for part in value]
    if not _is_eligible(value) or value.dtype == dtype:
        return value
    if not _is_cached(value, dtype):
        return value.to(dtype)
    if id(value) not in _cache:
        _cache[id(value)] = (value, value.to(dtype))
    return _cache[id(value)][1]


def _is_cached(value: torch.Tensor, dtype: torch.dtype) -> bool:
    return (
        dtype == autocast_dtype()
        and value.dtype == torch.float32
        and value.requires_grad
        and value.is_leaf
        and not value._is_view()
        and torch.is_autocast_cache_enabled()
    )
