from __future__ import annotations

import pytest

from optplan.planner.errors import shorten, unknown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("gpt2", "'gpt2'"),
        ("a\nb", "'a\\nb'"),
        ("é", "'\\xe9'"),
        (float("nan"), "nan"),
        ([1], "[1]"),
        ("it's", '"it\'s"'),
    ],
)
def test_values_are_shown_on_one_line(value: object, shown: str) -> None:
    assert shorten(value) == shown


def test_long_values_are_cut() -> None:
    shown = shorten("x" * 1_000_000)
    assert len(shown) == 60
    assert shown.endswith("...'")


def test_unknown_names_the_nearest() -> None:
    assert str(unknown("colour", "gren", ["red", "green", "blue"])) == "unknown colour 'gren'; nearest: green, red"


def test_unknown_lists_a_short_table() -> None:
    assert str(unknown("colour", "zzz", ["red", "green"], more="see the list")) == (
        "unknown colour 'zzz'; known: red, green; see the list"
    )


def test_unknown_summarises_a_long_table() -> None:
    names = [f"name{number:02}" for number in range(20)]
    assert str(unknown("thing", "?", names)) == ("unknown thing '?'; known: name00, name01, name02, name03 and 16 more")
