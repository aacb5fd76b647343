"""Files that commands write besides what they print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from optplan.app import app
from optplan.boundary import run

RECORD = str(Path(__file__).resolve().parents[2] / "docs" / "examples" / "h200_step.json.gz")
ESTIMATE = ["estimate", "--model", "gpt2", "--gpu", "h200", "--optimizer", "adamw"]


@pytest.mark.parametrize(
    ("args", "title"),
    [
        (ESTIMATE, "<title>gpt2 on h200-141g · optplan</title>"),
        (["show", RECORD], "<title>llama-3.2-1b with adamw · optplan</title>"),
        (["compare", RECORD, RECORD], "<title>llama-3.2-1b with adamw · optplan</title>"),
        (["report", RECORD], "<title>llama-3.2-1b with adamw · optplan</title>"),
        (
            ["recommend", "--model", "gpt2", "--gpu", "h200", "-o", "adamw"],
            "<title>gpt2 on h200-141g · optplan</title>",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_page_is_written_and_named(
    args: list[str], title: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "page.html"
    assert run(app, [*args, "--html", str(path)]) == 0
    assert capsys.readouterr().err == f"wrote {path}\n"
    assert title in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "args",
    [
        ESTIMATE, ["show", RECORD], ["compare", RECORD, RECORD],
        ["recommend", "--model", "gpt2", "--gpu", "h200", "-o", "adamw"],
    ],
    ids=lambda args: args[0],
)  # fmt: skip
def test_markdown_is_written_and_json_stays_alone(
    args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "page.md"
    assert run(app, [*args, "--md", str(path), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)
    assert err == f"wrote {path}\n"
    assert "| --- |" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("flag", ["--html", "--md"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "missing" / "page"
    assert run(app, [*ESTIMATE, flag, str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("optplan: cannot write ")
    assert err.endswith(": No such file or directory; nothing was saved\n")


def test_a_validation_becomes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "step.json.gz").write_bytes(Path(RECORD).read_bytes())
    page = tmp_path / "page.html"
    status = run(app, ["validate", "--records", str(tmp_path / "records"), "--check", "--html", str(page)])
    assert (status, capsys.readouterr().err) == (0, f"wrote {page}\n")
    assert "1 of 1 peaks are predicted within 1 %" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("records", [[RECORD], [RECORD, RECORD]])
def test_a_report_of_records_has_markdown_too(records: list[str], tmp_path: Path) -> None:
    html, md = tmp_path / "page.html", tmp_path / "page.md"
    assert run(app, ["report", *records, "--html", str(html), "--md", str(md)]) == 0
    assert "| optimizer state | 4.60 GiB | 4.60 GiB | equal |" in md.read_text(encoding="utf-8")
    assert html.exists()
