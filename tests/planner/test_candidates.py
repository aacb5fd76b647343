from __future__ import annotations

import pytest

from optplan.planner.candidates import bind_candidates, choose_optimizers
from optplan.planner.catalog import load_model
from optplan.planner.errors import ConfigError
from optplan.planner.optimizers.registry import optimizer_ids
from optplan.planner.request import check_request


def test_all_when_none_is_named() -> None:
    assert tuple(choice.id for choice in choose_optimizers(None)) == optimizer_ids()


def test_named_ones_in_their_order_and_once() -> None:
    choices = choose_optimizers(["sgd", "adamw", "sgd"])
    assert [choice.id for choice in choices] == ["sgd", "adamw"]
    assert all(choice.explicit for choice in choices)


def test_an_option_reaches_whoever_has_it() -> None:
    micro_adam, adamw = choose_optimizers(["micro-adam", "adamw"], ["window=20"])
    assert micro_adam.optimizer.options["window"] == 20
    assert "window" not in adamw.optimizer.options


def test_an_option_may_name_its_optimizer() -> None:
    adamw, sgd = choose_optimizers(["adamw", "sgd"], ["sgd.implementation=foreach"])
    assert adamw.optimizer.implementation == "fused"
    assert sgd.optimizer.implementation == "foreach"


def test_options_may_come_typed() -> None:
    (choice,) = choose_optimizers("micro-adam", {"window": 4, "density": 0.02})
    assert (choice.optimizer.options["window"], choice.optimizer.options["density"]) == (4, 0.02)


@pytest.mark.parametrize("text", ["window", "=5", "window=", "", " = "])
def test_a_setting_is_a_key_and_a_value(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_optimizers("micro-adam", [text])
    assert str(caught.value) == f"--set takes key=value, such as window=10, got {text!r}"


def test_what_cannot_run_is_left_out_with_its_reason_unless_it_was_named() -> None:
    # GPT-2's layers are Conv1D, which GaLore's and APOLLO's trainers do not match.
    request = check_request(load_model("gpt2"), gpu="h200")
    candidates, left_out = bind_candidates(request, choose_optimizers(None))
    assert [name for name, _ in left_out] == ["galore", "apollo"]
    assert len(candidates) == len(optimizer_ids()) - 2
    with pytest.raises(ConfigError) as caught:
        bind_candidates(request, choose_optimizers("galore"))
    assert str(caught.value) == dict(left_out)["galore"]


def test_another_implementation_steps_in_unless_one_was_named() -> None:
    # The authors' SOAP fails on bf16 gradients; the port of pytorch_optimizer does not.
    request = check_request(load_model("tinyllama-1.1b"), gpu="h200", precision="bf16")
    candidates, left_out = bind_candidates(request, choose_optimizers(None))
    assert left_out == []
    assert {candidate.id: candidate.implementation for candidate in candidates}["soap"] == "pytorch_optimizer"
    for options in (None, ["implementation=official"]):
        with pytest.raises(ConfigError, match=r"^soap with implementation=official fails on bfloat16 gradients"):
            bind_candidates(request, choose_optimizers("soap", options))


def test_a_state_dtype_is_served_by_the_implementation_that_can() -> None:
    request = check_request(load_model("tinyllama-1.1b"), gpu="h200", state_dtype="fp32")
    candidates, left_out = bind_candidates(request, choose_optimizers(None))
    assert {candidate.id: candidate.implementation for candidate in candidates}["adamw"] == "optplan"
    assert "lion" in dict(left_out)


def test_settings_rebuild_the_candidate() -> None:
    request = check_request(load_model("gpt2"), gpu="h200")
    (candidate,), _ = bind_candidates(request, choose_optimizers("adamw", ["implementation=foreach", "amsgrad=true"]))
    assert candidate.settings == {"implementation": "foreach", "amsgrad": True}
    (plain,), _ = bind_candidates(request, choose_optimizers("adamw"))
    assert plain.settings == {}
