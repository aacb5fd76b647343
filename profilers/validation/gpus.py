"""The GPUs of this machine as torch sees them, asked in a process of its own: `python -m` this module.

Who asks torch initialises CUDA, and would hold memory on every GPU while others measure there.
"""

from __future__ import annotations

import sys

import msgspec


class VisibleGpu(msgspec.Struct, frozen=True):
    """A GPU that torch sees: its name and its memory."""

    name: str
    total_bytes: int


def visible_gpus() -> list[VisibleGpu]:
    """All of them, in torch's order."""
    import torch

    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [VisibleGpu(properties.name, properties.total_memory) for properties in found]


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(visible_gpus()))
