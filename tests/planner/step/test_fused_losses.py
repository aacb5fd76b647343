"""What losses in chunks hold, against sums over the sizes of a chunk."""

from __future__ import annotations

import pytest

from optplan.planner.models.fields import Fields
from optplan.planner.models.registry import family_of
from optplan.planner.step.fused_losses import chunk_sizes, liger_chunk
from optplan.planner.step.rules import StepOptions, record_step
from optplan.planner.step_time_work import step_work

VOCAB, WIDTH = 32003, 384
LLAMA = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 1088, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip


def most_bytes(loss, category, **step):
    """The most bytes of one category at once, outside the layers."""
    spec = family_of("llama").spec(Fields(LLAMA, where="test"), name="m", source="test")
    tape = record_step(spec, StepOptions(batch_size=3, seq_len=173, fused_loss=loss, **step), compressed=False).tape
    used = most = 0
    for event in tape.events:
        record = tape.records[abs(event) - 1]
        if record.category == category and record.layer is None:
            used += record.num_bytes if event > 0 else -record.num_bytes
            most = max(most, used)
    return most


@pytest.mark.parametrize(
    ("num_tokens", "sizes"),
    [
        # What torch.chunk(..., 8) cuts.
        (519, [65, 65, 65, 65, 65, 65, 65, 64]),
        (16, [2] * 8),
        (9, [2, 2, 2, 2, 1]),
        (8, [1] * 8),
        (3, [1, 1, 1]),
        (1, [1]),
    ],
)
def test_chunks_are_those_of_torch(num_tokens, sizes):
    assert chunk_sizes(num_tokens) == sizes


@pytest.mark.parametrize(
    ("num_tokens", "width", "vocab", "chunk"),
    [
        # The example in Liger's own comment: 16384 tokens of width 4096 and 32000 words take chunks of 2048.
        (16384, 4096, 32000, 2048),
        (519, 384, 32003, 8),
        (1, 384, 32003, 1),
    ],
)
def test_chunks_of_liger(num_tokens, width, vocab, chunk):
    assert liger_chunk(num_tokens, width, vocab) == chunk


@pytest.mark.parametrize(("precision", "itemsize"), [("bf16", 2), ("fp32", 4), ("amp", 4)])
def test_backward_holds_one_chunk_in_fp32_three_times(precision, itemsize):
    chunk, whole = (most_bytes(loss, "logits_and_loss", precision=precision) for loss in ("chunked", "none"))
    # Log-softmax, its gradient and the gradient of the logits of the chunk run last, which is the first; beside them
    # the gradient of the input for the tokens of the others, and a few bytes a token for labels and scalars.
    expected = 3 * 4 * 65 * VOCAB + (519 - 65) * WIDTH * itemsize
    assert expected <= chunk <= expected + 3 * 174 * 8 + 100 * 4
    assert whole >= 3 * 4 * 519 * VOCAB


@pytest.mark.parametrize(("precision", "itemsize"), [("bf16", 2), ("fp32", 4)])
def test_the_heads_gradient_is_there_three_times_while_chunks_are_added_up(precision, itemsize):
    chunked, plain = (most_bytes(loss, "gradients", precision=precision) for loss in ("chunked", "none"))
    head = VOCAB * WIDTH * itemsize
    # The sum so far, the next chunk's and the new sum: autograd adds a transposed gradient to no other in place.
    assert chunked == 3 * head
    assert plain == 2 * head + WIDTH * itemsize  # at the end: head, embedding and the last norm


def test_a_loss_in_chunks_takes_the_heads_product_twice():
    spec = family_of("llama").spec(Fields(LLAMA, where="test"), name="m", source="test")
    steps = [StepOptions(batch_size=3, seq_len=173, fused_loss=loss) for loss in ("none", "chunked")]
    plain, chunked = (step_work(spec, step, record_step(spec, step)) for step in steps)
    assert chunked.backward.product_flops - plain.backward.product_flops == 2 * 519 * VOCAB * WIDTH
    assert chunked.forward.product_flops == plain.forward.product_flops
