"""`optplan estimate`: what a training step needs with each optimizer, and which one to take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from optplan import options, output

if TYPE_CHECKING:
    from optplan.planner.records import EstimateReport


def estimate(
    model: options.Model,
    gpu: options.GpuName = None,
    memory: options.Memory = None,
    optimizer: options.Optimizers = None,
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
    per_tensor: Annotated[bool, typer.Option("--per-tensor", help="List the state of every parameter.")] = False,
    json: options.Json = False,
) -> None:
    """Estimate a training step's memory by optimizer.

    Prints whether it fits, what to run and why, and for each optimizer its state, its peak and what is left of the GPU.
    The exit status is 0 if something fits, 1 if nothing does, 2 for bad input.
    """
    report = _report(
        model,
        gpu=gpu,
        memory=memory,
        optimizer=optimizer or None,
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
        per_tensor=per_tensor,
    )
    if json:
        output.print_json(report)
    else:
        from optplan.reports.terminal.estimate import render_estimate

        output.print_terminal(render_estimate, report)
    if report.estimates and all(row.fits is False for row in report.estimates):
        raise typer.Exit(1)


def _report(model: str, **request: Any) -> EstimateReport:
    """The report by the engine asked for."""
    if request["engine"] != "trace":
        from optplan.planner.estimate import estimate as estimate_report

        return estimate_report(model, **request)
    estimation = output.import_torch_part("optplan.profilers.estimation")
    with output.progress() as tell:
        report: EstimateReport = estimation.traced_estimate(model, progress=tell, **request)
    return report
