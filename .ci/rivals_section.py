"""The part of `docs/accuracy.md` that holds public estimators to the same measured steps."""

from __future__ import annotations

from statistics import median


def rivals_section() -> list[str]:
    """The lines of the section: a row an estimator, then a row a step."""
    from optplan.planner.rivals import compared_rivals

    rivals = compared_rivals()
    lines = [
        "",
        "## Other estimators",
        "",
        f"{len(rivals.cases)} of the steps, those of `{rivals.record}`, and what public estimators say of them when asked"
        f" through their own interfaces ({rivals.date}, {rivals.environment}; `python benchmarks/run_rivals.py`). They"
        " answer different questions: one that counts weights, gradients and optimizer state alone says so, and cannot be"
        " near a step in which activations or logits are larger. Where a step has number formats that an estimator does"
        " not take, it was asked for the nearest that it does (marked ~); where it has no input for the optimizer, there"
        " is no answer. Every call is in `planner/data/rivals.toml`.",
        "",
        "| estimator | what its figure is | answers | of them nearest | median of error | largest error |",
        "|---|---|---|---|---|---|",
    ]
    for tool in rivals.tools:
        errors, exact = rivals.errors(tool), rivals.errors(tool, with_nearest=False)
        lines.append(
            f"| {tool.title} {tool.version} | {tool.counts} | {len(errors)} | {len(errors) - len(exact)} |"
            f" {_percent(median(map(abs, errors)))} | {_percent(max(errors, key=abs), signed=True)} |"
        )
    titles = " | ".join(tool.title for tool in rivals.tools)
    lines += ["", f"| model | step | measured GiB | {titles} |", "|---|---|---|" + "---|" * len(rivals.tools)]
    for number, case in enumerate(rivals.cases):
        cells = []
        for tool in rivals.tools:
            answer = tool.answers[number]
            mark = "~" if answer.is_nearest else ""
            size = answer.predicted_bytes
            cells.append("-" if size is None else f"{mark}{_percent(size / case.measured_peak_bytes - 1, signed=True)}")
        measured = f"{case.measured_peak_bytes / 2**30:.2f}"
        lines.append(f"| {case.model} | {case.setting} | {measured} | {' | '.join(cells)} |")
    return lines


def _percent(error: float, *, signed: bool = False) -> str:
    """With one digit, or that it is less than that shows."""
    if 0 < abs(error) < 0.0005:
        return "below 0.1%"
    return f"{error:+.1%}" if signed else f"{error:.1%}"
