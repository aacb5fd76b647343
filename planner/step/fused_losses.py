"""Losses that never hold the logits of all tokens: the projection onto the vocabulary and the loss, chunk by chunk.

`liger` makes the gradients of input and weight in the forward. `chunked` computes the logits of each chunk twice, in
the forward for the loss and in the backward for the gradients, and adds the weight's gradients of the chunks up.

Source: Liger-Kernel `ops/fused_linear_cross_entropy.py` and `transformers/model/loss_utils.py` (0.8); our
`optplan.profilers.workloads.fused_losses`, which is the chunked loss that is run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from optplan.planner.dtypes import Dtype
from optplan.planner.step.graph import Tensor
from optplan.planner.step.operations import add, cast, multiply_constant
from optplan.planner.step.options import StepOptions
from optplan.planner.step.projections import split
from optplan.planner.step.tape import Tape
from optplan.planner.step.vocabulary import shifted_labels, token_cross_entropy

NUM_CHUNKS = 8
"""Chunks that the tokens of a micro-batch are cut into by `--fused-loss chunked`: torchtune's number."""


def chunk_sizes(num_tokens: int) -> list[int]:
    """Tokens of each chunk, as `torch.chunk` cuts them: all of one size but the last."""
    size = -(-num_tokens // NUM_CHUNKS)
    return [min(size, num_tokens - first) for first in range(0, num_tokens, size)]


def chunked_cross_entropy(
    t: Tape, hidden: Tensor, width: int, *, project: Callable[[Tensor], Tensor], options: StepOptions
) -> Tensor:
    """The loss of next-token prediction, each chunk's logits made under `torch.utils.checkpoint`.

    Args:
        t: The tape.
        hidden: What the output head would be given.
        width: Its elements a token.
        project: From a part of `hidden` to its logits as they go into the loss.
        options: How the step is run.
    """
    t.path, t.category = "loss", "logits_and_loss"
    num_tokens = options.batch_size * options.seq_len
    padded, labels = shifted_labels(t, options.batch_size, options.seq_len)
    del padded
    total: Tensor | None = None
    for part in split(t, hidden, [size * width for size in chunk_sizes(num_tokens)]):
        loss = t.checkpoint(partial(_sum_of_chunk, t, labels=labels, project=project), part)
        t.path, t.category = "loss", "logits_and_loss"
        total = loss if total is None else add(t, total, loss, "sum of the losses")
    assert total is not None
    count = _count_of(t, num_tokens)
    return multiply_constant(t, total, count, "loss")


def _sum_of_chunk(t: Tape, hidden: Tensor, *, labels: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
    """The losses of one chunk added up."""
    t.category = "activations"
    logits = cast(t, project(hidden), "float32")
    t.path, t.category = "loss", "logits_and_loss"
    return token_cross_entropy(t, logits, labels)


def _count_of(t: Tape, num_tokens: int) -> Tensor:
    """How many labels count."""
    counted = t.new(num_tokens, "bool", "labels that count")
    count = t.new(1, "int64", "number of labels")
    t.new(num_tokens, "int64", "labels as numbers")
    del counted
    return count


def liger_chunk(num_tokens: int, width: int, vocab: int) -> int:
    """Tokens of one chunk: so many that its logits are about as large as the input of all tokens."""
    times = -(-vocab // width)
    return min(1 << (-(-num_tokens // times) - 1).bit_length(), num_tokens)


def liger_cross_entropy(t: Tape, hidden: Tensor, width: int, vocab: int, *, name: str, options: StepOptions) -> Tensor:
    """Liger's loss of next-token prediction; the gradients of input and weight are made in the forward.

    Args:
        t: The tape.
        hidden: What the output head would be given.
        width: Its elements a token.
        vocab: Rows of the head's weight.
        name: The head's weight, which is the embedding's where they are tied.
        options: How the step is run.
    """
    t.path, t.category = "loss", "logits_and_loss"
    num_tokens = options.batch_size * options.seq_len
    padded, labels = shifted_labels(t, options.batch_size, options.seq_len)
    weight = t.parameter(name, width * vocab)
    held: list[Tensor] = []

    def backward(_: list[Tensor]) -> list[Tensor]:
        one, different = t.new(1, "float32", "one"), t.new(1, "bool", "comparison with one")
        t.new(1, "bool", "comparison with one")
        del one, different
        of_weight = held.pop()
        return [held.pop().view(), of_weight]

    node = t.node([hidden, weight], backward)
    of_input = t.new(num_tokens * width, hidden.dtype, "gradient of the input")
    of_weight = t.new(width * vocab, weight.dtype, "weight gradient", "gradients")
    losses, counted = t.new(num_tokens, "float32", "losses"), t.new(num_tokens, "bool", "labels that count")
    count = t.new(1, "int64", "number of labels")
    t.new(num_tokens, "int64", "labels as numbers")
    del count
    _liger_chunks(t, num_tokens, width, vocab, name)
    loss = t.new(1, "float32", "loss")
    if t.keeps_graph:
        held += [of_input, of_weight]
    loss.node = node
    del padded, labels, losses, counted
    return loss


def _liger_chunks(t: Tape, num_tokens: int, width: int, vocab: int, name: str) -> None:
    chunk = liger_chunk(num_tokens, width, vocab)
    logits = t.new(chunk * vocab, t.parameter_dtype, "logits of a chunk") if t.autocast is None else None
    for first in range(0, num_tokens, chunk):
        size = min(chunk, num_tokens - first)
        if t.autocast is not None:
            _autocast_chunk(t, size, width, vocab, t.autocast, name)
        elif t.parameter_dtype == "float32":
            t.new(width * vocab, "float32", "weight gradient of a chunk")
    del logits


def _autocast_chunk(t: Tape, size: int, width: int, vocab: int, dtype: Dtype, name: str) -> None:
    """One chunk under autocast: the weight is cast once and kept, its transpose, no leaf, in every chunk."""
    weight, rows = t.new(width * vocab, dtype, f"weight in {dtype}"), t.new(size * width, dtype, f"input in {dtype}")
    logits = t.new(size * vocab, dtype, "logits of a chunk")
    del weight, rows
    if (t.layer, name) not in t.casts:
        t.casts[t.layer, name] = t.new(width * vocab, dtype, f"weight in {dtype}")
    t.new(size * width, dtype, "gradient of a chunk")
    rows = t.new(size * width, dtype, f"input in {dtype}")
    del logits, rows
