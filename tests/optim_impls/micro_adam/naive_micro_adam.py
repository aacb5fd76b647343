"""MicroAdam once more, element by element in Python's floats and without torch: an independent oracle."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

BLOCK, BUCKET, WINDOW = 2048, 64, 10


def _bf16(x: float) -> float:
    bits = int(np.float32(x).view(np.uint32))
    return float(np.uint32((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32))


def _outward(x: float, *, up: bool) -> float:
    """The next bfloat16 number, of seven digits after the first; `x` is no smaller than those that have less."""
    bits = int(np.float64(x).view(np.uint64)) >> 45 << 45
    toward_zero = float(np.uint64(bits).view(np.float64))
    away = float(np.uint64(bits + (1 << 45)).view(np.float64))
    if toward_zero == x:
        return toward_zero
    return away if (x > 0) == up else toward_zero


class NaiveMicroAdam:
    """One flat tensor; `parameter` is updated by `step`."""

    def __init__(
        self,
        parameter: np.ndarray,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        decay: float = 0.0,
        alpha: float = 0.0,
    ) -> None:
        self.parameter = parameter.astype(np.float64)
        self.lr, self.betas, self.eps, self.decay, self.alpha = lr, betas, eps, decay, alpha
        self.error = np.zeros(len(parameter))
        self.history: list[dict[int, float]] = []
        self.accumulated: Any = None

    def step(self, gradient: np.ndarray) -> None:
        """One step; what was selected is the last of `history`."""
        self.accumulated = gradient.astype(np.float64) + self.error
        selected: dict[int, float] = {}
        for start in range(0, len(gradient), BLOCK):
            self._select(start, min(BLOCK, len(gradient) - start), selected)
        self.history.append(selected)
        self._update()
        if self.alpha:
            self._densify()

    def _select(self, start: int, size: int, selected: dict[int, float]) -> None:
        block = self.accumulated[start : start + size]
        order = sorted(range(size), key=lambda i: (-abs(block[i]), i))
        picked = order[: -(-size // 100)]
        selected.update({start + i: _bf16(block[i]) for i in picked})
        residual = block.copy()
        residual[picked] = 0
        self._quantize(start, residual)

    def _quantize(self, start: int, residual: np.ndarray) -> None:
        """Put a block's residual into codes, with the range that each bucket has now."""
        size = len(residual)
        num_buckets = min(BLOCK // BUCKET, -(-size // 8))
        for bucket in range(num_buckets):
            members = [i for i in range(size) if i // 8 % num_buckets == bucket]
            ends = [*residual[members], *([0.0] if size < BLOCK else [])]
            low, high = _outward(min(ends), up=False), _outward(max(ends), up=True)
            unit = (high - low) / 15
            for i in members:
                code = round((residual[i] - low) * (15 / (high - low))) if unit else 0
                self.error[start + i] = low + code * unit

    def _densify(self) -> None:
        """As the authors do: a part of the error feedback to the parameters, the rest quantized once more."""
        self.parameter -= self.lr * self.alpha * self.error
        # In float32 the ends of a range, which are bfloat16 numbers, are that to the last digit.
        rest = ((1 - self.alpha) * self.error).astype(np.float32).astype(np.float64)
        for start in range(0, len(rest), BLOCK):
            self._quantize(start, rest[start : start + BLOCK])

    def _update(self) -> None:
        t = len(self.history)
        first, second = self.betas
        sums: dict[int, list[float]] = {}
        for age, row in enumerate(reversed(self.history[-WINDOW:])):
            for i, value in row.items():
                pair = sums.setdefault(i, [0.0, 0.0])
                pair[0] += first**age * value
                pair[1] += second**age * value**2
        self.parameter *= 1 - self.lr * self.decay
        for i, (m, v) in sums.items():
            mean, square = (1 - first) / (1 - first**t) * m, (1 - second) / (1 - second**t) * v
            self.parameter[i] -= self.lr * mean / (math.sqrt(square) + self.eps)
