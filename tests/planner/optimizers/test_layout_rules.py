"""The layout rules: blocks of Adam-mini, selection of MicroAdam, ranks of Adapprox, the matrices of Muon."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optplan.planner.optimizers.adam_mini_blocks import Partition, blocks_of, partition
from optplan.planner.optimizers.adam_mini_work import partial_sum_bytes
from optplan.planner.optimizers.adapprox import matrix_shape, max_rank
from optplan.planner.optimizers.base import OptimizerContext
from optplan.planner.optimizers.launch import launch_table_bytes
from optplan.planner.optimizers.micro_adam import select
from optplan.planner.optimizers.micro_adam_official import reference_block
from optplan.planner.optimizers.muon import is_hidden_matrix
from optplan.planner.optimizers.registry import build_optimizer
from optplan.planner.tensors import HeadLayout, Parameter

FUSED = HeadLayout(64, num_query_heads=12, num_key_heads=12, num_value_heads=12)
GROUPED = HeadLayout(64, num_query_heads=71, num_key_heads=1, num_value_heads=1, interleaved=True)
BF16 = OptimizerContext("bfloat16", "bfloat16")


def _parameter(role: Any, shape: tuple[int, ...], **more: Any) -> Parameter:
    return Parameter(role, shape, role, more.pop("module", "linear"), **more)


BLOCKS = [
    (_parameter("token_embedding", (50257, 768), module="embedding"), Partition("row", 50257)),
    (_parameter("position_embedding", (1024, 768), module="embedding"), Partition("row", 1024)),
    (_parameter("output_head", (50257, 768)), Partition("row", 50257)),
    (_parameter("query", (4096, 1024), heads=HeadLayout(128, num_query_heads=32)), Partition("head", 32)),
    (_parameter("key", (512, 4096), heads=HeadLayout(128, num_key_heads=4)), Partition("head", 4)),
    (_parameter("value", (512, 4096), heads=HeadLayout(128, num_value_heads=4)), Partition("row", 512)),
    (_parameter("fused_qkv", (768, 2304), module="conv1d", output_axes=(1,), heads=FUSED), Partition("fused_qkv", 792)),
    (_parameter("fused_qkv", (4672, 4544), heads=GROUPED), Partition("fused_qkv", 71 + 1 + 64)),
    (_parameter("attention_output", (1024, 4096)), Partition("row", 1024)),
    (_parameter("mlp", (768, 3072), module="conv1d", output_axes=(1,)), Partition("row", 3072)),
    (_parameter("mlp", (8, 28672, 4096), module="experts", output_axes=(0, 1)), Partition("row", 8 * 28672)),
    (_parameter("router", (64, 2048), module="parameter"), Partition("row", 64)),
    (_parameter("patch_embedding", (768, 3, 16, 16), module="conv2d"), Partition("row", 768)),
    (_parameter("bias", (2304,), heads=FUSED), Partition("element", 2304)),
    (_parameter("norm", (4096,), module="rms_norm"), Partition("tensor", 1)),
    (_parameter("other", (100, 37)), Partition("tensor", 1)),
    (_parameter("other", (), module="parameter"), Partition("tensor", 1)),
]


@pytest.mark.parametrize(("parameter", "expected"), BLOCKS)
def test_adam_mini_partitions_by_structure(parameter: Parameter, expected: Partition) -> None:
    assert partition(parameter) == expected
    second = build_optimizer("adam-mini").state(parameter, BF16)[2]
    assert (second.name, second.dtype, second.num_bytes) == ("exp_avg_sq", "float32", 4 * expected.num_blocks)


@pytest.mark.parametrize(
    ("parameter", "num_bytes"),
    [
        (_parameter("mlp", (11008, 4096)), 0),
        (_parameter("bias", (4096,)), 0),
        # A block of up to 16,384 elements is one program's, so nothing is left to sum.
        (_parameter("norm", (4096,)), 0),
        (_parameter("mlp", (8192, 28672)), 8192 * 2 * 4),
        # 32 heads of 524,288 elements, summed in 32 chunks each.
        (_parameter("query", (4096, 4096), heads=HeadLayout(128, num_query_heads=32)), 32 * 32 * 4),
        # Neurons that are columns: a sum for each column of each tile of 128 rows.
        (_parameter("fused_qkv", (768, 2304), output_axes=(1,), heads=FUSED), 2304 * 6 * 4),
        (_parameter("mlp", (3000, 768), output_axes=(1,)), 768 * 24 * 4),
        # 24 heads of 64 x 768 elements, summed in 3 chunks each; the value rows need none.
        (_parameter("fused_qkv", (2304, 768), heads=FUSED), 24 * 3 * 4),
        (_parameter("other", (100, 37)), 0),
        (_parameter("other", (1000, 37)), 3 * 4),
    ],
)
def test_adam_mini_sums_large_blocks_in_chunks(parameter: Parameter, num_bytes: int) -> None:
    assert partial_sum_bytes(blocks_of(parameter)) == num_bytes


@pytest.mark.parametrize(
    ("gpu", "block"),
    [("v100", 12160), ("t4", 8064), ("a100", 20864), ("rtx", 12672), ("h100", 29056), ("h200", 29056), ("b200", 29056)],
)
def test_the_official_block_follows_from_shared_memory(gpu: str, block: int) -> None:
    assert reference_block(gpu) == block


# Bytes of each state tensor in bfloat16, from runs of ista-daslab-optimizers 1.1.15 on stand-ins for its CUDA kernels.
@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        ((250, 300), {}, {"I": 15020, "V": 15020, "error": 37500, "min_vals": 2344, "max_vals": 2344}),
        ((100, 37), {}, {"I": 740, "V": 740, "error": 1850, "min_vals": 116, "max_vals": 116}),
        ((64,), {}, {"I": 20, "V": 20, "error": 32, "min_vals": 4, "max_vals": 4}),
        ((29056, 2), {}, {"I": 11640, "V": 11640, "error": 29056, "min_vals": 1818, "max_vals": 1818}),
        ((1,), {}, {"I": 20, "V": 20, "error": 1, "min_vals": 4, "max_vals": 4}),
        ((250, 300), {"bucket": 100000}, {"I": 15020, "V": 15020, "error": 37500, "min_vals": 4, "max_vals": 4}),
        (
            (250, 300),
            {"alpha": -2},
            {"quant_err": 150000, "I": 15020, "V": 15020, "error": 37500, "min_vals": 2344, "max_vals": 2344},
        ),
    ],
)
def test_the_official_micro_adam_keeps(shape: tuple[int, ...], options: Any, expected: dict[str, int]) -> None:
    model = build_optimizer("micro-adam", {"implementation": "official"} | options)
    assert {s.name: s.num_bytes for s in model.state(_parameter("mlp", shape), BF16)} == expected


# The step over (250, 300), (100, 37), (64,), (29056, 2) and (1,) peaks at two blocks of 29056: 122,044 bytes of torch's
# tensors, from the same runs, and top-k buffers for 58 thread blocks: 58 x (512 + 8) + 2 x (1024 + 18) + 1279.
@pytest.mark.parametrize("options", [{}, {"bucket": 100000}, {"alpha": 0.1}])
def test_the_official_micro_adam_allocates(options: Any, step_peak: Any) -> None:
    parameters = [_parameter("mlp", shape) for shape in ((250, 300), (100, 37), (64,), (29056, 2), (1,))]
    model = build_optimizer("micro-adam", {"implementation": "official"} | options)
    assert step_peak(model, parameters, BF16) == 122_044 + 33_523


def test_the_official_micro_adam_counts_zeros_of_the_error_in_64_bits(step_peak: Any) -> None:
    model = build_optimizer("micro-adam", {"implementation": "official", "alpha": -2})
    # The zeros as booleans, as integers, their number, and the square of the norm.
    assert step_peak(model, [_parameter("mlp", (250, 300))], BF16) == 75_000 * 9 + 8 + 2


@pytest.mark.parametrize(
    ("options", "context", "shape", "reason"),
    [
        ({}, BF16, (3, 4), None),
        (
            {},
            OptimizerContext("float32", "bfloat16"),
            (3, 4),
            "the official micro-adam needs bfloat16 parameters and gradients, got float32",
        ),
        (
            {"density": 0.05},
            BF16,
            (3, 4),
            "the official micro-adam selects at most 1024 of a block, got density 0.05 of 29056, which is 1453",
        ),
        (
            {"bucket": 63},
            BF16,
            (3, 4),
            "the official micro-adam packs two codes a byte and needs an even bucket, got 63",
        ),
        ({}, BF16, (0,), "the official micro-adam divides by zero on the empty tensor mlp"),
    ],
)
def test_the_official_micro_adam_has_limits(options: Any, context: Any, shape: Any, reason: str | None) -> None:
    model = build_optimizer("micro-adam", {"implementation": "official"} | options)
    assert model.unsupported_reason([_parameter("mlp", shape)], context) == reason


@given(numel=st.integers(0, 10**7), block=st.integers(64, 32768), parts=st.integers(1, 1000))
def test_micro_adam_selects_of_every_block_and_never_more_than_it_has(numel: int, block: int, parts: int) -> None:
    selection = select(numel, block=block, density=parts / 1000)
    assert selection.num_full_blocks * block + selection.tail_numel == numel
    assert selection.num_blocks == -(-numel // block)
    assert selection.num_selected_block == -(-parts * block // 1000)
    assert selection.num_selected_tail == -(-parts * selection.tail_numel // 1000)
    assert selection.num_blocks <= selection.num_selected <= numel


@pytest.mark.parametrize(
    ("shape", "matrix", "rank"),
    [
        ((4096, 4096), (4096, 4096), 1024),
        ((100, 37), (100, 37), 9),
        ((3, 5), (3, 5), 1),
        ((768, 3, 16, 16), (768, 768), 192),
        ((8, 14336, 4096), (8, 14336 * 4096), 2),
        ((1, 1, 768), None, None),
        ((768, 1), None, None),
        ((768,), None, None),
        ((), None, None),
    ],
)
def test_adapprox_factors_matrices(shape: tuple[int, ...], matrix: Any, rank: int | None) -> None:
    parameter = _parameter("mlp", shape)
    assert matrix_shape(parameter) == matrix
    states = {s.name: s.shape for s in build_optimizer("adapprox").state(parameter, BF16)}
    if matrix is None:
        assert states == {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
    else:
        assert max_rank(*matrix) == rank
        factors = {"q_factor": (matrix[0], rank), "u_factor": (matrix[1], rank)}
        assert states == {"step": (), "exp_avg": shape} | factors


@given(rank=st.integers(1, 2**20), rows=st.integers(2, 300), columns=st.integers(2, 300))
def test_adapprox_lies_between_its_ends_at_any_rank(rank: int, rows: int, columns: int) -> None:
    parameter = _parameter("mlp", (rows, columns))
    least, given_rank, most = (
        sum(s.num_bytes for s in build_optimizer("adapprox", {"rank": r}).state(parameter, BF16))
        for r in ("min", rank, "max")
    )
    assert least <= given_rank <= most
    assert given_rank == 4 + 2 * rows * columns + 4 * (rows + columns) * max(1, min(rank, min(rows, columns) // 4))


@pytest.mark.parametrize(
    ("role", "shape", "taken"),
    [
        ("mlp", (11, 7), True),
        ("query", (8, 8), True),
        ("router", (4, 8), True),
        ("other", (4, 8), True),
        ("token_embedding", (11, 7), False),
        ("position_embedding", (11, 7), False),
        ("output_head", (11, 7), False),
        ("mlp", (2, 11, 7), False),
        ("patch_embedding", (8, 3, 2, 2), False),
        ("norm", (8,), False),
    ],
)
def test_muon_takes_hidden_matrices_and_leaves_the_rest_to_adamw(
    role: Any, shape: tuple[int, ...], taken: bool
) -> None:
    parameter = _parameter(role, shape)
    assert is_hidden_matrix(parameter) is taken
    names = [s.name for s in build_optimizer("muon").state(parameter, BF16)]
    assert names == (["momentum_buffer"] if taken else ["step", "exp_avg", "exp_avg_sq"])


def test_our_kernels_allocate_a_launch_table_and_little_else(step_peak: Any) -> None:
    heads = HeadLayout(128, num_query_heads=32)
    tensors = [
        Parameter("embed", (32000, 4096), "token_embedding", "embedding"),
        Parameter("query", (4096, 4096), "query", "linear", heads=heads),
        Parameter("norm", (4096,), "norm", "rms_norm"),
    ]
    chunks = 2000 + 256 + 1  # of 65,536 elements
    table = 3 * (4 + 2) * 8 + chunks * 12
    assert launch_table_bytes(tensors, num_lists=4) == table
    assert step_peak(build_optimizer("adamw", {"implementation": "optplan"}), tensors, BF16) == table
    # Fourteen words a tensor; chunks of 16 embedding rows, 32 of each head, and the norm; each head.
    words = 3 * 14 + (2000 + 32 * 32 + 1) * 2 + 32 * 4
    assert step_peak(build_optimizer("adam-mini"), tensors, BF16) == words * 8 + 32 * 32 * 4
    # Seven pointers a tensor and the two other columns; candidates are gathered in the window.
    assert step_peak(build_optimizer("micro-adam"), tensors, BF16) == 3 * (7 + 2) * 8 + chunks * 12
    # 30 fields and one program for the norm, in a table that is there until the norm's turn. Three sketches of the
    # embedding, a Gram matrix and its factor: in plain torch at a rank this high.
    norm = 30 * 8 + 4
    expected = norm + 4 * (3 * 32000 * 1024 + 2 * 1024 * 1024)
    assert step_peak(build_optimizer("adapprox"), tensors, BF16) == expected
    # 30 fields a matrix; programs of both passes, and 63 + 8 that share the factors. Scratch: sums, four scales, 32
    # peaks, a partial Gram matrix a share and one more, U in two bf16 parts, Q' in bf16, and the partial sketches: two
    # across each matrix, 16 down the embedding, two down the query. The norm's table begins at the next 16 bytes.
    table = 2 * 30 * 8 + (2 * 500 + 16 * 64 + 2 * 64 + 2 * 64 + 63 + 8) * 4
    words = 2 * 500 + 2 * 64 + 2 * (4 + 32) + (63 + 8 + 2) * 32 * 32 + 2 * 32 * 4096 + 16 * (32000 + 4096)
    words += 32 * (2 * 32000 + 2 * 4096 + 16 * 4096 + 2 * 4096)
    assert (
        step_peak(build_optimizer("adapprox", {"rank": "32"}), tensors, BF16) == -(-table // 16) * 16 + norm + 4 * words
    )
