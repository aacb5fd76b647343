"""The configuration for training programs: the file of each, and what a program cannot be told."""

from __future__ import annotations

from collections.abc import Callable

from optplan.planner.errors import ConfigError
from optplan.planner.trainers.export import TARGETS
from optplan.planner.trainers.job import Export
from optplan.reports.html.parts import Exported, Exports, Refused

_TITLES = {
    "python": "Plain PyTorch", "hf-args": "transformers' Trainer", "torchtitan": "torchtitan", "axolotl": "Axolotl",
    "llama-factory": "LLaMA-Factory", "deepspeed": "DeepSpeed", "accelerate": "Accelerate",
}  # fmt: skip


def exports(write: Callable[[str], Export]) -> Exports:
    """Every training program's file, or why it has none.

    Args:
        write: Writes the configuration for a target, as `optplan recommend --export` does.
    """
    written: list[Exported] = []
    refused: list[Refused] = []
    for target in TARGETS:
        title = _TITLES.get(target, target)
        try:
            found = write(target)
        except ConfigError as error:
            refused.append(Refused(title, _reason(target, str(error))))
            continue
        written.append(Exported(f"export-{target}", title, found.file_name, found.text, found.command, found.by_hand))
    return Exports(written, _joined(refused))


def _reason(target: str, sentence: str) -> str:
    """The sentence without the command line's options, which a page has not."""
    return sentence.removeprefix(f"--export {target} is not possible: ").partition("; try --export")[0]


def _joined(refused: list[Refused]) -> list[Refused]:
    """One entry for programs that refuse for one reason."""
    titles: dict[str, list[str]] = {}
    for each in refused:
        titles.setdefault(each.reason, []).append(each.title)
    return [Refused(", ".join(names), reason) for reason, names in titles.items()]
