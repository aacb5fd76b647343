import json

import msgspec
import pytest

from optplan.planner.errors import DataError
from optplan.planner.published import (
    PublishedReport,
    PublishedRow,
    Reading,
    check,
    published_report,
    published_rows,
)

ROWS = published_rows()


def row_called(name: str) -> PublishedRow:
    return next(row for row in ROWS if row.id == name)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_figure_holds_or_says_why_it_cannot_be_judged(row):
    done = check(row)
    if row.evidence in ("derived", "recalled"):
        assert done.status == "unverified"
    elif row.not_reproducible:
        assert done.status == "not reproducible"
    else:
        assert done.passes, f"ours is {done.ours} {row.unit}, printed {row.value}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_row_says_where_the_figure_stands_and_what_makes_it_true(row):
    assert row.paper.startswith("arXiv:2")
    assert row.where and row.claim and row.how and row.tolerance_reason
    assert (row.bytes_per_parameter is None) == (row.formula == "")
    assert f"{row.value:g}" in row.claim or f"{row.value:.2f}" in row.claim
    assert 0 <= row.tolerance <= 0.05 * row.value


def test_the_figures_that_were_promised_are_there():
    printed = {(row.paper, row.value, row.unit) for row in ROWS}
    micro_adam = [(value, "GiB") for value in (50.21, 25.10, 12.55, 5.65)] + [(44.59, "MiB"), (10.03, "MiB")]
    adam_mini = (12.48, 6.24, 8.80, 4.40, 53.92, 26.96, 64.24, 32.12, 104.16, 52.08, 86.0)
    adapprox = (34.5, 49.9, 33.8, 84.5, 99.9, 83.8)
    assert {("arXiv:2405.15593", *figure) for figure in micro_adam} <= printed
    assert {("arXiv:2406.16793", value, "GB") for value in adam_mini} <= printed
    assert {("arXiv:2403.14958", value, "%") for value in adapprox} <= printed
    assert ("arXiv:2406.16793", 50.0, "GPUs") in printed


@pytest.mark.parametrize(
    ("name", "layout", "formula"),
    [  # worked out by hand, or with the real packages, in the row's unit
        ("micro-adam-llama-2-7b-adamw-fp32", 50.2051, 8 * 6_738_415_616 / 2**30),
        ("micro-adam-llama-2-7b-micro-adam", 5.6527, 0.9 * 6_738_415_616 / 2**30),
        ("adam-mini-llama-2-7b-adam-mini", 26.958317828, 26.96),
        ("adam-mini-llama-2-7b-adamw", (8 * 6_738_415_616 + 4 * 291) / 1e9, 53.92),
        ("micro-adam-resnet-18-sgd", 4 * 11_689_512 / 2**20, 4 * 11_689_512 / 2**20),
        ("adam-mini-7b-adamw-with-gradients", (8 * 6_738_415_616 + 4 * 291) / 1e9, 84.0),
        ("adam-mini-palm-540b-gpus", 54.04, 8 * 540_356_474_880 / 80e9),
        ("adapprox-gpt-2-117m-least", 34.50, None),
        ("adapprox-gpt-2-345m-no-momentum-most", 99.89, None),
    ],
)
def test_layout_and_formula_are_both_shown(name, layout, formula):
    done = check(row_called(name))
    assert done.layout == pytest.approx(layout, rel=1e-4)
    assert done.formula == (None if formula is None else pytest.approx(formula, rel=1e-9))
    assert done.difference == done.ours - done.row.value


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("micro-adam-llama-2-7b-adamw-fp32", {"value": 53.92}),  # the same bytes in the other paper's unit
        ("micro-adam-llama-2-7b-adamw-fp32", {"unit": "GB"}),
        ("micro-adam-llama-2-7b-adamw-bf16", {"dtype": "float32"}),
        ("micro-adam-llama-2-7b-adamw-8bit", {"compare": "layout"}),  # the scales do not fit into the rounding
        ("adam-mini-llama-2-13b-adamw", {"model": "llama-2-7b"}),
        ("adam-mini-llama-2-7b-adam-mini", {"optimizer": "adamw", "options": {}}),
        ("adapprox-gpt-2-117m-least", {"options": {"rank": "min"}}),
        ("adam-mini-7b-adamw-with-gradients", {"not_reproducible": ""}),
        ("adam-mini-palm-540b-gpus", {"gpu_bytes": 100_000_000_000}),
    ],
)
def test_a_wrong_row_fails(name, change):
    assert check(msgspec.structs.replace(row_called(name), **change)).status == "fails"


@pytest.mark.parametrize(
    "change",
    [
        {"value": 84.0},
        {"value": 112.0},
        {"readings": (Reading(label="as much as it takes", bytes_per_parameter=86.0 / 7, num_parameters=7 * 10**9),)},
    ],
)
def test_a_row_given_up_too_early_fails(change):
    row = row_called("adam-mini-7b-adamw-with-gradients")
    assert check(msgspec.structs.replace(row, **change)).status == "fails"


def test_a_remembered_figure_proves_nothing_even_if_it_fits():
    row = msgspec.structs.replace(row_called("micro-adam-llama-2-7b-adamw-fp32"), evidence="recalled")
    done = check(row)
    assert abs(done.difference) <= row.tolerance
    assert done.status == "unverified"
    assert not done.passes


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        (
            "micro-adam-llama-2-7b-adamw-8bit",
            {"bytes_per_parameter": None},
            "published.toml is damaged: row micro-adam-llama-2-7b-adamw-8bit lacks bytes_per_parameter",
        ),
        (
            "adam-mini-palm-540b-gpus",
            {"gpu_bytes": None},
            "published.toml is damaged: row adam-mini-palm-540b-gpus lacks gpu_bytes",
        ),
        (
            "adapprox-gpt-2-117m-most",
            {"readings": (Reading(label="nothing"),)},
            (
                "published.toml is damaged: "
                "row adapprox-gpt-2-117m-most lacks bytes_per_parameter or optimizer for a reading"
            ),
        ),
    ],
)
def test_a_row_without_its_terms_is_refused(name, change, sentence):
    with pytest.raises(DataError) as caught:
        check(msgspec.structs.replace(row_called(name), **change))
    assert str(caught.value) == sentence


def test_readings_show_other_terms():
    readings = {r.label: r.value for r in check(row_called("adam-mini-7b-adamw-with-gradients")).readings}
    assert readings["mixed precision with a master copy, 16 x 7e9"] == 112.0
    assert readings["moments and fp32 gradients of Llama-2-7B's exact count, 12 d"] == pytest.approx(80.861, abs=1e-3)
    authors = check(row_called("micro-adam-llama-2-7b-micro-adam")).readings[0]
    assert authors.value == pytest.approx(6.045, abs=1e-3)


def test_report_counts_every_row_and_survives_json():
    report = published_report()
    assert sum(report.counts.values()) == len(report.checks) == len(ROWS)
    assert report.counts["fails"] == 0
    assert report.counts["not reproducible"] == 1
    text = msgspec.json.encode(report)
    assert json.loads(text)["schema"] == "optplan.published/1"
    assert msgspec.json.decode(text, type=PublishedReport) == report
