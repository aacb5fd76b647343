"""How much room a step leaves or lacks, in the words that follow a verdict in every renderer."""

from __future__ import annotations

from optplan.planner.units import format_gib


def margin_in_words(*, fits: bool | None, headroom_bytes: int | None) -> str:
    """What follows "fits on GPU" or "does not fit on GPU"; empty where the peak is not known."""
    if headroom_bytes is None:
        return ""
    word = "to spare" if headroom_bytes >= 0 else "too much"
    return lost_in_words(fits=fits, headroom_bytes=headroom_bytes) or f", {format_gib(abs(headroom_bytes))} {word}"


def lost_in_words(*, fits: bool | None, headroom_bytes: int | None) -> str:
    """What follows "does not fit on GPU" where a step has room by bytes; empty for all others."""
    if fits is not False or headroom_bytes is None or headroom_bytes < 0:
        return ""
    return f": {format_gib(headroom_bytes)} to spare by bytes, lost to fragmentation"
