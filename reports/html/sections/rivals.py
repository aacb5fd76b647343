"""The section of other estimators: their errors on the same measured steps, and how each was asked."""

from __future__ import annotations

from statistics import median

from optplan.planner.rivals import RivalAnswer, Rivals, RivalTool
from optplan.reports.html.figures.rivals import rival_errors
from optplan.reports.html.parts import Column, Drawing, Part, Points, Section, Table, Value
from optplan.reports.html.text import percent

_FAIRNESS = (
    "They answer different questions: one that counts weights, gradients and optimizer state alone says so, and cannot"
    " be near a step in which activations or logits are larger.",
    "Where a step has number formats that an estimator does not take, it was asked for the nearest that it does; such"
    " answers are drawn hollow and counted apart. Where it has no input for the optimizer at all, there is no answer.",
    "xMem (arXiv:2510.21048) was not asked: it profiles the training script itself. Its paper reports, over its own"
    " 5209 runs of 25 models, a median relative error 91 % below that of the estimators it compares.",
)


def rivals(record: Rivals) -> Section:
    """The section."""
    parts: list[Part] = [_errors(record), _summary(record), _answers(record), Points(list(_FAIRNESS))]
    lead = (
        f"{len(record.cases)} steps measured on {record.place}, and what each public estimator says of them when it is"
        f" asked through its own interface. Asked on {record.date}, {record.environment}."
    )
    return Section("rivals", "And other estimators?", lead, parts)


def _errors(record: Rivals) -> Drawing:
    best, *others = record.tools
    medians = [_median(record, tool) for tool in others]
    return Drawing(
        id="rival-errors",
        title="Errors on the same steps",
        summary=f"The median error is {percent(_median(record, best))} for {best.title}; for the others it is"
        f" between {percent(min(medians), digits=1)} and {percent(max(medians), digits=0)}.",
        figure=rival_errors(record),
        table=_matrix(record),
    )


def _summary(record: Rivals) -> Table:
    titles = ["Steps as measured", "Nearest steps", "No answer"]
    return Table(
        id="rival-summary",
        caption="Each estimator over all steps",
        columns=[
            Column("Estimator"), Column("What its figure is"), Column("Median of |error|, all", "error"),
            Column("Median of |error|, as measured", "error"), Column("Largest error", "signed_percent"),
            *(Column(title, "int") for title in titles), Column("Version"), Column("Documented", "code"),
        ],
        rows=[_row(record, tool) for tool in record.tools],
        source=f"planner/data/rivals.toml, asked on {record.date} by benchmarks/run_rivals.py; optplan: today's rules",
    )  # fmt: skip


def _row(record: Rivals, tool: RivalTool) -> list[Value]:
    exact, errors = record.errors(tool, with_nearest=False), record.errors(tool)
    return [
        tool.title, tool.counts, median(map(abs, errors)), median(map(abs, exact)) if exact else None,
        max(errors, key=abs), len(exact), len(errors) - len(exact), len(tool.answers) - len(errors), tool.version,
        tool.source,
    ]  # fmt: skip


def _matrix(record: Rivals) -> Table:
    """A row a step, a column an estimator."""
    return Table(
        id="rival-errors-data",
        caption="Error of each estimator on each step",
        columns=[Column("Model"), Column("Setting"), Column("Measured", "bytes"),
                 *(Column(tool.title, "signed_percent") for tool in record.tools)],
        rows=[[case.model, case.setting, case.measured_peak_bytes,
               *(_error(record, tool.answers[number]) for tool in record.tools)]
              for number, case in enumerate(record.cases)],
        source=f"measured: {record.record}; predictions: planner/data/rivals.toml",
    )  # fmt: skip


def _answers(record: Rivals) -> Table:
    rows: list[list[Value]] = [
        [tool.title, record.cases[answer.case].model, record.cases[answer.case].setting, answer.predicted_bytes,
         _error(record, answer), answer.note, answer.call]
        for tool in record.tools for answer in tool.answers
    ]  # fmt: skip
    return Table(
        id="rival-answers",
        caption="How each was asked, and what it answered",
        columns=[Column("Estimator"), Column("Model"), Column("Setting"), Column("Predicted", "bytes"),
                 Column("Error", "signed_percent"), Column("Not taken"), Column("Call", "code")],
        rows=rows,
        source=f"planner/data/rivals.toml, asked on {record.date}",
        folded=True,
    )  # fmt: skip


def _error(record: Rivals, answer: RivalAnswer) -> float | None:
    if answer.predicted_bytes is None:
        return None
    return answer.predicted_bytes / record.cases[answer.case].measured_peak_bytes - 1


def _median(record: Rivals, tool: RivalTool) -> float:
    return median(map(abs, record.errors(tool)))
