"""Adam-mini as a `torch.optim.Optimizer`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self, get_args

import msgspec
import torch
from torch import nn

from optplan.optim_impls.adam_mini.reference import Hyperparameters, adam_mini
from optplan.optim_impls.adam_mini.roles import describe_module
from optplan.optim_impls.checks import check_at_least_zero, check_betas, check_choice
from optplan.optim_impls.optimizer_base import Batch, GradScale, KernelOptimizer, Member, local_tensor
from optplan.optim_impls.step_counters import State
from optplan.planner.optimizers.adam_mini_blocks import BlockKind, Blocks, blocks_of
from optplan.planner.tensors import Parameter, Role

STATE_DTYPES = (None, torch.float32, torch.bfloat16)


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

    Args:
        params: Parameters or param groups; a group may override every number below.
        roles: What each parameter is for: a role (see `optplan.planner.tensors.Role`), or the planner's `Parameter`
            where heads or transposed weights matter.
        lr: Learning rate, a number; with `capturable` also a scalar tensor on the device.
        betas: Decays of the two moments.
        eps: Added to the root of the corrected second moment.
        weight_decay: Decoupled: `lr * weight_decay` of the parameter is taken off each step.
        state_dtype: Dtype of the first moment: torch.float32, torch.bfloat16, or None for the parameter's.
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
        backend: str = "auto",
        capturable: bool = False,
    ) -> None:
        self._blocks: dict[torch.Tensor, Blocks] = {}
        self._rows: dict[torch.Tensor, PartitionRow] = {}
        self._roles = dict(roles)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "state_dtype": state_dtype}
        super().__init__(params, defaults, backend=backend, capturable=capturable)

    @classmethod
    def from_module(cls, model: nn.Module, *, params: Any = None, **options: Any) -> Self:
        """The optimizer of a model, with the roles that its structure gives.

        Args:
            model: Any module; `partition_table()` shows what was recognised.
            params: Parameters or param groups, all of this model; every trained parameter by default.
            options: As the class takes them.
        """
        described = describe_module(model)
        named = [(row.parameter.name, row.tensor) for row in described]
        roles = {row.tensor: row.parameter for row in described}
        optimizer = cls(named if params is None else params, roles=roles, **options)
        reasons = {row.tensor: row.why for row in described}
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
        return {**super().__getstate__(), "_blocks": self._blocks, "_rows": self._rows, "_roles": self._roles}

    def _describe(self, tensor: torch.Tensor, name: str) -> None:
        shape = tuple(tensor.shape)
        if local_tensor(tensor) is not tensor:
            raise ValueError(
                f"parameter '{name}' is a DTensor; AdamMini takes whole tensors, whose blocks are not split"
            )
        given = self._roles.get(tensor)
        if given is None:
            raise ValueError(
                f"parameter '{name}' of shape {shape} has no role; "
                f"name one in roles, or use AdamMini.from_module(model)"
            )
        parameter = given if isinstance(given, Parameter) else _without_heads(given, name, shape)
        if parameter.shape != shape:
            raise ValueError(f"the role of parameter '{name}' is for shape {parameter.shape}, got {shape}")
        blocks = self._blocks[tensor] = blocks_of(parameter)
        self._rows[tensor] = PartitionRow(
            parameter.name or name, shape, parameter.role, blocks.kind, blocks.num_blocks, "given"
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("lr", "eps", "weight_decay"):
            check_at_least_zero(name, group[name])
        check_betas(group["betas"])
        check_choice("state_dtype", group["state_dtype"], STATE_DTYPES)

    def _new_state(self, parameter: torch.Tensor, group: dict[str, Any]) -> State:
        work = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        shape = self._blocks[parameter].state_shape
        return {
            "exp_avg": torch.zeros_like(parameter, dtype=group["state_dtype"] or parameter.dtype),
            "exp_avg_sq": torch.zeros(shape, dtype=work, device=parameter.device),
        }

    def _blocks_of(self, batch: Batch) -> list[Blocks]:
        """Blocks of the members, by their place among all parameters."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        return [self._blocks[parameters[member.ordinal]] for member in batch.members]

    def _step_torch(self, batch: Batch, group: dict[str, Any], grad_scale: GradScale) -> None:
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        hyperparameters = Hyperparameters(lr, beta1, beta2, group["eps"], group["weight_decay"])
        for member, blocks in zip(batch.members, self._blocks_of(batch), strict=True):
            gradient, state = member.gradient, member.state
            m, v = local_tensor(state["exp_avg"]), local_tensor(state["exp_avg_sq"])
            scaled = gradient if grad_scale is None else gradient.to(v.dtype) * grad_scale
            step = batch.step or int(state["step"])
            new = adam_mini(member.parameter, scaled, m, v, blocks=blocks, step=step, hyperparameters=hyperparameters)
            member.parameter.copy_(new)

    def _step_triton(self, batch: Batch, group: dict[str, Any], grad_scale: GradScale) -> None:
        # Triton is not there on every machine that can run the reference.
        from optplan.optim_impls.adam_mini.launcher import launch_adam_mini
        from optplan.optim_impls.adam_mini.plan import Plan

        if "plan" not in batch.scratch:
            batch.scratch["plan"] = Plan(batch.members, self._blocks_of(batch), aligned=batch.aligned)
        launch_adam_mini(batch.scratch["plan"], group, step=batch.step, grad_scale=grad_scale)

    def _kernels_take(self, member: Member) -> bool:
        return super()._kernels_take(member) and member.state["exp_avg"].is_contiguous()


def _without_heads(role: Role, name: str, shape: tuple[int, ...]) -> Parameter:
    """The description of a tensor of which only the role is given."""
    check_choice(f"the role of parameter '{name}'", role, sorted(get_args(Role)))
    if role in ("query", "key", "fused_qkv"):
        raise ValueError(
            f"the role of parameter '{name}' is {role}, whose blocks are heads; give a Parameter with its head layout"
        )
    return Parameter(name, shape, role, "parameter")
