"""The training-curve page: losses of the recorded runs, optimizers over each other."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from optplan.reports.html.figures.curves import loss_curves
from optplan.reports.html.page import render
from optplan.reports.html.parts import Column, Drawing, Page, Section, Table, Value
from optplan.reports.html.training_runs import Curve, TrainingRun, mean_curve, newest, spread


def training_page(runs: Sequence[TrainingRun], *, source: str) -> str:
    """Runs as one HTML document; `source` names the records."""
    final = newest(runs)
    best = min(final, key=lambda name: _mean(final[name]))
    environment = next(iter(final.values()))[0].environment
    return render(
        Page(
            title="Training curves · optplan",
            kicker=f"{environment.get('gpu')} · torch {environment.get('torch')} · "
            f"{sum(map(len, final.values()))} runs with the best learning rates of {len(final)} optimizers",
            headline=f"{best} ends lowest, at {_mean(final[best]):.3f}",
            tone="",
            lead="Loss by step, mean over the seeds, every optimizer at its own best learning rate.",
            sections=[_results(final, source), _curves(final, source)],
            records={"runs": [run for group in final.values() for run in group]},
        )
    )


def _results(final: dict[str, list[TrainingRun]], source: str) -> Section:
    rows: list[list[Value]] = []
    for name, runs in sorted(final.items(), key=lambda item: _mean(item[1])):
        losses = _losses(runs)
        rows.append(
            [name, _mean(runs), spread(losses), len(runs), runs[0].lr, runs[0].num_steps,
             runs[0].state_bytes / runs[0].num_parameters]
        )  # fmt: skip
    table = Table(
        id="results",
        caption="Validation loss after the last step",
        columns=[Column("Optimizer"), Column("Mean loss", "decimal"), Column("Deviation", "decimal"),
                 Column("Seeds", "int"), Column("Learning rate", "number"), Column("Steps", "int"),
                 Column("State, bytes a parameter", "decimal")],
        rows=rows,
        source=source,
    )  # fmt: skip
    return Section("results", "Which trains best?", "Nats a byte on held-out files; lower is better.", [table])


def _curves(final: dict[str, list[TrainingRun]], source: str) -> Section:
    validation = [mean_curve(name, [run.validation_losses for run in runs]) for name, runs in final.items()]
    training = [mean_curve(name, [run.train_losses for run in runs]) for name, runs in final.items()]
    drawings = [
        _drawing("validation", "Validation loss", validation, source),
        _drawing("training", "Training loss", training, source),
    ]
    return Section("curves", "How do they learn?", "Mean over the seeds.", [*drawings])


def _drawing(id_: str, title: str, curves: list[Curve], source: str) -> Drawing:
    ends = ", ".join(f"{curve.optimizer} {curve.losses[-1]:.3f}" for curve in curves)
    return Drawing(
        id=id_,
        title=title,
        summary=f"Last values: {ends}.",
        figure=loss_curves(curves, title=title.lower()),
        table=Table(
            id=f"{id_}-data",
            caption=f"{title} by step",
            columns=[Column("Optimizer"), Column("Step", "int"), Column("Loss", "decimal")],
            rows=[[curve.optimizer, step, loss] for curve in curves
                  for step, loss in zip(curve.steps, curve.losses, strict=True)],
            source=source,
        ),
    )  # fmt: skip


def _losses(runs: Sequence[TrainingRun]) -> list[float]:
    return [run.final_validation_loss for run in runs if run.final_validation_loss is not None]


def _mean(runs: Sequence[TrainingRun]) -> float:
    losses = _losses(runs)
    return fmean(losses) if losses else float("inf")
