"""Every configuration is decided, and nothing that could be chosen is lost."""

from __future__ import annotations

from itertools import pairwise, product
from time import process_time

import pytest

from optplan.planner.catalog import load_model
from optplan.planner.request import check_request
from optplan.planner.search.explore import Exploration, Found
from optplan.planner.search.question import Question, check_question
from optplan.planner.search.space import Layout, Manner
from optplan.planner.search.steps import StepRecorder, frame_of, request_of
from optplan.planner.step_timer import StepTimer
from optplan.planner.workload import Workload

SMALL = {"optimizer": ["adamw", "micro-adam", "sgd", "adafactor"], "tokens_per_step": 4096, "seq_len": 1024}


def explore(question: Question) -> Exploration:
    return Exploration(question.base, question.space, question.base.gpu, limit_bytes=question.limit_bytes)


@pytest.mark.parametrize(
    ("model", "gpu", "gpus"), [("llama-7b", "a100-40g", 1), ("gpt2", "t4-16g", 1), ("tinyllama-1.1b", "l4-24g", 2)]
)
def test_the_rules_decide_all_of_the_space(model: str, gpu: str, gpus: int) -> None:
    exploration = explore(check_question(model, gpu=gpu, gpus=gpus, optimizer=["adamw", "micro-adam"]))
    assert sum(exploration.counts.values()) == exploration.space.size


def test_the_space_of_the_readme_holds_more_than_twenty_thousand() -> None:
    assert check_question("llama-7b", gpu="a100-40g").space.size >= 20_000


def test_twenty_thousand_are_decided_within_two_seconds_of_one_core() -> None:
    question, start = check_question("llama-7b", gpu="a100-40g"), process_time()
    exploration = explore(question)
    assert process_time() - start < 2
    assert sum(exploration.counts.values()) >= 20_000


@pytest.mark.parametrize(
    ("model", "fused_losses"),
    [("llama-7b", ("none", "liger")), ("gpt2", ("none", "chunked")), ("bert-base-uncased", ("none",))],
)
def test_the_fused_loss_tried_is_one_that_the_model_can_have(model: str, fused_losses: tuple[str, ...]) -> None:
    assert check_question(model, gpu="a100-40g").space.fused_losses == fused_losses


def test_a_front_without_pruning_is_the_same() -> None:
    # Every configuration with its own workload, no bound and no order: what no other beats must be what was kept.
    asked = SMALL | {"optimizer": ["adamw", "sgd", "adafactor"], "tokens_per_step": 2048, "checkpointing": "full"}
    question = check_question("tinyllama-1.1b", gpu="rtx-3080-12g", precision="bf16", **asked)
    exploration = explore(question)
    every = [found for found in _all(question, exploration) if found[0] <= question.limit_bytes]
    front = {one for one in every if not any(_beats(other, one) for other in every)}
    kept = {(found.peak_bytes, round(found.seconds, 9), found.key) for found in exploration.front}
    assert kept == front


def _all(question: Question, exploration: Exploration) -> list[tuple[int, float, tuple[int, ...]]]:
    entries = []
    members = exploration.pool.frames[0].members
    for member, manner in product(members, question.space.manners):
        for size in question.space.micro_batches[1]:
            accumulated = 1 if manner.step_in_backward else question.space.sequences // size
            request = request_of(member.workload.request, manner, size, accumulated)
            peak = Workload(request).rounded_peak_bytes(member.candidate)
            found = Found(
                member, manner, size, accumulated, peak, 0.0, member.evidence(step_in_backward=manner.step_in_backward)
            )
            entries.append((peak, round(_seconds(exploration, found), 9), found.key))
    return entries


def _seconds(exploration: Exploration, found: Found) -> float:
    request = request_of(found.bound.workload.request, found.manner, found.micro_batch, found.accumulated)
    step = StepTimer(Workload(request)).seconds(found.bound.candidate)
    assert step is not None
    return step.step * exploration.space.sequences / (found.micro_batch * found.accumulated)


def _beats(one: tuple[int, float, tuple[int, ...]], other: tuple[int, float, tuple[int, ...]]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("model", ["gpt2", "tinyllama-1.1b", "bert-base"])
def test_memory_grows_with_the_batch(model: str, checkpointing: str) -> None:
    base = check_request(load_model(model), gpu="h200", seq_len=256)
    recorder, manner = StepRecorder(), Manner(checkpointing, "none", False)
    frame = frame_of(base, "amp", Layout(1, "none"))
    points = [recorder.point(frame, manner, size, accumulates=True) for size in (1, 2, 3, 4, 8, 16, 32)]
    for smaller, larger in pairwise(points):
        assert smaller.forward_bytes <= larger.forward_bytes
        assert smaller.backward_bytes <= larger.backward_bytes
        assert smaller.after_backward_bytes <= larger.after_backward_bytes


@pytest.mark.parametrize(
    ("one", "other", "num_recorded"), [("bf16", "mixed", 1), ("amp", "fp16-amp", 2), ("bf16", "amp", 2)]
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_precisions_that_share_a_record_have_the_same_step(
    one: str, other: str, num_recorded: int, attention: str
) -> None:
    base = check_request(load_model("tinyllama-1.1b"), gpu="h200", attention=attention)
    manner, shared = Manner("full", "liger", False), StepRecorder()
    for precision in (one, other):
        frame = frame_of(base, precision, Layout(1, "none"))
        alone = StepRecorder().point(frame, manner, 2, accumulates=True)
        assert shared.point(frame, manner, 2, accumulates=True) == alone
    assert shared.num_recorded == num_recorded


def test_the_answer_is_the_same_every_time() -> None:
    question = check_question("tinyllama-1.1b", gpu="rtx-3080-12g", **SMALL)
    first, second = explore(question).front, explore(question).front
    assert [found[1:] for found in first] == [found[1:] for found in second]


def test_a_flag_that_there_is_not_is_an_error() -> None:
    with pytest.raises(TypeError, match="a search has no flag 'settings'"):
        check_question("tinyllama-1.1b", gpu="rtx-3080-12g", settings=["window=20"])  # type: ignore[call-arg]
