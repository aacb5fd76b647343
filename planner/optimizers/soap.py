"""SOAP: Adam in the eigenbasis of Shampoo's preconditioners, the authors' code and pytorch_optimizer's port.

Source: arXiv 2409.11321; nikhilvyas/SOAP `soap.py` at f42d296; pytorch_optimizer 4.1.0 `optimizer/soap.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from optplan.planner.dtypes import Dtype
from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel, itemsize
from optplan.planner.optimizers.linalg import write_qr
from optplan.planner.optimizers.options import Option
from optplan.planner.optimizers.parts import like_parameter, tensor
from optplan.planner.optimizers.scratch import Scratch
from optplan.planner.optimizers.sorting import write_sort_buffers
from optplan.planner.tensors import Parameter, StateTensor
from optplan.planner.timeline import TimelineBuilder

_FP32_BYTES = 4
_INDEX_BYTES = 8


class _Soap(OptimizerModel):
    """Two moments, and for each side of a tensor that is not too long a preconditioner and its eigenbasis.

    The steady step modelled is one that renews the bases (every tenth by default): of all it allocates most. For
    tensors of three or more dimensions some copies of permuted operands are left out. Where a step replaces a state
    tensor, the new one stands for the old one, of the same size, until the code lets go of the old one.
    """

    OPTIONS = (
        Option("max_precond_dim", "integer", 10_000, "longest side that is preconditioned", low=1),
        Option("precondition_1d", "boolean", False, "precondition vectors too: two square matrices each"),
    )

    @abstractmethod
    def _basis_dtype(self, context: OptimizerContext) -> Dtype:
        """Dtype of preconditioners and bases."""

    def _sides(self, parameter: Parameter) -> tuple[tuple[int, int], ...]:
        """Axis and size of the sides that are preconditioned."""
        if len(parameter.shape) == 1 and not self.options["precondition_1d"]:
            return ()
        return tuple((axis, n) for axis, n in enumerate(parameter.shape) if n <= self.options["max_precond_dim"])

    def state(self, parameter: Parameter, context: OptimizerContext) -> tuple[StateTensor, ...]:
        """Both moments, preconditioners (`GG`) and bases (`Q`)."""
        dtype, basis = self.state_dtype(context, own=context.gradient_dtype), self._basis_dtype(context)
        moments = [like_parameter(name, parameter, dtype) for name in ("exp_avg", "exp_avg_sq")]
        squares = [
            tensor(f"{name}.{axis}", (size, size), basis, why=why)
            for name, why in (("GG", "preconditioner"), ("Q", "eigenbasis"))
            for axis, size in self._sides(parameter)
        ]
        return (*moments, *squares)

    def moved_bytes(self, parameter: Parameter, context: OptimizerContext) -> int:
        """The default for a step between two renewals, in which the bases are only read."""
        bases = sum(n * n for _, n in self._sides(parameter)) * itemsize(self._basis_dtype(context))
        return super().moved_bytes(parameter, context) - bases

    def write_step(self, timeline: TimelineBuilder, parameters: Sequence[Parameter], context: OptimizerContext) -> None:
        """Projections of gradient and moments, outer products, and the new bases of each tensor."""
        scratch, width = Scratch(timeline), itemsize(context.gradient_dtype)
        for p in parameters:
            self._write_tensor(scratch, p, width)
        scratch.close()

    @abstractmethod
    def _write_tensor(self, scratch: Scratch, p: Parameter, width: int) -> None:
        """Append one tensor's turn."""

    def _products(self, p: Parameter, width: int, what: str) -> list[tuple[str, int]]:
        """A projection: one product a side, each of the tensor's size; none if no side is preconditioned."""
        return [(what, p.numel * width) for _ in self._sides(p)]

    def _project(self, scratch: Scratch, p: Parameter, variable: str, what: str, width: int) -> None:
        """Bind `variable` to a projection, or to a view that takes nothing."""
        products = self._products(p, width, what)
        if products:
            scratch.assign(variable, p, *products)
        else:
            scratch.drop(variable)

    def _write_outer_products(self, scratch: Scratch, p: Parameter, width: int) -> None:
        last = len(p.shape) - 1
        for axis, size in self._sides(p):
            operands = [("operand made contiguous", p.numel * width)] * (2 if 0 < axis < last else 0)
            copies = [scratch.alloc(p, operand) for operand in operands]
            product = scratch.alloc(p, ("outer product", size * size * width))
            scratch.free(*reversed(copies))
            scratch.bind("outer_product", product)
        if last == 0:
            scratch.drop("outer_product")  # a vector's is never given a name

    def _write_order(self, scratch: Scratch, p: Parameter, size: int, width: int) -> None:
        """The order of the eigenvalues, by sorting, and the second moment in that order."""
        values = scratch.alloc(p, ("sorted eigenvalues", size * width))
        order = scratch.alloc(p, ("order", size * _INDEX_BYTES))
        write_sort_buffers(scratch, p, numel=size, element_bytes=width)
        scratch.free(values)
        scratch.bind("sort_idx", order)
        scratch.assign("exp_avg_sq", p, ("second moment in order", p.numel * width))


class OfficialSoap(_Soap):
    """The authors' `SOAP`: fp32 preconditioners; the first moment lives in the eigenbasis and moves with it."""

    def _basis_dtype(self, context: OptimizerContext) -> Dtype:
        del context
        return "float32"

    def unsupported_reason(self, parameters: Sequence[Parameter], context: OptimizerContext) -> str | None:
        """Its fp32 preconditioners cannot be averaged with 16-bit products."""
        if context.gradient_dtype == "float32" or not any(self._sides(p) for p in parameters):
            return None
        return (
            f"soap with implementation=official fails on {context.gradient_dtype} gradients: it averages them "
            "into fp32 preconditioners; use fp32 parameters or implementation=pytorch_optimizer"
        )

    def _write_tensor(self, scratch: Scratch, p: Parameter, width: int) -> None:
        size = p.numel * width
        self._project(scratch, p, "grad_projected", "projected gradient", width)
        scratch.drop("exp_avg_sq")
        scratch.passing(p, ("squared gradient", size))
        scratch.assign("denom", p, ("denominator", size))
        scratch.drop("exp_avg")
        scratch.assign("norm_grad", p, ("direction", size), *self._products(p, width, "direction projected back"))
        self._project(scratch, p, "exp_avg", "first moment projected back", width)
        self._write_outer_products(scratch, p, width)
        self._write_bases(scratch, p, width)
        self._project(scratch, p, "exp_avg", "projected first moment", width)
        scratch.drop("outer_product")

    def _write_bases(self, scratch: Scratch, p: Parameter, width: int) -> None:
        bases = []
        for _, size in self._sides(p):
            square = size * size * _FP32_BYTES
            scratch.drop("o")
            product = scratch.chain(p, ("basis times preconditioner", square), ("rotated preconditioner", square))
            eigenvalues = scratch.alloc(p, ("eigenvalues", size * _FP32_BYTES))
            scratch.free(product)
            scratch.bind("est_eig", eigenvalues)
            self._write_order(scratch, p, size, width)
            scratch.assign("o", p, ("basis in order", square))
            scratch.assign("power_iter", p, ("power iteration", square))
            basis, rest = write_qr(scratch, p, size=size)
            scratch.bind("R", rest)
            bases.append(basis)
        scratch.drop("est_eig", "sort_idx", "o", "power_iter", "R")
        scratch.free(*bases)  # they take the place of the old bases, which die here


class PortedSoap(_Soap):
    """`pytorch_optimizer.SOAP`: everything in the gradient's dtype, the first moment in the original basis."""

    def _basis_dtype(self, context: OptimizerContext) -> Dtype:
        return context.gradient_dtype

    def _write_tensor(self, scratch: Scratch, p: Parameter, width: int) -> None:
        size = p.numel * width
        self._project(scratch, p, "grad_projected", "projected gradient", width)
        scratch.drop("exp_avg_sq")
        scratch.passing(p, ("squared gradient", size))
        scratch.assign("de_nom", p, ("denominator", size))
        self._project(scratch, p, "exp_avg_projected", "projected first moment", width)
        scratch.assign("norm_grad", p, ("direction", size), *self._products(p, width, "direction projected back"))
        self._write_outer_products(scratch, p, width)
        self._write_bases(scratch, p, width)
        scratch.drop("outer_product")

    def _write_bases(self, scratch: Scratch, p: Parameter, width: int) -> None:
        bases = []
        for _, size in self._sides(p):
            square = size * size * width
            scratch.assign("matrix_product", p, ("preconditioner times basis", square))
            product = scratch.alloc(p, ("rotated preconditioner", square))
            eigenvalues = scratch.alloc(p, ("eigenvalues", size * width))
            scratch.free(product)
            scratch.bind("est_eig", eigenvalues)
            self._write_order(scratch, p, size, width)
            scratch.assign("power_iter", p, ("power iteration in order", square))
            bases.append(self._write_basis(scratch, p, size, width))
        scratch.drop("matrix_product", "est_eig", "sort_idx", "power_iter", "R")
        scratch.free(*bases)  # they take the place of the old bases, which die here

    def _write_basis(self, scratch: Scratch, p: Parameter, size: int, width: int) -> int:
        """The orthogonal factor, through fp32 for 16-bit preconditioners; returns its id."""
        square = size * size
        is_cast = width < _FP32_BYTES
        copies = [scratch.alloc(p, ("fp32 copy of the power iteration", square * _FP32_BYTES))] if is_cast else []
        basis, rest = write_qr(scratch, p, size=size)
        scratch.free(*copies)
        scratch.bind("R", rest)
        if is_cast:
            narrow = scratch.alloc(p, ("new basis", square * width))
            scratch.free(basis)
            basis = narrow
        return basis
