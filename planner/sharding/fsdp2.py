"""FSDP2: torch's `fully_shard` on every layer and on the root; each rank keeps its rows of every parameter.

A group of parameters is gathered before its layer runs and dropped after it. The gathered buffer lives on a stream of
its own, and so in a cache of its own; from it the parameters are copied out into storages of theirs. In forward the
buffer is kept until the next layer's copy-out is done; in backward the next layer's is gathered while one runs. The
root's group (embedding, last norm, output head) stays gathered from forward to the end of backward.

After a layer's backward its parameters are dropped and its gradients copied into the reduce-scatter's input, which
lives until the next layer has run backward; the output, of which all the group's sharded gradients are views, stays.

A model made on the host is moved to the GPU layer by layer as `fully_shard` is applied: whole parameters, of which the
shards are copied. What they leave in the cache the first step's tensors are cut from.

Source: torch 2.13 `distributed/fsdp/_fully_shard/_fsdp_param_group.py` (`unshard`, `wait_for_unshard`,
`post_backward`), `_fsdp_collectives.py` (`foreach_all_gather`, `foreach_reduce`), `_fsdp_state.py` (`_lazy_init`),
`_fsdp_init.py` (`_move_states_to_device`), `_fsdp_param.py` (`_init_sharded_param`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import msgspec

from optplan.planner.dtypes import ITEMSIZE_BYTES, Dtype
from optplan.planner.sharding.base import ModelView, Ranks, Sized, Strategy
from optplan.planner.sharding.groups import Group, ParameterGroups, all_groups
from optplan.planner.sharding.shards import RowShard
from optplan.planner.step.graph import Storage, Tensor
from optplan.planner.step.hooks import StepHooks
from optplan.planner.step.tape import Tape
from optplan.planner.timeline import Category

COPY_IN, REDUCE = 1, 2
"""Streams of the gathered buffers and of what the reduce-scatter leaves."""


class FullySharding(msgspec.Struct, frozen=True, kw_only=True):
    """How a model is fully sharded.

    Attributes:
        shard: This rank's rows.
        stored_dtype: Dtype of the sharded parameters.
        compute_dtype: Dtype in which they are gathered (`param_dtype`).
        reduce_dtype: Dtype in which gradients are reduced.
        reshards: Whether layers drop their parameters after forward.
        root_reshards: Whether the root does; not unless it is told to.
        replicates: Whether the shards are repeated, and gradients reduced once more between the repetitions.
        offloads: Whether shards live on the host.
    """

    shard: RowShard
    stored_dtype: Dtype
    compute_dtype: Dtype
    reduce_dtype: Dtype
    reshards: bool = True
    root_reshards: bool = False
    replicates: bool = False
    offloads: bool = False


class FullyShardedHooks(StepHooks):
    """Gathers before layers and reduces after them.

    Args:
        how: How the model is sharded.
        groups: The layers' parameters.
        root: The root's.
        accumulates: Whether there are sharded gradients already.
    """

    def __init__(self, how: FullySharding, groups: ParameterGroups, root: Group, *, accumulates: bool) -> None:
        self._how, self._groups, self._root, self._accumulates = how, groups, root, accumulates
        self._num_layers = 0
        self._gathered: dict[int | None, Storage] = {}
        self._kept_gathered: Storage | None = None
        self._whole: dict[int | None, list[Storage]] = {}
        self._gradients: dict[int | None, dict[str, Storage]] = {}
        self._reduce_input: Storage | None = None
        self._reduced: list[Storage] = []

    def before_forward(self, t: Tape) -> None:
        """The root's group is gathered."""
        self._gather(t, None)
        self._copy_out_in_forward(t, None)

    def before_layer(self, t: Tape, layer: int, x: Tensor) -> Tensor:
        """The layer's group is gathered; when backward comes past here, its gradients are reduced."""
        if t.is_recomputing:
            return x
        self._num_layers = max(self._num_layers, layer + 1)
        self._gather(t, layer)
        self._copy_out_in_forward(t, layer)

        def backward(gradients: list[Tensor]) -> list[Tensor]:
            self._reduce(t, layer)
            return [gradients[0]]

        return Tensor(x.storage, x.numel, x.dtype, t.node([x], backward), 0, x.permuted)

    def after_layer(self, t: Tape, layer: int, out: Tensor) -> Tensor:
        """The layer's group is dropped until backward reaches what the layer made."""
        if t.is_recomputing:
            return out
        if self._how.reshards:
            self._drop(layer)
        assert out.node is not None
        out.node.before = partial(self._before_backward, t, layer)
        return out

    def after_forward(self, t: Tape, loss: Tensor) -> None:
        """The last gathered buffer goes, and the root's group if it is told to."""
        if self._how.root_reshards:
            self._drop(None)
        self._kept_gathered = None
        assert loss.node is not None
        # A pipeline's stage without a loss ends in its last layer, whose turn comes first.
        of_layer = loss.node.before

        def begin() -> None:
            if of_layer is not None:
                of_layer()
            self._before_backward(t, None)

        loss.node.before = begin

    def takes_gradient(self, t: Tape, key: tuple[int | None, str], storage: Storage) -> bool:
        """Every gradient waits for its group's reduction."""
        del t
        self._gradients.setdefault(key[0], {})[key[1]] = storage
        return True

    def after_backward(self, t: Tape) -> None:
        """The root's gradients are reduced last."""
        self._reduce(t, None)
        self._reduce_input = None
        self._reduced.clear()

    def _members(self, layer: int | None) -> Group:
        return self._root if layer is None else self._groups.of_layer(layer)

    def _gather(self, t: Tape, layer: int | None, name: str = "all-gather output") -> None:
        """Start to gather a group, unless it is there or on its way."""
        if layer in self._gathered or layer in self._whole or not self._members(layer):
            return
        shard, itemsize = self._how.shard, ITEMSIZE_BYTES[self._how.compute_dtype]
        numel = sum(map(shard.padded_numel, self._members(layer).values()))
        inputs = self._gather_inputs(t, layer, numel)
        self._gathered[layer] = _buffer(t, shard.num_ranks * numel * itemsize, name, COPY_IN)
        del inputs

    def _gather_inputs(self, t: Tape, layer: int | None, numel: int) -> list[Storage]:
        """The shards where they are brought to the device or cast; otherwise they are copied from where they lie."""
        how = self._how
        itemsizes = ITEMSIZE_BYTES[how.stored_dtype], ITEMSIZE_BYTES[how.compute_dtype]
        casts = how.stored_dtype != how.compute_dtype
        if not how.offloads:
            return [_buffer(t, numel * itemsizes[1], "all-gather input", COPY_IN)] if casts else []
        inputs = []
        for name, parameter in self._members(layer).items():
            size = how.shard.padded_numel(parameter)
            brought = _buffer(t, size * itemsizes[0], f"shard of {name} from the host", COPY_IN)
            inputs.append(_buffer(t, size * itemsizes[1], "all-gather input", COPY_IN) if casts else brought)
            del brought
        return inputs

    def _copy_out_in_forward(self, t: Tape, layer: int | None) -> None:
        """Copy a group out; its buffer stays until the next group has been copied out."""
        self._copy_out(t, layer)
        if layer in self._gathered:
            self._kept_gathered = self._gathered.pop(layer)

    def _copy_out(self, t: Tape, layer: int | None) -> None:
        if layer not in self._gathered:
            return
        shard, itemsize = self._how.shard, ITEMSIZE_BYTES[self._how.compute_dtype]
        self._whole[layer] = [
            _storage(t, shard.num_ranks * shard.padded_numel(p) * itemsize, f"gathered {name}", "parameters")
            for name, p in self._members(layer).items()
        ]

    def _drop(self, layer: int | None) -> None:
        held = self._whole.pop(layer, [])
        held.reverse()
        while held:
            held.pop()

    def _before_backward(self, t: Tape, layer: int | None) -> None:
        """Backward reaches a group: it is copied out, and the one before it is gathered."""
        self._gather(t, layer)
        self._copy_out(t, layer)
        self._gathered.pop(layer, None)
        previous = self._num_layers - 1 if layer is None else layer - 1
        if previous >= 0:
            self._gather(t, previous, "all-gather output of the layer before")

    def _reduce(self, t: Tape, layer: int | None) -> None:
        """Drop a group and reduce its gradients."""
        found = self._gradients.pop(layer, {})
        members = {name: p for name, p in self._members(layer).items() if name in found}
        held = [found.pop(name) for name in members]
        self._drop(layer)
        self._reduce_input = None
        if not held:
            return
        numel = sum(map(self._how.shard.padded_numel, members.values()))
        itemsize = ITEMSIZE_BYTES[self._how.reduce_dtype]
        self._reduce_input = _buffer(t, self._how.shard.num_ranks * numel * itemsize, "reduce-scatter input", 0)
        # torch's loop over the gradients leaves its variable bound to the last one.
        last = held.pop()
        while held:
            held.pop()
        self._keep(t, layer, numel)
        del last

    def _keep(self, t: Tape, layer: int | None, numel: int) -> None:
        """The sharded gradients of a group: the reduction's output, cast where dtypes differ."""
        how = self._how
        name = "sharded gradients"
        output = _storage(t, numel * ITEMSIZE_BYTES[how.reduce_dtype], name, "gradients", stream=REDUCE)
        if how.reduce_dtype != how.stored_dtype:
            if how.replicates:
                self._reduced.append(output)
            output = _storage(t, numel * ITEMSIZE_BYTES[how.stored_dtype], name, "gradients", stream=REDUCE)
        if not self._accumulates and not how.offloads:
            t.keep_gradient((layer, name), output)


class Fsdp2(Strategy):
    """`fully_shard` with its defaults.

    Args:
        ranks: The processes.
        reshards: Whether layers drop their parameters after forward.
        shard_ranks: Processes among which a shard is dealt out, all of them if None; the rest repeat it.
        offloads: Whether shards, gradients and state live on the host.
        root_reshards: Whether the root drops its parameters too.
    """

    def __init__(
        self,
        ranks: Ranks,
        *,
        name: str = "fsdp2",
        reshards: bool = True,
        shard_ranks: int | None = None,
        offloads: bool = False,
        root_reshards: bool = False,
    ) -> None:
        super().__init__(ranks)
        self.name = name
        self._reshards, self._root_reshards, self.offloads = reshards, root_reshards, offloads
        self._num_shards = shard_ranks or ranks.num_gpus

    def shard(self) -> RowShard:
        """This rank's rows."""
        return RowShard(self._num_shards, self.ranks.rank % self._num_shards)

    def parameters(self, view: ModelView) -> Iterator[Sized]:
        """Padded shards."""
        if self.offloads:
            return
        shard, itemsize = self.shard(), view.stored_itemsize
        for group in all_groups(view.parameters, view.num_layers, view.layer_name):
            yield from ((p.name, shard.padded_numel(p) * itemsize) for p in group.values())

    def divided(self, view: ModelView) -> Iterator[tuple[int, list[int]]]:
        """A layer's parameters are moved to the GPU whole and dropped when it has been divided; the root's at last."""
        if self.offloads:
            return
        for group in all_groups(view.parameters, view.num_layers, view.layer_name):
            yield len(group), [p.numel * view.stored_itemsize for p in group.values()]

    def gradients(self, view: ModelView) -> Iterator[Sized]:
        """One buffer a group."""
        if self.offloads:
            return
        for group in all_groups(view.parameters, view.num_layers, view.layer_name):
            yield "sharded gradients", sum(map(self.shard().padded_numel, group.values())) * view.stored_itemsize

    def hooks(self, view: ModelView, recorded: Callable[[int], str], *, accumulates: bool) -> StepHooks:
        """Gathering and reducing."""
        # fp32 shards are reduced in fp32 whatever is computed with.
        how = FullySharding(
            shard=self.shard(),
            stored_dtype=view.stored_dtype,
            compute_dtype=view.compute_dtype,
            reduce_dtype=view.stored_dtype,
            reshards=self._reshards,
            root_reshards=self._root_reshards,
            replicates=self._num_shards < self.ranks.num_gpus,
            offloads=self.offloads,
        )
        groups = ParameterGroups(view.parameters, recorded)
        root = ParameterGroups(view.parameters, view.layer_name).of_root(view.num_layers)
        return FullyShardedHooks(how, groups, root, accumulates=accumulates)


def _buffer(t: Tape, num_bytes: int, operation: str, stream: int) -> Storage:
    return _storage(t, num_bytes, operation, "communication", stream=stream)


def _storage(t: Tape, num_bytes: int, operation: str, category: Category, *, stream: int = 0) -> Storage:
    path, t.path = t.path, "FSDP2:"
    storage = t.storage(num_bytes, operation, category, stream=stream)
    t.path = path
    return storage
