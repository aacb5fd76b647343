"""The pages in a real browser: nothing is fetched, every figure holds the record's numbers, all can be reached."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe

import optplan
from optplan.planner.accuracy import AccuracyReport, AccuracyRow
from optplan.planner.estimate_details import EstimateDetails, details_of
from optplan.planner.measured.measurement import Measurement
from optplan.planner.measured.record_files import load_record
from optplan.planner.records import EstimateReport
from optplan.planner.rivals import load_rivals
from optplan.planner.search.recommend import recommend
from optplan.reports.html.accuracy_page import accuracy_page
from optplan.reports.html.comparison_page import measurement_page
from optplan.reports.html.documents import load_runs
from optplan.reports.html.estimate_page import estimate_page
from optplan.reports.html.recommendation_page import recommendation_page
from optplan.reports.html.training_page import training_page

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "docs" / "examples" / "h200_step.json.gz"
GIB = 2**30

Visit = Any
"""An opened page: `page`, `complaints`, `requests`, `draw_all`."""
Open = Callable[..., Visit]


@pytest.fixture(scope="module")
def report() -> EstimateReport:
    return optplan.estimate("gpt2", gpu="rtx-4090-24g", batch_size=8)


@pytest.fixture(scope="module")
def details(report: EstimateReport) -> EstimateDetails:
    found = details_of(report)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def pages(
    tmp_path_factory: pytest.TempPathFactory, report: EstimateReport, details: EstimateDetails
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    runs = ROOT / "benchmarks" / "records" / "h200_training.jsonl"
    texts = {
        "estimate": estimate_page(report, details),
        "measurement": measurement_page(load_measurement()),
        "training": training_page(load_runs(str(runs)), source="h200_training.jsonl"),
        "search": recommendation_page(recommend("gpt2", gpu="rtx-4090-24g", optimizer=["adamw", "lion"])),
        "accuracy": accuracy_page(AccuracyReport(version="0", place="a GPU", rows=[ROW], rivals=load_rivals())),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


def load_measurement() -> Measurement:
    record = load_record(RECORD)
    assert isinstance(record, Measurement)
    return record


def traces(visit: Visit, id_: str) -> list[dict[str, Any]]:
    read = "({name, meta, x, y, customdata, parents, values}) => ({name, meta, x, y, customdata, parents, values})"
    found: list[dict[str, Any]] = visit.page.evaluate(f"(id) => document.getElementById(id).data.map({read})", id_)
    return found


NAMES = ("estimate", "measurement", "training", "search", "accuracy")
ROW = AccuracyRow(
    model="gpt2", precision="bf16", optimizer="adamw", implementation="fused", batch_size=4, seq_len=1024,
    grad_accum=1, checkpointing="none", attention="sdpa", measured_peak_bytes=10**9, predicted_peak_bytes=10**9 + 512,
    measured_reserved_bytes=2 * 10**9, predicted_reserved_bytes=2 * 10**9, measured_phases={"forward": 10**9},
    predicted_phases={"forward": 10**9 + 512}, state_is_exact=True, record="cases.jsonl",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_fetched_and_nothing_complains(name: str, pages: dict[str, Path], drawn: dict[str, Visit]) -> None:
    seen = drawn[name]
    assert seen.complaints == []
    assert seen.requests == [pages[name].as_uri()]
    assert seen.page.evaluate("new Set([...document.querySelectorAll('[id]')].map((e) => e.id)).size") == (
        seen.page.evaluate("document.querySelectorAll('[id]').length")
    )


def serious(visit: Visit, **options: object) -> list[object]:
    """What axe finds serious, with the elements."""
    # A figure is one image to a screen reader; its colours have a test of their own.
    found = (
        Axe()
        .run(visit.page, context={"exclude": [[".plot"]]}, options={"resultTypes": ["violations"], **options})
        .response["violations"]
    )
    return [
        (rule["id"], node["target"], node.get("failureSummary"))
        for rule in found
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]


@pytest.mark.parametrize("name", NAMES)
def test_axe_finds_nothing_serious(name: str, drawn: dict[str, Visit]) -> None:
    seen = drawn[name]
    # One table opened stands for all: they come from one template, and axe looks at every cell.
    seen.page.evaluate("document.querySelector('details').open = true")
    assert serious(seen) == []
    seen.page.emulate_media(color_scheme="dark")
    assert serious(seen, runOnly=["color-contrast"]) == []
    seen.page.emulate_media(color_scheme="light")


def test_the_bars_hold_the_records_bytes(drawn: dict[str, Visit], report: EstimateReport) -> None:
    seen = drawn["estimate"]
    shown = {
        (trace["meta"], name): size
        for trace in traces(seen, "optimizers")
        for name, size in zip(trace["y"], trace["customdata"], strict=True)
        if size
    }
    expected = {
        (category, row.optimizer): size
        for row in report.estimates
        for category, size in (row.peak_categories or {}).items()
    }
    assert shown == expected
    for trace in traces(seen, "optimizers"):
        assert trace["x"] == pytest.approx([size / GIB for size in trace["customdata"]], abs=1e-6)


def test_the_timeline_holds_the_steps_events(drawn: dict[str, Visit], details: EstimateDetails) -> None:
    assert details.curve is not None
    seen = drawn["estimate"]
    outline = next(trace for trace in traces(seen, "timeline") if trace["name"] == "allocated")
    assert outline["x"] == [point.event for point in details.curve.points]
    assert [row[0] for row in outline["customdata"]] == [point.allocated_bytes for point in details.curve.points]
    peak = next(trace for trace in traces(seen, "timeline") if trace["name"] == "peak")
    assert peak["customdata"][0][0] == details.estimate.peak_allocated_bytes


def test_the_treemap_adds_up_to_the_state(drawn: dict[str, Visit], report: EstimateReport) -> None:
    (tiles,) = traces(drawn["estimate"], "state-map")
    root = tiles["parents"].index("")
    advice = report.recommendation
    assert advice is not None
    row = next(row for row in report.estimates if row.optimizer == advice.optimizer)
    assert tiles["values"][root] == row.bytes.optimizer_state
    children = [size for parent, size in zip(tiles["parents"], tiles["values"], strict=True) if parent == "state"]
    assert sum(children) == row.bytes.optimizer_state


def test_the_overlay_holds_both_timelines(drawn: dict[str, Visit]) -> None:
    record = load_measurement()
    measured, predicted = traces(drawn["measurement"], "timelines")
    assert max(row[0] for row in measured["customdata"]) == record.peak_allocated_bytes
    (row,) = optplan.estimate(
        record.model.name, gpu="h200-141g", optimizer="adamw", options={"implementation": "foreach"},
        batch_size=2, seq_len=1024,
    ).estimates  # fmt: skip
    assert max(row[0] for row in predicted["customdata"]) == row.peak_allocated_bytes


def test_the_switches_show_what_estimate_says(drawn: dict[str, Visit]) -> None:
    seen = drawn["estimate"]
    axes = {
        select.get_attribute("data-axis"): select.locator("option").all_text_contents()
        for select in seen.page.locator("#switches select").all()
    }
    choose = random.Random(8)
    for _ in range(6):
        chosen = {axis: choose.choice(values) for axis, values in axes.items()}
        for axis, value in chosen.items():
            seen.page.select_option(f"#switch-{axis}", label=value)
        (row,) = optplan.estimate(
            "gpt2", gpu=chosen["gpu"], optimizer=chosen["optimizer"], batch_size=int(chosen["batch_size"]),
            seq_len=int(chosen["seq_len"]), checkpointing=chosen["checkpointing"],
        ).estimates  # fmt: skip
        for field in ("peak_allocated_bytes", "peak_reserved_bytes", "headroom_bytes"):
            shown = seen.page.locator(f"#switches [data-field={field}]")
            assert shown.get_attribute("data-value") == str(getattr(row, field)), (chosen, field)
            assert shown.text_content() == f"{getattr(row, field) / GIB:.2f}"
        verb = "fits" if row.fits else "does not fit"
        assert seen.page.text_content("#what-if-verdict") == f"{chosen['optimizer']} {verb} on {chosen['gpu']}"


def test_the_command_of_a_switch_says_the_same(drawn: dict[str, Visit]) -> None:
    seen = drawn["estimate"]
    seen.page.select_option("#switch-checkpointing", label="full")
    command = seen.page.text_content("#what-if-command")
    assert command is not None
    assert command.startswith("optplan estimate --model gpt2 ")
    result = subprocess.run(
        [sys.executable, "-m", *command.split(), "--json"], capture_output=True, text=True, check=True
    )
    (row,) = json.loads(result.stdout)["estimates"]
    shown = seen.page.get_attribute("#switches [data-field=peak_allocated_bytes]", "data-value")
    assert shown == str(row["peak_allocated_bytes"])


def test_the_keyboard_reaches_everything_and_nothing_moves(pages: dict[str, Path], visit: Open) -> None:
    page = visit(pages["estimate"], reduced_motion="reduce").page
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the answer"
    count = page.evaluate(
        "window.controls = [...document.querySelectorAll('a, button, select, summary, [tabindex=\"0\"]')]"
        ".filter((e) => e.checkVisibility()); controls.length"
    )
    reached = set()
    for _ in range(count):
        index, outline = page.evaluate(
            "[controls.indexOf(document.activeElement), getComputedStyle(document.activeElement).outlineStyle]"
        )
        assert outline == "solid"
        reached.add(index)
        page.keyboard.press("Tab")
    assert reached == set(range(count))
    page.focus("#switch-checkpointing")
    page.keyboard.press("ArrowDown")
    assert page.input_value("#switch-checkpointing") == "full"
    page.focus("#optimizers ~ details summary")
    page.keyboard.press("Enter")
    assert page.is_visible("#optimizers-data")


def test_csv_holds_exact_bytes(drawn: dict[str, Visit], report: EstimateReport) -> None:
    page = drawn["estimate"].page
    page.evaluate("document.querySelector('#optimizers ~ details').open = true")
    with page.expect_download() as saved:
        page.click("[data-csv-table=optimizers-data]")
    assert saved.value.suggested_filename == "optimizers-data.csv"
    lines = Path(saved.value.path()).read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("Optimizer,Implementation,State (bytes),Resident (bytes),Peak allocated (bytes)")
    first = report.estimates[0]
    assert lines[1].split(",")[:3] == [first.optimizer, first.implementation, str(first.bytes.optimizer_state)]
    assert len(lines) == 1 + len(report.estimates)


def test_the_command_can_be_copied(drawn: dict[str, Visit], report: EstimateReport) -> None:
    page = drawn["estimate"].page
    page.bring_to_front()
    page.click("[data-copy-text=command]")
    assert report.recommendation is not None
    assert page.evaluate("navigator.clipboard.readText()") == report.recommendation.command


def test_figures_follow_the_colour_scheme(drawn: dict[str, Visit]) -> None:
    seen = drawn["estimate"]
    colour = "document.getElementById('optimizers').layout.font.color"
    assert seen.page.evaluate(colour) == "#1b1d22"
    seen.page.emulate_media(color_scheme="dark")
    seen.page.wait_for_timeout(300)
    assert seen.page.evaluate(colour) == "#eceae6"
    seen.page.emulate_media(color_scheme="light")


@pytest.mark.parametrize("name", NAMES)
def test_a_phone_never_scrolls_sideways(name: str, drawn: dict[str, Visit]) -> None:
    page = drawn[name].page
    page.set_viewport_size({"width": 360, "height": 740})
    for _ in range(50):
        # Figures take their new size a moment later.
        if page.evaluate("document.documentElement.scrollWidth") == 360:
            break
        page.wait_for_timeout(100)
    assert page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [360, 360]
    page.set_viewport_size({"width": 1280, "height": 900})


def test_print_shows_every_figure_and_no_controls(drawn: dict[str, Visit]) -> None:
    page = drawn["estimate"].page
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.getElementById('timeline').layout.font.color") == "#1b1d22"
    assert not page.is_visible("#switches")
    assert not page.is_visible("nav")
    assert page.is_visible("#optimizers")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.emulate_media(media="screen", color_scheme="light")
    page.evaluate("dispatchEvent(new Event('afterprint'))")


@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_there_within_a_second(
    name: str, pages: dict[str, Path], drawn: dict[str, Visit], visit: Open
) -> None:
    # Once more where the machine was busy with something else.
    assert drawn[name].first_paint_seconds() < 1 or visit(pages[name]).first_paint_seconds() < 1


def test_bars_of_a_comparison_stand_side_by_side(drawn: dict[str, Visit]) -> None:
    seen = drawn["measurement"]
    layout = "document.getElementById('by-peak')._fullLayout"
    assert seen.page.evaluate(f"[{layout}.xaxis.type, {layout}.yaxis.type]") == ["category", "linear"]
    boxes = seen.page.evaluate(
        "[...document.querySelectorAll('#by-peak .bars path')].map((bar) => bar.getBBox())"
        ".map(({width, height}) => [width, height])"
    )
    assert max(height for _, height in boxes) > 100
    assert max(width for width, _ in boxes) < 200


def test_a_file_for_a_training_program_is_copied_and_saved(drawn: dict[str, Visit]) -> None:
    page = drawn["estimate"].page
    page.bring_to_front()
    page.click(".exports summary:has-text('transformers')")
    text = page.text_content("#export-hf-args")
    assert text is not None
    assert "gradient_checkpointing" in text
    page.click("[data-copy-text=export-hf-args]")
    assert page.evaluate("navigator.clipboard.readText()") == text
    with page.expect_download() as saved:
        page.click("[data-save-text=export-hf-args]")
    assert saved.value.suggested_filename == "training_args.yaml"
    assert Path(saved.value.path()).read_text(encoding="utf-8") == text


def test_errors_of_other_estimators_are_those_of_the_data(drawn: dict[str, Visit]) -> None:
    rivals = load_rivals()
    shown = {
        (point[0], point[1]): (point[2], point[4])
        for trace in traces(drawn["accuracy"], "rival-errors")[:2] for point in trace["customdata"]
    }  # fmt: skip
    expected = {
        (tool.title, f"{case.model}: {case.setting}"): (
            answer.predicted_bytes, pytest.approx(answer.predicted_bytes / case.measured_peak_bytes - 1),
        )
        for tool in rivals.tools for answer in tool.answers if answer.predicted_bytes is not None
        for case in [rivals.cases[answer.case]]
    }  # fmt: skip
    assert shown == expected
