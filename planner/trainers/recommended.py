"""A recommendation handed on: the best configuration of a search that a training program can run."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

import msgspec

from optplan.planner.errors import ConfigError
from optplan.planner.models.spec import ModelSpec
from optplan.planner.search.records import Configuration, SearchReport
from optplan.planner.trainers.export import check_export_target, export
from optplan.planner.trainers.job import Export

_LIMITS: dict[str, dict[str, Any]] = {
    "hf-args": {"step_in_backward": False},
    "torchtitan": {"fused_loss": "none", "optimizer": ["adamw"], "options": ["implementation=fused"]},
    "axolotl": {"step_in_backward": False},
    "llama-factory": {"step_in_backward": False, "fused_loss": "none"},
    "deepspeed": {"step_in_backward": False},
}


def limited(target: str, asked: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A search narrowed to what a training program can run, as far as the search's options can say it.

    Args:
        target: One of `export.TARGETS`.
        asked: Options of the search; None is what was left open. What was fixed stays as it is.

    Returns:
        The options, and a note on what was not searched.
    """
    open_limits = {key: value for key, value in _LIMITS.get(target, {}).items() if asked.get(key) is None}
    if "options" in open_limits and "optimizer" not in open_limits:
        # They belong to the optimizer that was not asked for.
        del open_limits["options"]
    if not open_limits:
        return asked, []
    words = {
        "step_in_backward": "steps in backward",
        "fused_loss": "fused losses",
        "optimizer": "optimizers other than torch's adamw",
    }
    left_out = " and ".join(words[key] for key in words if key in open_limits)
    return asked | open_limits, [f"searched what {target} can run: {left_out} are left out"]


def export_recommendation(report: SearchReport, target: str, *, model: str | ModelSpec) -> Export:
    """The recommended configuration as a file, or the next one that the program can run.

    Args:
        report: What the search found.
        target: One of `export.TARGETS`.
        model: The model as it was asked for.

    Raises:
        ConfigError: The target is unknown, nothing fits, or the program can run nothing that was found; the sentence
            is about the recommended configuration.
    """
    check_export_target(target)
    if report.recommendation is None:
        raise ConfigError(f"there is nothing to write for {target}: no configuration fits")
    refusal: ConfigError | None = None
    for configuration in _in_order(report):
        try:
            written = _export(configuration, target, model)
        except ConfigError as error:
            refusal = refusal or error
            continue
        return written if refusal is None else _instead(written, configuration, refusal)
    assert refusal is not None
    raise refusal


def _in_order(report: SearchReport) -> Iterator[Configuration]:
    """What fits: the recommendation, the runner-up, the front, then the best of every other choice."""
    first = [found for found in (report.recommendation, report.runner_up) if found is not None]
    yield from first
    yield from report.front
    yield from (other.best for other in report.alternatives if other.best is not None and other.best.verdict == "fits")


def _export(configuration: Configuration, target: str, model: str | ModelSpec) -> Export:
    return export(
        target,
        model=model,
        optimizer=configuration.optimizer,
        implementation=configuration.implementation,
        options=configuration.options,
        config=configuration.config,
        state_dtype=configuration.state_dtype,
    )


def _instead(written: Export, configuration: Configuration, refusal: ConfigError) -> Export:
    """The file with a word on why it is not of what is recommended."""
    why = str(refusal).partition(" is not possible: ")[2].partition("; try --export")[0]
    note = (
        f"not the recommended configuration, which {written.target} cannot run ({why}), but the next that it can: "
        f"{configuration.command}"
    )
    comment = "".join(f"# {line}\n" for line in textwrap.wrap(note, 96, break_long_words=False, break_on_hyphens=False))
    text = written.text if written.text.startswith("{") else comment + written.text
    return msgspec.structs.replace(written, text=text, by_hand=[note, *written.by_hand])
