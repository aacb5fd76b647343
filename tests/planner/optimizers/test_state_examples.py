"""State bytes of five tensors, written out: measured with the packages, or by the papers' formulas."""

from __future__ import annotations

from typing import Any

import pytest

from optplan.planner.errors import ConfigError
from optplan.planner.optimizers.base import OptimizerContext
from optplan.planner.optimizers.registry import build_optimizer
from optplan.planner.tensors import HeadLayout, Parameter

TENSORS = [
    Parameter("model.layers.0.self_attn.q_proj.weight", (4096, 4096), "query", "linear", heads=HeadLayout(128, 32)),
    Parameter("model.embed_tokens.weight", (32000, 4096), "token_embedding", "embedding"),
    Parameter("model.norm.weight", (4096,), "norm", "rms_norm"),
    Parameter("model.layers.0.mlp.up_proj.weight", (11008, 4096), "mlp", "linear"),
    Parameter("mixing.weight", (100, 37), "other", "linear"),
]
OFFICIAL: dict[str, str] = {"implementation": "official"}
FP32, BF16 = "float32", "bfloat16"

# Optimizer, options, dtype; bytes of each of TENSORS, every state counted wherever it lives.
EXAMPLES = [
    ("adamw", {}, FP32, [134217732, 1048576004, 32772, 360710148, 29604]),
    ("adamw", {"implementation": "foreach"}, FP32, [134217732, 1048576004, 32772, 360710148, 29604]),
    ("adamw", {"implementation": "for-loop"}, FP32, [134217732, 1048576004, 32772, 360710148, 29604]),
    ("adamw", {"implementation": "optplan"}, FP32, [134217732, 1048576004, 32772, 360710148, 29604]),
    ("adamw", {}, BF16, [67108868, 524288004, 16388, 180355076, 14804]),
    ("adamw", {"amsgrad": "true"}, FP32, [201326596, 1572864004, 49156, 541065220, 44404]),
    ("sgd", {}, FP32, [67108864, 524288000, 16384, 180355072, 14800]),
    ("sgd", {"momentum": "0"}, FP32, [0, 0, 0, 0, 0]),
    ("lion", {}, FP32, [67108864, 524288000, 16384, 180355072, 14800]),
    # Muon takes the hidden matrices; the embedding and the norm stay with AdamW.
    ("muon", {}, FP32, [67108864, 1048576004, 32772, 180355072, 14800]),
    ("micro-adam", OFFICIAL | {"bucket": "100000"}, BF16, [15110360, 118049444, 3696, 40609028, 3338]),
    ("micro-adam", OFFICIAL, BF16, [16158268, 126236204, 3948, 43425276, 3562]),
    (
        "micro-adam",
        OFFICIAL | {"bucket": "100000", "block": "reference:a100"},
        BF16,
        [15111760, 118060524, 3696, 40612828, 3338],
    ),
    ("micro-adam", OFFICIAL | {"block": "20864"}, BF16, [16159668, 126247284, 3948, 43429076, 3562]),
    # Blocks of 2048 with 21 selected, 10 rows of 4 bytes; half a byte of error, in runs of 8 elements; 4 bytes a bucket
    # of 64; 4 for the step.
    ("micro-adam", {}, BF16, [16318468, 127488004, 3988, 43855876, 3632]),
    ("micro-adam", {}, FP32, [16318468, 127488004, 3988, 43855876, 3632]),
    ("adam-mini", OFFICIAL, FP32, [67108992, 524416000, 16388, 180399104, 14804]),
    ("adam-mini", OFFICIAL, BF16, [33554496, 262208000, 8194, 90199552, 7402]),
    ("adam-mini", OFFICIAL | {"version": "1.0.4"}, FP32, [67108992, 1048576000, 16388, 180355076, 14804]),
    # As the package, with second moments in fp32 and 4 bytes for the step.
    ("adam-mini", {}, FP32, [67108996, 524416004, 16392, 180399108, 14808]),
    ("adam-mini", {}, BF16, [33554564, 262272004, 8200, 90221572, 7408]),
    # The papers' formulas, and 4 bytes for the step.
    ("adapprox", {"rank": "min"}, FP32, [67141636, 524432388, 32772, 180415492, 15352]),
    ("adapprox", {}, FP32, [100663300, 672137220, 32772, 242221060, 19736]),
    ("adapprox", {"rank": "1", "beta1": "0"}, FP32, [32772, 144388, 16388, 60420, 552]),
    ("adapprox", {"rank": "max", "beta1": "0"}, FP32, [33554436, 147849220, 16388, 61865988, 4936]),
    ("adafactor", {}, FP32, [32772, 144388, 16388, 60420, 552]),
    ("adafactor", {"implementation": "transformers"}, FP32, [32772, 144388, 16388, 60420, 552]),
    ("adafactor", {"implementation": "transformers"}, BF16, [32772, 144388, 16388, 60420, 552]),
    (
        "adafactor",
        {"implementation": "transformers", "beta1": "0.9"},
        BF16,
        [67141636, 524432388, 32772, 180415492, 15352],
    ),
]


@pytest.mark.parametrize(("id_", "options", "dtype", "expected"), EXAMPLES)
def test_bytes_of_five_tensors(id_: str, options: dict[str, str], dtype: Any, expected: list[int]) -> None:
    model, context = build_optimizer(id_, options).bind(TENSORS), OptimizerContext(dtype, dtype)
    found = [sum(state.num_bytes for state in model.state(parameter, context)) for parameter in TENSORS]
    assert found == expected


# Bytes a parameter that a step moves at least, large matrices; the parameter's and gradient's dtypes, the state's.
FLOORS = [
    ("adamw", {}, (BF16, BF16, None), 14.0),
    ("adamw", {}, (FP32, FP32, None), 28.0),
    ("adamw", {"implementation": "optplan"}, (BF16, BF16, FP32), 22.0),
    ("adamw", {"implementation": "optplan"}, (FP32, FP32, BF16), 20.0),
    ("adam-mini", {}, (BF16, BF16, None), 10.0),
    ("adam-mini", {}, (BF16, BF16, FP32), 14.0),
    ("adam-mini", {}, (FP32, FP32, None), 20.0),
    ("micro-adam", {"bucket": "256"}, (BF16, BF16, None), 7.48),
    ("micro-adam", {"bucket": "256"}, (FP32, BF16, None), 11.48),
    ("micro-adam", {"bucket": "256"}, (FP32, FP32, None), 13.48),
    ("adapprox", {"rank": "min"}, (BF16, BF16, None), 12.0),
    ("adapprox", {"rank": "min", "beta1": "0"}, (BF16, BF16, None), 8.0),
    ("adapprox", {"rank": "min"}, (FP32, FP32, None), 24.0),
    ("sgd", {}, (BF16, BF16, None), 10.0),
    ("lion", {}, (BF16, BF16, None), 10.0),
    ("adafactor", {}, (BF16, BF16, None), 12.0),
    ("muon", {}, (BF16, BF16, None), 44.0),
]


@pytest.mark.parametrize(("id_", "options", "dtypes", "expected"), FLOORS)
def test_bytes_moved_a_parameter(id_: str, options: dict[str, str], dtypes: Any, expected: float) -> None:
    matrix = Parameter("w", (8192, 8192), "mlp", "linear")
    moved = build_optimizer(id_, options).bind([matrix]).moved_bytes(matrix, OptimizerContext(*dtypes))
    assert moved / matrix.numel == pytest.approx(expected, abs=0.006)


OURS = "; a state dtype can be chosen for adamw, adam-mini and adapprox with implementation=optplan"


@pytest.mark.parametrize(
    ("id_", "kind", "kept", "wish"),
    [
        ("adamw", "fused", "bfloat16", "float32"),
        ("sgd", "for-loop", "bfloat16", "float32"),
        ("adafactor", "transformers", "float32", "float16"),
        ("micro-adam", "optplan", "bfloat16", "float32"),
        ("adam-mini", "official", "bfloat16", "float32"),
        ("adam-mini", "optplan", "bfloat16 or float32", "float16"),
    ],
)
def test_a_state_dtype_that_cannot_be_kept_is_refused(id_: str, kind: str, kept: str, wish: Any) -> None:
    model = build_optimizer(id_, {"implementation": kind})
    with pytest.raises(ConfigError) as caught:
        model.state(TENSORS[0], OptimizerContext("bfloat16", "bfloat16", wish))
    hint = "" if (id_, kind) == ("adam-mini", "optplan") else OURS
    assert str(caught.value) == f"{id_} with implementation={kind} keeps its state in {kept}, got {wish}{hint}"


@pytest.mark.parametrize("id_", ["adamw", "adam-mini", "adapprox"])
def test_our_implementations_keep_the_moments_in_the_dtype_asked_for(id_: str) -> None:
    model = build_optimizer(id_, {"implementation": "optplan"})
    states = model.state(TENSORS[3], OptimizerContext("bfloat16", "bfloat16", "float32"))
    assert {state.dtype for state in states} == {"float32"}


def test_formulas_are_filled_in() -> None:
    context = OptimizerContext("bfloat16", "bfloat16")
    assert [(s.name, s.formula) for s in build_optimizer("micro-adam").state(TENSORS[4], context)] == [
        ("step", "1 x 4 B"),
        ("error_feedback", "1852 x 1 B (codes of 4 bits for runs of 8, 3700 elements)"),
        ("bucket_min", "64 x 2 B (3700 elements in buckets of 64)"),
        ("bucket_max", "64 x 2 B (3700 elements in buckets of 64)"),
        ("window_indices", "380 x 2 B (10 rows x (1 block x 21 of 2048 + 17 of 1652))"),
        ("window_values", "380 x 2 B (10 rows x (1 block x 21 of 2048 + 17 of 1652))"),
    ]
    assert [s.formula for s in build_optimizer("adam-mini").state(TENSORS[0], context)] == [
        "1 x 4 B",
        "4096 x 4096 x 2 B",
        "32 x 4 B (one a head)",
    ]
    assert [s.formula for s in build_optimizer("adapprox").state(TENSORS[4], context)][2:] == [
        "100 x 9 x 4 B (rank 9 of at most 9)",
        "37 x 9 x 4 B (rank 9 of at most 9)",
    ]
