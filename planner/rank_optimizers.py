"""What optimizers keep, allocate and move on the rank whose memory is told."""

from __future__ import annotations

from collections.abc import Sequence

from optplan.planner.candidates import Candidate, optimizer_context
from optplan.planner.footprint import optimizer_footprint
from optplan.planner.optimizers.base import OptimizerModel
from optplan.planner.request import StepRequest
from optplan.planner.sharding.optimizer_state import kept_beside_state
from optplan.planner.sharding.rank import rank_footprint, updated_parameters, write_rank_step
from optplan.planner.step.simulation import ParameterStep
from optplan.planner.tensors import Parameter
from optplan.planner.timeline import Timeline, TimelineBuilder


class RankOptimizers:
    """Answers for one request; an optimizer's step is written once.

    Attributes:
        parameters: Those that the rank updates.
    """

    def __init__(self, request: StepRequest) -> None:
        self._request = request
        self._strategy = request.strategy
        self.parameters = updated_parameters(request.rank_model.trained_parameters, self._strategy)
        self._context = optimizer_context(request)
        self._steps: dict[OptimizerModel, Timeline] = {}
        self._parameter_steps: dict[OptimizerModel, dict[str, ParameterStep]] = {}

    def share_steps(self, other: RankOptimizers) -> None:
        """Have the steps in common with another request's optimizers, which take the same."""
        self._steps = other._steps

    def state_sizes(self, candidate: Candidate) -> list[int]:
        """Bytes of the state tensors on the device, as the first step makes them, and of what is kept beside them."""
        kept = [num_bytes for _, num_bytes in self._kept(candidate)]
        return [*candidate.footprint.device_sizes(self.parameters), *kept]

    def state_names(self, candidate: Candidate) -> list[str]:
        """Names of those tensors."""
        return [*candidate.footprint.device_names(self.parameters), *(name for name, _ in self._kept(candidate))]

    def state_variants(self, candidate: Candidate) -> dict[str, int]:
        """Bytes of device state under each of the optimizer's variants, such as the ends of Adapprox's rank."""
        parameters = self._request.rank_model.trained_parameters
        return {
            name: rank_footprint(variant, parameters, self._context, self._strategy).device_bytes
            for name, variant in candidate.optimizer.variants().items()
        }

    def step(self, candidate: Candidate) -> Timeline:
        """What the optimizer's `step()` allocates and frees besides its state."""
        key = candidate.optimizer
        if key not in self._steps:
            self._steps[key] = self._step_of(key, self.parameters)
        return self._steps[key]

    def parameter_steps(self, candidate: Candidate) -> dict[str, ParameterStep]:
        """What an optimizer of each parameter's own keeps and allocates."""
        key = candidate.optimizer
        if key not in self._parameter_steps:
            self._parameter_steps[key] = {
                parameter.name: ParameterStep(
                    optimizer_footprint(key, [parameter], self._context).device_sizes([parameter]),
                    self._step_of(key, [parameter]),
                )
                for parameter in self.parameters
            }
        return self._parameter_steps[key]

    def moved_bytes(self, candidate: Candidate) -> int:
        """Bytes that the optimizer's `step()` must at least read and write: each tensor once, each result once."""
        return sum(
            len(group.parameters) * candidate.optimizer.moved_bytes(self._local(group.parameters[0]), self._context)
            for group in candidate.footprint.groups
        )

    def _step_of(self, optimizer: OptimizerModel, parameters: Sequence[Parameter]) -> Timeline:
        timeline, master = TimelineBuilder("step"), self._request.policy.master_dtype
        write_rank_step(timeline, optimizer, parameters, self._context, master=master, strategy=self._strategy)
        return timeline.events

    def _kept(self, candidate: Candidate) -> list[tuple[str, int]]:
        shard = None if self._strategy is None else self._strategy.shard()
        return kept_beside_state(candidate.optimizer, self.parameters, shard)

    def _local(self, parameter: Parameter) -> Parameter:
        shard = None if self._strategy is None else self._strategy.shard()
        return parameter if shard is None else shard.local(parameter)
