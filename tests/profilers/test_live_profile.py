"""A training loop under observation: what is seen, and that nothing of it changes."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from optplan.planner.records import ResidentBytes, StepConfig
from optplan.profilers.live import profile as profiles
from optplan.profilers.live import step_clock
from optplan.profilers.live.measure import Speed, _Run, step_time
from optplan.profilers.live.phases import ModuleFollower, StepWatcher
from optplan.profilers.live.profile import LiveProfile
from optplan.profilers.live.step_clock import StepClock


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int, micro_steps: int = 1) -> list[float]:
    losses = []
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for _ in range(micro_steps):
            loss = model(torch.randn(4, 6, generator=generator)).square().mean()
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_the_losses_are_those_of_a_loop_nobody_watches() -> None:
    plain, watched = _model(), _model()
    expected = _train(plain, torch.optim.AdamW(plain.parameters(), lr=0.1), steps=5)
    optimizer = torch.optim.AdamW(watched.parameters(), lr=0.1)
    with LiveProfile(watched, optimizer).observing():
        assert _train(watched, optimizer, steps=5) == expected


def test_every_hook_is_gone_afterwards() -> None:
    model = _model()
    optimizer, backward = torch.optim.AdamW(model.parameters()), torch.autograd.backward
    with LiveProfile(model, optimizer).observing():
        assert torch.autograd.backward is not backward
        _train(model, optimizer, steps=3)
    assert torch.autograd.backward is backward
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_error_of_the_loop_goes_on_and_leaves_no_hook() -> None:
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(RuntimeError, match="cannot be multiplied"), LiveProfile(model, optimizer).observing():
        model(torch.zeros(1, 7))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("micro_steps", [1, 2])
def test_phases_follow_one_another(micro_steps: int) -> None:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    changes: list[str] = []
    watcher = StepWatcher(model, optimizer)
    with watcher.watching(lambda _, phase: changes.append(phase)):
        _train(model, optimizer, steps=2, micro_steps=micro_steps)
    assert changes == [*["forward", "backward", "clip"] * micro_steps, "step", "zero"] * 2
    assert watcher.num_steps == 2


def test_reentrant_checkpointing_stays_in_backward() -> None:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    changes: list[str] = []
    watcher = StepWatcher(model, optimizer)
    with watcher.watching(lambda _, phase: changes.append(phase)):
        inputs = torch.ones(2, 6, requires_grad=True)
        torch.utils.checkpoint.checkpoint(model, inputs, use_reentrant=True).sum().backward()
    assert changes == ["forward", "backward", "clip"]


def test_modules_are_followed_forward_and_backward() -> None:
    model, count = _model(), iter(range(1000))
    follower = ModuleFollower(model, count_events=lambda: next(count))
    follower.start(on_logits=lambda *_: None)
    follower.enter("forward")
    loss = model(torch.ones(2, 6)).sum()
    follower.enter("backward")
    loss.backward()
    follower.stop()
    assert [mark.path for mark in follower.marks] == ["", "0", "", "1", "", "2", "", "", "", "2", "1", "0"]
    assert [mark.phase for mark in follower.marks] == ["forward"] * 8 + ["backward"] * 4


def test_what_lives_across_the_step() -> None:
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters())
    profile = LiveProfile(model, optimizer)
    with profile.observing():
        _train(model, optimizer, steps=1)
    numel = 6 * 5 + 5 + 5 * 3 + 3
    assert profile.residents is not None
    # Each of the four parameters has a step counter of one fp32 element.
    assert profile.residents.bytes == ResidentBytes(numel * 4, numel * 4, 0, numel * 8 + 4 * 4)
    assert profile.residents.state_tensors == {"step": 16, "exp_avg": numel * 4, "exp_avg_sq": numel * 4}


@pytest.mark.parametrize(
    ("after", "timed"),
    # The first step after the recorded one counts only where it is needed for three.
    [(0, 0), (1, 1), (3, 3), (4, 3), (5, 4)],
)
def test_times_are_of_the_steps_after_the_recorded_one(after: int, timed: int) -> None:
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters())
    profile = LiveProfile(model, optimizer)
    with profile.observing():
        _train(model, optimizer, steps=3)
        assert profile.step_seconds() == profile.clocked_seconds() == []
        _train(model, optimizer, steps=after)
    clocked = profile.clocked_seconds()
    assert len(clocked) == after
    assert profile.step_seconds() == clocked[after - timed :]
    assert all(seconds > 0 for seconds in clocked)
    phases = profile.phase_seconds()
    # The last step's `zero` has not ended.
    assert list(phases) == ["forward", "backward", "clip", "step", "zero"][: 5 if after > 1 else 4 * after]
    assert min(phases.values(), default=0) >= 0


def test_the_step_after_the_recorded_one_is_in_no_median() -> None:
    model = _model()
    profile = LiveProfile(model, torch.optim.SGD(model.parameters()))
    with profile.observing():
        _train(model, profile.watcher._optimizer, steps=7)
    # Of steps 3 to 6 the first took an hour, which the host spent on the record.
    for index, (step, phase, when) in enumerate(profile._clock._moments):
        late = 3600.0 if (step, phase) != (3, "forward") else 0.0
        profile._clock._moments[index] = step_clock._Moment(step, phase, when + late)
    assert profile.clocked_seconds()[0] > 3600
    assert max(profile.step_seconds()) < 3600
    assert max(profile.phase_seconds().values()) < 3600


def test_a_timed_step_has_the_clock_s_note_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    model, noted = _model(), list[tuple[str, int]]()
    profile = LiveProfile(model, torch.optim.AdamW(model.parameters()))
    for name in ("_note_call", "_note_owners", "_note_residents", "_begin_record", "_end_record"):
        original = getattr(profile, name)

        def note(*args, name=name, original=original):
            noted.append((name, profile.num_steps - (profile.watcher.phase == "zero")))
            original(*args)

        monkeypatch.setattr(profile, name, note)
    with profile.observing():
        _train(model, profile.watcher._optimizer, steps=6, micro_steps=2)
    assert [step for name, step in noted if name == "_note_residents"] == [0, 1, 2]
    # The record ends as the step after it begins, before that step is timed.
    assert [step for name, step in noted if name == "_end_record"] == [1, 2, 3]
    assert max(step for name, step in noted if name != "_end_record") == 2
    assert profile.call is not None and profile.call.num_forwards == 2
    assert len(profile.step_seconds()) == 3
    assert 0 < profile.hook_seconds < sum(profile.step_seconds())


def test_a_long_loop_is_timed_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "MAX_TIMED_STEPS", 2)
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters())
    profile = LiveProfile(model, optimizer)
    with profile.observing():
        _train(model, optimizer, steps=9)
    assert (profile.num_steps, len(profile.step_seconds())) == (9, 2)
    assert len(profile._clock._moments) == 2 * 5


class _Event:
    """Stands for a CUDA event: the time when it was recorded last."""

    made = 0
    now = 0.0

    def __init__(self) -> None:
        _Event.made += 1

    def record(self, stream: object = None) -> None:
        _Event.now += 1000.0
        self.when = _Event.now

    def elapsed_time(self, end: "_Event") -> float:
        return end.when - self.when


def test_cuda_events_are_made_before_the_steps_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_clock, "_new_event", _Event)
    monkeypatch.setattr(step_clock, "_NUM_PREPARED", 8)
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(current_stream=lambda _: None, synchronize=lambda _: None))
    clock = StepClock(torch.device("cuda", 0))
    clock.prepare()
    clock.prepare()
    assert _Event.made == 8
    for step in range(3):
        for phase in ("forward", "backward", "step", "zero"):
            clock.note(step, phase)  # type: ignore[arg-type]
        assert _Event.made == (8, 8, 12)[step]
    # An event a second, the fourth of a step ends it.
    assert clock.step_seconds(range(1, 9)) == [3.0, 3.0]
    assert clock.seconds(range(2)) == {"forward": 1.0, "backward": 1.0, "step": 1.0, "zero": 1.0}


@pytest.mark.parametrize(
    ("steps", "micro_steps", "made"),
    # 128 at least; forward, backward and clip of every micro-step, and two more, of 29 steps after the recorded one.
    [(8, 1, 128), (32, 1, 145), (32, 16, 29 * 50), (1000, 64, 8192)],
)
def test_as_many_events_are_made_as_the_steps_will_need(
    monkeypatch: pytest.MonkeyPatch, steps: int, micro_steps: int, made: int
) -> None:
    monkeypatch.setattr(step_clock, "_new_event", _Event)
    monkeypatch.setattr(_Event, "made", 0)
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(current_stream=lambda _: None, synchronize=lambda _: None))
    clock = StepClock(torch.device("cuda", 0))
    clock.prepare(_Run(torch.device("cpu"), print, steps, num_micro_steps=micro_steps)._num_moments)
    assert _Event.made == made


@pytest.mark.parametrize("micro_steps", [1, 3])
def test_a_step_has_as_many_moments_as_are_prepared(micro_steps: int) -> None:
    model = _model()
    profile = LiveProfile(model, torch.optim.SGD(model.parameters()))
    with profile.observing():
        _train(model, profile.watcher._optimizer, steps=8, micro_steps=micro_steps)
    assert len(profile._clock._moments) == 5 * step_clock.moments_of_step(micro_steps)


def test_how_fast_the_machine_is_is_kept_with_the_times() -> None:
    model = _model()
    profile = LiveProfile(model, torch.optim.SGD(model.parameters()))
    with profile.observing():
        _train(model, profile.watcher._optimizer, steps=7)
    config = StepConfig("fp32", 1, 1, 1, "none", "sdpa", 1, "none")
    time = step_time(profile, config, moved_bytes=600, speed=Speed(copy_bandwidth=4e12, launch_seconds=1.2e-5))
    assert time is not None and time.num_steps == 3
    assert (time.copy_bandwidth_bytes_per_second, time.host_launch_seconds) == (4e12, 1.2e-5)
    assert time.optimizer_copy_fraction == pytest.approx(600 / time.phases["step"] / 4e12)
    unknown = step_time(profile, config, moved_bytes=600, speed=Speed())
    assert unknown is not None and (unknown.host_launch_seconds, unknown.optimizer_copy_fraction) == (None, None)
