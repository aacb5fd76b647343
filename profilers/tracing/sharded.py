"""Tracing one rank of several: the module under DDP or FSDP2, its peers simulated, on any machine.

The rank that is traced runs torch's own code for both; only the other ranks are missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from optplan.planner.dtypes import Dtype
from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel
from optplan.planner.sharding.rank import updated_parameters
from optplan.planner.step.options import StepOptions
from optplan.planner.tensors import Parameter
from optplan.profilers.tracing.optimizers import modelled_part
from optplan.profilers.tracing.runs import ORDERS, OptimizerPart, Order, Pieces, SimulatedRun
from optplan.profilers.tracing.sharded_steps import ShardedStepTracer, Sharding, StepEnd, with_lasting_bucket
from optplan.profilers.tracing.trace import RunSettings, TracedStep, clip_gradients

if TYPE_CHECKING:
    from optplan.planner.sharding.base import Strategy
    from optplan.profilers.workloads.subject import Subject


class ShardedTracedStep(TracedStep):
    """Traced micro-steps of one rank; its optimizers update this rank's part."""

    def __init__(
        self,
        subject: Subject,
        options: StepOptions,
        settings: RunSettings | None = None,
        *,
        sharding: str,
        strategy: Strategy,
        parameters: Sequence[Parameter],
    ) -> None:
        """Trace.

        Args:
            subject: The undivided module in the dtype in which it is stored, with its inputs.
            options: How the step is run.
            settings: Clipping, and the allocator's settings.
            sharding: What `--sharding` said, one of `TRACED_SHARDINGS`.
            strategy: The strategy of that name.
            parameters: All of the module's parameters in the planner's words.

        Raises:
            ConfigError: The module cannot be traced under the strategy.
        """
        self._strategy = strategy
        self._all_parameters = parameters
        ranks = strategy.ranks
        self._sharding = Sharding(
            strategy=sharding, num_ranks=ranks.num_gpus, rank=ranks.rank, views=sharding != "ddp-copies"
        )
        super().__init__(subject, options, settings)

    @property
    def _is_mixed(self) -> bool:
        """Whether fp32 shards are gathered in bf16, instead of fp32 copies kept beside bf16 parameters."""
        return self._sharding.is_full and self._options.precision == "mixed"

    def _master_dtype(self) -> Dtype | None:
        return None if self._is_mixed else super()._master_dtype()

    def _make_tracer(self, subject: Subject) -> ShardedStepTracer:
        names = [parameter.name for parameter in updated_parameters(self._all_parameters, self._strategy)]
        return ShardedStepTracer(
            subject, sharding=self._sharding, mixed=self._is_mixed, updated=names, **self._tracer_arguments()
        )

    def _run_pieces(self) -> Pieces:
        settings = self._settings
        clips = settings.clip_grad_norm is not None
        end = StepEnd(
            clip=(lambda parameters: clip_gradients(parameters, settings)) if clips else None,
            keeps_gradients=self._options.keep_grads,
        )
        tracer = self._tracer
        assert isinstance(tracer, ShardedStepTracer)
        return tracer.run_steps(num_micro_steps=self._options.grad_accum, end=end)

    def simulate(self, part: OptimizerPart, orders: Sequence[Order] = ORDERS) -> list[SimulatedRun]:
        """As for one GPU; of several orders also with DDP's first bucket held beside the later ones."""
        runs = super().simulate(part, orders)
        other = with_lasting_bucket(self.pieces) if len(orders) > 1 else None
        return runs if other is None else [*runs, *(self._simulator(other, order).simulate(part) for order in orders)]

    def _modelled_part(self, optimizer: OptimizerModel, parameters: Sequence[Parameter]) -> OptimizerPart:
        del parameters  # a rank's state follows from all of them
        everything = self._all_parameters
        dtype = self._options.stored_dtype or self._options.parameter_dtype
        context = OptimizerContext(dtype, dtype)
        bound = optimizer.bind(everything)
        return modelled_part(bound, everything, context, master=self._master, strategy=self._strategy)
