"""Train a byte-level GPT with every optimizer, and save the curves as JSON lines.

    python benchmarks/train_study.py --out FILE [--optimizers ID ...] [--processes N]
    python benchmarks/train_study.py --out FILE --device cpu --steps 20 --smoke

Each optimizer runs its learning rates with the first seed over the whole length, goes on upwards or downwards while
the best is the last one tried on that side, and repeats the best with the other seeds. Controls run at the learning
rate of the one they control. Data, its order, initial values, schedule and validation set are the same for all. Where
optplan is not installed, `python .ci/link_types.py` links this tree into `.types`, to be named in PYTHONPATH.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from train_study_corpus import Corpus, load_corpus
from train_study_model import Size
from train_study_optimizers import SUBJECTS, families
from train_study_record import row_of, save
from train_study_runs import Outcome, Plan, Recipe, train

MAX_EXTENSIONS = 3
"""Learning rates tried beyond the given ones."""


class Study(NamedTuple):
    """What a process needs to know."""

    recipe: Recipe
    device: str
    smoke: bool


def main() -> int:
    """Run what is asked for, saving each optimizer's rows as they come."""
    options = parse_arguments()
    names = [name for name in options.optimizers if SUBJECTS[name].is_available()]
    for name in set(options.optimizers) - set(names):
        print(f"left out: {name}, package {SUBJECTS[name].package} is not installed", file=sys.stderr)
    study = Study(recipe_of(options), options.device, options.smoke)
    for row in all_rows(families(names), study, options.processes):
        save(options.out, row, commit=options.commit)
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are appended to this file")
    parser.add_argument("--optimizers", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--processes", type=int, default=1, help="families of optimizers that train at once")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, one learning rate and one seed each")
    parser.add_argument("--commit", default="", help="commit to record; by default that of the tree")
    return parser.parse_args()


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The study's recipe, or a tiny one."""
    if not options.smoke:
        return Recipe(num_steps=options.steps)
    size = Size(layers=1, width=32, heads=2, context=32)
    return Recipe(size, options.steps, batch=4, num_validation_windows=16, validate_every=10)


def all_rows(groups: list[list[str]], study: Study, num_processes: int) -> Iterator[dict[str, Any]]:
    """The rows of every family, each family's when it is through."""
    if num_processes == 1:
        for group in groups:
            yield from family_rows(group, study)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        futures = [pool.submit(family_rows, group, study) for group in groups]
        for done in as_completed(futures):
            if done.exception() is None:
                yield from done.result()
        for done in futures:
            done.result()  # what failed is raised once the others are saved


def family_rows(names: list[str], study: Study) -> list[dict[str, Any]]:
    """The runs of a leader and its followers: the sweep, then every seed that is missing."""
    torch.set_num_threads(1)
    corpus = load_corpus(torch.device(study.device))
    leader = names[0]
    swept = sweep(leader, study, corpus)
    best = min(swept, key=lambda outcome: outcome.final_loss)
    final = [best]
    for plans in fleets([plan for name in names for plan in seed_plans(name, best.plan.lr, study)][1:]):
        final += train(plans, study.recipe, corpus)
    stages = [("sweep", outcome) for outcome in swept if outcome is not best] + [("final", o) for o in final]
    return [row_of(outcome, SUBJECTS[outcome.plan.name], stage, study.recipe, corpus) for stage, outcome in stages]


def fleets(plans: list[Plan]) -> list[list[Plan]]:
    """Runs that train together: all of ours, and each of others' code alone."""
    ours = [plan for plan in plans if not SUBJECTS[plan.name].package]
    return [fleet for fleet in (ours, *([plan] for plan in plans if plan not in ours)) if fleet]


def seed_plans(name: str, lr: float, study: Study) -> list[Plan]:
    """Runs at the best learning rate; the leader's first is its sweep's."""
    num_seeds = 1 if study.smoke else SUBJECTS[name].num_seeds
    return [plan_of(name, study.recipe, lr, seed) for seed in range(num_seeds)]


def plan_of(name: str, recipe: Recipe, lr: float, seed: int) -> Plan:
    """One run of a subject."""
    subject = SUBJECTS[name]
    build = partial(subject.build, betas=subject.betas)
    return Plan(name, build, lr, seed, subject.dtype, round(subject.part * recipe.num_steps))


def sweep(name: str, study: Study, corpus: Corpus) -> list[Outcome]:
    """One run a learning rate, and more by factors of 2 while the best has no neighbour on both sides."""
    rates = SUBJECTS[name].learning_rates[: 1 if study.smoke else None]
    outcomes = train([plan_of(name, study.recipe, lr, 0) for lr in rates], study.recipe, corpus)
    for _ in range(0 if study.smoke else MAX_EXTENSIONS):
        outcomes.sort(key=lambda outcome: outcome.plan.lr)
        best = min(outcomes, key=lambda outcome: outcome.final_loss)
        lr = {0: best.plan.lr / 2, len(outcomes) - 1: best.plan.lr * 2}.get(outcomes.index(best))
        if lr is None:
            break
        outcomes += train([plan_of(name, study.recipe, lr, 0)], study.recipe, corpus)
    return outcomes


if __name__ == "__main__":
    raise SystemExit(main())
