"""What torch says of the GPUs in a process that must not touch one: what a child of it found out.

Some packages ask while they are imported (torchao what a GPU can do, through transformers), and torch initialises CUDA
to answer: no child could use it any more. Here a child, forked before, asks in earnest; its answers stand in the place
of torch's as long as packages are imported.

Source: torch `torch/cuda/__init__.py` (`get_device_properties`, `get_device_capability`, `get_device_name` and
`current_device` all come down to the three functions replaced here).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import msgspec

_MISSING = object()


class _Asked:
    """A child that is asking; the answers are waited for when they are first needed."""

    def __init__(self, torch: Any) -> None:
        self._answers, told = os.pipe()
        self._process = os.fork()
        if self._process == 0:
            _tell(torch, told)
        os.close(told)

    @cached_property
    def properties(self) -> list[SimpleNamespace]:
        """Of each GPU, with the fields that torch gives them; none where they cannot be asked."""
        with os.fdopen(self._answers, "rb") as answers:
            text = answers.read()
        os.waitpid(self._process, 0)
        return [SimpleNamespace(**fields) for fields in msgspec.json.decode(text)] if text else []


def _tell(torch: Any, pipe: int) -> None:
    """Ask torch, write what it says, and end; never returns."""
    try:
        found = [_fields(torch.cuda.get_device_properties(index)) for index in range(torch.cuda.device_count())]
        os.write(pipe, msgspec.json.encode(found))
    finally:
        os._exit(0)


def _fields(properties: Any) -> dict[str, Any]:
    """Every field; what JSON does not know as text."""
    fields = {name: getattr(properties, name) for name in dir(properties) if not name.startswith("_")}
    return {name: value if isinstance(value, int | float | str) else str(value) for name, value in fields.items()}


@contextmanager
def told_gpus(torch: Any) -> Iterator[None]:
    """Let torch answer within the context without initialising CUDA, where there is a GPU at all.

    Args:
        torch: The module; nothing else may have asked it before.
    """
    if not torch.cuda.is_available():
        yield
        return
    asked, initialise = _Asked(torch), torch.cuda._lazy_init

    def initialise_if_nothing_is_told() -> None:
        if not asked.properties:
            initialise()

    with ExitStack() as stack:
        for owner, name, stand_in in (
            (torch.cuda, "_lazy_init", initialise_if_nothing_is_told),
            (torch.cuda, "_get_device_properties", lambda index: asked.properties[index]),
            (torch._C, "_cuda_getDevice", lambda: 0),
        ):
            stack.callback(_replace(owner, name, stand_in))
        yield
        # The child must be gone before others are forked.
        _ = asked.properties


def _replace(owner: Any, name: str, stand_in: Callable[..., Any]) -> Callable[[], None]:
    """Put a function in the place of another, which need not be there yet; what is returned undoes it."""
    original = vars(owner).get(name, _MISSING)
    setattr(owner, name, stand_in)
    if original is _MISSING:
        return lambda: delattr(owner, name)
    return lambda: setattr(owner, name, original)
