"""How the times of a validation were measured, and the host that they are predicted for, in a sentence or two."""

from __future__ import annotations

from collections.abc import Sequence

from optplan.planner.measured.validation import Judgement


def how_timed(rows: Sequence[Judgement]) -> str | None:
    """Over how many processes each time is the median and on which host it is predicted; None if no step was timed."""
    timed = [row for row in rows if row.step_seconds_error is not None and row.num_processes]
    if not timed:
        return None
    told = [row.host_launch_seconds for row in timed if row.host_launch_seconds is not None]
    sentences = [f"Time of the whole step: {_measured([row.num_processes for row in timed])}; {_predicted(told)}."]
    untold = len(timed) - len(told)
    if told and untold:
        steps = "one step" if untold == 1 else f"{untold} steps"
        sentences.append(f"In {steps} no process measured its host: there the host of a plain estimate is assumed.")
    return " ".join(sentences)


def has_several_processes(rows: Sequence[Judgement]) -> bool:
    """Whether any step's time is of more than one process."""
    return any(row.num_processes > 1 for row in rows)


def _measured(counts: Sequence[int]) -> str:
    if max(counts) == 1:
        return "measured in one process a step"
    each = str(counts[0]) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    return f"measured as the median over the processes that took it, {each} a step and {sum(counts):,} in all"


def _predicted(launches: Sequence[float]) -> str:
    if not launches:
        return "predicted for the host of a plain estimate, because none measured its own"
    least, most = f"{min(launches) * 1e6:.1f}", f"{max(launches) * 1e6:.1f}"
    each = least if least == most else f"{least} to {most}"
    return f"predicted for their mean host, which took {each} microseconds to launch one operation"
