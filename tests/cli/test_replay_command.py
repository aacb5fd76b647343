"""`optplan replay` as people call it."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path

import msgspec
import pytest

from optplan.app import app
from optplan.boundary import run
from optplan.planner.history.report import HistoryReport

ROOT = Path(__file__).parents[2]
TRAINING = str(ROOT / "tests" / "records" / "h200_histories" / "training.json.gz")


def test_a_recorded_history_is_replayed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, ["replay", TRAINING]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "3,452 events, 1,141 allocations on 1 stream; recorded under torch's own settings" in out
    assert "The replay is the recording: all 1,141 addresses and all 35 moves of memory are equal." in out


def test_other_settings_stand_beside_the_recorded_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, ["replay", TRAINING, "--alloc-conf", "expandable_segments:True", "--memory", "2GiB"]) == 0
    out = capsys.readouterr().out
    (reserved,) = [line.split() for line in out.splitlines() if line.strip().startswith("peak reserved")]
    # 1 199 570 944 bytes were recorded with segments and 1 090 519 040 with an expandable range.
    assert reserved == ["peak", "reserved", "1.12", "GiB", "1.02", "GiB", "-104.00", "MiB"]
    assert "Everything is served within 2.00 GiB." in out


def test_running_out_of_memory_is_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, ["replay", TRAINING, "--memory", "600MiB"]) == 1
    out = capsys.readouterr().out
    assert "Out of memory at event " in out


def test_json_is_the_record_of_the_committed_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, ["replay", TRAINING, "--memory", "600MiB", "--json"]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    report = msgspec.json.decode(out, type=HistoryReport, strict=True)
    assert (report.schema, report.history.source) == ("optplan.replay/1", TRAINING)
    assert report.what_if is not None
    assert report.what_if.out_of_memory is not None
    assert report.what_if.memory_bytes == 600 * 2**20
    schema = json.loads((ROOT / "docs" / "schemas" / "replay.json").read_text())
    assert sorted(json.loads(out)) == sorted(schema["$defs"]["HistoryReport"]["properties"])


def test_a_snapshot_of_torch_s_own_making_will_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(gzip.decompress(Path(TRAINING).read_bytes()))
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(pickle.dumps(record["snapshot"]))
    assert run(app, ["replay", str(path)]) == 0
    assert "all 1,141 addresses" in capsys.readouterr().out


SENTENCES = [
    (["no-such-file"], "there is no file 'no-such-file'"),
    ([TRAINING, "--device", "1"], f"'{TRAINING}' holds no history of device 1; recorded: 0"),
    ([TRAINING, "--memory", "2"], "size '2' is not a number with a unit; write it like 38GiB (2^30) or 40GB (10^9)"),
    (
        [TRAINING, "--alloc-conf", "expandable_segments:yes"],
        "expandable_segments in --alloc-conf must be True or False, got 'yes'",
    ),
]


@pytest.mark.parametrize(("args", "sentence"), SENTENCES)
def test_bad_input_is_one_sentence(args: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, ["replay", *args]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"optplan: {sentence}\n")
