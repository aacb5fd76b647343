"""What all models share when their step is recorded: how layers are run, and what is left when the loss is there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

from optplan.planner.step import projections, vocabulary
from optplan.planner.step.fused_losses import chunked_cross_entropy, liger_cross_entropy
from optplan.planner.step.graph import Tensor
from optplan.planner.step.options import StepOptions
from optplan.planner.step.tape import Tape

Config = TypeVar("Config")
RECOMPUTED = "recomputed"
"""Last word of the kind of a layer that selective checkpointing recomputes."""


class StepModel(ABC, Generic[Config]):
    """A model at work: its configuration, how the step is run, and the tape that records it.

    Attributes:
        kinds: Kind of each recorded layer, as `layer_kinds` gives them.
    """

    def __init__(self, t: Tape, config: Config, kinds: tuple[str, ...], options: StepOptions) -> None:
        self.t = t
        self.c = config
        self.kinds = kinds
        self.o = options
        self.num_tokens = options.batch_size * options.seq_len

    def loss(self) -> Tensor:
        """The forward pass up to the loss; everything else is let go, as when only `.loss` is read."""
        self.t.hooks.before_forward(self.t)
        loss, logits = self._loss_and_logits()
        self.t.hooks.after_forward(self.t, loss)
        del logits
        self.t.casts.clear()
        return loss

    @abstractmethod
    def _loss_and_logits(self) -> tuple[Tensor, Tensor | None]:
        """The loss and the logits, as the transformers class returns them; None if the loss is made without."""

    def language_loss(self, hidden: Tensor, width: int, vocab: int, *, name: str) -> tuple[Tensor, Tensor | None]:
        """The loss of next-token prediction, and the logits if they are made.

        Args:
            hidden: What the output head is given.
            width: Its elements a token.
            vocab: Rows of the head's weight.
            name: The head's weight, which is the embedding's where they are tied.
        """
        if self.o.fused_loss == "liger":
            return liger_cross_entropy(self.t, hidden, width, vocab, name=name, options=self.o), None

        def project(x: Tensor) -> Tensor:
            self.t.path = "lm_head"
            return self._capped(projections.output_head(self.t, x, width, vocab, name=name))

        if self.o.fused_loss == "chunked":
            return chunked_cross_entropy(self.t, hidden, width, project=project, options=self.o), None
        logits = project(hidden)
        return vocabulary.cross_entropy(self.t, logits, self.o.batch_size, self.o.seq_len), logits

    def _capped(self, logits: Tensor) -> Tensor:
        """The logits as they go into the loss."""
        return logits

    def run_layer(self, layer: int, run: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """The layer's output, checkpointed as the options say."""
        self.t.enter(layer)
        checkpointing, hooks = self.o.checkpointing, self.t.hooks

        def wrapped(x: Tensor) -> Tensor:
            return hooks.after_layer(self.t, layer, run(hooks.before_layer(self.t, layer, x)))

        if checkpointing == "full-reentrant":
            return self.t.checkpoint_whole(wrapped, hidden)
        if checkpointing == "full" or self.kinds[layer].endswith(RECOMPUTED):
            return self.t.checkpoint(wrapped, hidden)
        return wrapped(hidden)


def kind_of(kind: str) -> str:
    """The kind of layer without what is said about its checkpointing."""
    return kind.split(" ")[0]
