"""The order in which moving a model to the GPU places its tensors: modules inside one another first.

Source: pytorch `torch/nn/modules/module.py` (`Module._apply`): each module moves its children, then its own parameters,
then its own buffers; a shared parameter is moved where it is met first.
"""

from __future__ import annotations

from collections.abc import Iterator

from optplan.planner.dtypes import ITEMSIZE_BYTES, Dtype
from optplan.planner.models.spec import ModelSpec


class _Module:
    """The modules in a module, in the order in which they are registered, and its own tensors."""

    def __init__(self) -> None:
        self.children: dict[str, _Module] = {}
        self.own: list[tuple[str, int]] = []

    def add(self, path: list[str], name: str, num_bytes: int) -> None:
        if not path:
            self.own.append((name, num_bytes))
            return
        self.children.setdefault(path[0], _Module()).add(path[1:], name, num_bytes)

    def tensors(self) -> Iterator[tuple[str, int]]:
        for child in self.children.values():
            yield from child.tensors()
        yield from self.own


def placed_tensors(spec: ModelSpec, dtype: Dtype) -> Iterator[tuple[str, int]]:
    """Name and bytes of each parameter (tied aliases left out) and each buffer.

    A module without parameters counts as registered after those with some, as rotary embeddings are.

    Args:
        spec: The model.
        dtype: Dtype of the parameters, and of the buffers that follow them.
    """
    root = _Module()
    for parameter in spec.parameters:
        name = parameter.tied_to or parameter.name
        root.add(parameter.name.split(".")[:-1], name, parameter.numel * ITEMSIZE_BYTES[dtype])
    for buffer in spec.buffers:
        root.add(buffer.name.split(".")[:-1], buffer.name, buffer.numel * ITEMSIZE_BYTES[buffer.dtype or dtype])
    placed: set[str] = set()
    for name, num_bytes in root.tensors():
        if name not in placed:
            placed.add(name)
            yield name, num_bytes
