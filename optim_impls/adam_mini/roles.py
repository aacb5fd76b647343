"""What each parameter of a module is for, read from the structure of the module: its types, shapes and attributes.

The answer is the planner's own `Parameter`, so the blocks of the optimizer and those of the planner come from the same
rule (`optplan.planner.optimizers.adam_mini.partition`). What no rule recognises gets the role `other`, one block for
the whole tensor, and a sentence that says so.
"""

from __future__ import annotations

import msgspec
from torch import Tensor, nn

from optplan.optim_impls.adam_mini.attention import (
    Attention,
    find_attentions,
    is_linear,
    is_transposed_linear,
)
from optplan.planner.tensors import HeadLayout, ModuleKind, Parameter, Role

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MATRIX, _STACK = 2, 3


class Described(msgspec.Struct, frozen=True):
    """One parameter, its role, and the structure that gave the role.

    Attributes:
        tensor: The parameter itself.
        parameter: Its description in the planner's words.
        why: The reason of the role, for people.
    """

    tensor: Tensor
    parameter: Parameter
    why: str


class _Finding(msgspec.Struct, frozen=True):
    role: Role
    why: str
    output_axes: tuple[int, ...] = (0,)
    heads: HeadLayout | None = None


def describe_module(model: nn.Module) -> list[Described]:
    """Every parameter of `model` that is trained, once, in the order of `named_parameters()`.

    A tied tensor is described by the first module that owns it.
    """
    structure = _Structure(model)
    owners = dict(model.named_modules())
    described = []
    for name, tensor in model.named_parameters():
        if not tensor.requires_grad:
            continue
        owner_name, _, attribute = name.rpartition(".")
        owner = owners[owner_name]
        finding = structure.finding(owner, attribute, tensor)
        parameter = Parameter(
            name,
            tuple(tensor.shape),
            finding.role,
            _module_kind(owner),
            finding.output_axes,
            finding.heads,
        )
        described.append(Described(tensor, parameter, finding.why))
    return described


class _Structure:
    """The parts of a model that its parameters are told by: attention, layers, experts, embedding, head."""

    def __init__(self, model: nn.Module) -> None:
        self.parents = {id(child): module for module in model.modules() for child in module.children()}
        self.model = model
        attentions = find_attentions(model)
        self.projections = {id(p.weight): p for attention in attentions for p in attention.projections}
        self.input_embedding = _tensor_of(_ask(model, "get_input_embeddings"))
        self.heads = _head_weights(model, attentions)
        self.layers = self._layer_modules(attentions)

    def finding(self, owner: nn.Module, attribute: str, tensor: Tensor) -> _Finding:
        """The role of one parameter, by the first rule that knows it."""
        if _is_bias(owner, attribute, tensor):
            return _Finding("bias", "a bias", heads=self._bias_heads(owner))
        projection = self.projections.get(id(tensor))
        if projection is not None:
            return _Finding(projection.role, projection.why, _linear_axes(owner), projection.heads)
        if isinstance(owner, nn.Embedding):
            return self._embedding(tensor)
        if id(tensor) in self.heads:
            return _Finding("output_head", "the model's last linear map", _linear_axes(owner))
        if _is_norm(owner):
            return _Finding("norm", f"the scale of {type(owner).__name__}")
        return self._inside_layer(owner, tensor) or _outside_layer(owner, attribute, tensor)

    def _bias_heads(self, owner: nn.Module) -> HeadLayout | None:
        weight = getattr(owner, "in_proj_weight", None)
        weight = getattr(owner, "weight", None) if weight is None else weight
        projection = self.projections.get(id(weight))
        return None if projection is None else projection.heads

    def _embedding(self, tensor: Tensor) -> _Finding:
        if self.input_embedding is None or tensor is self.input_embedding:
            return _Finding("token_embedding", "an embedding: one row a token")
        return _Finding("position_embedding", "an embedding beside the tokens'")

    def _inside_layer(self, owner: nn.Module, tensor: Tensor) -> _Finding | None:
        """Roles of a feed-forward block, dense or of experts."""
        if id(owner) not in self.layers:
            return None
        num_experts = self._num_sibling_experts(owner)
        if num_experts and tensor.dim() == _MATRIX and num_experts == _num_outputs(owner, tensor):
            return _Finding("router", f"scores the {num_experts} experts beside it", _linear_axes(owner))
        if is_linear(owner):
            return _Finding("mlp", f"a linear map of a layer with attention, {_place(self.parents, owner)}",
                            _linear_axes(owner))  # fmt: skip
        axes = _expert_axes(owner, tensor)
        return None if axes is None else _Finding("mlp", f"{tensor.shape[0]} stacked experts", axes)

    def _num_sibling_experts(self, owner: nn.Module) -> int:
        """Experts held by a module beside `owner`: stacked in one tensor, or a list of feed-forward modules."""
        parent = self.parents.get(id(owner))
        for sibling in () if parent is None else parent.children():
            if sibling is owner:
                continue
            stacked = [w.shape[0] for w in sibling.parameters(recurse=False) if w.dim() == _STACK]
            if stacked:
                return int(stacked[0])
            if isinstance(sibling, nn.ModuleList) and all(any(map(is_linear, m.modules())) for m in sibling):
                return len(sibling)
        return 0

    def _layer_modules(self, attentions: list[Attention]) -> set[int]:
        """Ids of all modules of the layers: of each attention, the smallest module with a feed-forward block too."""
        inside_attention = {id(part) for attention in attentions for part in attention.module.modules()}
        modules: set[int] = set()
        for attention in attentions:
            layer: nn.Module | None = attention.module
            while layer is not None and not any(self._is_feed_forward(m, inside_attention) for m in layer.modules()):
                layer = self.parents.get(id(layer))
            if layer is not None:
                modules.update(id(part) for part in layer.modules())
        return modules - inside_attention

    def _is_feed_forward(self, module: nn.Module, inside_attention: set[int]) -> bool:
        if id(module) in inside_attention:
            return False
        if is_linear(module):
            return id(module.weight) not in self.heads
        return any(_expert_axes(module, weight) is not None for weight in module.parameters(recurse=False))


def _outside_layer(owner: nn.Module, attribute: str, tensor: Tensor) -> _Finding:
    """Patch embeddings, bare position embeddings, and what nothing is known about."""
    if _embeds_patches(owner):
        return _Finding("patch_embedding", "a convolution whose stride is its kernel")
    if tensor.dim() == _STACK and tensor.shape[0] == 1:
        axes = (0, 1)
        if tensor.shape[1] > 1:
            return _Finding("position_embedding", "a bare parameter [1, positions, width]", axes)
        return _Finding("other", "a single bare vector", axes)
    what = f"parameter '{attribute}' of {type(owner).__name__}"
    return _Finding("other", f"no rule for the {what} here", _linear_axes(owner))


def _head_weights(model: nn.Module, attentions: list[Attention]) -> set[int]:
    """Ids of the weights of output heads: the one the model names, and its last module if that is a linear map."""
    named = _tensor_of(_ask(model, "get_output_embeddings"))
    heads = set() if named is None else {id(named)}
    owners = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
    inside_attention = {id(part) for attention in attentions for part in attention.module.modules()}
    if owners and is_linear(owners[-1]) and id(owners[-1]) not in inside_attention and _is_outermost(model, owners[-1]):
        heads.add(id(owners[-1].weight))
    return heads


def _is_outermost(model: nn.Module, module: nn.Module) -> bool:
    """Whether `module` hangs on the model itself or on a head of its own, not in a list of like layers."""
    if any(module is child for child in model.children()):
        return True
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    in_a_list = any(module is part for group in lists for part in group.modules())
    return not in_a_list and not isinstance(model, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))


def _ask(model: nn.Module, method: str) -> nn.Module | None:
    """What a transformers model answers about itself, None for others."""
    if not hasattr(model, method):
        return None
    try:
        answer = getattr(model, method)()
    except NotImplementedError:
        return None
    return answer if isinstance(answer, nn.Module) else None


def _tensor_of(module: nn.Module | None) -> Tensor | None:
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def _is_bias(owner: nn.Module, attribute: str, tensor: Tensor) -> bool:
    """The attribute `bias`; `x_bias` beside a parameter `x`; the biases of multi-head attention and recurrent nets."""
    if isinstance(owner, nn.MultiheadAttention):
        return any(tensor is bias for bias in (owner.in_proj_bias, owner.bias_k, owner.bias_v))
    if isinstance(owner, nn.RNNBase):
        return tensor.dim() == 1
    base = attribute.removesuffix("_bias")
    return attribute == "bias" or (base != attribute and base in owner._parameters)


def _is_norm(owner: nn.Module) -> bool:
    """A norm of torch, or a module without children whose one scale is a vector called `weight`."""
    if isinstance(owner, _NORMS):
        return True
    own = dict(owner.named_parameters(recurse=False))
    childless = not any(True for _ in owner.children())
    return childless and set(own) in ({"weight"}, {"weight", "bias"}) and own["weight"].dim() == 1


def _embeds_patches(owner: nn.Module) -> bool:
    if not isinstance(owner, _CONVOLUTIONS) or owner.transposed or owner.groups != 1:
        return False
    return owner.stride == owner.kernel_size and max(owner.kernel_size) > 1 and not any(owner.padding)


def _expert_axes(owner: nn.Module, tensor: Tensor) -> tuple[int, ...] | None:
    """Output axes of a stack of experts, None for what is no such stack.

    Modules say how their stacks lie with `is_transposed`; older ones are `[expert, in, out]` where the first stack's
    second axis is as wide as the model.
    """
    stacks = [weight for weight in owner.parameters(recurse=False) if weight.dim() == _STACK]
    if tensor.dim() != _STACK or getattr(owner, "num_experts", None) != tensor.shape[0]:
        return None
    transposed = getattr(owner, "is_transposed", None)
    if transposed is None:
        hidden = getattr(owner, "hidden_size", getattr(owner, "hidden_dim", None))
        transposed = stacks[0].shape[1] == hidden and stacks[0].shape[2] != hidden
    return (0, 2) if transposed else (0, 1)


def _linear_axes(owner: nn.Module) -> tuple[int, ...]:
    return (1,) if is_transposed_linear(owner) else (0,)


def _num_outputs(owner: nn.Module, tensor: Tensor) -> int:
    return int(tensor.shape[_linear_axes(owner)[0]])


def _place(parents: dict[int, nn.Module], owner: nn.Module) -> str:
    parent = parents.get(id(owner))
    return "on its own" if parent is None else f"in {type(parent).__name__}"


def _module_kind(owner: nn.Module) -> ModuleKind:
    """Kind of the owning module in the planner's words."""
    if is_linear(owner):
        return "conv1d" if is_transposed_linear(owner) else "linear"
    if isinstance(owner, nn.Conv2d):
        return "conv2d"
    if isinstance(owner, nn.Embedding):
        return "embedding"
    if isinstance(owner, nn.modules.batchnorm._NormBase):
        return "batch_norm"
    if isinstance(owner, nn.LayerNorm | nn.GroupNorm):
        return "layer_norm"
    if any(_expert_axes(owner, weight) is not None for weight in owner.parameters(recurse=False)):
        return "experts"
    return "rms_norm" if _is_norm(owner) else "parameter"
