from __future__ import annotations

from optplan.planner.catalog import load_model
from optplan.planner.footprint import group_parameters, optimizer_footprint, pattern_of
from optplan.planner.optimizers.base import OptimizerContext
from optplan.planner.optimizers.registry import build_optimizer

BF16 = OptimizerContext("bfloat16", "bfloat16")


def test_layers_share_a_pattern() -> None:
    assert pattern_of("model.layers.31.mlp.up_proj.weight") == "model.layers.*.mlp.up_proj.weight"


def test_groups_hold_every_parameter_once() -> None:
    parameters = load_model("gpt2").unique_parameters
    groups = group_parameters(parameters)
    assert sorted(p.name for _, members in groups for p in members) == sorted(p.name for p in parameters)
    # Two embeddings, twelve tensors of a layer, two of the final norm.
    assert len(groups) == 16


def test_a_group_is_worth_the_sum_of_its_members() -> None:
    parameters = load_model("gpt2").unique_parameters
    for optimizer_id in ("adamw", "micro-adam", "adam-mini", "adapprox", "adamw-8bit"):
        optimizer = build_optimizer(optimizer_id).bind(parameters)
        one_by_one = sum(
            tensor.num_bytes for p in parameters for tensor in optimizer.state(p, BF16) if tensor.device == "device"
        ) + sum(tensor.num_bytes for tensor in optimizer.shared_state(parameters, BF16))
        assert optimizer_footprint(optimizer, parameters, BF16).device_bytes == one_by_one


def test_adamw_of_gpt2_as_measured_on_an_h200() -> None:
    parameters = load_model("gpt2").unique_parameters
    footprint = optimizer_footprint(build_optimizer("adamw"), parameters, BF16)
    assert footprint.bytes_by_name == {"step": 592, "exp_avg": 248_879_616, "exp_avg_sq": 248_879_616}
    # Each of the 148 counters occupies 512 bytes; every moment of GPT-2 is a multiple of that.
    assert footprint.rounded_device_bytes == 2 * 248_879_616 + 148 * 512
    assert footprint.host_bytes == 0


def test_host_state_is_not_on_the_device() -> None:
    parameters = load_model("gpt2").unique_parameters
    footprint = optimizer_footprint(build_optimizer("adamw", {"implementation": "foreach"}), parameters, BF16)
    assert footprint.host_bytes == 148 * 4
    assert footprint.bytes_by_name == {"exp_avg": 248_879_616, "exp_avg_sq": 248_879_616}
