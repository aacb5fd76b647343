"""Adam-mini as the authors' package partitions it: by substrings of the parameters' names.

Sources: adam-mini 1.0.4, 1.0.5 and 1.1.1, `adam_mini/adam_mini.py`; the three partition differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel, itemsize
from optplan.planner.optimizers.options import Option
from optplan.planner.optimizers.parts import like_parameter, tensor
from optplan.planner.optimizers.reduction import write_reduction_buffers
from optplan.planner.optimizers.scratch import Scratch
from optplan.planner.reductions import row_reduction_bytes
from optplan.planner.tensors import Parameter, StateTensor
from optplan.planner.timeline import TimelineBuilder

Rule = Literal["element", "head", "row", "tensor"]

_EARLY_ELEMENTS = ("embed", "embd", "wte", "lm_head.weight", "output.weight")
_EARLY_HEADS = ("k_proj.weight", "q_proj.weight", "wq.weight", "wk.weight")
_HEADS = ("k_proj", "q_proj", "wq", "wk", "query", "key")
_ROWS = (
    "embed", "embd", "wte", "lm_head", "output", "final_layer", "v_proj", "wv", "value", "feed_forward", "linear",
    "mlp", "o_proj", "wo", "attn.proj",
)  # fmt: skip
_RULES: dict[str, tuple[tuple[Rule, tuple[str, ...]], ...]] = {
    "1.1.1": (("element", ("bias",)), ("head", _HEADS), ("row", _ROWS)),
    "1.0.5": (
        ("element", _EARLY_ELEMENTS),
        ("head", (*_EARLY_HEADS, "v_proj.weight", "wv.weight")),
        ("row", ("feed_forward", "o_proj.weight", "wo.weight")),
    ),
    "1.0.4": (("element", _EARLY_ELEMENTS), ("head", _EARLY_HEADS)),
}
"""What each version tests for, in order; a name that matches nothing shares one second moment for the whole tensor."""

DEFAULT_DIM, DEFAULT_NUM_HEADS = 2048, 32
"""What the package's constructor assumes when it is told nothing."""


class AdamMini(OptimizerModel):
    """The package adam-mini; `dim` and `n_heads` are given as the model has them, as its documentation asks."""

    OPTIONS = (
        Option(
            "version", "text", "1.1.1", "release of the package, which decides the partition", choices=tuple(_RULES)
        ),
        Option("dim", "integer", None, "hidden size told to the constructor; the model's own by default", low=1),
        Option("n_heads", "integer", None, "query heads told to the constructor; the model's own by default", low=1),
    )

    def bind(self, parameters: Sequence[Parameter]) -> Self:
        """The same with `dim` and `n_heads` read off the first matrix that holds queries, unless they were given."""
        dim, num_heads = DEFAULT_DIM, DEFAULT_NUM_HEADS
        for p in parameters:
            if p.heads is not None and p.heads.num_query_heads and len(p.shape) == 2:
                dim, num_heads = p.numel // p.num_output_neurons, p.heads.num_query_heads
                break
        derived = {"dim": self.options["dim"] or dim, "n_heads": self.options["n_heads"] or num_heads}
        return type(self)(self.id, self.implementation, self.options | derived)

    @property
    def _head_numel(self) -> int:
        dim = self.options["dim"] or DEFAULT_DIM
        return dim * dim // (self.options["n_heads"] or DEFAULT_NUM_HEADS)

    def rule(self, parameter: Parameter) -> Rule:
        """Which of the package's branches takes a parameter."""
        name = parameter.name.lower() if self.options["version"] == "1.1.1" else parameter.name
        for rule, words in _RULES[self.options["version"]]:
            if any(word in name for word in words):
                return rule
        return "tensor"

    def _num_blocks(self, parameter: Parameter) -> int:
        rule = self.rule(parameter)
        if rule == "head":
            return parameter.numel // self._head_numel
        return parameter.shape[0] if rule == "row" else 1

    def state(self, parameter: Parameter, context: OptimizerContext) -> tuple[StateTensor, ...]:
        """`m` and, where the name says bias (or embedding, early on), `v`; otherwise `vmean`, one a block."""
        dtype, rule = self.state_dtype(context), self.rule(parameter)
        if rule == "element":
            return (like_parameter("m", parameter, dtype), like_parameter("v", parameter, dtype))
        num_blocks = self._num_blocks(parameter)
        if rule == "tensor":
            return (like_parameter("m", parameter, dtype), tensor("vmean", (), dtype, why="one for the tensor"))
        why = f"one a head of {self._head_numel} elements" if rule == "head" else "one a row"
        shape = (num_blocks, self._head_numel) if rule == "head" else parameter.shape
        return (tensor("m", shape, dtype), tensor("vmean", (num_blocks, 1), dtype, why=why))

    def unsupported_reason(self, parameters: Sequence[Parameter], context: OptimizerContext) -> str | None:
        """A tensor of another shape than the substring of its name makes the package expect."""
        del context
        package = f"adam-mini {self.options['version']}"
        for p in parameters:
            rule = self.rule(p)
            if rule == "row" and len(p.shape) != 2:
                return f"{package} fails on {p.name}: it expects a matrix by that name, got shape {list(p.shape)}"
            if rule == "head" and (p.numel == 0 or p.numel % self._head_numel):
                return (
                    f"{package} fails on {p.name}: {p.numel} elements do not divide into heads of {self._head_numel} "
                    f"(dim x dim / n_heads)"
                )
        return None

    def write_step(self, timeline: TimelineBuilder, parameters: Sequence[Parameter], context: OptimizerContext) -> None:
        """Squared gradient, update and its negation of one tensor, beside the update of the last."""
        scratch = Scratch(timeline)
        for p in parameters:
            self._write_tensor(scratch, p, itemsize(self.state_dtype(context)))
        scratch.close()

    def _write_tensor(self, scratch: Scratch, p: Parameter, width: int) -> None:
        rule, size, num_blocks = self.rule(p), p.numel * width, self._num_blocks(p)
        means = num_blocks * width
        if rule == "element":
            scratch.assign("h", p, ("square root of v", size), ("denominator", size))
            scratch.drop("stepsize")  # a plain number here
            return
        squares = scratch.alloc(p, ("squared gradient", size))
        mean = scratch.alloc(p, ("mean square" if rule != "tensor" else "sum of squares", means))
        write_reduction_buffers(scratch, p, row_reduction_bytes(num_blocks, p.numel // max(1, num_blocks)))
        scratch.free(squares)
        scratch.bind("tmp_lr", mean)
        if rule == "tensor":
            scratch.assign("tmp_lr", p, ("mean square", means))
        scratch.assign("h", p, ("square root of vmean", means), ("denominator", means))
        scratch.assign("stepsize", p, ("reciprocal denominator", means), ("step size", means))
        scratch.assign("update", p, ("update", size))
        scratch.passing(p, ("negated update", size))
