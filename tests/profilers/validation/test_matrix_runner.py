"""When the cases of a matrix begin, where, and what becomes of those that are cut short; no step is taken here."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from optplan.planner.errors import ConfigError, OptplanError
from optplan.planner.measured.measurement import Environment, Measurement
from optplan.planner.measured.record_files import save_record
from optplan.planner.records import ModelRow, ResidentBytes, StepConfig
from optplan.profilers.live.environment import given_notes, read_environment
from optplan.profilers.live.measure import INTERRUPTED
from optplan.profilers.validation import runner
from optplan.profilers.validation.command import BUSY_HOST, _places, _refusing, _visible_gpus
from optplan.profilers.validation.gpus import VisibleGpu
from optplan.profilers.validation.launching import Process
from optplan.profilers.validation.matrix import ValidationCase
from optplan.profilers.validation.runner import Limits, RunOutcome, run_cases

RECORD = Measurement(
    version="1",
    source="live",
    device="cpu",
    model=ModelRow("gpt2", 1, "written for this test"),
    gpu=None,
    config=StepConfig("bf16", 1, 8, 1, "none", "sdpa", 1, "none"),
    optimizer="sgd",
    implementation="fused",
    options={},
    bytes=ResidentBytes(1, 1, 0, 1),
    state_tensors={},
    environment=Environment(python="3", optplan="1", command="optplan profile", date="2026-11-22T00:00:00Z"),
)
ONE, TWO, THREE = (ValidationCase("gpt2", name, (), {}) for name in ("adamw", "sgd", "lion"))
PAIR = ValidationCase("gpt2", "adamw", (), {"sharding": "ddp"}, 2)


class Stub:
    """A process that ends after being looked at a few times, and then leaves a record."""

    def __init__(self, script: Script, words: Sequence[str]) -> None:
        self._script, self._out = script, Path(words[words.index("--out") + 1])
        self._looks = 0
        self.signals: list[int] = []
        self._ended: int | None = None

    @property
    def status(self) -> int | None:
        self._looks += 1
        if self._ended is None and self._looks > self._script.looks:
            self._ended = self._script.status
            if self._script.record is not None:
                save_record(self._script.record, self._out)
        return self._ended

    def signal(self, number: int) -> None:
        self.signals.append(number)
        self._ended = -number


class Script(msgspec.Struct):
    """What a process does: its exit status, how often it is looked at before it ends, what it leaves."""

    status: int = 0
    looks: int = 3
    record: Measurement | None = RECORD


class Stage:
    """A launcher of stand-ins; `begun` is what was started, with how many others ran then."""

    def __init__(self, folder: Path, scripts: Mapping[str, Script]) -> None:
        self.begun: list[tuple[str, int, dict[str, str]]] = []
        self.stubs: list[Stub] = []
        self._folder, self._scripts = folder, scripts

    def start(self, module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Process:
        optimizer = arguments[arguments.index("--optimizer") + 1]
        running = sum(stub._ended is None for stub in self.stubs)
        self.begun.append((optimizer, running, dict(environment)))
        self.stubs.append(Stub(self._scripts.get(optimizer, Script()), arguments))
        (self._folder / f"{len(self.stubs)}.err").write_text("optplan: no such thing\n")
        return Process(self.stubs[-1], self._folder, len(self.stubs))


@pytest.fixture
def play(tmp_path: Path) -> Callable[..., tuple[Stage, RunOutcome]]:
    def play(cases: Sequence[ValidationCase], scripts: Mapping[str, Script] = {}, **how: object) -> object:
        stage = Stage(tmp_path, scripts)
        given = {"launcher": stage, "device": "cuda", "limits": Limits(4, 60), **how}
        try:
            return stage, run_cases(cases, tmp_path / "records", **given)  # type: ignore[arg-type]
        except KeyboardInterrupt:
            return stage, None

    return play  # type: ignore[return-value]


def test_two_at_once_each_on_its_own_gpu(play: Callable[..., tuple[Stage, RunOutcome]]) -> None:
    places = [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    stage, outcome = play([ONE, TWO, THREE], {"adamw": Script(looks=9)}, places=places)
    assert stage.begun == [("adamw", 0, places[0]), ("sgd", 1, places[1]), ("lion", 1, places[1])]
    assert sorted(outcome.measured) == sorted(case.name for case in (ONE, TWO, THREE))


def test_several_processes_of_a_step_run_alone(play: Callable[..., tuple[Stage, RunOutcome]]) -> None:
    stage, outcome = play([ONE, PAIR, TWO], places=[{}, {}])
    assert [running for _, running, _ in stage.begun] == [0, 0, 1, 0]
    ranks = [environment for _, _, environment in stage.begun[1:3]]
    assert [(rank["RANK"], rank["LOCAL_RANK"], rank["WORLD_SIZE"]) for rank in ranks] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
    ]
    assert ranks[0]["MASTER_PORT"] == ranks[1]["MASTER_PORT"]
    # Neither rank is to listen there: the store is validate's own.
    assert {rank["TORCHELASTIC_USE_AGENT_STORE"] for rank in ranks} == {"True"}
    assert len(outcome.measured) == 3


def test_a_record_cut_short_is_measured_again(play: Callable[..., tuple[Stage, RunOutcome]], tmp_path: Path) -> None:
    cut = msgspec.structs.replace(RECORD, notes=[INTERRUPTED])
    _, outcome = play([ONE, TWO], {"adamw": Script(status=130, record=cut)})
    assert outcome is None
    assert list((tmp_path / "records").iterdir()) == []
    _, outcome = play([ONE, TWO])
    assert outcome.measured == [ONE.name, TWO.name]


def test_a_file_that_cannot_be_read_is_left_alone(
    play: Callable[..., tuple[Stage, RunOutcome]], tmp_path: Path
) -> None:
    folder = tmp_path / "records"
    folder.mkdir()
    newer = folder / f"{ONE.name}.json.gz"
    newer.write_text('{"schema": "optplan.measurement/9"}')
    stage, outcome = play([ONE, TWO])
    assert outcome.measured == [TWO.name] and len(stage.begun) == 1
    assert outcome.failed[ONE.name].endswith(
        "was made by a newer optplan: schema 'optplan.measurement/9'; this version reads optplan.estimate/1, "
        "optplan.measurement/1; remove the file to measure the step again"
    )
    assert newer.read_text() == '{"schema": "optplan.measurement/9"}'


def test_a_case_that_does_not_end_is_ended(play: Callable[..., tuple[Stage, RunOutcome]]) -> None:
    slow = Script(looks=10**9, record=None)
    stage, outcome = play([ONE, TWO], {"adamw": slow}, limits=Limits(4, 60, case_seconds=1.0))
    assert outcome.failed == {ONE.name: "it did not end within 1 s"}
    assert outcome.measured == [TWO.name]
    assert stage.stubs[0].signals == [signal.SIGINT]


def test_an_interrupt_ends_what_runs_and_keeps_what_is_there(
    play: Callable[..., tuple[Stage, RunOutcome]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(progress: runner.Progress) -> None:
        if progress.done == 1:
            raise KeyboardInterrupt

    stage, outcome = play([ONE, TWO, THREE], progress=interrupted)
    assert outcome is None and len(stage.begun) == 1
    assert [path.name for path in (tmp_path / "records").iterdir()] == [f"{ONE.name}.json.gz"]


def test_what_cannot_be_measured_is_not_begun(play: Callable[..., tuple[Stage, RunOutcome]]) -> None:
    stage, outcome = play([ONE, TWO], refuse=lambda case: "too large" if case is ONE else None)
    assert outcome.skipped == {ONE.name: "too large"}
    assert [name for name, _, _ in stage.begun] == ["sgd"]


def test_the_last_words_of_a_case_without_a_record(play: Callable[..., tuple[Stage, RunOutcome]]) -> None:
    _, outcome = play([PAIR], {"adamw": Script(status=1, record=None)})
    assert outcome.failed == {PAIR.name: "optplan: no such thing"}


class Asked:
    """A launcher whose only process tells of GPUs."""

    def __init__(self, status: int, probed: str | None = None) -> None:
        self._status, self.probed = status, probed

    def start(self, module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> object:
        assert (module, list(arguments), dict(environment)) == ("optplan.profilers.validation.gpus", [], {})
        return SimpleNamespace(
            status=self._status,
            wait=lambda _: True,
            output='[{"name": "NVIDIA H200", "total_bytes": 150109880320}]',
            last_words=lambda: "CUDA error: out of memory",
        )


def test_the_gpus_are_asked_in_a_process_of_their_own() -> None:
    seen = _visible_gpus(Asked(0))  # type: ignore[arg-type]
    assert seen == [VisibleGpu("NVIDIA H200", 150_109_880_320)]
    # What the server was tried with has told already.
    assert _visible_gpus(Asked(1, '[{"name": "H100", "total_bytes": 8}]')) == [VisibleGpu("H100", 8)]  # type: ignore[arg-type]
    refuse = _refusing(seen, 0)
    assert refuse(PAIR) == "it needs 2 GPUs, torch sees 1"
    assert refuse(ValidationCase("gpt2", "sgd", (), {"seq_len": 128})) is None
    with pytest.raises(OptplanError, match=r"^the GPUs cannot be asked: CUDA error: out of memory$"):
        _visible_gpus(Asked(1))  # type: ignore[arg-type]


def test_more_gpus_than_there_are() -> None:
    with pytest.raises(ConfigError, match=r"^--gpus-in-parallel 3 is more than the 2 that torch sees$"):
        _places(3, 2)


def test_places_are_the_gpus_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in _places(2, 4)] == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-8ab")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in _places(2, 2)] == ["3", "GPU-8ab"]
    assert _places(1, 2) == [{}]


def test_a_record_says_under_which_circumstances_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    assert given_notes() == []
    monkeypatch.setenv("OPTPLAN_RECORD_NOTE", BUSY_HOST)
    monkeypatch.setenv("OPTPLAN_COMMIT", "0123abcd")
    assert given_notes() == [
        "measured while other GPUs of this host were busy: the host's share of the times may be longer"
    ]
    assert read_environment(command="optplan").commit == "0123abcd"
