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
    bits = int(np.float32(x).view(np.uint32)) & 0xFFFF0000
    toward_zero = float(np.uint32(bits).view(np.float32))
    away = float(np.uint32(bits + 0x10000).view(np.float32))
    if toward_zero == float(np.float32(x)):
        return toward_zero
    return away if (x > 0) == up else toward_zero


class NaiveMicroAdam:
    """One flat tensor; `parameter` is updated by `step`."""

    def __init__(
        self, parameter: np.ndarray, *, lr: float, betas: tuple[float, float], eps: float, decay: float
    ) -> None:
        self.parameter = parameter.astype(np.float64)
        self.lr, self.betas, self.eps, self.decay = lr, betas, eps, decay
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

    def _select(self, start: int, size: int, selected: dict[int, float]) -> None:
        block = self.accumulated[start : start + size]
        order = sorted(range(size), key=lambda i: (-abs(block[i]), i))
        picked = order[: -(-size // 100)]
        selected.update({start + i: _bf16(block[i]) for i in picked})
        residual = block.copy()
        residual[picked] = 0
        num_buckets = min(BLOCK // BUCKET, -(-size // 8))
        for bucket in range(num_buckets):
            members = [i for i in range(size) if i // 8 % num_buckets == bucket]
            ends = [*residual[members], *([0.0] if size < BLOCK else [])]
            low, high = _outward(min(ends), up=False), _outward(max(ends), up=True)
            unit = (high - low) / 15
            for i in members:
                code = round((residual[i] - low) * (15 / (high - low))) if unit else 0
                self.error[start + i] = low + code * unit

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
