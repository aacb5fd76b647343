"""What every model with a language-model head shares when its step is recorded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from optplan.planner.step.graph import Tensor
from optplan.planner.step.options import StepOptions
from optplan.planner.step.tape import Tape

Config = TypeVar("Config")


class CausalLm(ABC, Generic[Config]):
    """A model at work: its configuration, how the step is run, and the tape that records it."""

    def __init__(self, t: Tape, config: Config, options: StepOptions) -> None:
        self.t = t
        self.c = config
        self.o = options
        self.num_tokens = options.batch_size * options.seq_len

    def loss(self) -> Tensor:
        """The forward pass up to the loss; everything else is let go, as when only `.loss` is read."""
        loss, logits = self._causal_lm()
        del logits
        self.t.casts.clear()
        return loss

    @abstractmethod
    def _causal_lm(self) -> tuple[Tensor, Tensor]:
        """The loss and the logits, as the transformers class returns them."""
