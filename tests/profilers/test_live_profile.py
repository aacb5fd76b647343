"""A training loop under observation: what is seen, and that nothing of it changes."""

import pytest
import torch
from torch import nn

from optplan.planner.records import ResidentBytes
from optplan.profilers.live.phases import ModuleFollower, StepWatcher
from optplan.profilers.live.profile import LiveProfile


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
    follower.start()
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


def test_times_are_of_the_steps_after_the_recorded_one() -> None:
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters())
    profile = LiveProfile(model, optimizer)
    with profile.observing():
        _train(model, optimizer, steps=3)
        assert profile.step_seconds() == []
        _train(model, optimizer, steps=4)
    assert len(profile.step_seconds()) == 4
    assert all(seconds > 0 for seconds in profile.step_seconds())
    phases = profile.phase_seconds()
    assert set(phases) == {"forward", "backward", "clip", "step", "zero"}
    assert min(phases.values()) >= 0
