"""The attention masks that a model makes before its first layer.

Source: transformers `masking_utils.py`.
"""

from __future__ import annotations

from optplan.planner.dtypes import Dtype
from optplan.planner.step import kernels
from optplan.planner.step.graph import Tensor
from optplan.planner.step.options import StepOptions
from optplan.planner.step.positions import position_ids
from optplan.planner.step.tape import Tape


def causal_mask(
    t: Tape,
    options: StepOptions,
    dtype: Dtype,
    *,
    window: int | None = None,
    finds_packed: bool = True,
    has_ones: bool = False,
) -> Tensor | None:
    """What `create_causal_mask` returns: None where the attention kernel knows by itself that attention is causal.

    Args:
        t: The tape.
        options: How the step is run.
        dtype: Dtype of the hidden states, in which eager attention adds the mask.
        window: Sliding window in tokens, if attention looks through one.
        finds_packed: Whether the model gives its positions, so that restarts in them are looked for.
        has_ones: Whether the model makes a padding mask that hides nothing where it is given none.
    """
    t.path = "mask"
    batch, seq = options.batch_size, options.seq_len
    padding = _padding(t, options, has_ones=has_ones)
    if padding is None and finds_packed:
        _find_packed_sequences(t, batch, seq)
    if options.attention == "flash":
        if padding is not None:
            t.new(1, "bool", "whether all are visible")
        return None
    fits = window is None or seq < window
    if options.attention == "sdpa" and fits:
        if padding is not None:
            _look_for_padding(t, batch * seq, times=2 if options.padding_mask else 1)
        if not options.padding_mask:
            return None
    mask = _boolean_mask(t, batch, seq, padding, is_windowed=window is not None)
    return mask if options.attention == "sdpa" else _as_numbers(t, mask, batch * seq * seq, dtype)


def bidirectional_mask(t: Tape, options: StepOptions, dtype: Dtype, *, queries: int | None = None) -> Tensor | None:
    """What `create_bidirectional_mask` returns: nothing to hide unless there is padding.

    Args:
        t: The tape.
        options: How the step is run.
        dtype: Dtype of the hidden states, in which eager attention adds the mask.
        queries: Tokens that attend, those attended to if None.
    """
    t.path = "mask"
    padding = _padding(t, options)
    if options.attention == "flash" or padding is None:
        return None
    batch, seq = options.batch_size, options.seq_len
    t.new(1, "bool", "whether all are visible")
    mask = _everywhere(t, batch, seq, queries or seq, padding)
    return mask if options.attention == "sdpa" else _as_numbers(t, mask, batch * seq * (queries or seq), dtype)


def _padding(t: Tape, options: StepOptions, *, has_ones: bool = False) -> Tensor | None:
    if not options.padding_mask and not has_ones:
        return None
    return t.new(options.batch_size * options.seq_len, "bool", "padding mask as booleans")


def _look_for_padding(t: Tape, num_tokens: int, *, times: int) -> None:
    """The checks whether a padding mask hides anything; causal attention looks at its beginning too if it does."""
    for _ in range(times):
        total = t.new(1, "int64", "visible tokens")
        t.new(num_tokens, "int64", "padding mask as numbers")
        t.new(1, "bool", "whether all are visible")
        del total


def _as_numbers(t: Tape, mask: Tensor, numel: int, dtype: Dtype) -> Tensor:
    zero, lowest = t.new(1, dtype, "mask constant"), t.new(1, dtype, "mask constant")
    added = t.new(numel, dtype, "mask as numbers")
    del lowest, zero, mask
    return added


def _find_packed_sequences(t: Tape, batch: int, seq: int) -> None:
    """The search for restarts in the positions that precedes every mask."""
    num_tokens = batch * seq
    before = t.new(batch, "int64", "first position")
    extended = t.new(num_tokens + batch, "int64", "extended positions")
    steps = t.new(num_tokens, "int64", "steps of the positions")
    del extended
    restarts = t.new(num_tokens, "bool", "restarts")
    indices = t.new(num_tokens, "int64", "sequence numbers")
    counted = t.new(num_tokens, "int64", "restarts as numbers")
    if batch == 1:
        t.scratch(kernels.SCAN_SCRATCH, operation="scan")
    del counted, restarts
    last_is_zero = t.new(batch, "bool", "single sequences")
    single = t.new(1, "bool", "whether all are single")
    del last_is_zero, single, before, steps, indices


def _boolean_mask(t: Tape, batch: int, seq: int, padding: Tensor | None, *, is_windowed: bool) -> Tensor:
    """Booleans `[seq, seq]`, with a padding mask `[batch, 1, seq, seq]`."""
    sequences, heads = t.new(batch, "int64", "sequence numbers"), t.new(1, "int64", "head numbers")
    queries, keys = position_ids(t, seq), position_ids(t, seq)
    t.path = "mask"
    if padding is None:
        mask = _causal(t, seq, is_windowed=is_windowed)
    else:
        true = t.new(1, "bool", "true")
        causal = _causal(t, seq, is_windowed=is_windowed)
        mask = t.new(seq * seq, "bool", "mask so far")
        del causal, true
        mask = _visible(t, mask, batch, seq, batch * seq * seq)
    del sequences, heads, queries, keys
    return mask


def _everywhere(t: Tape, batch: int, seq: int, queries: int, padding: Tensor) -> Tensor:
    """Booleans `[batch, 1, queries, seq]`: what the padding mask leaves."""
    sequences, heads = t.new(batch, "int64", "sequence numbers"), t.new(1, "int64", "head numbers")
    asking, keys = position_ids(t, queries), position_ids(t, seq)
    t.path = "mask"
    true = t.new(1, "bool", "true")
    at_query = t.new(queries, "bool", "true at each query")
    mask = t.new(queries, "bool", "mask so far")
    del at_query, true
    mask = _visible(t, mask, batch, seq, batch * queries * seq)
    del sequences, heads, asking, keys, padding
    return mask


def _visible(t: Tape, mask: Tensor, batch: int, seq: int, numel: int) -> Tensor:
    """What is left of a mask where a padding mask is looked up for every sequence and key."""
    indices = [t.new(batch * seq, "int64", "indices into the padding mask") for _ in range(2)]
    visible = t.new(batch * seq, "bool", "visible keys")
    indices.clear()
    left = t.new(numel, "bool", "mask")
    del mask, visible
    return left


def _causal(t: Tape, seq: int, *, is_windowed: bool) -> Tensor:
    inside = _window(t, seq) if is_windowed else None
    mask = t.new(seq * seq, "bool", "keys not after the query")
    if inside is None:
        return mask
    both = t.new(seq * seq, "bool", "mask")
    del mask, inside
    return both


def _window(t: Tape, seq: int) -> Tensor:
    one = t.new(1, "bool", "true")
    starts = t.new(seq, "int64", "window starts")
    inside = t.new(seq * seq, "bool", "keys inside the window")
    del starts
    mask = t.new(seq * seq, "bool", "mask so far")
    del inside, one
    return mask
