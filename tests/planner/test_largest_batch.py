"""The largest micro-batch: quick sums narrow it down, the sure answer has the last word."""

import pytest

from optplan.planner.largest_batch import largest_batch


@pytest.mark.parametrize(
    ("by_sums", "sure", "expected"),
    [(0, 0, 0), (1, 1, 1), (1, 0, 0), (100, 100, 100), (100, 37, 37), (10**7, 10**7, 2**21 - 1)],
)
def test_the_largest_that_fits(by_sums: int, sure: int, expected: int) -> None:
    assert largest_batch(fits_by_sums=lambda size: size <= by_sums, fits=lambda size: size <= sure) == expected


def test_what_has_no_room_by_sums_is_not_asked_for_surely() -> None:
    asked: list[int] = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= 5

    assert largest_batch(fits_by_sums=lambda size: size <= 8, fits=fits) == 5
    assert asked == [8, 4, 6, 5]
