"""AdamW as a `torch.optim.Optimizer`."""

from __future__ import annotations

from typing import Any

import torch

from optplan.optim_impls.adamw.reference import Hyper, adamw_step
from optplan.optim_impls.checks import check_at_least_zero, check_betas, check_choice
from optplan.optim_impls.optimizer_base import Batch, GradScale, KernelOptimizer, Member, local_tensor
from optplan.optim_impls.rounding import ROUNDINGS, mix_seed
from optplan.optim_impls.step_counters import State

STATE_DTYPES = (None, torch.float32, torch.bfloat16)


class AdamW(KernelOptimizer):
    """AdamW in one launch for all tensors of a kind, with bf16 rounding that loses nothing on average.

    State of DTensors is DTensors, divided as the parameter is: with FSDP2 a rank keeps the moments of its own rows, and
    a checkpoint loads on any number of ranks.

    Args:
        params: Parameters or param groups; a group may override every number below.
        lr: Learning rate, a number; with `capturable` also a scalar tensor on the device.
        betas: Decays of the two moments.
        eps: Added to the root of the corrected second moment.
        weight_decay: Decoupled: `lr * weight_decay` of the parameter is taken off each step.
        state_dtype: Dtype of both moments: torch.float32, torch.bfloat16, or None for the parameter's.
        rounding: How results are stored in bf16. `nearest`; `stochastic`: up or down with the probability that keeps
            the mean (parameters and second moments); `kahan`: what rounding took from a parameter is kept in a third
            state tensor of its dtype and added the next time.
        seed: Of stochastic rounding; the stream depends on it, the step and the element, on nothing else.
        backend: `auto`, `triton` or `torch`; see `KernelOptimizer`.
        capturable: Keep the step counters on the device, so that a CUDA graph may record `step()`.

    Raises:
        ValueError: An argument is out of range.
        TypeError: A parameter is not of real floating-point numbers.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        state_dtype: torch.dtype | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        backend: str = "auto",
        capturable: bool = False,
    ) -> None:
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"state_dtype": state_dtype, "rounding": rounding, "seed": seed}
        super().__init__(params, defaults, backend=backend, capturable=capturable)

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("lr", "eps", "weight_decay"):
            check_at_least_zero(name, group[name])
        check_betas(group["betas"])
        check_choice("state_dtype", group["state_dtype"], STATE_DTYPES)
        check_choice("rounding", group["rounding"], ROUNDINGS)

    def _new_state(self, parameter: torch.Tensor, group: dict[str, Any]) -> State:
        dtype = group["state_dtype"] or parameter.dtype
        state = {name: torch.zeros_like(parameter, dtype=dtype) for name in ("exp_avg", "exp_avg_sq")}
        if group["rounding"] == "kahan":
            state["compensation"] = torch.zeros_like(parameter)
        return state

    def _step_torch(self, batch: Batch, group: dict[str, Any], grad_scale: GradScale) -> None:
        for parameter, gradient, state, ordinal in batch.members:
            step = batch.step or int(state["step"])
            seed = mix_seed(group["seed"], step, ordinal) if group["rounding"] == "stochastic" else None
            beta1, beta2 = group["betas"]
            hyper = Hyper(float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"], step)
            m, v = local_tensor(state["exp_avg"]), local_tensor(state["exp_avg_sq"])
            c = _compensation(parameter, state) if group["rounding"] == "kahan" else None
            adamw_step(parameter, gradient, m, v, hyper, grad_scale=grad_scale, seed=seed, compensation=c)

    def _step_triton(self, batch: Batch, group: dict[str, Any], grad_scale: GradScale) -> None:
        # Triton is not there on every machine that can run the reference.
        from optplan.optim_impls.adamw.launcher import AdamWLaunch

        kahan = group["rounding"] == "kahan"
        launch = batch.scratch.get("launch")
        if launch is None or launch.kahan is not kahan:
            capturable = self.defaults["capturable"]
            rows = [_row(member, kahan=kahan, capturable=capturable) for member in batch.members]
            ordinals = [part.ordinal for part in batch.parts]
            launch = AdamWLaunch(rows, ordinals, kahan=kahan, capturable=capturable, aligned=batch.aligned)
            batch.scratch["launch"] = launch
        launch(group, batch.step, grad_scale)


def _row(member: Member, *, kahan: bool, capturable: bool) -> list[torch.Tensor]:
    parameter, gradient, state, _ = member
    row = [parameter, gradient, local_tensor(state["exp_avg"]), local_tensor(state["exp_avg_sq"])]
    if kahan:
        row.append(_compensation(parameter, state))
    return [*row, state["step"]] if capturable else row


def _compensation(parameter: torch.Tensor, state: State) -> torch.Tensor:
    """What rounding took from the parameter; a checkpoint of another rounding has none."""
    if "compensation" not in state:
        state["compensation"] = torch.zeros_like(parameter)
    return local_tensor(state["compensation"])
