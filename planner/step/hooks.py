"""What may be done around a step's operations: where parameters are gathered and gradients are passed on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optplan.planner.step.graph import Storage, Tensor

if TYPE_CHECKING:
    from optplan.planner.step.tape import Tape


class StepHooks:
    """Does nothing; a sharding strategy overrides what it needs.

    Layers are numbered as they are recorded.
    """

    def before_forward(self, t: Tape) -> None:
        """The model is about to run."""

    def before_layer(self, t: Tape, layer: int, x: Tensor) -> Tensor:
        """A layer is about to run on `x`; the result is what it is given instead."""
        del t, layer
        return x

    def after_layer(self, t: Tape, layer: int, out: Tensor) -> Tensor:
        """A layer has made `out`; the result is what goes on."""
        del t, layer
        return out

    def after_forward(self, t: Tape, loss: Tensor) -> None:
        """The model has made the loss."""

    def takes_gradient(self, t: Tape, key: tuple[int | None, str], storage: Storage) -> bool:
        """Whether the gradient of a parameter, which lies in `storage`, is not the parameter's to keep."""
        del t, key, storage
        return False

    def after_backward(self, t: Tape) -> None:
        """The graph has been run backward."""
