"""The text that `train_study.py` trains on: the sources of Python's standard library, which every machine has."""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests"}
"""Folders that differ from one installation to the next."""
VALIDATION_EVERY = 20
"""One file of so many is kept for validation."""


class Corpus(NamedTuple):
    """Bytes of the standard library, divided by file.

    Attributes:
        train: uint8 `[bytes]`, on the device of the study.
        validation: uint8 `[bytes]`, of other files.
        facts: What a record says of them: the hash of all paths and contents, number of files, bytes, Python's version.
    """

    train: torch.Tensor
    validation: torch.Tensor
    facts: dict[str, str | int]


def load_corpus(device: torch.device) -> Corpus:
    """The whole text, files in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    names = [name for name in names if not LEFT_OUT & set(name.split("/"))]
    digest = hashlib.sha256()
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for number, name in enumerate(names):
        text = (root / name).read_bytes()
        digest.update(f"{name}\0{len(text)}\0".encode() + text)
        parts[number % VALIDATION_EVERY == VALIDATION_EVERY // 2].append(text)
    train, validation = (_as_tensor(b"".join(texts), device) for texts in parts)
    facts = {
        "sha256": digest.hexdigest(), "num_files": len(names), "python": platform.python_version(),
        "train_bytes": train.numel(), "validation_bytes": validation.numel(),
    }  # fmt: skip
    return Corpus(train, validation, facts)


def _as_tensor(text: bytes, device: torch.device) -> torch.Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)


def random_starts(text: torch.Tensor, *, num_steps: int, batch: int, length: int, seed: int) -> torch.Tensor:
    """Where each window of each step begins, `[num_steps, batch]`: the data order, a function of the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(text.numel() - length, (num_steps, batch), generator=generator)
    return starts.to(text.device)


def even_windows(text: torch.Tensor, *, num_windows: int, length: int) -> torch.Tensor:
    """int64 `[num_windows, length]`: windows spread evenly over the text."""
    last = text.numel() - length
    starts = torch.arange(num_windows, device=text.device) * last // max(num_windows - 1, 1)
    return windows_at(text, starts, length)


def windows_at(text: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
    """int64 `[len(starts), length]`."""
    return text[starts[:, None] + torch.arange(length, device=text.device)].long()
