"""Ranks that validate starts: they meet at no port of their own, and none waits long for one that is gone."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from optplan.planner.measured.measurement import Measurement
from optplan.planner.measured.record_files import load_record
from optplan.profilers.validation import runner
from optplan.profilers.validation.command import _preloaded
from optplan.profilers.validation.launching import ForkLauncher, Launcher, Process, launching
from optplan.profilers.validation.matrix import ValidationCase
from optplan.profilers.validation.ranks import arrange_meeting, last_words
from optplan.profilers.validation.runner import Limits, RunOutcome, run_cases

TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 24,
    "num_attention_heads": 2, "num_hidden_layers": 1, "num_key_value_heads": 1, "vocab_size": 32,
    "max_position_embeddings": 64,
}  # fmt: skip
DYING = """
import os, sys
how = sys.argv[1]
if how == "killed":
    os.kill(os.getpid(), 9)
elif how == "failed":
    sys.exit("optplan: the disk of this rank is gone")
"""


class Sabotage:
    """A launcher whose rank 1 is one that ends at once."""

    probed = None

    def __init__(self, launcher: Launcher, how: str) -> None:
        self._launcher, self._how = launcher, how

    def start(self, module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Process:
        if environment["RANK"] == "1":
            return self._launcher.start("dying_rank", [self._how], environment)
        return self._launcher.start(module, arguments, environment)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(TINY))
    (path.parent / "dying_rank.py").write_text(DYING)
    return str(path)


@pytest.fixture(scope="module")
def launcher(config: str) -> Iterator[Launcher]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(config).parent), prepend=os.pathsep)
        with launching(_preloaded([pair(config)])) as made:
            assert isinstance(made, ForkLauncher)
            yield made


def pair(config: str) -> ValidationCase:
    return ValidationCase(config, "adamw", (), {"batch_size": 1, "seq_len": 8, "sharding": "ddp"}, 2)


def run_pair(config: str, folder: Path, launcher: Launcher) -> RunOutcome:
    return run_cases([pair(config)], folder, launcher=launcher, device="cpu", limits=Limits(3, 600))


def test_the_ranks_meet_where_validate_listens_already(config: str, tmp_path: Path, launcher: Launcher) -> None:
    outcome = run_pair(config, tmp_path, launcher)
    assert outcome.failed == {}
    record = load_record(tmp_path / f"{pair(config).name}.json.gz")
    assert isinstance(record, Measurement)
    assert [row.rank for row in record.ranks] == [0, 1]


@pytest.mark.parametrize(
    ("how", "words"),
    [("killed", "rank 1 of 2 was ended by signal 9"), ("failed", "optplan: the disk of this rank is gone")],
)
def test_a_rank_does_not_wait_for_one_that_is_gone(
    config: str, tmp_path: Path, launcher: Launcher, monkeypatch: pytest.MonkeyPatch, how: str, words: str
) -> None:
    monkeypatch.setattr(runner, "_PEER_SECONDS", 0.5)
    begin = time.monotonic()
    outcome = run_pair(config, tmp_path, Sabotage(launcher, how))
    # Rank 0 alone would wait a minute for the other.
    assert time.monotonic() - begin < 20
    assert outcome.failed == {pair(config).name: words}


def test_a_meeting_has_a_port_that_nobody_else_can_take() -> None:
    first, second = arrange_meeting(2), arrange_meeting(2)
    ports = [int(meeting.variables[1]["MASTER_PORT"]) for meeting in (first, second)]
    assert ports[0] != ports[1]
    for port in ports:
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
    assert [rank["RANK"] for rank in first.variables] == ["0", "1"]


class Told:
    """A process that has ended, and its last words."""

    def __init__(self, status: int, words: str) -> None:
        self.status, self._words = status, words

    def last_words(self) -> str:
        return self._words


def test_the_cause_is_told_before_what_followed_from_it() -> None:
    left = Told(2, "optplan: rank 0 of 2 failed: RuntimeError: Connection closed by peer")
    killed = Told(-11, "the process ended with status -11")
    assert last_words([left, killed]) == (  # type: ignore[list-item]
        "rank 1 of 2 was ended by signal 11; optplan: rank 0 of 2 failed: RuntimeError: Connection closed by peer"
    )
    assert last_words([killed]) == "the process ended with status -11"  # type: ignore[list-item]
