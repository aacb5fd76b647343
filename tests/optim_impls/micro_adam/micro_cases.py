"""Blocks that try a selection: nine families of gradients, and the selection of each by an independent rule."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def _sawtooth(rng: np.random.Generator, size: int) -> np.ndarray:
    return (np.arange(size) % 37 - 18.0) * rng.choice([1.0, 0.5])


def _clustered(rng: np.random.Generator, size: int) -> np.ndarray:
    values = rng.standard_normal(size)
    values[: min(40, size)] *= 1000
    return values


def _few(rng: np.random.Generator, size: int) -> np.ndarray:
    values = np.zeros(size)
    values[rng.integers(size, size=5)] = 1.0
    return values


FAMILIES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "gaussian": lambda rng, size: rng.standard_normal(size),
    "zeros": lambda rng, size: np.zeros(size),
    "equal": lambda rng, size: np.full(size, -0.75),
    "ternary": lambda rng, size: rng.integers(-1, 2, size=size).astype(float),
    "clustered": _clustered,
    "few": _few,
    "lognormal": lambda rng, size: rng.standard_normal(size) * np.exp(3 * rng.standard_normal(size)),
    "subnormal": lambda rng, size: rng.standard_normal(size) * 1e-40,
    "sawtooth": _sawtooth,
}


def gradient(family: str, size: int, *, seed: int = 0) -> np.ndarray:
    """A gradient in float32."""
    return FAMILIES[family](np.random.default_rng(seed), size).astype(np.float32)


def largest(values: np.ndarray, num_selected: int) -> set[int]:
    """Indices of the largest magnitudes, ties to the lowest, by a sort with two keys."""
    order = np.lexsort((np.arange(len(values)), -np.abs(values)))
    return set(order[:num_selected].tolist())
