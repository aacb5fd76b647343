"""Markdown of records: tables that render, names that stay names."""

from __future__ import annotations

from pathlib import Path

import msgspec

import optplan
from optplan.planner.measured.record_files import load_record
from optplan.planner.measured.validation import validate_records
from optplan.planner.search.recommend import recommend
from optplan.reports.markdown.documents import record_markdown
from optplan.reports.markdown.recommend import recommend_markdown
from optplan.reports.markdown.tables import code, escaped, table
from optplan.reports.markdown.validation import validation_markdown

ROOT = Path(__file__).resolve().parents[3]


def test_text_is_escaped() -> None:
    assert escaped("a|b <img> *x* [l](u) `c` @me\x1b") == r"a\|b \<img\> \*x\* \[l\](u) \`c\` \@me?"


def test_a_table_has_a_line_for_its_head() -> None:
    assert table(["a", "b"], [["1", "2"]]) == ["| a | b |", "| --- | ---: |", "| 1 | 2 |"]


def test_code_is_fenced_by_more_backquotes_than_it_holds() -> None:
    assert code("x ```` y") == ["`````console", "x ```` y", "`````"]


def test_an_estimate_begins_with_its_verdict_and_holds_its_rows() -> None:
    report = optplan.estimate("llama-7b", gpu="a100-40g", optimizer=["adamw", "micro-adam"])
    lines = record_markdown(report).splitlines()
    assert lines[0] == "### llama-1-7b fits on a100-40g with 1 of 2 optimizers"
    assert "**Recommended: micro-adam**" in lines
    reserved = f"{report.estimates[0].peak_reserved_bytes / 2**30:.2f}"
    assert f"| adamw | 25.10 | 50.21 | 50.24 | backward | {reserved} | -11.51 | no |" in lines
    assert all(line.count(" | ") == 7 for line in lines if line.startswith("| adamw"))


def test_a_hostile_model_is_text() -> None:
    report = optplan.estimate("gpt2", gpu="a100-40g", optimizer="adamw")
    named = msgspec.structs.replace(report.model, name="</script><img src=x onerror=alert(1)>")
    first = record_markdown(msgspec.structs.replace(report, model=named)).splitlines()[0]
    assert first == r"### \</script\>\<img src=x onerror=alert(1)\> with adamw fits on a100-40g"


def test_a_measurement_stands_beside_its_estimate() -> None:
    text = record_markdown(load_record(ROOT / "docs" / "examples" / "h200_step.json.gz"))
    assert "|  | measured | predicted by rules | difference |" in text
    assert "| optimizer state | 4.60 GiB | 4.60 GiB | equal |" in text


def test_a_search_says_what_to_run_and_why_not_the_others() -> None:
    report = recommend("gpt2", gpu="a100-40g", optimizer=["adamw", "lion"])
    named = msgspec.structs.replace(report, model=msgspec.structs.replace(report.model, name="<img src=x>"))
    lines = recommend_markdown(named).splitlines()
    assert lines[0].startswith(r"### \<img src=x\> on a100-40g: adamw")
    assert "```console" in lines
    assert "| Configuration | Evidence | Peak GiB | Step s | Tokens/s |" in lines
    assert any(line.endswith("| recommended | picked by the rule |") for line in lines)


def test_a_search_in_vain_says_what_would_fit() -> None:
    text = recommend_markdown(recommend("llama-7b", gpu="rtx-4090-24g", optimizer="adamw"))
    assert text.startswith("### llama-1-7b does not fit on rtx-4090-24g with anything that was searched\n")
    assert "**What would make it fit, each change alone**" in text


def test_a_validation_has_its_verdict_spreads_and_records(tmp_path: Path) -> None:
    record = tmp_path / "a|b.json.gz"
    record.write_bytes((ROOT / "docs" / "examples" / "h200_step.json.gz").read_bytes())
    lines = validation_markdown(validate_records([record, tmp_path / "missing.json"])).splitlines()
    assert lines[0] == "### Optimizer state predicted to the byte in 1 of 1 records"
    assert any(line.startswith("| peak allocated | 1 | 0.000% | 0.000% | a\\|b |") for line in lines)
    assert any(line.startswith("| a\\|b | exact | -0.000% |") for line in lines)
    assert any(line.startswith("- missing.json: cannot read") for line in lines)
