"""MicroAdam as a `torch.optim.Optimizer`: the kernels on a GPU, the reference elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from optplan.optim_impls.checks import check_at_least_zero, check_betas, check_choice, check_fraction
from optplan.optim_impls.fingerprint import local_tensor
from optplan.optim_impls.micro_adam.layout import RUN_NUMEL, Layout, layout_of
from optplan.optim_impls.micro_adam.reference import Hyperparameters, micro_adam_step
from optplan.optim_impls.optimizer_base import Batch, GradScale, KernelOptimizer, Member, Part, member_of
from optplan.optim_impls.rounding import mix_seed
from optplan.optim_impls.sharding import GatheredBatch, RowShards, divide_apart, row_shards
from optplan.optim_impls.step_counters import State

STATE_NAMES = ("error_feedback", "bucket_min", "bucket_max", "window_indices", "window_values")
ROUNDINGS = ("nearest", "stochastic")
CORRECTIONS = ("full", "window")
_OF_QUANTIZATION = -2  # the authors' word for a mode of another kind
_LAYOUT_NAMES = ("block", "bucket", "window", "density")


class MicroAdam(KernelOptimizer):
    """Adam whose moments are rebuilt from a window of selected gradients; about one byte of state a parameter.

    Each step adds to the gradient what earlier steps left over, selects the largest of each block of elements exactly,
    puts them into the window and keeps the rest in 4-bit codes. State is a function of the shapes and these arguments
    alone, so that a checkpoint moves between machines. A block whose accumulated gradient is not finite sits out a
    step: its parameters and its left-over stay, and its older gradients age by one step.

    Gradients are rounded to bfloat16, in which the window keeps them.

    With FSDP2 the blocks stay those of the whole tensor: training does not depend on the number of ranks, but for the
    noise of stochastic rounding, which counts from the start of a shard. Where all ranks hold as many rows, and these
    are whole blocks, a rank steps on its own and keeps its part of the state: DTensors of the whole tensor's state,
    `1 / ranks` of its bytes on each. Other tensors (short vectors, uneven rows) have their gradients gathered in one
    collective, and every rank keeps their whole state. Either way a checkpoint of
    `torch.distributed.checkpoint` loads on any number of ranks; to gather a whole state (`full_state_dict`) is beyond
    NCCL and gloo, which know no 16-bit integers.

    Args:
        params: Parameters or param groups.
        lr: Learning rate. Adam's does not carry over: with `bias_correction="full"` the effective step grows about
            6.5-fold during the first few thousand steps.
        betas: Decay of the moments with each step of age.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        window: Gradients kept.
        density: Part of each block that enters the window.
        block: Elements among which the largest are selected; up to 32768.
        bucket: Elements that share a range of the codes; a multiple of 8 that divides `block`.
        rounding: Of the codes, `nearest` or `stochastic`.
        bias_correction: `full` as in the paper, or `window`: by the weights the window really holds.
        alpha: Part of the left-over that enters the update of every element, and is left over no longer; from 0, as in
            the paper, below 1. It makes the update dense, for which error feedback gives no guarantee.
        seed: Of stochastic rounding.
        backend: `triton`, `torch`, or `auto`. The kernels need compute capability 8.0.
        capturable: Keep step counters on the device, so that a CUDA graph may record `step()`; `lr` may then be a
            scalar there. For what the kernels do not take, the host reads the counter.

    Source: Modoranu et al., MicroAdam, NeurIPS 2024, arXiv 2405.15593.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        window: int = 10,
        density: float = 0.01,
        block: int = 2048,
        bucket: int = 64,
        rounding: str = "nearest",
        bias_correction: str = "full",
        alpha: float = 0.0,
        seed: int = 0,
        backend: str = "auto",
        capturable: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        layout = {"window": window, "density": density, "block": block, "bucket": bucket}
        how = {"rounding": rounding, "bias_correction": bias_correction, "alpha": alpha, "seed": seed}
        super().__init__(params, {**defaults, **layout, **how}, backend=backend, capturable=capturable)

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("lr", "eps", "weight_decay"):
            check_at_least_zero(name, group[name])
        check_betas(group["betas"])
        check_choice("rounding", group["rounding"], ROUNDINGS)
        check_choice("bias_correction", group["bias_correction"], CORRECTIONS)
        if not 0 < group["density"] <= 1:
            raise ValueError(f"density must be above 0 and at most 1, got {group['density']}")
        _check_alpha(group["alpha"])
        _check_integer("window", group["window"], low=1, high=1000)
        _check_integer("block", group["block"], low=64, high=32768)
        block, bucket = group["block"], group["bucket"]
        if not (isinstance(bucket, int) and bucket > 0 and bucket % RUN_NUMEL == 0 and block % bucket == 0):
            raise ValueError(f"bucket must be a multiple of {RUN_NUMEL} and divide block={block}, got {bucket}")

    def _new_state(self, parameter: torch.Tensor, group: dict[str, Any]) -> State:
        shards = row_shards(parameter, optimizer="MicroAdam")
        apart = shards is not None and not _whole_blocks(shards, group)
        local = local_tensor(parameter)
        layout = _layout(parameter.numel() if apart else local.numel(), group)
        sizes = {
            "error_feedback": (layout.num_codes, torch.uint8),
            "bucket_min": (layout.num_buckets, torch.bfloat16),
            "bucket_max": (layout.num_buckets, torch.bfloat16),
            "window_indices": (layout.num_window, torch.int16),
            "window_values": (layout.num_window, torch.bfloat16),
        }
        state = {name: torch.zeros(size, dtype=dtype, device=local.device) for name, (size, dtype) in sizes.items()}
        if shards is None or apart:
            return state
        return {name: shards.join(own, own.shape[0] * shards.num_ranks) for name, own in state.items()}

    def _divide(self, parts: Sequence[Part], steps: Sequence[float]) -> list[Batch]:
        return divide_apart(parts, steps, apart=self._is_gathered, divide=super()._divide, new_batch=self._new_gathered)

    def _is_gathered(self, part: Part) -> bool:
        shards = row_shards(part.parameter, optimizer="MicroAdam")
        return shards is not None and not _whole_blocks(shards, self._group_of(part))

    def _new_gathered(self, part: Part, place: int) -> Batch:
        return GatheredBatch(lead=place, triton=self._use_triton(member_of(part)))

    def _kernels_take(self, member: Member) -> bool:
        from optplan.optim_impls.micro_adam.launcher import kernels_take

        group = self._group_of(member)
        taken = super()._kernels_take(member) and kernels_take(**{name: group[name] for name in _LAYOUT_NAMES})
        # Codes are read as 32-bit words; a state of somebody else's making may begin anywhere.
        codes = local_tensor(member.state["error_feedback"])
        return taken and codes.data_ptr() % 4 == 0 and _computes_in_bf16(member.parameter.device)

    def _group_of(self, member: Member | Part) -> dict[str, Any]:
        first = 0
        for group in self.param_groups:
            first += len(group["params"])
            if member.ordinal < first:
                return group
        raise AssertionError("a member belongs to a group")

    def _step_triton(self, batch: Batch, group: dict[str, Any], grad_scale: GradScale) -> None:
        # Triton is not there on every machine that can run the reference.
        from optplan.optim_impls.micro_adam.launcher import MicroAdamLaunch

        launch = batch.scratch.get("launch")
        if launch is None:
            capturable = self.defaults["capturable"]
            rows = [_lists(member, capturable=capturable) for member in batch.members]
            ordinals = [part.ordinal for part in batch.parts]
            how = {"layout": _layout(0, group), "aligned": batch.aligned, "capturable": capturable}
            launch = batch.scratch["launch"] = MicroAdamLaunch(rows, ordinals, **how)
        hyper = _hyperparameters(group, on_device=self.defaults["capturable"])
        launch(step=batch.step, hyper=hyper, seed=group["seed"], scale=grad_scale)

    def _step_torch(self, batch: Batch, group: dict[str, Any], grad_scale: GradScale) -> None:
        for member in batch.members:
            step = batch.step or int(member.state["step"])
            parameter = member.parameter.contiguous().view(-1)
            micro_adam_step(
                parameter,
                member.gradient.reshape(-1),
                {name: local_tensor(member.state[name]) for name in STATE_NAMES},
                step=step,
                layout=_layout(parameter.numel(), group),
                hyper=_hyperparameters(group),
                seed=mix_seed(group["seed"] & 0x7FFFFFFF, step, member.ordinal),
                scale=grad_scale,
                dtype=torch.float64 if parameter.dtype == torch.float64 else torch.float32,
            )
            if parameter.data_ptr() != member.parameter.data_ptr():
                member.parameter.copy_(parameter.view(member.parameter.shape))


def _lists(member: Member, *, capturable: bool) -> list[torch.Tensor]:
    names = (*STATE_NAMES, "step") if capturable else STATE_NAMES
    return [member.parameter, member.gradient, *(local_tensor(member.state[name]) for name in names)]


def _computes_in_bf16(device: torch.device) -> bool:
    """Whether a GPU has bfloat16's arithmetic; the interpreter has."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def _whole_blocks(shards: RowShards, group: dict[str, Any]) -> bool:
    """Whether every rank's rows are whole blocks, and as many."""
    return shards.equal and shards.rows_per_rank * shards.columns % int(group["block"]) == 0


def _layout(numel: int, group: dict[str, Any]) -> Layout:
    return layout_of(numel, **{name: group[name] for name in _LAYOUT_NAMES})


def _hyperparameters(group: dict[str, Any], *, on_device: bool = False) -> Hyperparameters:
    (first, second), lr = group["betas"], group["lr"]
    return Hyperparameters(
        lr=lr if on_device and isinstance(lr, torch.Tensor) else float(lr),
        betas=(float(first), float(second)),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        bias_correction=group["bias_correction"],
        rounding=group["rounding"],
        alpha=float(group["alpha"]),
    )


def _check_alpha(alpha: Any) -> None:
    if alpha == _OF_QUANTIZATION:
        raise ValueError(
            f"alpha must be >= 0 and < 1, got {alpha}: with it the authors' package adds what quantization lost to the "
            "parameters whatever lr is, and keeps a tensor of their size, which this class does not"
        )
    check_fraction("alpha", alpha)


def _check_integer(name: str, value: Any, *, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}, got {value}")
