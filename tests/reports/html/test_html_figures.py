"""Figures from records: fronts, tiles, colours."""

from __future__ import annotations

import json
import re

import msgspec
import pytest

import optplan
from optplan.planner.estimate_details import StateRow
from optplan.planner.records import Estimate
from optplan.planner.timeline import Category
from optplan.reports.html import theme
from optplan.reports.html.estimate_page import estimate_page
from optplan.reports.html.figures.memory import memory_bar
from optplan.reports.html.figures.pareto import front, why_not
from optplan.reports.html.figures.state import state_treemap
from optplan.reports.labels import CATEGORY_NAMES
from optplan.reports.terminal.bars import LABELS

REPORT = optplan.estimate("gpt2", gpu="a100-40g", optimizer=["adamw", "lion", "sgd", "adafactor"])


def timed(optimizer: str, peak_bytes: int, seconds: float) -> Estimate:
    row = next(row for row in REPORT.estimates if row.optimizer == optimizer)
    return msgspec.structs.replace(row, peak_allocated_bytes=peak_bytes, step_seconds={"step": seconds})


ROWS = [timed("adamw", 50, 1.0), timed("lion", 40, 1.0), timed("sgd", 30, 2.0), timed("adafactor", 45, 3.0)]


def test_the_front_holds_what_nothing_beats() -> None:
    assert [row.optimizer for row in front(ROWS)] == ["lion", "sgd"]


def test_every_loser_has_a_reason() -> None:
    assert why_not(ROWS[0], ROWS) == "lion: no slower, with no more memory"
    assert why_not(ROWS[3], ROWS) == "lion, sgd: no slower, with no more memory"
    assert why_not(ROWS[1], ROWS) == ""


def test_memory_against_time_is_drawn_only_where_times_are_known() -> None:
    def without(report: object) -> str:
        return estimate_page(msgspec.structs.replace(report, estimates=[
            msgspec.structs.replace(row, step_seconds=None) for row in REPORT.estimates
        ]))  # fmt: skip

    assert "Peak memory against the time of a step" not in without(REPORT)
    assert "Peak memory against the time of a step" in estimate_page(msgspec.structs.replace(REPORT, estimates=ROWS))


def state(parameter: str, name: str, num_bytes: int, *, device: str = "device") -> StateRow:
    return StateRow(
        parameter=parameter, state=name, shape=(num_bytes,), dtype="uint8", device=device, count=1,
        bytes_each=num_bytes, bytes=num_bytes,
    )  # fmt: skip


def test_tiles_join_modules_that_hold_one_other() -> None:
    rows = [
        state("model.layers.*.mlp.up.weight", "exp_avg", 6),
        state("model.layers.*.mlp.down.weight", "exp_avg", 4),
        state("model.embed.weight", "exp_avg", 3),
        state("model.embed.weight", "step", 9, device="host"),
        state("", "scratch", 1),
    ]
    (tiles,) = state_treemap(rows).data
    found = {
        id_: (parent, size) for id_, parent, size in zip(tiles["ids"], tiles["parents"], tiles["values"], strict=True)
    }
    assert found == {
        "state": ("", 14),
        "state.model": ("state", 13),
        "state.model.layers.*.mlp": ("state.model", 10),
        "state.model.layers.*.mlp.up": ("state.model.layers.*.mlp", 6),
        "state.model.layers.*.mlp.up.exp_avg": ("state.model.layers.*.mlp.up", 6),
        "state.model.layers.*.mlp.down": ("state.model.layers.*.mlp", 4),
        "state.model.layers.*.mlp.down.exp_avg": ("state.model.layers.*.mlp.down", 4),
        "state.model.embed": ("state.model", 3),
        "state.model.embed.exp_avg": ("state.model.embed", 3),
        "state.kept once": ("state", 1),
        "state.kept once.scratch": ("state.kept once", 1),
    }


def test_the_bar_ends_at_what_is_reserved() -> None:
    categories: dict[Category, int] = {"parameters": 3 * 2**30, "activations": 2**30}
    figure = memory_bar(categories, reserved_bytes=5 * 2**30, gpu=REPORT.gpu)
    assert [(trace["name"], trace["customdata"][0]) for trace in figure.data] == [
        ("parameters", 3 * 2**30), ("activations", 2**30), ("reserved beyond the peak", 2**30),
    ]  # fmt: skip


def test_reports_share_words_and_order() -> None:
    assert {name: label for name, (label, _) in LABELS.items()} == CATEGORY_NAMES
    assert list(LABELS) == list(CATEGORY_NAMES) == list(theme.CATEGORIES)


def luminance(colour: str) -> float:
    parts = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("text", ["ink", "muted", "accent", "good", "bad", "limit"])
@pytest.mark.parametrize("ground", ["page", "card"])
def test_text_has_the_contrast_that_wcag_asks_of_aa(text: str, ground: str, dark: bool) -> None:
    # WCAG 2.2, success criterion 1.4.3: 4.5 to 1.
    light, low = sorted(
        (luminance(theme.INTERFACE[text][dark]), luminance(theme.INTERFACE[ground][dark])), reverse=True
    )
    assert (light + 0.05) / (low + 0.05) >= 4.5


def test_figures_name_only_colours_of_the_theme() -> None:
    page = estimate_page(REPORT)
    found = re.search(r'id="optplan-figures">(.*?)</script>', page, flags=re.DOTALL)
    assert found is not None
    used = set(re.findall(r"var\((--[\w-]+)\)", json.dumps(json.loads(found.group(1)))))
    declared = set(re.findall(r"(--[\w-]+):", theme.variables(dark=True)))
    assert used
    assert used <= declared
    assert set(re.findall(r"(--[\w-]+):", theme.variables(dark=False))) == declared
