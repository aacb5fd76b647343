"""What to run: the configuration, its command, and the same for programs."""

from __future__ import annotations

import shlex

import msgspec

from optplan.planner.records import EstimateReport, Recommendation, StepConfig
from optplan.planner.sharding.clusters import usual_num_nodes
from optplan.planner.trainers.export import export
from optplan.planner.trainers.job import Export
from optplan.reports.gpu_words import gpus_in_words, per_copy
from optplan.reports.html.parts import Code, Column, Download, Part, Section, Table, Value
from optplan.reports.html.sections.exports import exports

_SELDOM: dict[str, object] = {"gpus": 1, "sharding": "none"}
_SELDOM |= {
    field.name: field.default for field in msgspec.structs.fields(StepConfig) if field.default is not msgspec.NODEFAULT
}
"""Settings of a step that are written only where they are not the usual ones."""


def run(report: EstimateReport) -> Section:
    """The recommended configuration, or what to try where there is none."""
    advice = report.recommendation
    if advice is None:
        text = (
            "Nothing is recommended: no configuration leaves room. Try a shorter sequence, other optimizers or a larger"
            " GPU; the switches below show some."
        )
        return Section("run", "What should I run?", text, [Download("optplan-estimate.json")])
    parts: list[Part] = [
        _configuration(report, advice),
        Code("command", "Command that prints this estimate", advice.command),
        Code("python", "The same in Python", _python(report, advice)),
        Download("optplan-estimate.json"),
        exports(lambda target: _export(report, advice, target)),
    ]
    return Section("run", "What should I run?", f"{advice.optimizer}, as follows.", parts)


def _configuration(report: EstimateReport, advice: Recommendation) -> Table:
    config = advice.config
    options: list[list[Value]] = [[f"option {name}", str(value)] for name, value in advice.options.items()]
    allocator: list[list[Value]] = [["allocator settings", config.alloc_conf]] if config.alloc_conf else []
    divided: list[list[Value]] = [["work divided", gpus_in_words(config)]] if config.gpus > 1 else []
    rows: list[list[Value]] = [
        ["model", report.model.name],
        ["GPU", f"{config.gpus} × {report.gpu.name}" if config.gpus > 1 else report.gpu.name],
        *divided,
        ["optimizer", f"{advice.optimizer}, implementation {advice.implementation}"],
        *options,
        ["precision", config.precision],
        [f"micro-batch{per_copy(config)}", f"{config.batch_size} × {config.seq_len} tokens"],
        ["accumulated micro-batches", str(config.grad_accum)],
        ["checkpointing", config.checkpointing],
        ["attention", config.attention],
        *allocator,
    ]
    return Table(
        id="configuration",
        caption="Configuration",
        columns=[Column("Setting"), Column("Value")],
        rows=rows,
        source="recommendation; options left out are the defaults",
    )


def _export(report: EstimateReport, advice: Recommendation, target: str) -> Export:
    return export(
        target,
        model=_model(report, advice),
        optimizer=advice.optimizer,
        implementation=advice.implementation,
        options=advice.options,
        config=advice.config,
    )


def _model(report: EstimateReport, advice: Recommendation) -> str:
    """The model as it was asked for."""
    return _asked(advice, "--model") or report.model.name


def _asked(advice: Recommendation, flag: str) -> str | None:
    """What the command has after a flag, None without it."""
    words = shlex.split(advice.command)
    return words[words.index(flag) + 1] if flag in words else None


_CALLS = {
    "rules": "import optplan\n\nreport = optplan.estimate(",
    "trace": "from optplan.profilers.estimation import traced_estimate\n\nreport = traced_estimate(",
}
"""What is called, by engine."""


def _python(report: EstimateReport, advice: Recommendation) -> str:
    config, state_dtype = advice.config, _asked(advice, "--state-dtype")
    seldom = _SELDOM | {"nodes": usual_num_nodes(config.gpus, report.gpu.name)}
    target = {"memory": report.gpu.total_bytes} if report.gpu.context_bytes == 0 else {"gpu": report.gpu.name}
    settings = {
        **target,
        "optimizer": advice.optimizer,
        "options": {"implementation": advice.implementation, **advice.options},
        "precision": config.precision,
        "batch_size": config.batch_size,
        "seq_len": config.seq_len,
        "grad_accum": config.grad_accum,
        "checkpointing": config.checkpointing,
        "attention": config.attention,
        **({"state_dtype": state_dtype} if state_dtype else {}),
        **{name: getattr(config, name) for name, usual in seldom.items() if getattr(config, name) != usual},
    }
    lines = "".join(f"    {name}={_literal(value)},\n" for name, value in settings.items())
    return f"{_CALLS[report.engine]}\n    {_model(report, advice)!r},\n{lines})\n"


def _literal(value: object) -> str:
    """A value as Python is written: options one below the other where a line would be long."""
    if not isinstance(value, dict) or len(repr(value)) < 50:
        return repr(value)
    return "{\n" + "".join(f"        {name!r}: {setting!r},\n" for name, setting in value.items()) + "    }"
