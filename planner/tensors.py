"""The tensors the planner reasons about: a model's parameters and buffers, an optimizer's state."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from optplan.planner.dtypes import ITEMSIZE_BYTES, Dtype

Role = Literal[
    "token_embedding",  # one row a token
    "position_embedding",  # one row a position (also BERT's token types, T5's relative bias)
    "output_head",  # the projection onto the vocabulary or the classes
    "query",
    "key",
    "value",
    "fused_qkv",  # query, key and value in one matrix; `heads` says how they lie
    "attention_output",
    "mlp",  # every projection of a feed-forward block, experts included
    "router",
    "norm",
    "bias",
    "patch_embedding",
    "other",
]
ModuleKind = Literal[
    "linear", "conv1d", "conv2d", "embedding", "layer_norm", "rms_norm", "batch_norm", "experts", "parameter"
]
Device = Literal["device", "cpu", "managed"]


class HeadLayout(msgspec.Struct, frozen=True):
    """How the output neurons of an attention projection divide into heads.

    Attributes:
        head_dim: Output neurons of one head.
        num_query_heads: Query heads in this matrix, 0 if it holds none.
        num_key_heads: Key heads in this matrix.
        num_value_heads: Value heads in this matrix.
        interleaved: In a fused matrix, True if each key head follows the query heads that share it and is followed by
            its value head (GPT-NeoX, BLOOM, Falcon-40B), False if all queries come first, then all keys, then all
            values (GPT-2, Phi-3, Falcon-7B).
    """

    head_dim: int
    num_query_heads: int = 0
    num_key_heads: int = 0
    num_value_heads: int = 0
    interleaved: bool = False


class Parameter(msgspec.Struct, frozen=True):
    """One trainable tensor of a model, described by the module that owns it rather than by its name.

    Attributes:
        name: Dotted name, as `named_parameters()` of the transformers class gives it.
        shape: Sizes, outermost first; () for a scalar.
        role: What the tensor is for.
        module: Kind of the module that owns it.
        output_axes: Axes that together index the output neurons (rows): (0,) for a linear layer `[out, in]`, (1,) for
            GPT-2's `Conv1D` `[in, out]`, (0, 1) for stacked experts `[expert, out, in]`.
        heads: For attention projections, how the output neurons divide into heads.
        tied_to: Name of the parameter whose storage this one shares; such a parameter occupies nothing.
        is_used: Whether the forward uses it; one that it never uses gets no gradient, and so no optimizer's state.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    module: ModuleKind
    output_axes: tuple[int, ...] = (0,)
    heads: HeadLayout | None = None
    tied_to: str | None = None
    is_used: bool = True

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @property
    def num_output_neurons(self) -> int:
        """Rows along `output_axes`: output neurons, tokens of an embedding."""
        return math.prod(self.shape[axis] for axis in self.output_axes)


class Buffer(msgspec.Struct, frozen=True):
    """A tensor of the model that is not trained, such as the rotary frequencies.

    Attributes:
        dtype: The buffer's own dtype, or None when it follows the parameters' dtype.
        persistent: Whether a checkpoint holds it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Dtype | None = "float32"
    persistent: bool = False

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)


class StateTensor(msgspec.Struct, frozen=True):
    """One tensor that an optimizer keeps between steps, for one parameter or for all.

    Attributes:
        name: State name as users meet it in `optimizer.state[p]`, such as `exp_avg`.
        device: `device` (GPU), `cpu`, or `managed` (CUDA managed memory that the driver may evict to the host).
        storage_numel: Elements of the storage behind the tensor, where it is a view of something larger; None if equal.
        formula: How the size follows from the parameter, for people: `2 x m x k`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Dtype
    device: Device = "device"
    storage_numel: int | None = None
    formula: str = ""

    @property
    def num_bytes(self) -> int:
        """Bytes of the storage, unrounded."""
        numel = math.prod(self.shape) if self.storage_numel is None else self.storage_numel
        return numel * ITEMSIZE_BYTES[self.dtype]
