"""What the host takes for a step, and how GPU and host go on beside each other."""

from __future__ import annotations

import msgspec
import pytest

from optplan.planner.catalog import load_model
from optplan.planner.gpus import load_gpu
from optplan.planner.host_work import HostCalls
from optplan.planner.request import check_request
from optplan.planner.requested_step import step_options
from optplan.planner.step.rules import record_step
from optplan.planner.step_time import phase_busy
from optplan.planner.step_time_overlap import Busy, MicroSteps, Update, combine, longer, phase_ends, step_length
from optplan.planner.step_time_rates import load_time_model
from optplan.planner.step_time_work import PhaseWork, step_work


def test_what_the_host_is_asked_for_has_three_rates() -> None:
    model = load_time_model()
    rates = {"seconds_per_call": 2e-5, "seconds_per_launch": 1e-5, "seconds_per_hook": 5e-6}
    host = msgspec.structs.replace(model.host, **rates)
    # Python calls torch 60 times and 40 modules; 30 launches, and 20 more from 50 nodes of autograd; 10 tensors hooked.
    calls = HostCalls(calls=60, modules=40, launches=30, nodes=50, backward_launches=20, kept=10, waits=3)
    work = PhaseWork(1.0, 0.0, 0.0, 0.0, num_launches=100, calls=calls)
    busy = phase_busy(work, load_gpu("h200"), "bf16", model=msgspec.structs.replace(model, host=host))
    assert busy.host == pytest.approx(100 * 2e-5 + 100 * 1e-5 + 10 * 5e-6)
    assert busy.gpu == pytest.approx(100 * model.gpu.seconds_per_launch, rel=0.01)
    assert msgspec.structs.replace(host, launch_reference_seconds=8e-6).slower(2.0) == msgspec.structs.replace(
        host.slower(2.0), launch_reference_seconds=1.6e-5
    )
    untold = msgspec.structs.replace(host, launch_reference_seconds=None).slower(2.0)
    assert (untold.seconds_per_launch, untold.launch_reference_seconds) == (2e-5, None)


def test_the_longest_decides() -> None:
    assert longer(Busy(3.0, 0.0), 4) == 3.0
    assert longer(Busy(1.0, 1.0), 2) == pytest.approx(2**0.5)
    step = combine(MicroSteps(Busy(1.0, 0.1), Busy(2.0, 0.2)), Update(Busy(0.5, 0.1)), exponent=4)
    assert step.bound == "gpu"
    assert step.forward + step.backward + step.optimizer == pytest.approx(step.step)
    gathering = Update(Busy(0.0, 0.1), gather=9.0)
    assert combine(MicroSteps(Busy(1.0, 0.1), Busy(1.0, 0.2)), gathering, exponent=4).bound == "link"


def test_the_host_runs_ahead() -> None:
    # Forward: 1 s of GPU, 2 s of host. Backward: 4 s of GPU, 1 s of host. The optimizer: 1 s and 1 s.
    micro, update = MicroSteps(Busy(1.0, 2.0), Busy(4.0, 1.0)), Update(Busy(1.0, 1.0))
    # Begun together, the GPU ends forward with the host at 2 s; then it lags behind it.
    assert phase_ends(micro, update, num_steps=2, exponent=500) == pytest.approx([2, 6, 7, 8, 12, 13], rel=1e-2)
    # Where one step follows another, the host's forward hides behind the step before: 6 s of GPU, 4 s of host.
    step = combine(micro, update, exponent=500)
    assert (step.step, step.forward, step.backward, step.optimizer) == pytest.approx((6, 1, 4, 1), rel=1e-2)
    # With a host half as quick the step is the host's 8 s, and all of the GPU's work hides behind it but the last.
    slow = MicroSteps(Busy(1.0, 4.0), Busy(4.0, 2.0))
    step = combine(slow, Update(Busy(1.0, 2.0)), exponent=500)
    assert (step.step, step.bound) == (pytest.approx(8, rel=1e-2), "host")


def test_a_host_that_waits_in_forward_runs_no_further_ahead() -> None:
    # Forward: 1 s of GPU, 2 s of host. Backward: 4 s and 1 s. The optimizer: 1 s and 1 s. Each step starts afresh:
    # forward ends with the host at 2 s, backward at 6, the optimizer at 7, and only then the host comes to the next.
    micro = MicroSteps(Busy(1.0, 2.0), Busy(4.0, 1.0), waits=True)
    update = Update(Busy(1.0, 1.0))
    assert phase_ends(micro, update, num_steps=2, exponent=500) == pytest.approx([2, 6, 7, 9, 13, 14], rel=1e-2)
    step = combine(micro, update, exponent=500)
    assert (step.step, step.forward, step.backward, step.optimizer) == pytest.approx((7, 2, 4, 1), rel=1e-2)
    # Every micro-step waits: 6 s each.
    for count in (2, 3, 5, 20):
        several = msgspec.structs.replace(micro, count=count)
        assert step_length(several, update, exponent=500) == pytest.approx(6 * count + 1, rel=1e-2)
        assert combine(several, update, exponent=500).step == pytest.approx(6 * count + 1, rel=1e-2)


def test_the_head_follows_the_layers_and_leads_back_into_them() -> None:
    # Forward: layers of 1 s on a GPU that waits for the host's 2 s, then 3 s of head and loss. Backward: 1 s of them,
    # then layers of 3 s, which the host has long launched. The optimizer: 1 s.
    micro = MicroSteps(Busy(4.0, 2.0), Busy(4.0, 2.0), waits=True, forward_head=3.0, backward_head=1.0)
    update = Update(Busy(1.0, 0.5))
    assert phase_ends(micro, update, num_steps=2, exponent=500) == pytest.approx([5, 9, 10, 15, 19, 20], rel=1e-2)
    assert step_length(micro, update, exponent=500) == pytest.approx(10, rel=1e-2)
    # With a slower host backward's layers wait for it: 2 x 6 s of launches, however long the head took.
    slow = MicroSteps(Busy(4.0, 6.0), Busy(4.0, 6.0), waits=True, forward_head=3.0, backward_head=1.0)
    assert phase_ends(slow, update, num_steps=1, exponent=500) == pytest.approx([9, 13, 14], rel=1e-2)
    slower = MicroSteps(Busy(4.0, 6.0), Busy(4.0, 12.0), waits=True, forward_head=3.0, backward_head=1.0)
    assert phase_ends(slower, update, num_steps=1, exponent=500) == pytest.approx([9, 18, 19], rel=1e-2)
    # Over steps that follow one another without a wait the longer of GPU and host decides: 9 s of GPU.
    free = msgspec.structs.replace(micro, waits=False)
    assert step_length(free, update, exponent=500) == pytest.approx(9, rel=1e-2)


def test_what_comes_after_the_layers_of_gpt2() -> None:
    request = check_request(load_model("gpt2"), gpu="h200", batch_size=2, seq_len=1024, precision="bf16")
    work = step_work(request.model, step_options(request), record_step(request.model, step_options(request)))
    tokens, logits = 2 * 1024, 2 * 1024 * 50257
    assert work.forward.head.product_flops == 2 * tokens * 768 * 50257
    assert work.backward.head.product_flops == 2 * work.forward.head.product_flops
    # Logits in bf16, in fp32, and their log-softmax; beside them the last norm's output and a few numbers a token.
    assert 0 <= work.forward.head.written_bytes - (2 + 4 + 4) * logits < 64 * 768 * tokens
    assert 0 < work.forward.head.num_launches < 0.1 * work.forward.num_launches
    # Back through log-softmax in fp32 and into bf16.
    assert work.backward.head.written_bytes >= (4 + 2) * logits
    assert work.backward.head.written_bytes < 0.7 * work.backward.written_bytes
