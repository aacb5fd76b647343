"""Small modules traced, event by event: what is allocated, when it ends, what it is called and what it is for."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from optplan.planner.errors import ConfigError
from optplan.planner.step.options import StepOptions
from optplan.planner.timeline import Allocation
from optplan.profilers.tracing.trace import RunSettings, TracedStep, trace_step
from optplan.profilers.workloads.subject import Subject

OPTIONS = StepOptions(batch_size=4, seq_len=1, precision="fp32")


def fused(params):
    return torch.optim.AdamW(params, lr=1e-3, fused=True)


class Perceptron(nn.Module):
    """Two layers; the loss is the mean of the squares."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 16, bias=False)
        self.second = nn.Linear(16, 2, bias=False)

    def forward(self, x):
        return self.second(F.relu(self.first(x))).square().mean()


class Asking(nn.Module):
    """Does what `question` does with the input; the loss is a sum."""

    def __init__(self, question):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.question = question

    def forward(self, x):
        factor = self.question(x)
        return (x * self.weight).sum() * factor


def subject(make, **inputs):
    with torch.device("meta"):
        module = make()
        return Subject(module.train(), inputs or {"x": torch.empty(4, 8)})


def allocations(timeline):
    return [(event.name, event.bytes, event.category) for event in timeline if isinstance(event, Allocation)]


def test_parameters_and_inputs_are_placed_in_order():
    pieces = TracedStep(subject(Perceptron), OPTIONS).pieces
    assert allocations(pieces.load) == [
        ("first.weight", 8 * 16 * 4, "parameters"),
        ("second.weight", 16 * 2 * 4, "parameters"),
        ("x", 4 * 8 * 4, "activations"),
    ]


def test_forward_and_backward_are_named_by_module_and_operation():
    (micro_step,) = TracedStep(subject(Perceptron), OPTIONS).pieces.steady
    made = {name: num_bytes for name, num_bytes, _ in allocations(micro_step)}
    assert made["first mm"] == 4 * 16 * 4
    assert made["relu"] == 4 * 16 * 4
    assert made["first.weight gradient"] == 8 * 16 * 4
    categories = {name: category for name, _, category in allocations(micro_step)}
    assert categories["second.weight gradient"] == "gradients"
    assert categories["relu"] == "activations"


def test_everything_but_gradients_and_workspaces_ends_within_a_micro_step():
    (first,) = TracedStep(subject(Perceptron), OPTIONS).pieces.first
    ended = {event.id for event in first if not isinstance(event, Allocation)}
    left = [event for event in first if isinstance(event, Allocation) and event.id not in ended]
    assert sorted((event.name, event.category) for event in left) == [
        ("cuBLAS workspace of the backward", "workspace"),
        ("cuBLAS workspace of the forward", "workspace"),
        ("first.weight gradient", "gradients"),
        ("second.weight gradient", "gradients"),
    ]


def test_what_a_module_makes_once_is_made_in_the_first_step_alone():
    class Caching(Perceptron):
        cache = None

        def forward(self, x):
            if self.cache is None:
                self.cache = torch.zeros(1000, device=x.device)
            return super().forward(x) + self.cache[0]

    pieces = TracedStep(subject(Caching), OPTIONS).pieces
    assert 4000 in [num_bytes for _, num_bytes, _ in allocations(pieces.first[0])]
    assert 4000 not in [num_bytes for _, num_bytes, _ in allocations(pieces.steady[0])]


def test_fused_adamw_keeps_two_moments_and_a_counter_and_nothing_else():
    step = TracedStep(subject(Perceptron), OPTIONS)
    part = step.part(fused)
    assert allocations(part.first) == [
        ("first.weight step", 4, "optimizer_state"),
        ("first.weight exp_avg", 512, "optimizer_state"),
        ("first.weight exp_avg_sq", 512, "optimizer_state"),
        ("second.weight step", 4, "optimizer_state"),
        ("second.weight exp_avg", 128, "optimizer_state"),
        ("second.weight exp_avg_sq", 128, "optimizer_state"),
    ]
    assert part.steady == []


def test_foreach_adamw_takes_a_root_of_every_parameter_at_once():
    part = TracedStep(subject(Perceptron), OPTIONS).part(lambda p: torch.optim.AdamW(p, foreach=True))
    assert [event.bytes for event in part.steady if isinstance(event, Allocation)] == [512, 128]


def test_a_gradient_that_meets_another_is_added_in_place():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8, 8))

        def forward(self, x):
            return (x @ self.weight).sum() + (x @ self.weight.relu()).sum()

    (micro_step,) = TracedStep(subject(Twice), OPTIONS).pieces.steady
    gradients = [event for event in micro_step if isinstance(event, Allocation) and event.category == "gradients"]
    sums = [name for name, _, _ in allocations(micro_step) if "add (backward)" in name]
    assert [event.bytes for event in gradients] == [256]
    assert sums == []


def test_accumulation_adds_to_the_gradients_in_place():
    options = StepOptions(batch_size=4, seq_len=1, precision="fp32", grad_accum=3)
    pieces = TracedStep(subject(Perceptron), options).pieces
    assert len(pieces.first) == len(pieces.steady) == 3
    later = [event for event in pieces.steady[1] if isinstance(event, Allocation) and event.category == "gradients"]
    ended = {event.id for event in pieces.steady[1] if not isinstance(event, Allocation)}
    assert {event.id for event in later} <= ended


def test_autocast_casts_a_weight_once_and_keeps_it_until_autocast_ends():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8, bias=False)

        def forward(self, x):
            return self.layer(self.layer(x)).sum()

    options = StepOptions(batch_size=4, seq_len=1, precision="amp")
    (micro_step,) = TracedStep(subject(Shared), options).pieces.steady
    forward = [event for event in micro_step if isinstance(event, Allocation) and event.phase == "forward"]
    casts = [event for event in forward if event.name == "layer to_copy"]
    assert sorted(event.bytes for event in casts) == [2 * 4 * 8, 2 * 8 * 8]


def test_fp16_scales_the_loss_and_steps():
    options = StepOptions(batch_size=4, seq_len=1, precision="fp16-amp")
    trace = trace_step(subject(Perceptron), options, optimizer=fused)
    assert set(trace.phases) == {"forward", "backward", "step"}


def test_clipping_is_a_phase_of_its_own():
    trace = trace_step(subject(Perceptron), OPTIONS, optimizer=fused, settings=RunSettings(clip_grad_norm=1.0))
    assert list(trace.phases) == ["forward", "backward", "clip", "step"]


def test_the_timeline_of_a_run_frees_nothing_twice_and_counts_three_steps():
    trace = trace_step(subject(Perceptron), OPTIONS, optimizer=fused)
    alive, gradients = set(), 0
    for event in trace.timeline:
        if isinstance(event, Allocation):
            assert event.id not in alive
            alive.add(event.id)
            gradients += event.name == "first.weight gradient"
        else:
            alive.remove(event.id)
    assert gradients == 3


@pytest.mark.parametrize("question", [lambda x: 1 if (x == 1).all() else 1 / 0, lambda x: 1 / 0 if x.any() else 1])
def test_nothing_is_masked_and_nothing_is_exceptional(question):
    assert trace_step(subject(lambda: Asking(question)), OPTIONS, optimizer=fused).phases


def test_a_module_that_reads_numbers_cannot_be_traced():
    with pytest.raises(ConfigError) as error:
        TracedStep(subject(lambda: Asking(lambda x: x.sum().item())), OPTIONS)
    assert str(error.value) == (
        "the step reads a number off the GPU (float32), and a trace has none; a step whose memory depends on values "
        "cannot be traced"
    )


def test_a_module_that_fails_is_named_with_its_error():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Perceptron()

        def forward(self, x):
            return self.inner(x[:, :3])

    with pytest.raises(ConfigError) as error:
        TracedStep(subject(Broken), OPTIONS)
    assert str(error.value).startswith("inner.first cannot be run without contents: RuntimeError: ")
