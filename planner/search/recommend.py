"""The configuration to run for a model and a GPU: the question answered, and the report written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Unpack

from optplan.planner.gpus import load_gpu
from optplan.planner.models.spec import ModelSpec
from optplan.planner.optimizers.facts import load_facts
from optplan.planner.records import GpuRow, ModelRow
from optplan.planner.search.alternatives import Alternatives
from optplan.planner.search.choose import Choice, choose
from optplan.planner.search.describe import Describer, rated_gpu, title_of
from optplan.planner.search.evidence import ADVENTUROUS
from optplan.planner.search.explore import Exploration, Found
from optplan.planner.search.fit_changes import fit_changes
from optplan.planner.search.picks import RULES
from optplan.planner.search.question import Question, SearchFlags, check_question
from optplan.planner.search.records import Configuration, Decided, SearchReport, SpaceRow, Time
from optplan.planner.step_time import timed_gpu
from optplan.planner.step_time_rates import CALIBRATED_GPU
from optplan.planner.units import format_gib
from optplan.planner.version import VERSION


def recommend(
    model: str | ModelSpec,
    *,
    optimizer: str | Sequence[str] | None = None,
    options: Mapping[str, object] | Sequence[str] | None = None,
    explain: bool = False,
    **flags: Unpack[SearchFlags],
) -> SearchReport:
    """The configuration to run for a model and a GPU, and what became of every other.

    Args:
        model: Catalogue id or alias, path to a `config.json`, or a model already read.
        optimizer: Optimizer id or ids to search; every one when None.
        options: Their options where they are fixed, as a mapping or as `key=value` texts.
        explain: Whether every optimizer with its settings under every precision is accounted for, not only each once.
        flags: As in `SearchFlags`.

    Raises:
        ConfigError: Something is unknown, out of range or contradictory, or the model's family has no step rules.
        TypeError: A flag is none of `SearchFlags`.
    """
    return answer_question(check_question(model, optimizer=optimizer, options=options, **flags), explain=explain)


def answer_question(question: Question, *, explain: bool = False) -> SearchReport:
    """The report for a checked question."""
    exploration, describer, choice = _search(question)
    told = Alternatives(exploration, describer, choice, question.prefer)
    best = describer.describe(choice.best, simulate=True) if choice.best else None
    base, gpu = question.base, question.base.gpu
    flushes = describer.flushes(choice.best) if choice.best else None
    return SearchReport(
        version=VERSION,
        model=ModelRow(base.model.name, base.model.num_parameters, base.model.source),
        gpu=GpuRow(gpu.id, gpu.total_bytes, gpu.usable_bytes, gpu.context_bytes),
        gpus=list(question.space.micro_batches),
        limit_bytes=question.limit_bytes,
        reserve_bytes=question.reserve_bytes,
        prefer=question.prefer,  # type: ignore[arg-type]
        rule=RULES[question.prefer],
        seq_len=base.config.seq_len,
        sequences_per_step=question.space.sequences,
        space=_space_row(question),
        decided=_decided(exploration),
        recommendation=best,
        reasons=_reasons(best, choice, describer) if best else [],
        advice=_advice(best) if best else [],
        runner_up=describer.describe(choice.runner_up, simulate=True) if choice.runner_up else None,
        front=[describer.describe(found, simulate=False) for found in exploration.front],
        alternatives=told.every() if explain else told.by_optimizer(),
        what_would_fit=[] if best else fit_changes(question, exploration, _best_of),
        notes=[*base.notes, *_notes(question), *([f"the step {flushes}"] if flushes else [])],
    )


def _search(question: Question) -> tuple[Exploration, Describer, Choice]:
    gpu = rated_gpu(question.base.gpu, load_gpu(CALIBRATED_GPU))
    limits = {"limit_bytes": question.limit_bytes, "reserve_bytes": question.reserve_bytes}
    exploration = Exploration(question.base, question.space, gpu, **limits)
    describer = Describer(question, exploration)
    return exploration, describer, choose(describer, _candidates(exploration), question.prefer)


def _candidates(exploration: Exploration) -> list[Found]:
    """The front, and the best of each optimizer: where those on the front turn out tight, others are tried."""
    return list(dict.fromkeys([*exploration.front, *exploration.best.values(), *exploration.roomy.values()]))


def _best_of(question: Question) -> Configuration | None:
    _, describer, choice = _search(question)
    return describer.describe(choice.best, simulate=True) if choice.best else None


def _space_row(question: Question) -> SpaceRow:
    space = question.space
    return SpaceRow(
        optimizers=list(dict.fromkeys(member.optimizer.id for member in space.members)),
        precisions=list(space.precisions),
        checkpointing=list(space.checkpointing),
        fused_losses=list(space.fused_losses),
        step_in_backward=list(space.backward_steps),
        micro_batches=sorted({size for sizes in space.micro_batches.values() for size in sizes}),
        layouts=[f"{layout.gpus} {layout.sharding}" for layout in space.layouts],
        fixed=question.fixed,
    )


def _decided(exploration: Exploration) -> Decided:
    counts = exploration.counts
    return Decided(
        declared=exploration.space.size,
        cannot_run=counts["cannot_run"],
        larger_batch=counts["larger_batch"],
        resident=counts["resident"],
        memory=counts["memory"],
        beaten=counts["beaten"],
        front=counts["front"],
    )


def _reasons(best: Configuration, choice: Choice, describer: Describer) -> list[str]:
    reasons = [_memory_reason(best)]
    reasons += [_time_reason(best)] if best.time else []
    reasons += [f"{part.part}: {part.class_title}, {part.reason} ({part.source})" for part in best.evidence.parts]
    passed_over = [describer.describe(found, simulate=False) for found in choice.passed_over[:3]]
    why = "tight" if best.verdict == "fits" else "refused by fragmentation"
    reasons += [f"before it by the rule, but {why}: {title_of(other)}" for other in passed_over]
    if best.evidence.rank > ADVENTUROUS:
        reasons.append("nothing surer fits")
    return reasons


def _memory_reason(best: Configuration) -> str:
    limit_bytes = best.peak_allocated_bytes + best.margin_bytes
    reserved = f", reserved {format_gib(best.peak_reserved_bytes)}" if best.peak_reserved_bytes is not None else ""
    return f"{best.verdict}: peak {format_gib(best.peak_allocated_bytes)}{reserved}, of {format_gib(limit_bytes)}"


def _time_reason(best: Configuration) -> str:
    assert best.time is not None
    time = best.time
    return (
        f"{best.tokens_per_step:,} tokens a step in {time.step_seconds:.3g} s, {time.tokens_per_second:,.0f} tokens/s,"
        f" {time.optimizer_seconds:.2g} s of it the optimizer's ({'; '.join(_sureness(time))})"
    )


def _sureness(time: Time) -> list[str]:
    """What a time rests on, part by part."""
    shared = time.link_basis is not None
    errors = f"{time.median_error:.0%} off in the median and {time.largest_error:.0%} at most on models left out"
    marks = {
        "calibrated": f"a model fitted to measured steps of this GPU, {errors}",
        "scaled": f"scaled by the data sheet from {'two H200s' if shared else 'one H200'}, where the model is {errors}",
        "assumed": "as if on an H200: a budget has no speed",
    }
    words = [marks[time.basis]]
    words += ["the host's launches decide: another host is as much quicker or slower"] if time.bound == "host" else []
    words += ["the optimizer's part estimated"] if time.optimizer_basis == "estimated" else []
    links = {"cited": "the links' rate cited from others' measurements", "estimated": "the links' rate estimated"}
    return words + ([links[time.link_basis]] if time.link_basis in links else [])


def _advice(best: Configuration) -> list[str]:
    facts = load_facts()[best.optimizer]
    return [f"shown: {facts.evidence}", f"defaults: {facts.defaults}", f"limits: {facts.limits}"]


def _notes(question: Question) -> list[str]:
    if timed_gpu(question.base.gpu) is None:
        return ["a memory budget has no speed: configurations are compared by an H200's rates"]
    return []
