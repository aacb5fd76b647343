"""The largest micro-batch that runs, found by bisection over a quick answer and a sure one."""

from __future__ import annotations

from collections.abc import Callable

_LARGEST_BATCH = 2**20


def largest_batch(*, fits_by_sums: Callable[[int], bool], fits: Callable[[int], bool]) -> int:
    """Sequences of the largest micro-batch, 0 if not even one fits.

    Args:
        fits_by_sums: Whether a micro-batch has room by sums of bytes, which is quick to say.
        fits: Whether one runs; it has the last word, from what has room by sums downwards.
    """
    low, high = 0, 1
    while high <= _LARGEST_BATCH and fits_by_sums(high):
        low, high = high, high * 2
    return _most(_bisected(low, high, fits_by_sums), fits)


def _most(most: int, fits: Callable[[int], bool]) -> int:
    """Largest number up to `most` that fits while the next does not; 0 if none does."""
    if most == 0 or fits(most):
        return most
    return _bisected(0, most, fits)


def _bisected(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number below `high` that fits while the next does not; `low` is known to fit, `high` not to."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
