"""A training job between optplan and the program that runs it: what is written, and what has been read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from optplan.planner.candidates import settings_of
from optplan.planner.catalog import find_entry, load_model
from optplan.planner.errors import ConfigError
from optplan.planner.models.spec import ModelSpec
from optplan.planner.optimizers.registry import build_optimizer
from optplan.planner.records import StepConfig

LEARNING_RATE = 1e-5
"""What a written file says where it must say something: usual for fine-tuning, and to be chosen by whoever trains."""

_NOT_CAUSAL = ("bert", "roberta", "t5", "vit", "resnet")


class Export(msgspec.Struct, frozen=True, kw_only=True):
    """A configuration as the file of a training program.

    Attributes:
        target: The program, as `--export` names it.
        file_name: What the file is usually called.
        text: The file.
        by_hand: What the program cannot be told in the file, each one sentence.
        command: How to start it.
    """

    target: str
    file_name: str
    text: str
    by_hand: list[str]
    command: str


class TrainingJob(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be trained and how, every value checked.

    Attributes:
        model: What training programs load: a repository on the Hub, or a folder.
        spec: The model itself.
        optimizer: Its id.
        implementation: Its implementation.
        options: Every option of it with its value.
        settings: Those that are not defaults, without the implementation; `state_dtype` if one is asked for.
        config: How the step is run.
    """

    model: str
    spec: ModelSpec
    optimizer: str
    implementation: str
    options: dict[str, Any]
    settings: dict[str, Any]
    config: StepConfig

    def refuse(self, target: str, why: str, *, instead: str = "python") -> ConfigError:
        """The error for a job that a program cannot run, with one to try."""
        advice = "" if instead == target else f"; try --export {instead}"
        return ConfigError(f"--export {target} is not possible: {why}{advice}")


def training_job(
    model: str | ModelSpec,
    *,
    optimizer: str,
    implementation: str,
    options: dict[str, Any],
    config: StepConfig,
    state_dtype: str | None = None,
) -> TrainingJob:
    """The job that a recommendation or an estimate describes.

    Raises:
        ConfigError: The model, the optimizer or an option is unknown.
    """
    spec = model if isinstance(model, ModelSpec) else load_model(model)
    given = {key: value for key, value in options.items() if value is not None}
    built = build_optimizer(optimizer, {"implementation": implementation, **given})
    settings = {key: value for key, value in settings_of(built).items() if key != "implementation"}
    settings |= {"state_dtype": state_dtype} if state_dtype else {}
    return TrainingJob(
        model=_loadable(model, spec),
        spec=spec,
        optimizer=optimizer,
        implementation=implementation,
        options=built.options,
        settings=settings,
        config=config,
    )


def is_causal(spec: ModelSpec) -> bool:
    """Whether the model predicts the next token, which most training programs take for granted."""
    return spec.model_type not in _NOT_CAUSAL


def _loadable(model: str | ModelSpec, spec: ModelSpec) -> str:
    """A repository for a model of the catalogue, the folder of a `config.json`, or the name as it is."""
    entry = find_entry(spec.name)
    if spec.reference:
        path = Path(spec.reference)
        return str(path.parent if path.name == "config.json" else path)
    if entry is not None and entry.hub_id:
        return entry.hub_id
    return model if isinstance(model, str) else spec.name
