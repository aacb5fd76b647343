"""A model as the planner sees it: its parameters, its buffers and the configuration they came from."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import msgspec

from optplan.planner.models.fields import Fields
from optplan.planner.tensors import Buffer, HeadLayout, ModuleKind, Parameter, Role


class ModelSpec(msgspec.Struct, frozen=True, dict=True):
    """The exact inventory of a model.

    Attributes:
        name: Catalogue id, or the name of the file it was read from.
        model_type: Family, as `model_type` of a Hugging Face `config.json`.
        architecture: The transformers class that the inventory equals.
        parameters: Every name of `named_parameters(remove_duplicate=False)`, in that order; tied ones carry `tied_to`.
        buffers: Every name of `named_buffers()`, in that order.
        config: The configuration with the family's defaults filled in.
        max_seq_len: Longest sequence the model accepts, in tokens (patches and class token for a vision model).
        source: Where the configuration comes from.
        reference: What `--model` takes to find it again; the name where it is empty.
    """

    name: str
    model_type: str
    architecture: str
    parameters: tuple[Parameter, ...]
    buffers: tuple[Buffer, ...]
    config: dict[str, Any]
    max_seq_len: int
    source: str
    reference: str = ""

    @cached_property
    def unique_parameters(self) -> tuple[Parameter, ...]:
        """The parameters that occupy memory: aliases of tied ones left out."""
        return tuple(p for p in self.parameters if p.tied_to is None)

    @cached_property
    def trained_parameters(self) -> tuple[Parameter, ...]:
        """Those of them that get gradients."""
        return tuple(p for p in self.unique_parameters if p.is_used)

    @cached_property
    def num_parameters(self) -> int:
        """Elements of all parameters, tied ones counted once."""
        return sum(p.numel for p in self.unique_parameters)


def separate_heads(head_dim: int, num_heads: int) -> dict[Role, HeadLayout]:
    """Layouts of query, key and value projections that are three matrices of `num_heads` heads each."""
    return {
        "query": HeadLayout(head_dim, num_query_heads=num_heads),
        "key": HeadLayout(head_dim, num_key_heads=num_heads),
        "value": HeadLayout(head_dim, num_value_heads=num_heads),
    }


class Inventory:
    """Collects parameters and buffers in the order in which the modules register them."""

    def __init__(self) -> None:
        self.parameters: list[Parameter] = []
        self.buffers: list[Buffer] = []

    def add(
        self,
        name: str,
        shape: tuple[int, ...],
        role: Role,
        module: ModuleKind,
        *,
        output_axes: tuple[int, ...] = (0,),
        heads: HeadLayout | None = None,
        tied_to: str | None = None,
        is_used: bool = True,
    ) -> None:
        """Append one parameter."""
        self.parameters.append(Parameter(name, shape, role, module, output_axes, heads, tied_to, is_used))

    def linear(
        self,
        name: str,
        in_features: int,
        out_features: int,
        role: Role,
        *,
        bias: bool = False,
        heads: HeadLayout | None = None,
        tied_to: str | None = None,
    ) -> None:
        """Append an `nn.Linear`: weight `[out_features, in_features]` and its bias."""
        self.add(f"{name}.weight", (out_features, in_features), role, "linear", heads=heads, tied_to=tied_to)
        if bias:
            self.add(f"{name}.bias", (out_features,), "bias", "linear", heads=heads)

    def conv1d(
        self, name: str, in_features: int, out_features: int, role: Role, *, heads: HeadLayout | None = None
    ) -> None:
        """Append GPT-2's `Conv1D`: weight `[in_features, out_features]` and its bias."""
        self.add(f"{name}.weight", (in_features, out_features), role, "conv1d", output_axes=(1,), heads=heads)
        self.add(f"{name}.bias", (out_features,), "bias", "conv1d", heads=heads)

    def embedding(
        self, name: str, num_rows: int, width: int, role: Role = "token_embedding", *, tied_to: str | None = None
    ) -> None:
        """Append an `nn.Embedding`: weight `[num_rows, width]`."""
        self.add(f"{name}.weight", (num_rows, width), role, "embedding", tied_to=tied_to)

    def layer_norm(self, name: str, width: int, *, bias: bool = True) -> None:
        """Append an `nn.LayerNorm`: weight `[width]` and its bias."""
        self.add(f"{name}.weight", (width,), "norm", "layer_norm")
        if bias:
            self.add(f"{name}.bias", (width,), "bias", "layer_norm")

    def rms_norm(self, name: str, width: int) -> None:
        """Append an RMSNorm: weight `[width]`."""
        self.add(f"{name}.weight", (width,), "norm", "rms_norm")

    def buffer(self, buffer: Buffer) -> None:
        """Append a buffer."""
        self.buffers.append(buffer)


class Family(msgspec.Struct, frozen=True):
    """One architecture: how its fields are read and its inventory is built.

    Attributes:
        model_type: As in `config.json`.
        architecture: The transformers class whose inventory is reproduced.
        read: Fields of a `config.json` to the complete configuration, defaults filled in, every value checked.
        build: Complete configuration to inventory.
        max_seq_len: Name of the configuration's field for the longest sequence, or a function of the configuration.
    """

    model_type: str
    architecture: str
    read: Callable[[Fields], dict[str, Any]]
    build: Callable[[dict[str, Any]], Inventory]
    max_seq_len: str | Callable[[dict[str, Any]], int] = "max_position_embeddings"

    def spec(self, fields: Fields, *, name: str, source: str) -> ModelSpec:
        """The model that a configuration describes.

        Raises:
            ConfigError: A field is missing, of the wrong type or out of range.
        """
        config = self.read(fields)
        inventory = self.build(config)
        longest = config[self.max_seq_len] if isinstance(self.max_seq_len, str) else self.max_seq_len(config)
        return ModelSpec(
            name=name,
            model_type=self.model_type,
            architecture=self.architecture,
            parameters=tuple(inventory.parameters),
            buffers=tuple(inventory.buffers),
            config=config,
            max_seq_len=longest,
            source=source,
        )
