from __future__ import annotations

import tomllib
from typing import Any

import msgspec
import pytest
import yaml

from optplan.planner.errors import ConfigError
from optplan.planner.search.recommend import recommend
from optplan.planner.search.records import SearchReport
from optplan.planner.trainers.recommended import export_recommendation, limited

MODEL = "llama-3.2-1b"


def search(**arguments: Any) -> SearchReport:
    return recommend(MODEL, gpu="rtx-4090-24g", tokens_per_step=8192, **arguments)


@pytest.fixture(scope="module")
def report() -> SearchReport:
    return search(optimizer=["adamw", "micro-adam"], step_in_backward=False, fused_loss="none")


def test_the_recommendation_is_what_is_written(report: SearchReport) -> None:
    assert report.recommendation is not None
    config = report.recommendation.config
    fields = yaml.safe_load(export_recommendation(report, "hf-args", model=MODEL).text)
    assert fields["per_device_train_batch_size"] == config.batch_size
    assert fields["gradient_accumulation_steps"] == config.grad_accum
    assert fields["per_device_train_batch_size"] * fields["gradient_accumulation_steps"] * 2048 == 8192


def test_what_a_program_cannot_run_is_replaced_aloud() -> None:
    found = search(optimizer=["adamw"], step_in_backward=True, precision="bf16")
    assert found.recommendation is not None
    with pytest.raises(ConfigError) as caught:
        export_recommendation(found, "hf-args", model=MODEL)
    assert str(caught.value) == (
        "--export hf-args is not possible: the Trainer takes no optimizer step within backward; try --export python"
    )
    ours = ["adamw.implementation=optplan", "adamw-8bit.implementation=torchao"]
    found = search(optimizer=["adamw", "adamw-8bit"], options=ours, fused_loss="none", step_in_backward=False)
    first = next(other.best for other in found.alternatives if other.optimizer == "adamw")
    second = next(other.best for other in found.alternatives if other.optimizer == "adamw-8bit")
    found = msgspec.structs.replace(found, recommendation=first, runner_up=second)
    written = export_recommendation(found, "llama-factory", model=MODEL)
    assert written.by_hand[0].startswith(
        "not the recommended configuration, which llama-factory cannot run (it builds no adamw (optplan) with these "
        "options, and takes none from outside), but the next that it can: optplan estimate --model llama-3.2-1b "
    )
    assert written.text.startswith("# not the recommended configuration")
    assert yaml.safe_load(written.text)["optim"] == "adamw_torch_8bit"


@pytest.mark.parametrize(
    ("target", "asked", "narrowed", "notes"),
    [
        ("python", {"fused_loss": None}, {"fused_loss": None}, []),
        ("deepspeed", {"step_in_backward": True}, {"step_in_backward": True}, []),
        (
            "llama-factory",
            {"fused_loss": None, "step_in_backward": None},
            {"fused_loss": "none", "step_in_backward": False},
            ["searched what llama-factory can run: steps in backward and fused losses are left out"],
        ),
        (
            "torchtitan",
            {"optimizer": ["sgd"], "options": None, "fused_loss": None},
            {"optimizer": ["sgd"], "options": None, "fused_loss": "none"},
            ["searched what torchtitan can run: fused losses are left out"],
        ),
    ],
)
def test_the_search_is_narrowed_to_what_a_program_can_run(
    target: str, asked: dict[str, Any], narrowed: dict[str, Any], notes: list[str]
) -> None:
    assert limited(target, asked) == (narrowed, notes)


def test_a_narrowed_search_is_written_without_a_replacement() -> None:
    asked, _ = limited("torchtitan", {"optimizer": None, "options": None, "fused_loss": None})
    found = recommend("llama-3.1-8b", gpu="h200", **asked)
    written = export_recommendation(found, "torchtitan", model="llama-3.1-8b")
    assert tomllib.loads(written.text)["model"]["flavor"] == "8B"
    assert not any(sentence.startswith("not the recommended") for sentence in written.by_hand)


def test_there_must_be_something_to_write() -> None:
    nothing = recommend("llama-3.1-70b", gpu="t4-16g", optimizer=["adamw"], precision="fp32", batch_size=1)
    with pytest.raises(ConfigError) as caught:
        export_recommendation(nothing, "python", model="llama-3.1-70b")
    assert str(caught.value) == "there is nothing to write for python: no configuration fits"
