"""`optplan explain`: one configuration part by part, each number with its formula and its source."""

from __future__ import annotations

from typing import Annotated

import typer

from optplan import options, output


def explain(
    model: options.Model,
    gpu: options.GpuName = None,
    memory: options.Memory = None,
    optimizer: Annotated[
        str, typer.Option("--optimizer", "-o", help="Optimizer: an id of `optplan optimizers`.")
    ] = "adamw",
    settings: options.Settings = None,
    precision: options.Precision = "bf16",
    state_dtype: options.StateDtype = None,
    batch_size: options.BatchSize = 1,
    seq_len: options.SeqLen = None,
    grad_accum: options.GradAccum = 1,
    checkpointing: options.Checkpointing = "none",
    attention: options.Attention = None,
    fused_loss: options.FusedLoss = "none",
    step_in_backward: options.StepInBackward = False,
    clip_grad_norm: options.ClipGradNorm = None,
    keep_grads: options.KeepGrads = False,
    padding_mask: options.PaddingMask = False,
    empty_cache: options.EmptyCache = False,
    gpus: options.Gpus = 1,
    sharding: options.Sharding = "none",
    alloc_conf: options.AllocConf = None,
    engine: options.Engine = "rules",
    json: options.Json = False,
) -> None:
    """Take one estimate apart.

    Prints every part of it, each number with its formula filled in and its source.
    """
    from optplan.planner.explain import explain as explain_estimate

    record = explain_estimate(
        model,
        gpu=gpu,
        memory=memory,
        optimizer=optimizer,
        options=settings,
        precision=precision,
        state_dtype=state_dtype,
        batch_size=batch_size,
        seq_len=seq_len,
        grad_accum=grad_accum,
        checkpointing=checkpointing,
        attention=attention,
        fused_loss=fused_loss,
        step_in_backward=step_in_backward,
        clip_grad_norm=clip_grad_norm,
        keep_grads=keep_grads,
        padding_mask=padding_mask,
        empty_cache=empty_cache,
        gpus=gpus,
        sharding=sharding,
        alloc_conf=alloc_conf,
        engine=engine,
    )
    if json:
        output.print_json(record)
    else:
        from optplan.reports.terminal.explain import render_explanation

        output.print_terminal(render_explanation, record)
