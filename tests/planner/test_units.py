from __future__ import annotations

import pytest

from optplan.planner.errors import ConfigError
from optplan.planner.units import format_bytes, format_gib, parse_size, round_up


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("38GiB", 40_802_189_312),
        ("40GB", 40_000_000_000),
        ("40 gb", 40_000_000_000),
        ("1.5GiB", 1_610_612_736),
        ("512B", 512),
        ("1 MiB", 1_048_576),
        ("2TiB", 2_199_023_255_552),
        ("16kb", 16_000),
    ],
)
def test_sizes_mean_what_their_unit_says(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize(
    "text", ["", "38", "GiB", "-1GiB", "1e3GiB", "38 apples", "nanGiB", "infGB", "38GiB\n38GiB", "٣GiB"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_size(text)
    assert str(caught.value) == (
        f"size {text!a} is not a number with a unit; write it like 38GiB (2^30) or 40GB (10^9)"
    )


@pytest.mark.parametrize("text", ["0GiB", "0.1B", "999999999TiB"])
def test_sizes_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_size(text)
    assert str(caught.value) == f"size '{text}' is out of range; allowed: above 0 and at most 1024 PiB"


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (3_145_728, "3.00 MiB"), (5_368_709_120, "5.00 GiB"),
     (4_398_046_511_104, "4,096.00 GiB"), (-2_147_483_648, "-2.00 GiB")],
)  # fmt: skip
def test_bytes_for_people(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


def test_gib_is_two_to_the_thirty() -> None:
    assert format_gib(13_476_831_232) == "12.55 GiB"


@pytest.mark.parametrize(
    ("value", "multiple", "rounded"), [(0, 512, 0), (1, 512, 512), (512, 512, 512), (513, 512, 1024)]
)
def test_rounding_up(value: int, multiple: int, rounded: int) -> None:
    assert round_up(value, multiple) == rounded
