"""The largest micro-batch that runs, found by bisection over a quick answer and a sure one."""

from __future__ import annotations

from collections.abc import Callable

_LARGEST_BATCH = 2**20


def largest_batch(
    *, fits_by_sums: Callable[[int], bool], fits: Callable[[int], bool], guess: Callable[[int], int] | None = None
) -> int:
    """Sequences of the largest micro-batch, 0 if not even one fits.

    Args:
        fits_by_sums: Whether a micro-batch has room by sums of bytes, which is quick to say.
        fits: Whether one runs; it has the last word, from what has room by sums downwards.
        guess: A smaller one that probably runs, given one that does not.
    """
    low, high = 0, 1
    while high <= _LARGEST_BATCH and fits_by_sums(high):
        low, high = high, high * 2
    most = _bisected(low, high, fits_by_sums)
    if most == 0 or fits(most):
        return most
    low = min(max(guess(most), 0), most - 1) if guess else 0
    return _bisected(low, most, fits) if low == 0 or fits(low) else _bisected(0, low, fits)


def _bisected(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number below `high` that fits while the next does not; `low` is known to fit, `high` not to."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
