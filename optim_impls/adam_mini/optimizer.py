"""Adam-mini as a `torch.optim.Optimizer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, get_args

import msgspec
import torch
from torch import nn

from optplan.optim_impls.adam_mini.layout import Layout, layout_of, new_second_moments
from optplan.optim_impls.adam_mini.reference import Hyperparameters, adam_mini, block_square_sums
from optplan.optim_impls.adam_mini.roles import describe_module
from optplan.optim_impls.adam_mini.shared_blocks import SharedBlocks
from optplan.optim_impls.checks import check_at_least_zero, check_betas, check_choice
from optplan.optim_impls.fingerprint import local_tensor
from optplan.optim_impls.optimizer_base import (
    Batch,
    GradScale,
    GroupPlan,
    KernelOptimizer,
    Member,
    as_scale,
    on_device,
)
from optplan.optim_impls.rounding import mix_seed, random_bits, store
from optplan.optim_impls.step_counters import State
from optplan.planner.optimizers.adam_mini_blocks import BlockKind, blocks_of
from optplan.planner.tensors import Parameter, Role

if TYPE_CHECKING:
    from optplan.optim_impls.adam_mini.plan import Plan

STATE_DTYPES = (None, torch.float32, torch.bfloat16)
ROUNDINGS = ("nearest", "stochastic")


class PartitionRow(msgspec.Struct, frozen=True):
    """How one parameter is divided.

    Attributes:
        name: Of the parameter, or its number in the optimizer if it was given without one.
        shape: Sizes.
        role: What it is for.
        kind: `element`, `row`, `head`, `fused_qkv` or `tensor`.
        num_blocks: Second moments it keeps.
        why: What told its role.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    kind: BlockKind
    num_blocks: int
    why: str


class AdamMini(KernelOptimizer):
    """Adam with one second moment a block of parameters: a row, an attention head, or a whole tensor.

    Half the state of AdamW, with AdamW's hyperparameters. `AdamMini.from_module(model)` reads the blocks off the
    model; `partition_table()` says what it found.

    Parameters sharded by rows, as FSDP2's `fully_shard` makes them, keep the blocks of the whole tensor: where ranks
    hold parts of a block, its sum of squares is taken over all of them, in one collective a param group, and its second
    moment is kept on every rank.

    Args:
        params: Parameters or param groups; a group may override every number below.
        roles: What each parameter is for: a role (see `optplan.planner.tensors.Role`), or the planner's `Parameter`
            where heads or transposed weights matter.
        lr: Learning rate, a number; with `capturable` also a scalar tensor on the device.
        betas: Decays of the two moments.
        eps: Added to the root of the corrected second moment.
        weight_decay: Decoupled: `lr * weight_decay` of the parameter is taken off each step.
        state_dtype: Dtype of the first moment: torch.float32, torch.bfloat16, or None for the parameter's.
        rounding: How bf16 parameters are stored: `nearest`, or `stochastic`, up or down with the probability that keeps
            the mean.
        seed: Of stochastic rounding; the stream depends on it, the step and the element, on nothing else.
        backend: `auto`, `triton` or `torch`; see `KernelOptimizer`.
        capturable: Keep the step counters on the device, so that a CUDA graph may record `step()`.

    Raises:
        ValueError: An argument is out of range, a parameter has no role, or a role does not suit its shape.
        TypeError: A parameter is not of real floating-point numbers.

    Source: Zhang et al., Adam-mini: Use Fewer Learning Rates To Gain More, ICLR 2025, arXiv 2406.16793.
    """

    def __init__(
        self,
        params: Any,
        *,
        roles: Mapping[torch.Tensor, Role | Parameter],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_dtype: torch.dtype | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        backend: str = "auto",
        capturable: bool = False,
    ) -> None:
        self._layouts: dict[torch.Tensor, Layout] = {}
        self._rows: dict[torch.Tensor, PartitionRow] = {}
        self._roles = dict(roles)
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"state_dtype": state_dtype, "rounding": rounding, "seed": seed}
        super().__init__(params, defaults, backend=backend, capturable=capturable)

    @classmethod
    def from_module(
        cls, model: nn.Module, *, params: Any = None, masters: Sequence[torch.Tensor] | None = None, **options: Any
    ) -> Self:
        """The optimizer of a model, with the roles that its structure gives.

        Args:
            model: Any module; `partition_table()` shows what was recognised.
            params: Parameters or param groups, all of this model (or its masters); every trained one by default.
            masters: Tensors stepped instead of the model's, such as fp32 master weights of a bf16 model: one for each
                trained parameter, of its shape, in the order of `model.parameters()`.
            options: As the class takes them.

        Raises:
            ValueError: As for the class, or `masters` are not as many as the trained parameters or of other shapes.
        """
        described = describe_module(model)
        tensors = [row.tensor for row in described]
        stepped = tensors if masters is None else _checked_masters(masters, tensors)
        rows = list(zip(stepped, described, strict=True))
        named = [(row.parameter.name, tensor) for tensor, row in rows]
        roles = {tensor: row.parameter for tensor, row in rows}
        optimizer = cls(named if params is None else params, roles=roles, **options)
        reasons = {tensor: row.why for tensor, row in rows}
        for tensor, row in optimizer._rows.items():
            optimizer._rows[tensor] = msgspec.structs.replace(row, why=reasons[tensor])
        return optimizer

    def partition_table(self) -> list[PartitionRow]:
        """How each parameter is divided and why, in the order of the param groups."""
        return [self._rows[parameter] for group in self.param_groups for parameter in group["params"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own hyperparameters; `roles` in the group describes those not described before.

        Raises:
            ValueError: As for the class.
            TypeError: A parameter is not of real floating-point numbers.
        """
        param_group = dict(param_group)
        self._roles.update(param_group.pop("roles", {}))
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        first = sum(len(other["params"]) for other in self.param_groups[:-1])
        names = group.get("param_names", [])
        try:
            for number, parameter in enumerate(group["params"]):
                self._describe(parameter, names[number] if names else str(first + number))
        except ValueError:
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_layouts": self._layouts, "_rows": self._rows, "_roles": self._roles}

    def _describe(self, tensor: torch.Tensor, name: str) -> None:
        shape = tuple(tensor.shape)
        given = self._roles.get(tensor)
        if given is None:
            raise ValueError(
                f"parameter '{name}' of shape {shape} has no role; "
                f"name one in roles, or use AdamMini.from_module(model)"
            )
        parameter = given if isinstance(given, Parameter) else _without_heads(given, name, shape)
        if parameter.shape != shape:
            raise ValueError(f"the role of parameter '{name}' is for shape {parameter.shape}, got {shape}")
        blocks = blocks_of(parameter)
        self._layouts[tensor] = layout_of(tensor, blocks)
        self._rows[tensor] = PartitionRow(
            parameter.name or name, shape, parameter.role, blocks.kind, blocks.num_blocks, "given"
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("lr", "eps", "weight_decay"):
            check_at_least_zero(name, group[name])
        check_betas(group["betas"])
        check_choice("state_dtype", group["state_dtype"], STATE_DTYPES)
        check_choice("rounding", group["rounding"], ROUNDINGS)

    def _new_state(self, parameter: torch.Tensor, group: dict[str, Any]) -> State:
        work = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        return {
            "exp_avg": torch.zeros_like(parameter, dtype=group["state_dtype"] or parameter.dtype),
            "exp_avg_sq": new_second_moments(parameter, self._layouts[parameter], work),
        }

    def _before_batches(self, plan: GroupPlan, group: dict[str, Any], grad_scale: GradScale) -> None:
        """Bring the second moments of blocks that ranks share to this step."""
        if "shared" not in plan.scratch:
            parts = [part for part in plan.parts if self._layouts[part.parameter].shared]
            layouts = [self._layouts[part.parameter] for part in parts]
            plan.scratch["shared"] = SharedBlocks(parts, layouts) if parts else None
        shared: SharedBlocks | None = plan.scratch["shared"]
        if shared is None:
            return
        sums = shared.new_sums()
        for batch in plan.batches:
            batch.scratch["shared"] = shared
            add = self._sum_triton if batch.triton else self._sum_torch
            with on_device(batch.device):
                add(batch, group, as_scale(grad_scale, batch.device), sums)
        shared.advance(sums, beta2=group["betas"][1])

    def _sum_torch(self, batch: Batch, group: dict[str, Any], grad_scale: GradScale, sums: torch.Tensor) -> None:
        del group
        shared: SharedBlocks = batch.scratch["shared"]
        for part, member in zip(batch.parts, batch.members, strict=True):
            layout = self._layouts[part.parameter]
            if layout.shared:
                gradient = member.gradient.to(sums.dtype)
                gradient = gradient if grad_scale is None else gradient * grad_scale
                own = block_square_sums(gradient, layout.blocks, rows=layout.rows)
                sums[shared.sums_at(part.ordinal) :][: len(own)] = own

    def _sum_triton(self, batch: Batch, group: dict[str, Any], grad_scale: GradScale, sums: torch.Tensor) -> None:
        # Triton is not there on every machine that can run the reference.
        from optplan.optim_impls.adam_mini.launcher import launch_shared_sums

        launch_shared_sums(self._plan_of(batch), group, grad_scale=grad_scale, sums=sums)

    def _step_torch(self, batch: Batch, group: dict[str, Any], grad_scale: GradScale) -> None:
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        hyperparameters = Hyperparameters(lr, beta1, beta2, group["eps"], group["weight_decay"])
        for part, (parameter, gradient, state, ordinal) in zip(batch.parts, batch.members, strict=True):
            layout = self._layouts[part.parameter]
            m, v = local_tensor(state["exp_avg"]), local_tensor(state["exp_avg_sq"])
            scaled = gradient if grad_scale is None else gradient.to(v.dtype) * grad_scale
            step = batch.step or int(state["step"])
            new = adam_mini(
                parameter, scaled, m, v, blocks=layout.blocks, step=step, hyperparameters=hyperparameters,
                rows=layout.rows if layout.shared else None,
            )  # fmt: skip
            bits = None
            if group["rounding"] == "stochastic":
                bits = random_bits(new, mix_seed(group["seed"], step, ordinal), first=layout.first) & 0xFFFF
            store(parameter, new, bits)

    def _step_triton(self, batch: Batch, group: dict[str, Any], grad_scale: GradScale) -> None:
        from optplan.optim_impls.adam_mini.launcher import launch_adam_mini

        launch_adam_mini(self._plan_of(batch), group, step=batch.step, grad_scale=grad_scale)

    def _plan_of(self, batch: Batch) -> Plan:
        """Launches and table of a batch, kept until a tensor moves."""
        if "plan" not in batch.scratch:
            from optplan.optim_impls.adam_mini.plan import Plan

            shared: SharedBlocks | None = batch.scratch.get("shared")
            sums_at = [0 if shared is None else shared.sums_at(part.ordinal) for part in batch.parts]
            layouts = [self._layouts[part.parameter] for part in batch.parts]
            batch.scratch["plan"] = Plan(batch.members, layouts, aligned=batch.aligned, sums_at=sums_at)
        plan: Plan = batch.scratch["plan"]
        return plan

    def _kernels_take(self, member: Member) -> bool:
        return super()._kernels_take(member) and local_tensor(member.state["exp_avg"]).is_contiguous()


def _checked_masters(masters: Sequence[torch.Tensor], trained: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The masters, each of the shape of its parameter."""
    if len(masters) != len(trained):
        raise ValueError(
            f"masters must be one for each of the model's {len(trained)} trained parameters, got {len(masters)}"
        )
    return list(masters)


def _without_heads(role: Role, name: str, shape: tuple[int, ...]) -> Parameter:
    """The description of a tensor of which only the role is given."""
    check_choice(f"the role of parameter '{name}'", role, sorted(get_args(Role)))
    if role in ("query", "key", "fused_qkv"):
        raise ValueError(
            f"the role of parameter '{name}' is {role}, whose blocks are heads; give a Parameter with its head layout"
        )
    return Parameter(name, shape, role, "parameter")
