"""How a training step is run, as far as its forward and backward depend on it."""

from __future__ import annotations

import msgspec

from optplan.planner.dtypes import Dtype
from optplan.planner.errors import ConfigError, unknown

CHECKPOINTINGS = ("none", "full", "full-reentrant", "selective")
ATTENTIONS = ("sdpa", "eager", "flash")
FUSED_LOSSES = ("none", "liger", "chunked")
_PARAMETER_DTYPES: dict[str, Dtype] = {
    "bf16": "bfloat16",
    "fp32": "float32",
    "amp": "float32",
    "mixed": "bfloat16",
    "fp16-amp": "float32",
}
_AUTOCASTS: dict[str, Dtype] = {"amp": "bfloat16", "fp16-amp": "float16"}
HOPPER = (9, 0)
_AMPERE = (8, 0)
_NUM_SMS = {(7, 0): 80, (7, 5): 40, (8, 0): 108, (8, 6): 84, (8, 9): 128, (9, 0): 132, (10, 0): 148, (12, 0): 170}
_THREADS_PER_SM = {(7, 5): 1024, (8, 6): 1536, (8, 9): 1536, (12, 0): 1536}
_USUAL_NUM_SMS, _USUAL_THREADS_PER_SM = 108, 2048


class StepOptions(msgspec.Struct, frozen=True, kw_only=True):
    """One step's size and manner.

    Attributes:
        batch_size: Sequences in one micro-batch.
        seq_len: Tokens in one sequence.
        precision: bf16, fp32, amp, mixed (as bf16: the master weights are the optimizer's) or fp16-amp.
        checkpointing: `none`; `full`: every layer is recomputed (transformers, `use_reentrant=False`);
            `full-reentrant`: the same with `use_reentrant=True`; `selective`: every second layer (`every_n_layers=2`).
        attention: `sdpa`, `eager` or `flash`, as transformers' `attn_implementation`.
        grad_accum: Micro-batches of one step; above 1, gradients exist before the last one, which is described.
        fused_loss: `none`; `liger`: Liger's fused linear cross entropy; `chunked`: the logits of one chunk of tokens at
            a time, computed again in backward.
        step_in_backward: Whether the optimizer takes each parameter's step as soon as its gradient is there.
        keep_grads: Whether `zero_grad` keeps the gradients' memory (`set_to_none=False`).
        padding_mask: Whether the model is given a padding mask that hides some tokens.
        compute_capability: Of the GPU; it decides the attention kernel and the size of cuBLAS' workspaces.
        tensor_parallel: Ranks that share every layer; the model given is one rank's part.
        sequence_parallel: Whether they share the tokens between blocks too.
        starts: Whether the model given begins with the embedding, rather than with what an earlier stage sends.
        ends: Whether it ends with the loss, rather than with what a later stage takes.
        stored_dtype: Dtype of the parameters that are sharded, where it is not that of the parameters used.
        sm_count: Multiprocessors of the GPU; they decide how some sums are split, a matter of a few MiB. By compute
            capability if None.
    """

    batch_size: int
    seq_len: int
    precision: str = "bf16"
    checkpointing: str = "none"
    attention: str = "sdpa"
    grad_accum: int = 1
    fused_loss: str = "none"
    step_in_backward: bool = False
    keep_grads: bool = False
    padding_mask: bool = False
    compute_capability: tuple[int, int] = HOPPER
    sm_count: int | None = None
    stored_dtype: Dtype | None = None
    tensor_parallel: int = 1
    sequence_parallel: bool = False
    starts: bool = True
    ends: bool = True

    @property
    def parameter_dtype(self) -> Dtype:
        """Dtype of the parameters that forward and backward use, and of their gradients."""
        return _PARAMETER_DTYPES[self.precision]

    @property
    def autocast_dtype(self) -> Dtype | None:
        """Dtype of matrix products under `torch.autocast`, None without it."""
        return _AUTOCASTS.get(self.precision)

    @property
    def has_gradients(self) -> bool:
        """Whether the parameters have gradients before the forward, to which backward adds."""
        return self.grad_accum > 1 or self.keep_grads

    @property
    def recomputes(self) -> bool:
        """Whether backward runs some layers' forward again."""
        return self.checkpointing != "none"

    @property
    def resident_threads(self) -> int:
        """Threads that the whole GPU holds at once."""
        num_sms = self.sm_count or _NUM_SMS.get(self.compute_capability, _USUAL_NUM_SMS)
        return num_sms * _THREADS_PER_SM.get(self.compute_capability, _USUAL_THREADS_PER_SM)


def check_options(options: StepOptions) -> None:
    """Refuse what no rule describes.

    Raises:
        ConfigError: A value is unknown or out of range, or two contradict each other.
    """
    for name, value, known in (
        ("precision", options.precision, tuple(_PARAMETER_DTYPES)),
        ("attention", options.attention, ATTENTIONS),
        ("checkpointing", options.checkpointing, CHECKPOINTINGS),
        ("fused_loss", options.fused_loss, FUSED_LOSSES),
    ):
        if value not in known:
            raise unknown(name, value, known)
    counts = {"batch_size": options.batch_size, "seq_len": options.seq_len, "grad_accum": options.grad_accum}
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{name} must be at least 1, got {count}")
    if options.step_in_backward and options.has_gradients:
        raise ConfigError(
            "step_in_backward uses each gradient up as it comes, so that grad_accum must be 1 and keep_grads off"
        )
    _check_flash(options)


def _check_flash(options: StepOptions) -> None:
    if options.attention != "flash":
        return
    if options.padding_mask:
        raise ConfigError("flash attention takes padding out of the batch, which no rule describes; use attention sdpa")
    if options.precision == "fp32":
        raise ConfigError("flash attention does not run in fp32; use bf16, amp, mixed or fp16-amp, or attention sdpa")
    if options.compute_capability < _AMPERE:
        found = ".".join(map(str, options.compute_capability))
        raise ConfigError(f"flash attention needs compute capability 8.0 or newer, got {found}; use attention sdpa")
