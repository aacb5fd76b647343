"""Training runs of `train_study.py`, several at once: each on its own CUDA stream, without waiting for the device.

A run's forward and backward pass, the fetch of its data and the clipping of its gradients are one CUDA graph; the
optimizer steps as a user calls it. On a CPU all of it runs as it stands.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from train_study_corpus import Corpus, even_windows, random_starts, windows_at
from train_study_model import ByteGPT, Size, loss_of

NUM_WARM_UP_PASSES = 3
"""Passes before a CUDA graph is recorded, which change nothing."""

Build = Callable[[ByteGPT, float], torch.optim.Optimizer]


class Recipe(NamedTuple):
    """What is the same for every run of a study.

    Attributes:
        size: Of the model.
        num_steps: Steps of a run, but for those that are a part as long.
        batch: Windows a step, of `size.context` bytes each.
        warm_up: Part of the steps in which the learning rate rises.
        last_lr: What the cosine ends at, as part of the learning rate.
        clip_norm: Largest norm of all gradients together.
        num_validation_windows: Spread evenly over the validation text.
        log_every: Steps between training losses kept.
        validate_every: Steps between validation losses.
    """

    size: Size = Size()
    num_steps: int = 1000
    batch: int = 16
    warm_up: float = 0.1
    last_lr: float = 0.1
    clip_norm: float = 1.0
    num_validation_windows: int = 512
    log_every: int = 10
    validate_every: int = 100


class Plan(NamedTuple):
    """One run: whose optimizer, its learning rate, the seed of the initial values and of the data order.

    Attributes:
        name: Of the optimizer.
        build: Makes it.
        lr: Peak of the learning rate.
        seed: As above.
        dtype: Of the parameters.
        num_steps: Length of the run and of its schedule.
    """

    name: str
    build: Build
    lr: float
    seed: int
    dtype: torch.dtype
    num_steps: int


class Outcome(NamedTuple):
    """Losses in nats a byte, None where they were not finite; the state; seconds shared with `alongside` runs."""

    plan: Plan
    train_losses: list[list[float | None]]
    validation_losses: list[list[float | None]]
    num_parameters: int
    state_bytes: int
    seconds: float
    alongside: int

    @property
    def final_loss(self) -> float:
        """Validation loss after the last step; infinite for a run that diverged."""
        last = self.validation_losses[-1][1]
        return math.inf if last is None else last


def train(plans: list[Plan], recipe: Recipe, corpus: Corpus) -> list[Outcome]:
    """All runs, step by step in turns; a run alone is on the default stream, for code that knows no other."""
    start = time.perf_counter()
    runs = [_Run(plan, recipe, corpus, own_stream=len(plans) > 1) for plan in plans]
    for step in range(max(plan.num_steps for plan in plans)):
        for run in runs:
            if step < run.plan.num_steps:
                run.advance(step)
    for run in runs:
        run.validate()
    if corpus.train.is_cuda:
        torch.cuda.synchronize()
    seconds = round(time.perf_counter() - start, 2)
    return [run.outcome(seconds, len(plans)) for run in runs]


def rate_at(step: int, num_steps: int, recipe: Recipe) -> float:
    """The learning rate of a step as part of its peak: a linear rise, then half a cosine down to `last_lr`."""
    rise = max(round(recipe.warm_up * num_steps), 1)
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(num_steps - rise, 1)
    return recipe.last_lr + (1 - recipe.last_lr) * (1 + math.cos(math.pi * done)) / 2


class _Run:
    def __init__(self, plan: Plan, recipe: Recipe, corpus: Corpus, *, own_stream: bool) -> None:
        self.plan, self.recipe, self.text = plan, recipe, corpus.train
        device, self.length = corpus.train.device, recipe.size.context + 1
        self.model = ByteGPT(recipe.size, seed=plan.seed).to(device, plan.dtype)
        self.optimizer = plan.build(self.model, plan.lr)
        self.starts = random_starts(
            self.text, num_steps=plan.num_steps, batch=recipe.batch, length=self.length, seed=plan.seed
        )
        self.windows = even_windows(
            corpus.validation, num_windows=recipe.num_validation_windows, length=self.length
        ).split(8 * recipe.batch)
        self.counter = torch.zeros(1, dtype=torch.long, device=device)
        self.losses = torch.full((plan.num_steps,), torch.nan, device=device)
        self.validations: list[torch.Tensor] = []
        stream = torch.cuda.Stream() if self.text.is_cuda else None
        self._pass = self._record(stream) if stream else self._forward_backward
        self.stream = stream if own_stream else None

    def advance(self, step: int) -> None:
        """One step, after a validation where one is due."""
        if step % self.recipe.validate_every == 0:
            self.validate()
        with self._on_stream():
            self._pass()
            for group in self.optimizer.param_groups:
                group["lr"] = self.plan.lr * rate_at(step, self.plan.num_steps, self.recipe)
            self.optimizer.step()

    @torch.no_grad()
    def validate(self) -> None:
        """Keep the loss on the validation set."""
        with self._on_stream():
            losses = [loss_of(self.model, windows) * len(windows) for windows in self.windows]
            self.validations.append(torch.stack(losses).sum() / self.recipe.num_validation_windows)

    def outcome(self, seconds: float, alongside: int) -> Outcome:
        """The curves so far, read from the device."""
        losses, every = _finite(self.losses), self.recipe.log_every
        validations = _finite(torch.stack(self.validations))
        steps = [*range(0, self.plan.num_steps, self.recipe.validate_every), self.plan.num_steps]
        return Outcome(
            self.plan,
            [[step + 1, loss] for step, loss in enumerate(losses) if step % every == 0],
            [[step, loss] for step, loss in zip(steps, validations, strict=True)],
            sum(p.numel() for p in self.model.parameters()),
            _state_bytes(self.optimizer),
            seconds,
            alongside,
        )

    def _forward_backward(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None
        windows = windows_at(self.text, self.starts.index_select(0, self.counter)[0], self.length)
        loss = loss_of(self.model, windows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.losses.index_copy_(0, self.counter, loss.detach()[None])
        self.counter += 1

    def _record(self, stream: torch.cuda.Stream) -> Callable[[], None]:
        """The pass as a CUDA graph, recorded on the run's stream so that it shares no workspace with others."""
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(NUM_WARM_UP_PASSES):
                self.counter.zero_()
                self._forward_backward()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._forward_backward()
        self.counter.zero_()
        torch.cuda.synchronize()
        return graph.replay

    def _on_stream(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self.stream) if self.stream else nullcontext()


def _finite(losses: torch.Tensor) -> list[float | None]:
    return [round(loss, 5) if math.isfinite(loss) else None for loss in losses.tolist()]


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors but the step counters."""
    tensors = [
        value
        for state in optimizer.state.values()
        for name, value in state.items()
        if name != "step" and isinstance(value, torch.Tensor)
    ]
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)
