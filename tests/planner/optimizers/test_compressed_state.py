"""State of the quantized, low-rank and factored optimizers, in bytes written out: measured with the packages."""

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
FP32, BF16 = "float32", "bfloat16"
AO, PORT = {"implementation": "torchao"}, {"implementation": "pytorch_optimizer"}
EVERY = {"target": "all-matrices"}
MINI = EVERY | {"rank": "1", "scale_type": "tensor"}

# Optimizer, options, dtype; bytes of each of TENSORS, every state counted wherever it lives, shared ones apart.
EXAMPLES = [
    ("adamw-8bit", {}, FP32, [34078720, 266240000, 8320, 91586560, 29600]),
    ("adamw-8bit", {}, BF16, [34078720, 266240000, 8320, 91586560, 29600]),
    ("adamw-8bit", {"hf_embeddings_32bit": "true"}, BF16, [34078720, 1048576000, 8320, 91586560, 29600]),
    ("adamw-8bit", {"min_8bit_size": "16777217"}, BF16, [134217728, 266240000, 32768, 91586560, 29600]),
    ("paged-adamw-8bit", {}, FP32, [34078720, 266240000, 8320, 91586560, 29600]),
    ("adamw-8bit", AO, FP32, [34080772, 266242052, 10372, 91588612, 29604]),
    ("adamw-8bit", AO, BF16, [34080772, 266242052, 10372, 91588612, 14804]),
    ("adamw-4bit", {}, FP32, [17825924, 139264132, 4484, 47906948, 29604]),
    ("adamw-fp8", {}, FP32, [34078724, 266240004, 8324, 91586564, 29604]),
    ("galore", EVERY, FP32, [71303168, 99876864, 32768, 78381056, 35076]),
    ("galore", EVERY | {"compact_projector": "true"}, FP32, [6291456, 34865152, 32768, 13369344, 35076]),
    ("galore", EVERY, BF16, [3145728, 17432576, 16384, 6684672, 17538]),
    ("galore", {}, BF16, [3145728, 524288000, 16384, 6684672, 14800]),
    ("apollo", EVERY, BF16, [6291458, 34865154, 16384, 13369346, 121346]),
    ("apollo", MINI, BF16, [24578, 136194, 16384, 52226, 476]),
    ("apollo", {}, BF16, [6291458, 524288000, 16384, 13369346, 14800]),
    ("came", {}, FP32, [67174404, 524576772, 32772, 180475908, 15900]),
    ("came", {}, BF16, [67174402, 524576770, 32770, 180475906, 15898]),
    ("sm3", {}, FP32, [67141632, 524432384, 32768, 180415488, 15348]),
    ("sm3", {}, BF16, [33570816, 262216192, 16384, 90207744, 7674]),
    ("soap", {}, FP32, [402653184, 1182793728, 32768, 494927872, 120552]),
    ("soap", PORT, FP32, [402653184, 1182793728, 32768, 494927872, 120552]),
    ("soap", PORT, BF16, [201326592, 591396864, 16384, 247463936, 60276]),
    # Besides 8 bytes for the step on the host.
    ("flash-adamw", {}, BF16, [52428808, 409600008, 12808, 140902408, 11572]),
    ("flash-adamw", {"master": "32bit"}, BF16, [69206024, 540672008, 16904, 185991176, 15272]),
    ("flash-adamw", {"master": "none"}, BF16, [35651592, 278528008, 8712, 95813640, 7872]),
    ("flash-adamw", {}, FP32, [35651592, 278528008, 8712, 95813640, 7872]),
]


@pytest.mark.parametrize(("id_", "options", "dtype", "expected"), EXAMPLES)
def test_bytes_of_five_tensors(id_: str, options: dict[str, str], dtype: Any, expected: list[int]) -> None:
    model, context = build_optimizer(id_, options), OptimizerContext(dtype, dtype)
    assert [sum(state.num_bytes for state in model.state(p, context)) for p in TENSORS] == expected


# Optimizer, options, dtype, shape, bytes: around the quantizers' thresholds, and low ranks of smaller matrices.
EDGES = [
    ("adamw-8bit", {}, FP32, (4095,), 32760),
    ("adamw-8bit", {}, FP32, (4096,), 8320),
    ("adamw-8bit", {}, FP32, (4160,), 8456),
    ("adamw-8bit", AO, FP32, (4095,), 32764),
    ("adamw-8bit", AO, FP32, (4096,), 10372),
    ("adamw-8bit", AO, FP32, (4160,), 33284),
    ("adamw-8bit", AO, BF16, (4095,), 16384),
    ("adamw-8bit", AO, BF16, (4160,), 16644),
    ("adamw-4bit", {}, FP32, (4096,), 4484),
    ("adamw-fp8", {}, FP32, (4096,), 8324),
    ("galore", EVERY, FP32, (512, 512), 1572864),
    ("galore", EVERY, FP32, (1000, 512), 2072576),
    ("galore", EVERY, FP32, (512, 1376), 2457600),
    ("galore", EVERY, BF16, (512, 512), 393216),
    ("galore", EVERY, BF16, (1000, 512), 643072),
    ("galore", EVERY, BF16, (512, 1376), 835584),
    ("apollo", EVERY | {"rank": "128"}, FP32, (512, 512), 786436),
    ("apollo", EVERY | {"rank": "128"}, FP32, (1000, 512), 1286148),
    ("apollo", EVERY | {"rank": "128"}, FP32, (512, 1376), 1671172),
    ("apollo", MINI, FP32, (512, 512), 6148),
    ("apollo", MINI, FP32, (1000, 512), 10052),
    ("apollo", MINI, FP32, (512, 1376), 13060),
    ("soap", {}, FP32, (512, 512), 6291456),
    ("soap", {}, FP32, (1000, 512), 14193152),
    ("soap", {}, FP32, (11000, 64), 5664768),
    ("soap", {}, FP32, (512,), 4096),
    ("soap", {"precondition_1d": "true"}, FP32, (512,), 2101248),
    ("soap", {"max_precond_dim": "511"}, FP32, (512, 512), 2097152),
]


@pytest.mark.parametrize(("id_", "options", "dtype", "shape", "expected"), EDGES)
def test_bytes_at_the_edges(
    id_: str, options: dict[str, str], dtype: Any, shape: tuple[int, ...], expected: int
) -> None:
    parameter = Parameter("w", shape, "mlp", "linear")
    states = build_optimizer(id_, options).state(parameter, OptimizerContext(dtype, dtype))
    assert sum(state.num_bytes for state in states) == expected


def test_bitsandbytes_counts_its_lookup_tables_once_and_only_if_something_is_quantized() -> None:
    model, context = build_optimizer("adamw-8bit"), OptimizerContext(BF16, BF16)
    assert [(s.name, s.num_bytes) for s in model.shared_state(TENSORS, context)] == [("qmap1", 1024), ("qmap2", 1024)]
    assert model.shared_state(TENSORS[4:], context) == ()
    assert build_optimizer("adamw-8bit", {"min_8bit_size": 10**9}).shared_state(TENSORS, context) == ()


@pytest.mark.parametrize(("numel", "device"), [(99_999, "device"), (100_000, "managed")])
def test_paged_moments_of_large_tensors_are_managed_memory_and_their_scales_are_not(numel: int, device: str) -> None:
    parameter = Parameter("w", (numel,), "mlp", "linear")
    states = build_optimizer("paged-adamw-8bit").state(parameter, OptimizerContext(BF16, BF16))
    assert {state.name: state.device for state in states} == {
        "state1": device, "state2": device, "absmax1": "device", "absmax2": "device",
    }  # fmt: skip


@pytest.mark.parametrize("id_", ["adamw-8bit", "adamw-4bit", "adamw-fp8"])
def test_torchao_keeps_its_step_counter_on_the_host(id_: str) -> None:
    states = build_optimizer(id_, AO).state(TENSORS[0], OptimizerContext(BF16, BF16))
    assert [state.name for state in states if state.device != "device"] == ["step"]
    assert states[0].device == "cpu"


def test_state_names_are_those_of_the_packages() -> None:
    context = OptimizerContext(BF16, BF16)

    def names(id_: str, options: dict[str, str]) -> str:
        return " ".join(state.name for state in build_optimizer(id_, options).state(TENSORS[0], context))

    assert names("adamw-8bit", {}) == "state1 state2 absmax1 absmax2"
    assert names("adamw-8bit", AO) == (
        "step exp_avg.codes exp_avg.scale exp_avg.qmap exp_avg_sq.codes exp_avg_sq.scale exp_avg_sq.qmap"
    )
    assert names("adamw-fp8", {}) == "step exp_avg.codes exp_avg.scale exp_avg_sq.codes exp_avg_sq.scale"
    assert names("galore", {}) == "projector.ortho_matrix exp_avg exp_avg_sq"
    assert names("apollo", {}) == "projector.ortho_matrix exp_avg exp_avg_sq scaled_grad"
    assert names("came", {}) == "exp_avg exp_avg_sq_row exp_avg_sq_col exp_avg_res_row exp_avg_res_col RMS"
    assert names("sm3", {}) == "momentum_buffer accumulator_0 accumulator_1"
    assert names("soap", PORT) == "exp_avg exp_avg_sq GG.0 GG.1 Q.0 Q.1"
    assert names("flash-adamw", {}) == (
        "exp_avg::quantized exp_avg::scales exp_avg_sq::quantized exp_avg_sq::scales error_bits step"
    )


# Role, module and shape; whether a trainer hands the tensor to GaLore, and whether target=all-matrices does.
TARGETS = [
    ("query", "linear", (64, 64), True, True),
    ("fused_qkv", "linear", (192, 64), True, True),
    ("attention_output", "linear", (64, 64), True, True),
    ("mlp", "linear", (256, 64), True, True),
    ("fused_qkv", "conv1d", (64, 192), False, True),
    ("token_embedding", "embedding", (100, 64), False, True),
    ("output_head", "linear", (100, 64), False, True),
    ("router", "linear", (8, 64), False, True),
    ("mlp", "experts", (8, 256, 64), False, False),
    ("norm", "rms_norm", (64,), False, False),
    ("bias", "linear", (64,), False, False),
]


@pytest.mark.parametrize("id_", ["galore", "apollo"])
@pytest.mark.parametrize(("role", "module", "shape", "linear", "every"), TARGETS)
def test_what_is_projected(id_: str, role: Any, module: Any, shape: Any, linear: bool, every: bool) -> None:
    parameter, context = Parameter("w", shape, role, module), OptimizerContext(BF16, BF16)
    for target, expected in (("linear", linear), ("all-matrices", every)):
        states = build_optimizer(id_, {"target": target}).state(parameter, context)
        assert (states[0].name == "projector.ortho_matrix") is expected, target


NO_LINEAR = "finds no nn.Linear in attention or MLP blocks; use target=all-matrices"
SOAP_16BIT = (
    "soap with implementation=official fails on bfloat16 gradients: it averages them into fp32 preconditioners; "
    "use fp32 parameters or implementation=pytorch_optimizer"
)
FLASH_FP32 = "flash-adamw with master=24bit refuses fp32 parameters, which need no master weight; use master=none"
UNSUPPORTED = [
    ("galore", {}, BF16, TENSORS, None),
    ("galore", {}, BF16, TENSORS[4:], f"galore with target=linear {NO_LINEAR}"),
    ("apollo", {}, BF16, TENSORS[1:3], f"apollo with target=linear {NO_LINEAR}"),
    ("apollo", EVERY, BF16, TENSORS[1:3], None),
    ("apollo", EVERY, BF16, TENSORS[2:3], "apollo with target=all-matrices finds no matrix"),
    ("soap", {}, FP32, TENSORS, None),
    ("soap", {}, BF16, TENSORS, SOAP_16BIT),
    ("soap", {}, BF16, TENSORS[2:3], None),
    ("soap", PORT, BF16, TENSORS, None),
    ("flash-adamw", {}, FP32, TENSORS, None),
    ("flash-adamw", {"master": "none"}, FP32, TENSORS, None),
    ("flash-adamw", {"master": "24bit"}, FP32, TENSORS, FLASH_FP32),
    ("flash-adamw", {"master": "24bit"}, BF16, TENSORS, None),
]


@pytest.mark.parametrize(("id_", "options", "dtype", "parameters", "reason"), UNSUPPORTED)
def test_what_cannot_run_is_said(
    id_: str, options: dict[str, str], dtype: Any, parameters: list[Parameter], reason: str | None
) -> None:
    model = build_optimizer(id_, options)
    assert model.unsupported_reason(parameters, OptimizerContext(dtype, dtype)) == reason


@pytest.mark.parametrize(
    ("id_", "options", "kept"),
    [
        ("adamw-8bit", {}, "uint8"),
        ("paged-adamw-8bit", {}, "uint8"),
        ("adamw-4bit", {}, "uint8"),
        ("adamw-fp8", {}, "float8_e4m3fn"),
        ("galore", {}, "bfloat16"),
        ("apollo", {}, "bfloat16"),
        ("came", {}, "float32"),
        ("sm3", {}, "bfloat16"),
        ("soap", {}, "bfloat16"),
        ("flash-adamw", {}, "int8"),
    ],
)
def test_another_state_dtype_is_refused(id_: str, options: dict[str, str], kept: str) -> None:
    model = build_optimizer(id_, options)
    with pytest.raises(ConfigError) as caught:
        model.state(TENSORS[0], OptimizerContext(BF16, BF16, "float16"))
    assert str(caught.value) == (
        f"{id_} with implementation={model.implementation} keeps its state in {kept}, got float16; "
        "a state dtype can be chosen for adamw, adam-mini and adapprox with implementation=optplan"
    )


@pytest.mark.parametrize(
    ("id_", "options", "sentence"),
    [
        ("adamw-8bit", {"min_8bit_size": "-1"}, "adamw-8bit: min_8bit_size must be an integer from 0, got '-1'"),
        (
            "adamw-8bit",
            {"block_size": "256"},
            "adamw-8bit: option 'block_size' needs implementation=torchao, got implementation=bitsandbytes",
        ),
        ("adamw-fp8", {"block_size": "1"}, "adamw-fp8: block_size must be an integer from 2 to 1048576, got '1'"),
        ("galore", {"rank": "0"}, "galore: rank must be an integer from 1, got '0'"),
        ("galore", {"target": "all"}, "galore: target must be linear or all-matrices, got 'all'"),
        ("apollo", {"scale_type": "row"}, "apollo: scale_type must be channel or tensor, got 'row'"),
        ("sm3", {"momentum": "1"}, "sm3: momentum must be a number from 0 below 1, got '1'"),
        ("soap", {"max_precond_dim": "0"}, "soap: max_precond_dim must be an integer from 1, got '0'"),
        ("flash-adamw", {"master": "16bit"}, "flash-adamw: master must be auto, 24bit, 32bit or none, got '16bit'"),
    ],
)
def test_mistakes_in_options_are_one_sentence(id_: str, options: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_optimizer(id_, options)
    assert str(caught.value) == sentence


# Bytes a parameter that a step moves at least, an 8192 x 8192 matrix with parameters and gradients in bf16 or fp32.
FLOORS = [
    ("adamw-8bit", {}, BF16, 10.06),
    ("paged-adamw-8bit", {}, BF16, 10.06),
    ("adamw-8bit", AO, BF16, 10.06),
    ("adamw-4bit", {}, BF16, 8.13),
    ("adamw-fp8", {}, FP32, 16.06),
    ("galore", {}, BF16, 6.16),
    ("galore", {}, FP32, 12.31),
    ("apollo", {}, BF16, 8.31),
    ("came", {}, BF16, 24.0),
    ("sm3", {}, BF16, 6.0),
    ("sm3", {"momentum": "0.9"}, BF16, 10.0),
    ("soap", {}, FP32, 52.0),
    ("flash-adamw", {}, BF16, 12.25),
]


@pytest.mark.parametrize(("id_", "options", "dtype", "expected"), FLOORS)
def test_bytes_moved_a_parameter(id_: str, options: dict[str, str], dtype: Any, expected: float) -> None:
    matrix = Parameter("w", (8192, 8192), "mlp", "linear")
    moved = build_optimizer(id_, options).moved_bytes(matrix, OptimizerContext(dtype, dtype))
    assert moved / matrix.numel == pytest.approx(expected, abs=0.006)
