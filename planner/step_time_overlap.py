"""How GPU, links and host go on beside each other in a training step, given how long each is busy with its parts.

The host launches the GPU's work call by call and runs ahead as far as it can, into the next step too: over whole steps
the longer of GPU and host decides. Where forward reads a value off the GPU, as transformers' causal masks do, the host
runs ahead no further than that: each micro-step begins when all before it is done.

The layers ask much of the host and a vocabulary much of the GPU: head and loss follow when the layers are done, however
long the GPU had to wait for them, and while it goes back through the loss the host launches the layers' backward.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, NamedTuple

import msgspec

Bound = Literal["gpu", "host", "link"]
_FOLLOWED = 8
"""Micro-steps that are followed one by one to tell forward from backward; further ones are like them."""


class Busy(msgspec.Struct, frozen=True):
    """Seconds that the GPU, the host and the links to other GPUs are busy with one part of the step."""

    gpu: float
    host: float
    link: float = 0.0

    def plus(self, other: Busy) -> Busy:
        """Both one after the other."""
        return Busy(self.gpu + other.gpu, self.host + other.host, self.link + other.link)

    def times(self, count: float) -> Busy:
        """The same several times."""
        return Busy(self.gpu * count, self.host * count, self.link * count)


class MicroSteps(msgspec.Struct, frozen=True):
    """Forward and backward of all micro-steps.

    Attributes:
        forward: Of one of them; likewise `backward`.
        count: How many there are.
        reduction: Of gradients that are reduced once a step, beside the last backward.
        accumulation: Of gradients that are added to those of the micro-steps before, in each but the first.
        waits: Whether in each forward the host waits for all that it launched before.
        forward_head: Seconds of the forward on the GPU that come after all its layers, and ask next to nothing of the
            host; `backward_head` those of the backward that come before them.
    """

    forward: Busy
    backward: Busy
    count: int = 1
    reduction: Busy = Busy(0.0, 0.0)
    accumulation: Busy = Busy(0.0, 0.0)
    waits: bool = False
    forward_head: float = 0.0
    backward_head: float = 0.0

    @property
    def busy(self) -> Busy:
        """All of them."""
        once = self.reduction.plus(self.accumulation.times(self.count - 1))
        return self.forward.plus(self.backward).times(self.count).plus(once)

    def device_seconds(self, exponent: float) -> float:
        """How long they take on the GPU and its links, which work at the same time."""
        one = _without_host(self.forward.plus(self.backward))
        added = (self.count - 1) * self.accumulation.gpu
        if not self.reduction.link and not self.reduction.gpu:
            return self.count * longer(one, exponent) + added
        last = one.plus(_without_host(self.reduction))
        return (self.count - 1) * longer(one, exponent) + longer(last, exponent) + added

    @property
    def host_seconds(self) -> float:
        """How long the host takes to launch them."""
        return self.busy.host


class Update(msgspec.Struct, frozen=True):
    """The optimizer's step, and the seconds in which what it updated is gathered after it."""

    busy: Busy
    gather: float = 0.0

    @property
    def device_seconds(self) -> float:
        """How long both take on the GPU and its links."""
        return self.busy.gpu + self.gather


class StepSeconds(msgspec.Struct, frozen=True):
    """Time of one step in seconds.

    Attributes:
        step: The whole step, all its micro-steps.
        forward: All forwards; likewise `backward`, with what is computed again and reduced.
        optimizer: The optimizer's step.
        bound: What decides: the GPU's work, the host's launches or the links to other GPUs.
    """

    step: float
    forward: float
    backward: float
    optimizer: float
    bound: Bound

    def as_dict(self) -> dict[str, float]:
        """The form of an estimate's `step_seconds`."""
        return {"step": self.step, "forward": self.forward, "backward": self.backward, "optimizer": self.optimizer}


def combine(micro: MicroSteps, update: Update, *, exponent: float) -> StepSeconds:
    """The time of a step: its micro-steps, then the optimizer's, as one step follows another."""
    step = step_length(micro, update, exponent=exponent)
    few = msgspec.structs.replace(micro, count=min(micro.count, _FOLLOWED))
    ends = phase_ends(few, update, num_steps=2, exponent=exponent)
    spans = [end - begin for begin, end in pairwise(ends[2 * few.count :])]
    forward, backward = (sum(spans[first:-1:2]) * micro.count / few.count for first in (0, 1))
    share = step / (forward + backward + spans[-1])
    busy = micro.busy.plus(update.busy).plus(Busy(0.0, 0.0, update.gather))
    return StepSeconds(step, share * forward, share * backward, share * spans[-1], _bound(busy))


class BeforeUpdate(msgspec.Struct, frozen=True):
    """What of a step passes before its optimizer's.

    Attributes:
        seconds: Until GPU and host last waited for each other; zero where they never do.
        device: Since then, on the GPU and its links; likewise `host`.
    """

    seconds: float
    device: float
    host: float

    def step_seconds(self, update: Update, *, exponent: float) -> float:
        """From the end of one step to the end of the next."""
        device, host = self.device + update.device_seconds, self.host + update.busy.host
        return self.seconds + whole_step(device, host, exponent)


def before_update(micro: MicroSteps, *, exponent: float) -> BeforeUpdate:
    """How long forward and backward of all micro-steps take, whatever optimizer follows."""
    if not micro.waits:
        return BeforeUpdate(0.0, micro.device_seconds(exponent), micro.host_seconds)
    few = msgspec.structs.replace(micro, count=min(micro.count, 3))
    ends = [0.0, *phase_ends(few, Update(Busy(0.0, 0.0)), num_steps=1, exponent=exponent)]
    begin, end = ends[2 * few.count - 2], ends[2 * few.count]
    others = (micro.count - few.count) * (ends[4] - ends[2]) if micro.count > few.count else 0.0
    host = micro.forward.host + micro.backward.host + micro.reduction.host
    return BeforeUpdate(begin + others, end - begin, host + (micro.accumulation.host if micro.count > 1 else 0.0))


def step_length(micro: MicroSteps, update: Update, *, exponent: float) -> float:
    """Seconds from the end of one step to the end of the next."""
    return before_update(micro, exponent=exponent).step_seconds(update, exponent=exponent)


def phase_ends(micro: MicroSteps, update: Update, *, num_steps: int, exponent: float) -> list[float]:
    """When the GPU is done with every forward, every backward and the optimizer's step of each of some steps.

    GPU and host begin the first of them together, and the host goes on to the next without waiting, or to the next
    forward.
    """
    parts = []
    for index in range(micro.count):
        backward = micro.backward.plus(micro.accumulation) if index else micro.backward
        backward = backward.plus(micro.reduction) if index == micro.count - 1 else backward
        head, tail = micro.backward_head, micro.forward_head
        parts.append(_Part(0.0, _in_layers(micro.forward, tail, exponent), micro.forward.host, tail))
        parts.append(_Part(head, _in_layers(backward, head, exponent), backward.host))
    parts.append(_Part(0.0, update.device_seconds, update.busy.host))
    ends, together, launched = [0.0], 0.0, 0.0
    for index, part in enumerate(parts * num_steps):
        if micro.waits and index % len(parts) in range(0, 2 * micro.count, 2):
            together, launched = ends[-1], 0.0
        launched += part.host
        done = ends[-1] - together + part.before + part.device
        ends.append(together + whole_step(done, launched, exponent) + part.after)
    return ends[1:]


class _Part(NamedTuple):
    """Seconds of one phase on the GPU and its links: before its layers, in them, and after; and of the host."""

    before: float
    device: float
    host: float
    after: float = 0.0


def _in_layers(phase: Busy, head: float, exponent: float) -> float:
    """How long a phase's layers take on the GPU and its links."""
    return longer(Busy(phase.gpu - head, 0.0, phase.link), exponent)


def whole_step(device: float, host: float, exponent: float) -> float:
    """Seconds of a step that keeps the GPU with its links and the host busy for so long, each without a break."""
    return longer(Busy(device, host), exponent)


def _without_host(busy: Busy) -> Busy:
    return Busy(busy.gpu, 0.0, busy.link)


def _bound(whole: Busy) -> Bound:
    most = max(whole.gpu, whole.host, whole.link)
    return "gpu" if whole.gpu == most else "host" if whole.host == most else "link"


def longer(busy: Busy, exponent: float) -> float:
    """The longest of the three, a little more where two are alike."""
    most = max(busy.gpu, busy.host, busy.link)
    total = (busy.gpu / most) ** exponent + (busy.host / most) ** exponent
    if busy.link:
        total += (busy.link / most) ** exponent
    return float(most * total ** (1 / exponent))
