"""Values as text of cells and of figures."""

from __future__ import annotations

import pytest

from optplan.reports.html.parts import Kind, Value
from optplan.reports.html.text import exact, plain, sentence, shown


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (None, "bytes", "–"),
        (33_654_000_000, "bytes", "31.34"),
        (-(2**30), "bytes", "-1.00"),
        (0, "signed_bytes", "equal"),
        (1536, "signed_bytes", "+1.50 KiB"),
        (-1536, "signed_bytes", "−1.50 KiB"),
        (1234567, "int", "1,234,567"),
        (0.985, "percent", "98 %"),
        (0, "signed_percent", "0 %"),
        (-0.00013, "signed_percent", "−0.013 %"),
        (1e-9, "signed_percent", "below 0.001 %"),
        (0, "error", "0 %"),
        (1e-9, "error", "below 0.001 %"),
        (0.00042, "error", "0.042 %"),
        (-0.0203, "error", "2.03 %"),
        (1.166, "error", "116.6 %"),
        (0.0245, "duration", "24.5 ms"),
        (25.687, "duration", "25.69 s"),
        (90, "duration", "1.5 min"),
        (1.25, "decimal", "1.250"),
        (0.0245, "milliseconds", "24.50"),
        (1.18206, "number", "1.182"),
        ("a\x1b[2Jb\u202e", "text", "a?[2Jb?"),
    ],
)
def test_shown(value: Value, kind: Kind, text: str) -> None:
    assert shown(value, kind) == text


def test_exact_bytes_are_kept() -> None:
    assert exact(33_654_000_001, "bytes") == "33,654,000,001 bytes"
    assert exact(-5, "signed_bytes") == "-5 bytes"
    assert exact(7, "int") == ""
    assert exact(None, "bytes") == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fits: peak 1 GiB", "Fits: peak 1 GiB."),
        ("adam-mini fits", "adam-mini fits."),
        ("Nothing fits.", "Nothing fits."),
        ("", ""),
    ],
)
def test_a_sentence_begins_and_ends_as_one(text: str, expected: str) -> None:
    assert sentence(text) == expected


def test_plotly_takes_names_for_text() -> None:
    assert plain("</script><b>&amp;") == "&lt;/script&gt;&lt;b&gt;&amp;amp;"
