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


@pytest.mark.parametrize(
    ("guess", "asked"),
    [
        (36, [100, 36, 68, 52, 44, 40, 38, 37]),  # it runs: the answer lies above
        (40, [100, 40, 20, 30, 35, 37, 38]),  # it does not: below
        (-5, [100, 50, 25, 37, 43, 40, 38]),  # no guess at all
        (900, [100, 99, 49, 24, 36, 42, 39, 37, 38]),  # as large as one that does not run
    ],
)
def test_a_guess_shortens_the_search_and_changes_no_answer(guess: int, asked: list[int]) -> None:
    found: list[int] = []

    def fits(size: int) -> bool:
        found.append(size)
        return size <= 37

    assert largest_batch(fits_by_sums=lambda size: size <= 100, fits=fits, guess=lambda most: guess) == 37
    assert found == asked
