"""What lies at the two ends of a language model: embeddings, and the loss over the vocabulary.

Source: pytorch `aten/src/ATen/native/cuda/Embedding.cu` and `EmbeddingBackwardKernel.cu`; transformers
`loss/loss_utils.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from optplan.planner.dtypes import Dtype
from optplan.planner.step import kernels
from optplan.planner.step.graph import Tensor
from optplan.planner.step.operations import cast
from optplan.planner.step.tape import Tape

INDEX_BYTES = 8
"""Bytes of a token id, a label or a position."""


def embedding(
    t: Tape,
    num_tokens: int,
    num_rows: int,
    width: int,
    indices: Sequence[Tensor] = (),
    *,
    is_expanded: bool = False,
    is_transposed: bool = False,
) -> Tensor:
    """The current module's rows for `num_tokens` tokens.

    Args:
        t: The tape.
        num_tokens: Rows that are read.
        num_rows: Rows there are.
        width: Elements of a row.
        indices: Saved if they are not the resident inputs.
        is_transposed: Whether the rows' elements are read apart, so that a gradient that lies as it is read is copied.
        is_expanded: Whether the indices of one sequence serve all, so that they are written out to be used.
    """
    name = f"{t.path}.weight"
    weight = t.parameter(name, num_rows * width)
    dtype = weight.dtype
    written_out = num_tokens if is_expanded else 0

    def backward(gradients: list[Tensor]) -> list[Tensor]:
        copied = num_tokens * width if is_transposed and not gradients[0].permuted else 0
        rows = t.new(copied, dtype, "gradient of the rows")
        index = t.new(written_out, "int64", "indices")
        gradient = embedding_gradient(t, num_tokens, num_rows, width, dtype)
        del index, rows
        return [gradient]

    node = t.node([weight], backward, indices)
    index = t.new(written_out, "int64", "indices")
    out = t.new(num_tokens * width, dtype, "output")
    del index
    out.node = node
    return out


def embedding_gradient(t: Tape, num_tokens: int, num_rows: int, width: int, dtype: Dtype) -> Tensor:
    """The gradient of an embedding's weight; many tokens are sorted first and summed row by row."""
    segments = kernels.embedding_partial_sums(num_tokens, num_rows)
    if segments is None:
        return t.new(num_rows * width, dtype, "weight gradient", "gradients")
    index_bytes, row_bytes = INDEX_BYTES * num_tokens, INDEX_BYTES * min(num_tokens, num_rows)
    order = [t.storage(index_bytes, "sorted tokens", "workspace") for _ in range(2)]
    t.scratch(index_bytes, kernels.radix_sort_scratch(num_tokens), operation="sort of the tokens")
    gradient = t.new(num_rows * width, dtype, "weight gradient", "gradients")
    counts = [t.storage(size, "segments", "workspace") for size in (index_bytes, INDEX_BYTES)]
    t.scratch(index_bytes, kernels.SCAN_SCRATCH, operation="segments")
    rows = [t.storage(row_bytes, "segments", "workspace") for _ in range(2)]
    t.scratch(kernels.SCAN_SCRATCH, operation="segments")
    sums = kernels.embedding_segment_scratch(segments, num_rows, width, is_fp32=dtype == "float32")
    t.scratch(INDEX_BYTES, INDEX_BYTES * segments, *sums, operation="partial sums")
    for held in (rows, counts, order):
        while held:
            held.pop()
    return gradient


def cross_entropy(t: Tape, logits: Tensor, batch: int, seq: int) -> Tensor:
    """The loss of next-token prediction as transformers computes it: in fp32, labels shifted by one.

    Source: transformers `loss/loss_utils.py` (`ForCausalLMLoss`).
    """
    t.path, t.category = "loss", "logits_and_loss"
    logits = cast(t, logits, "float32")
    padded, labels = shifted_labels(t, batch, seq)
    loss = token_cross_entropy(t, logits, labels)
    del logits, padded
    return loss


def shifted_labels(t: Tape, batch: int, seq: int) -> tuple[Tensor, Tensor]:
    """The labels with one more at the end of each sequence, and those without the first."""
    padded = t.new(batch * (seq + 1), "int64", "padded labels")
    # Shifting the labels of a single sequence leaves them contiguous: no copy.
    return padded, padded if batch == 1 else t.new(batch * seq, "int64", "shifted labels")


def token_cross_entropy(t: Tape, logits: Tensor, labels: Tensor | None) -> Tensor:
    """`F.cross_entropy(logits, labels)`; None stands for labels that are resident."""
    numel, logits_dtype = logits.numel, logits.dtype
    node = t.node([logits], lambda _: [t.new(numel, logits_dtype, "gradient of the logits")])
    log_probabilities = t.new(numel, logits_dtype, "log-softmax")
    log_probabilities.node = node
    t.save(node, [log_probabilities])
    dtype: Dtype = logits_dtype if t.autocast is None else "float32"
    log_probabilities = cast(t, log_probabilities, dtype)

    def backward(_: list[Tensor]) -> list[Tensor]:
        return [t.new(numel, dtype, "gradient of the log-softmax")]

    node = t.node([log_probabilities], backward, [log_probabilities, *([] if labels is None else [labels])])
    loss, weight = t.new(1, dtype, "loss"), t.new(1, dtype, "number of labels")
    loss.node = node
    t.save(node, [weight])
    del weight  # it ends first where a checkpoint keeps nothing
    return loss
