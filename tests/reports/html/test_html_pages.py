"""Whole pages as text: one file, nothing to fetch, sources and tables everywhere."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest
from plotly.graph_objects import Figure

import optplan
from optplan.planner.accuracy import AccuracyReport, AccuracyRow
from optplan.planner.errors import ConfigError
from optplan.planner.estimate_details import details_of
from optplan.planner.rivals import load_rivals
from optplan.planner.search.recommend import recommend
from optplan.reports.html.accuracy_page import accuracy_page
from optplan.reports.html.documents import files_page
from optplan.reports.html.estimate_page import estimate_page
from optplan.reports.html.parts import Drawing, Switches
from optplan.reports.html.recommendation_page import recommendation_page
from optplan.reports.html.sections.what_if import what_if
from optplan.reports.html.sections.why import why

ROOT = Path(__file__).resolve().parents[3]
RECORD = str(ROOT / "docs" / "examples" / "h200_step.json.gz")
REPORT = optplan.estimate("gpt2", gpu="a100-40g", optimizer=["adamw", "lion"])


def accuracy(error_bytes: int = 0) -> AccuracyReport:
    row = AccuracyRow(
        model="gpt2", precision="bf16", optimizer="adamw", implementation="fused", batch_size=4, seq_len=1024,
        grad_accum=1, checkpointing="none", attention="sdpa", measured_peak_bytes=10**9,
        predicted_peak_bytes=10**9 + error_bytes, measured_reserved_bytes=2 * 10**9,
        predicted_reserved_bytes=2 * 10**9, measured_phases={"forward": 10**9}, predicted_phases={"forward": 10**9},
        state_is_exact=True, record="cases.jsonl",
    )  # fmt: skip
    return AccuracyReport(version="0", place="one GPU", rows=[row], rivals=load_rivals())


PAGES = {
    "estimate": estimate_page(REPORT, details_of(REPORT)),
    "measurement": files_page([RECORD]),
    "comparison": files_page([RECORD, RECORD]),
    "training": files_page([str(ROOT / "benchmarks" / "records" / "h200_training.jsonl")]),
    "accuracy": accuracy_page(accuracy()),
    "search": recommendation_page(recommend("gpt2", gpu="a100-40g", optimizer=["adamw", "lion"])),
}


def headline(page: str) -> str:
    (found,) = re.findall(r"<h1>(.*?)</h1>", page)
    return re.sub(r"<[^>]*>", "", found)


class Elements(HTMLParser):
    """Every element of a page with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture(params=PAGES)
def page(request: pytest.FixtureRequest) -> str:
    return PAGES[request.param]


def test_a_page_is_one_file_of_less_than_six_megabytes(page: str) -> None:
    assert len(page.encode()) < 6_000_000
    for tag, attributes in Elements(page).found:
        assert tag not in ("img", "iframe", "object", "embed", "base")
        for name in ("src", "href", "action"):
            target = attributes.get(name) or ""
            assert target == "" or target.startswith(("#", "data:")), (tag, attributes)


def test_only_the_pages_own_scripts_may_run(page: str) -> None:
    policy = next(
        attributes["content"] or ""
        for tag, attributes in Elements(page).found
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    scripts = re.findall(r"<script>(.*?)</script>\n", page, flags=re.DOTALL)
    assert len(scripts) == 2
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert policy == (
        f"default-src 'none'; script-src 'sha256-{hashes[0]}' 'sha256-{hashes[1]}'; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def test_identifiers_are_unique(page: str) -> None:
    ids = [attributes["id"] for _, attributes in Elements(page).found if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_every_figure_has_a_table_and_a_source(page: str) -> None:
    elements = Elements(page).found
    plots = [attributes["id"] for tag, attributes in elements if "plot" in (attributes.get("class") or "").split()]
    figures = re.search(r'id="optplan-figures">(.*?)</script>', page, flags=re.DOTALL)
    assert figures is not None
    assert plots
    assert set(json.loads(figures.group(1))) == set(plots)
    tables = [attributes["id"] for tag, attributes in elements if tag == "table"]
    assert [attributes["data-csv-table"] for _, attributes in elements if "data-csv-table" in attributes] == tables
    assert [attributes["data-copy-table"] for _, attributes in elements if "data-copy-table" in attributes] == tables
    assert len(tables) >= len(plots)
    assert page.count('<p class="source') >= len(tables)


def test_plotly_knows_every_property(page: str) -> None:
    found = re.search(r'id="optplan-figures">(.*?)</script>', page, flags=re.DOTALL)
    assert found is not None
    for figure in json.loads(found.group(1)).values():
        # Its own classes refuse what they do not know.
        assert len(Figure(figure).data) == len(figure["data"]) > 0


def test_the_configuration_is_handed_to_training_programs() -> None:
    elements = Elements(PAGES["estimate"]).found
    saved = {attributes["data-file-name"] for _, attributes in elements if "data-file-name" in attributes}
    assert {"train.py", "training_args.yaml", "axolotl.yaml"} <= saved
    assert "accelerate launch --config_file" in PAGES["estimate"]
    assert "per_device_train_batch_size: 1" in PAGES["estimate"]


def test_a_program_that_cannot_run_it_says_why() -> None:
    (refusal,) = re.findall(r"<dt>torchtitan cannot run it</dt><dd>(.*?)</dd>", PAGES["estimate"])
    assert refusal.startswith("it has no flavour of gpt2; it has llama-3.1-8b")
    assert "--export" not in refusal


def test_other_estimators_stand_beside_the_measurements() -> None:
    page = PAGES["accuracy"]
    titles = re.findall(r"<h2[^>]*>([^<]*)</h2>", page)
    assert "And other estimators?" in titles
    for tool in ("MemTracker of torch", "accelerate estimate-memory", "DeepSpeed ZeRO-2 estimate", "llm-analysis"):
        assert page.count(tool) > 2


def test_sections_answer_in_their_order() -> None:
    titles = re.findall(r"<h2[^>]*>([^<]*)</h2>", PAGES["estimate"])
    assert titles == [
        "Does it fit?", "What should I run?", "Why?", "When is the peak?", "What does the optimizer keep?", "What if?",
        "How sure are we?",
    ]  # fmt: skip


def test_a_switch_s_answer_that_bytes_alone_gave_says_so() -> None:
    details = details_of(REPORT)
    assert details is not None
    assert details.what_if is not None
    cells = [msgspec.structs.replace(details.what_if.cells[0], fits=fits) for fits in (True, False, None)]
    (switches,) = what_if(REPORT, msgspec.structs.replace(details.what_if, cells=cells)).parts
    assert isinstance(switches, Switches)
    assert [values[-1] for values in switches.table.rows] == ["yes", "no", "by bytes"]
    assert switches.table.tones == ["", "bad", ""]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        # AdamW needs 50 GiB; Adam-mini's 37.7 of 38.7 GiB are lost to fragmentation.
        (
            {"model": "llama-7b", "optimizer": ["adamw", "adam-mini", "micro-adam"]},
            "1 of 3 fit; 1 more stays below the usable memory, but fragmentation leaves no room.",
        ),
        ({"model": "gpt2", "optimizer": ["adamw", "lion"]}, "2 of 2 fit."),
    ],
)
def test_what_is_below_the_line_and_does_not_fit_is_told_apart(options: dict[str, Any], said: str) -> None:
    report = optplan.estimate(**options, gpu="a100-40g")
    (drawing,) = [part for part in why(report).parts if isinstance(part, Drawing) and part.id == "optimizers"]
    assert drawing.summary.partition("; ")[2] == said


def test_an_estimate_without_rows_still_has_a_page() -> None:
    report = optplan.estimate("gpt2", memory="1MiB", optimizer="adamw")
    assert headline(estimate_page(report, details_of(report))) == "gpt2 does not fit on 1 MiB"


def test_errors_are_told_with_their_sign() -> None:
    page = accuracy_page(accuracy(-20_000_000))
    assert headline(page) == "0 of 1 peaks are predicted within 1 %"
    assert "−2.00 %" in page


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["missing.json"], "cannot read 'missing.json': No such file or directory"),
        (["runs.jsonl", "other.json"], "'runs.jsonl' holds training runs, which are not compared with other records"),
        (["missing.jsonl"], "cannot read 'missing.jsonl': No such file or directory"),
    ],
)
def test_files_that_make_no_page(names: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        files_page(names)
    assert str(caught.value) == sentence


def test_lines_that_are_no_runs_make_no_page(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text("")
    with pytest.raises(ConfigError, match=r"holds no finished run with its best learning rate$"):
        files_page([str(path)])
    path.write_text('{"schema": "optplan.other/1"}\n')
    with pytest.raises(ConfigError, match=r"is no file of training runs: "):
        files_page([str(path)])
