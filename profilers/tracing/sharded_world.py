"""One rank of a process group whose other ranks do not exist: what FSDP2 and DDP need to run without contents.

The group is torch's fake one, of any size; collectives move nothing. FSDP2's streams are numbered, so that what is
allocated on them is known to come from caches of their own, and gathered parameters, whose memory it takes and gives
back by resizing storages, are followed through that.

Source: torch `testing/_internal/distributed/fake_pg.py`; `distributed/fsdp/_fully_shard/_fsdp_param_group.py`
(`FSDPCommContext`), `_fsdp_collectives.py` (the order of allocations), `_fsdp_param.py` (`alloc_storage`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from optplan.planner.errors import ConfigError
from optplan.planner.timeline import Category
from optplan.profilers.tracing.cuda_environment import replaced
from optplan.profilers.tracing.recorder import Recorder

_FSDP = "torch.distributed.fsdp._fully_shard."
META = torch.device("meta")


class World:
    """The rank, its group and its streams.

    Attributes:
        mesh: The ranks, of one dimension; there while the world runs.
        label: What memory allocated now is for, where the world knows; else None.
    """

    def __init__(self, recorder: Recorder, *, num_ranks: int, rank: int = 0) -> None:
        """Describe the world.

        Args:
            recorder: Where allocations are recorded.
            num_ranks: Processes in the group.
            rank: This one.
        """
        self.mesh: Any = None
        self.label: tuple[Category, str] | None = None
        self._recorder = recorder
        self._num_ranks = num_ranks
        self._rank = rank

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let FSDP2 and DDP run within the context.

        Raises:
            ConfigError: The process belongs to a real group.
        """
        if dist.is_initialized():
            raise ConfigError(
                "engine trace makes up the other ranks, and this process belongs to a process group already; "
                "trace before init_process_group()"
            )
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", rank=self._rank, world_size=self._num_ranks, store=FakeStore())
        try:
            self.mesh = init_device_mesh("cpu", (self._num_ranks,))
            with ExitStack() as stack:
                for owner, name, value in self._patches():
                    stack.enter_context(replaced(owner, name, value))
                yield
        finally:
            dist.destroy_process_group()

    @contextmanager
    def labelled(self, category: Category, name: str) -> Iterator[None]:
        """Say what memory allocated within the context is for."""
        outer, self.label = self.label, (category, name)
        try:
            yield
        finally:
            self.label = outer

    def communicator(self, name: str) -> Any:
        """A collective of FSDP2 that moves nothing; its buffers bear the name."""
        return _Collective(self, name)

    def _patches(self) -> Iterator[tuple[Any, str, Any]]:
        streams = _Streams(self._recorder)
        for name in ("_fsdp_collectives", "_fsdp_param_group", "_fsdp_state"):
            yield import_module(_FSDP + name), "_get_device_handle", lambda _: streams
        yield import_module(_FSDP + "_fully_shard"), "_get_device_from_mesh", lambda _: META
        group, parameter = (
            import_module(_FSDP + "_fsdp_param_group").FSDPParamGroup,
            import_module(_FSDP + "_fsdp_param").FSDPParam,
        )
        yield group, "_validate_no_meta_params", lambda _: None
        yield group, "post_backward", self._naming_gradients(group.post_backward)
        for name in ("init_all_gather_outputs", "alloc_all_gather_outputs"):
            yield parameter, name, self._naming(getattr(parameter, name))
        yield torch.UntypedStorage, "resize_", self._resizing(torch.UntypedStorage.resize_)
        ddp = import_module("torch.nn.parallel.distributed")
        yield ddp, "_verify_param_shape_across_processes", lambda *_: None
        yield ddp, "_sync_module_states", self._sending(ddp._sync_module_states)

    def _sending(self, original: Callable[..., None]) -> Callable[..., None]:
        """DDP's start, where rank 0 sends the others its parameters, many in one piece."""

        def send(*args: Any, **kwargs: Any) -> None:
            with self.labelled("communication", "broadcast of parameters"):
                original(*args, **kwargs)

        return send

    def _naming(self, original: Callable[..., None]) -> Callable[..., None]:
        """A method of FSDP2's parameter that makes room for what is gathered."""

        def make_room(parameter: Any, *args: Any) -> None:
            with self.labelled("parameters", f"gathered {parameter._param_fqn}"):
                original(parameter, *args)

        return make_room

    def _naming_gradients(self, original: Callable[..., None]) -> Callable[..., None]:
        """A method of FSDP2's group that reduces its gradients, which by now are known to be such."""

        def reduce(group: Any, *args: Any) -> None:
            for parameter in group.fsdp_params:
                whole = getattr(parameter, "_unsharded_param", None)
                if whole is not None and whole.grad is not None:
                    self._recorder.label(whole.grad, "gradients", f"{parameter._param_fqn} gradient")
            original(group, *args)

        return reduce

    def _resizing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            if storage.device.type == "meta":
                self._recorder.resize(storage, *(self.label or ("communication", "storage")))
            return result

        return resize


class _Collective:
    """Stands for FSDP2's all-gather and reduce-scatter."""

    def __init__(self, world: World, name: str) -> None:
        self._world = world
        self._name = name

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A buffer."""
        with self._world.labelled("communication", self._name):
            return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Move nothing."""


class _Event:
    """An event on which nothing has to wait: whatever runs, runs at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, *args: Any) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""


class _Stream:
    """A stream known by its number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def wait_event(self, event: Any) -> None:
        """Do nothing."""

    def wait_stream(self, stream: Any) -> None:
        """Do nothing."""

    def record_event(self) -> _Event:
        """An event."""
        return _Event()


class _Streams:
    """What `torch.cuda` is to FSDP2: streams and events."""

    Event = _Event

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._numbers = count(1)
        self._current = _Stream(0)

    def Stream(self, priority: int = 0) -> _Stream:  # noqa: N802 - as in torch.cuda
        """A new stream."""
        del priority
        return _Stream(next(self._numbers))

    def current_stream(self) -> _Stream:
        """The stream on which memory is allocated."""
        return self._current

    @contextmanager
    def stream(self, stream: _Stream) -> Iterator[None]:
        """Allocate on another stream within the context."""
        outer = self._current
        self._switch(stream)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, stream: _Stream) -> None:
        self._current, self._recorder.stream = stream, stream.number
