"""A catalogue model on a device, its optimizer and random inputs: training steps as `optplan profile` takes them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from optplan.planner.dtypes import Dtype
from optplan.planner.errors import ConfigError
from optplan.planner.models.spec import ModelSpec
from optplan.planner.optimizers.base import OptimizerModel
from optplan.planner.precision import PRECISIONS
from optplan.planner.records import StepConfig
from optplan.planner.step.options import FUSED_LOSSES
from optplan.profilers.workloads.catalogue import model_class_and_config, quiet
from optplan.profilers.workloads.fused_losses import fuse_loss
from optplan.profilers.workloads.real_optimizers import build_optimizer
from optplan.profilers.workloads.sharded_modules import FULLY_SHARDED, REPLICATED

_AUTOCAST = {"amp": torch.bfloat16, "fp16-amp": torch.float16}
_CHECKPOINTING: dict[str, dict[str, Any]] = {
    "full": {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "full-reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "selective": {"gradient_checkpointing_kwargs": {"use_reentrant": False}, "every_n_layers": 2},
}
_SUPPORTED: dict[str, tuple[object, ...]] = {
    "sharding": ("none", *REPLICATED, *FULLY_SHARDED), "step_in_backward": (False,), "fused_loss": FUSED_LOSSES,
}  # fmt: skip
_STANDARD_DEVIATION = 0.02


class RealStep(NamedTuple):
    """What is trained, and how one step is taken.

    Attributes:
        model: In training mode on the device.
        optimizer: Steps the model's parameters or its master weights.
        take: Takes one step and returns the loss, still on the device.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    take: Callable[[], torch.Tensor]


def build_real_step(
    spec: ModelSpec,
    config: StepConfig,
    description: OptimizerModel,
    device: torch.device,
    *,
    seed: int = 0,
    state_dtype: Dtype | None = None,
) -> RealStep:
    """Build model, inputs and optimizer.

    Args:
        spec: The model.
        config: How the step is run.
        description: The optimizer.
        device: Where it is trained.
        seed: Of weights and inputs.
        state_dtype: Dtype asked for the optimizer's moments; its own choice if None.

    Raises:
        ConfigError: A setting, the model or the optimizer cannot be run here.
    """
    for name, allowed in _SUPPORTED.items():
        if getattr(config, name) not in allowed:
            flag, listed = name.replace("_", "-"), ", ".join(map(str, allowed))
            raise ConfigError(f"--{flag} {getattr(config, name)} cannot be profiled in this version; allowed: {listed}")
    if config.fused_loss == "liger" and device.type != "cuda":
        raise ConfigError(
            f"--fused-loss liger runs Triton kernels, which need a GPU, not --device {device}; use --fused-loss chunked"
        )
    # torch's first optimizer imports it, and failures within that import keep the frames that built the optimizer, and
    # with them the model, until garbage is collected.
    import torch._dynamo

    torch.manual_seed(seed)
    if config.sharding != "none":
        from optplan.profilers.workloads.sharded_real_step import build_sharded_step

        return build_sharded_step(spec, config, description, device, state_dtype=state_dtype)
    model = build_real_model(spec, config, device)
    inputs = make_inputs(model, config, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    masters = master_weights(trained, config)
    optimizer = build_optimizer(description, model, masters or trained, spec, state_dtype=state_dtype)
    step = Step(model, optimizer, trained, masters, inputs, config)
    return RealStep(model, optimizer, step.take)


def master_weights(trained: list[nn.Parameter], config: StepConfig) -> list[nn.Parameter]:
    """The fp32 copies that the optimizer steps instead, where the precision asks for them."""
    return [nn.Parameter(p.detach().float()) for p in trained] if PRECISIONS[config.precision].master_dtype else []


def build_real_model(
    spec: ModelSpec,
    config: StepConfig,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    place: Callable[[Any], Any] | None = None,
) -> Any:
    """The transformers model with random weights; the device sees what `module.to(device)` of one made there does.

    Args:
        spec: The model.
        config: How the step is run.
        device: Where it is trained.
        dtype: Of the parameters; what the precision says if None.
        place: Puts it there; as a whole if None.
    """
    from transformers.initialization import no_init_weights

    cls, settings = model_class_and_config(spec)
    dtype = dtype or getattr(torch, PRECISIONS[config.precision].parameter_dtype)
    with quiet(), no_init_weights():
        try:
            model = cls._from_config(settings, attn_implementation=_attention(config.attention), dtype=dtype)
        except (ValueError, ImportError) as error:
            sentence = " ".join(str(error).split()).split(". ")[0]
            raise ConfigError(f"transformers cannot build {spec.name}: {sentence}") from None
        model.tie_weights()
    if place is None:
        place_module(model, device)
    else:
        place(model)
    with torch.no_grad():
        for parameter in model.parameters():
            getattr(parameter, "_local_tensor", parameter).normal_(0, _STANDARD_DEVIATION)
    if config.checkpointing != "none":
        _enable_checkpointing(model, config.checkpointing)
    fuse_loss(model, config.fused_loss)
    return model.train()


def place_module(module: nn.Module, device: torch.device) -> None:
    """Move a module whose parameters get their values later: allocated as `module.to(device)` does, but not copied."""

    def placed(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device == device or not isinstance(tensor, nn.Parameter):
            return tensor.to(device)
        return torch.empty_like(tensor, device=device)

    module._apply(placed)  # type: ignore[no-untyped-call]


def _enable_checkpointing(model: Any, kind: str) -> None:
    try:
        model.gradient_checkpointing_enable(**_CHECKPOINTING[kind])
    except TypeError:
        raise ConfigError(
            f"--checkpointing {kind} needs a transformers whose gradient_checkpointing_enable takes every_n_layers"
        ) from None


def _attention(name: str) -> str:
    return "flash_attention_2" if name == "flash" else name


def make_inputs(model: Any, config: StepConfig, device: torch.device) -> dict[str, torch.Tensor]:
    """Random tokens that are their own labels, or random images with random classes."""
    settings, batch = model.config, config.batch_size
    if hasattr(settings, "image_size"):
        shape = (batch, settings.num_channels, settings.image_size, settings.image_size)
        images = torch.randn(shape, device=device, dtype=model.dtype)
        return {"pixel_values": images, "labels": torch.randint(0, settings.num_labels, (batch,), device=device)}
    tokens = torch.randint(0, settings.get_text_config().vocab_size, (batch, config.seq_len), device=device)
    inputs = {"input_ids": tokens, "labels": tokens}
    if config.padding_mask:
        inputs["attention_mask"] = torch.ones_like(tokens)
        inputs["attention_mask"][:, -max(1, config.seq_len // 8) :] = 0
    return inputs


class Step:
    """Forward and backward of each micro-batch, then the optimizer."""

    def __init__(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        trained: list[nn.Parameter],
        masters: list[nn.Parameter],
        inputs: dict[str, torch.Tensor],
        config: StepConfig,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._trained = trained
        self._masters = masters
        self._inputs = inputs
        self._config = config
        self._autocast = _AUTOCAST.get(config.precision)
        self._device = trained[0].device
        self._scaler = torch.amp.GradScaler(self._device.type) if config.precision == "fp16-amp" else None

    def take(self) -> torch.Tensor:
        """One optimizer step; the loss of its last micro-batch."""
        for _ in range(self._config.grad_accum):
            with self._precision():
                loss: torch.Tensor = self._model(**self._inputs).loss
            scaled: torch.Tensor = self._scaler.scale(loss) if self._scaler else loss
            scaled.backward()  # type: ignore[no-untyped-call]
        self._clip()
        if self._masters:
            self._step_masters()
        elif self._scaler:
            self._scaler.step(self._optimizer)
            self._scaler.update()
        else:
            self._optimizer.step()
        self._end_gradients()
        if self._config.empty_cache and self._device.type == "cuda":
            torch.cuda.empty_cache()
        return loss.detach()

    def _clip(self) -> None:
        if self._config.clip_grad_norm is None:
            return
        if self._scaler:
            self._scaler.unscale_(self._optimizer)
        nn.utils.clip_grad_norm_(self._trained, self._config.clip_grad_norm)

    def _end_gradients(self) -> None:
        for parameter in self._trained:
            if self._config.keep_grads and parameter.grad is not None:
                parameter.grad.zero_()
            else:
                parameter.grad = None

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self._device.type, self._autocast) if self._autocast else contextlib.nullcontext()

    def _step_masters(self) -> None:
        """Give the masters the gradients in fp32, step them, and round them back into the parameters."""
        for master, parameter in zip(self._masters, self._trained, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
        self._optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(self._masters, self._trained, strict=True):
                master.grad = None
                parameter.copy_(master)
