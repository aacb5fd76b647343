"""How fast this host launches work: what the times of steps that wait for the host are held against."""

from __future__ import annotations

import time
from statistics import median

import torch
from torch import nn

NUM_LAUNCHES = 6 * 26
"""Operations that a repetition launches, by `_Block` and their number: forward 9 of each, backward 17."""
_NUM_BLOCKS = 6
_NUM_TOKENS, _WIDTH, _NUM_HEADS = 4, 64, 4
_NUM_WARM_UPS, _NUM_REPETITIONS = 5, 20


def launching_seconds(device: torch.device) -> float | None:
    """Seconds that this host takes to launch one operation of a training step; None without a GPU or room on it.

    Forward and backward of a few small blocks are taken again and again, each time with nothing left to do on the GPU:
    time passes until `backward()` returns, through modules in Python, autograd's graph and its own thread, and nobody
    waits for the GPU. The median of several, over the operations launched.

    What is measured afterwards finds all as it was: no random number is drawn, the memory goes back to the driver, and
    there is no product of matrices, whose workspace would stay. The GPU loads two kernels, fp32 sums and products: what
    is needed besides is copied from the host.
    """
    if device.type != "cuda":
        return None
    # A backward with a gradient given imports it, and failures within that import keep the frames around it, and with
    # them the tensors, until garbage is collected.
    import torch.fx.experimental.symbolic_shapes

    seconds = _step_seconds(device)
    torch.cuda.empty_cache()
    return None if seconds is None else seconds / NUM_LAUNCHES


class _Gain(nn.Module):
    """Forward launches a product, backward two."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(_ones())

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * self.weight


class _Block(nn.Module):
    """As many modules, residuals and views as a transformer's block, on next to nothing.

    Forward launches six gains, a product and two sums. Backward launches two products for each of the seven, and a sum
    where a tensor was used twice: the block's input, that of the second residual, and that of gate and value.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.mix, self.norm_2 = _Gain(), _Gain(), _Gain()
        self.gate, self.value, self.out = _Gain(), _Gain(), _Gain()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        heads = self.norm_1(hidden).unflatten(-1, (_NUM_HEADS, -1)).transpose(0, 1)
        hidden = hidden + self.mix(heads.transpose(0, 1).flatten(-2))
        normed = self.norm_2(hidden)
        out: torch.Tensor = self.out(self.gate(normed) * self.value(normed))
        return hidden + out


def _ones() -> torch.Tensor:
    return torch.ones(_NUM_TOKENS, _WIDTH, dtype=torch.float32)


def _step_seconds(device: torch.device) -> float | None:
    """Median time of a repetition, None if the memory for it cannot be had."""
    try:
        model = nn.Sequential(*(_Block() for _ in range(_NUM_BLOCKS))).to(device)
        hidden, gradient = _ones().to(device).requires_grad_(), _ones().to(device)
        with torch.enable_grad():
            taken = [_timed(model, hidden, gradient) for _ in range(_NUM_WARM_UPS + _NUM_REPETITIONS)]
    except torch.OutOfMemoryError:
        return None
    return median(taken[_NUM_WARM_UPS:])


def _timed(model: nn.Module, hidden: torch.Tensor, gradient: torch.Tensor) -> float:
    """Host time of forward and backward, begun when the GPU has nothing left to do."""
    for tensor in (hidden, *model.parameters()):
        tensor.grad = None
    torch.cuda.synchronize(hidden.device)
    begin = time.perf_counter()
    model(hidden).backward(gradient)
    return time.perf_counter() - begin
