"""ResNet-18 and ResNet-50 for ImageNet: parameters only, for the figures that papers publish about them.

Source: He et al. 2015, arXiv 1512.03385, table 1; the stride of a bottleneck does not change its parameters.
"""

from __future__ import annotations

from optplan.planner.errors import ConfigError
from optplan.planner.models.spec import Inventory
from optplan.planner.tensors import Parameter

NUM_CLASSES = 1000
_STEM_WIDTH = 64
_BLOCKS: dict[int, tuple[int, ...]] = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}
_EXPANSION = {18: 1, 50: 4}


def resnet_parameters(depth: int) -> tuple[Parameter, ...]:
    """Every parameter of a ResNet, in the order in which its modules register them.

    Args:
        depth: 18 (basic blocks) or 50 (bottlenecks).

    Raises:
        ConfigError: Another depth is asked for.
    """
    if depth not in _BLOCKS:
        raise ConfigError(f"a ResNet of depth {depth} is not known; known: {', '.join(map(str, _BLOCKS))}")
    inventory, expansion = Inventory(), _EXPANSION[depth]
    _convolution(inventory, "conv1", "bn1", in_channels=3, out_channels=_STEM_WIDTH, kernel=7)
    channels = _STEM_WIDTH
    for stage, num_blocks in enumerate(_BLOCKS[depth], start=1):
        width = _STEM_WIDTH * 2 ** (stage - 1)
        for block in range(num_blocks):
            _block(inventory, f"layer{stage}.{block}", in_channels=channels, width=width, expansion=expansion)
            channels = width * expansion
    inventory.linear("fc", channels, NUM_CLASSES, "output_head", bias=True)
    return tuple(inventory.parameters)


def _block(inventory: Inventory, name: str, *, in_channels: int, width: int, expansion: int) -> None:
    out_channels = width * expansion
    kernels = (3, 3) if expansion == 1 else (1, 3, 1)
    widths = (in_channels, *[width] * (len(kernels) - 1), out_channels)
    for number, kernel in enumerate(kernels, start=1):
        _convolution(
            inventory,
            f"{name}.conv{number}",
            f"{name}.bn{number}",
            in_channels=widths[number - 1],
            out_channels=widths[number],
            kernel=kernel,
        )
    if in_channels != out_channels:
        shortcut = f"{name}.downsample"
        _convolution(
            inventory, f"{shortcut}.0", f"{shortcut}.1", in_channels=in_channels, out_channels=out_channels, kernel=1
        )


def _convolution(
    inventory: Inventory, name: str, norm: str, *, in_channels: int, out_channels: int, kernel: int
) -> None:
    """A convolution without bias, `[out, in, kernel, kernel]`, and its batch norm."""
    inventory.add(f"{name}.weight", (out_channels, in_channels, kernel, kernel), "other", "conv2d")
    inventory.add(f"{norm}.weight", (out_channels,), "norm", "batch_norm")
    inventory.add(f"{norm}.bias", (out_channels,), "bias", "batch_norm")
