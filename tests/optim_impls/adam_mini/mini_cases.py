"""Tensors of every kind of block, small and odd, with their roles; shared by the tests of Adam-mini."""

from __future__ import annotations

from optplan.planner.tensors import HeadLayout, ModuleKind, Parameter, Role


def _parameter(
    role: Role,
    shape: tuple[int, ...],
    heads: HeadLayout | None = None,
    *,
    output_axes: tuple[int, ...] = (0,),
    module: ModuleKind = "linear",
) -> Parameter:
    return Parameter(role, shape, role, module, output_axes, heads)


FUSED = HeadLayout(5, num_query_heads=4, num_key_heads=2, num_value_heads=2)
INTERLEAVED = HeadLayout(5, num_query_heads=4, num_key_heads=2, num_value_heads=2, interleaved=True)

CASES: dict[str, tuple[Parameter, int]] = {
    "bias": (_parameter("bias", (13,)), 13),
    "long bias": (_parameter("bias", (4097,)), 4097),
    "rows": (_parameter("mlp", (7, 33)), 7),
    "one row": (_parameter("mlp", (1, 255)), 1),
    "rows of one": (_parameter("token_embedding", (63, 1)), 63),
    "many short rows": (_parameter("token_embedding", (4097, 3)), 4097),
    "wide rows": (_parameter("mlp", (3, 4097)), 3),
    "rows of several programs": (_parameter("output_head", (3, 20_001)), 3),
    "rows of two chunks": (_parameter("mlp", (71, 1000)), 71),
    "short rows of two chunks": (_parameter("value", (175, 384)), 175),
    "patches": (_parameter("patch_embedding", (6, 3, 4, 5), module="conv2d"), 6),
    "positions": (_parameter("position_embedding", (1, 11, 12), output_axes=(0, 1)), 11),
    "query": (_parameter("query", (24, 16), HeadLayout(6, num_query_heads=4)), 4),
    "key of many elements": (_parameter("key", (30, 1700), HeadLayout(15, num_key_heads=2)), 2),
    "fused": (_parameter("fused_qkv", (40, 16), FUSED), 4 + 2 + 10),
    "interleaved": (_parameter("fused_qkv", (40, 16), INTERLEAVED), 4 + 2 + 10),
    "fused of many elements": (_parameter("fused_qkv", (40, 4097), FUSED), 4 + 2 + 10),
    "transposed rows": (_parameter("mlp", (150, 33), output_axes=(1,), module="conv1d"), 33),
    "transposed, aligned": (_parameter("mlp", (64, 256), output_axes=(1,), module="conv1d"), 256),
    "transposed fused": (_parameter("fused_qkv", (129, 40), FUSED, output_axes=(1,), module="conv1d"), 16),
    "transposed interleaved": (_parameter("fused_qkv", (9, 40), INTERLEAVED, output_axes=(1,), module="conv1d"), 16),
    "transposed query": (
        _parameter("query", (20, 24), HeadLayout(6, num_query_heads=4), output_axes=(1,), module="conv1d"),
        4,
    ),
    "experts": (_parameter("mlp", (3, 10, 7), output_axes=(0, 1), module="experts"), 30),
    "transposed experts": (_parameter("mlp", (3, 10, 7), output_axes=(0, 2), module="experts"), 21),
    "norm": (_parameter("norm", (65,)), 1),
    "scalar": (_parameter("other", ()), 1),
    "large convolution": (_parameter("other", (30, 25, 5, 5), module="conv2d"), 1),
}
"""By name: a parameter, and how many second moments the paper's partition gives it."""
