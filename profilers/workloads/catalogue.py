"""transformers models without contents, from the configurations that the planner reads."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from optplan.planner.errors import ConfigError
from optplan.planner.models.spec import ModelSpec
from optplan.planner.step.options import StepOptions
from optplan.profilers.workloads import flash
from optplan.profilers.workloads.fused_losses import fuse_loss
from optplan.profilers.workloads.inputs import model_inputs
from optplan.profilers.workloads.liger import played_liger_loss
from optplan.profilers.workloads.subject import Subject

_CHECKPOINTING: dict[str, dict[str, Any]] = {
    "full": {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "full-reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "selective": {"gradient_checkpointing_kwargs": {"use_reentrant": False}, "every_n_layers": 2},
}
"""Arguments of `gradient_checkpointing_enable` by `--checkpointing`."""


def build_subject(spec: ModelSpec, options: StepOptions) -> Subject:
    """The transformers model of a specification in training mode, on the meta device, with one micro-batch.

    Raises:
        ConfigError: transformers is not installed, or has no class for the model, or its class refuses the options.
    """
    module = build_model(spec, options)
    return prepared_subject(module, options)


def prepared_subject(module: Any, options: StepOptions) -> Subject:
    """A built transformers model with one micro-batch, checkpointed as the options say.

    Raises:
        ConfigError: The model has no such loss as the options ask for, or Liger's package is not installed.
    """
    fuse_loss(module, options.fused_loss)
    if options.checkpointing != "none":
        module.gradient_checkpointing_enable(**_CHECKPOINTING[options.checkpointing])
    elif module.supports_gradient_checkpointing:
        module.gradient_checkpointing_disable()
    inputs = model_inputs(
        module, batch_size=options.batch_size, seq_len=options.seq_len, padding_mask=options.padding_mask
    )
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    return Subject(module, inputs, head=head, context=partial(_played_kernels, options))


@contextmanager
def _played_kernels(options: StepOptions) -> Iterator[None]:
    """Within the context packages with kernels of their own run without contents."""
    with contextlib.ExitStack() as stack:
        if options.attention == "flash":
            stack.enter_context(flash.played_flash_attention())
        stack.enter_context(played_liger_loss(options.compute_capability))
        yield


def build_model(spec: ModelSpec, options: StepOptions) -> Any:
    """The module alone, in training mode; see `build_subject`."""
    with quiet():
        cls, config = model_class_and_config(spec)
        try:
            module = _built(cls, config, options)
        except (ValueError, ImportError) as error:
            raise ConfigError(
                f"transformers cannot build {spec.name}: {' '.join(str(error).split()).split('. ')[0]}"
            ) from None
    if options.attention == "flash":
        # Chosen afterwards, or transformers would look for the package.
        module.config._attn_implementation = flash.NAME
    return module.train()


def model_class_and_config(spec: ModelSpec) -> tuple[Any, Any]:
    """The transformers class of a specification and its configuration, without a cache.

    Raises:
        ConfigError: transformers is not installed, or has no such class.
    """
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            "engine trace builds models with transformers, which is not installed: pip install 'optplan[gpu,hf]'"
        ) from None
    cls = getattr(transformers, spec.architecture, None)
    if cls is None:
        raise ConfigError(f"transformers has no class for {spec.name} ({spec.architecture}): it cannot be traced")
    config = cls.config_class.from_dict({**_plain(spec.config), "use_cache": False})
    if (getattr(config, "pad_token_id", None) or 0) >= getattr(config, "vocab_size", 0):
        config.pad_token_id = None  # the class's default, beyond a small vocabulary
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.pad_token_id or 0
    return cls, config


def _plain(value: Any) -> Any:
    """The value as JSON would hold it: lists for tuples, nothing shared with the original."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _built(cls: Any, config: Any, options: StepOptions) -> Any:
    from transformers.initialization import no_init_weights

    dtype = getattr(torch, options.parameter_dtype)
    implementation = "eager" if options.attention == "flash" else options.attention
    with torch.device("meta"), no_init_weights():
        module = cls._from_config(config, attn_implementation=implementation, dtype=dtype)
    module.tie_weights()
    return module


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' remarks about configurations to itself."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
