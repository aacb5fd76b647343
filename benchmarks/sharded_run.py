"""What `record_sharded.py` runs in each process: training under FSDP2, its checkpoint, and training from it on one GPU.

Every rank sees the same batches, so that averaging the gradients changes nothing and one GPU takes the same steps. The
model is that of the training study in bf16, wider and with an odd number of positions: its rows fall apart unevenly,
its norms are shorter than a block of MicroAdam.
"""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from train_study_corpus import load_corpus, random_starts, windows_at
from train_study_model import ByteGPT, Size

from optplan.optim_impls import AdamMini, AdamW, Adapprox, MicroAdam

SIZES = {"300m": Size(24, 1024, 16, 511), "60m": Size(8, 768, 12, 511), "3m": Size(4, 256, 4, 127)}
BATCH = 8
SEED = 0
PHASES = ("forward", "backward", "step")

BUILDERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": lambda model: AdamW(model.parameters(), lr=3e-4),
    "adam-mini": lambda model: AdamMini.from_module(model, lr=3e-4),
    "micro-adam": lambda model: MicroAdam(model.parameters(), lr=3e-4),
    "adapprox": lambda model: Adapprox(model.parameters(), lr=3e-4),
}


class Plan(NamedTuple):
    """One training run.

    Attributes:
        optimizer: Its id.
        size: Name of the model's size.
        num_steps: Steps in all.
        saved_after: Steps before the checkpoint.
    """

    optimizer: str
    size: str
    num_steps: int
    saved_after: int


class Run:
    """A model under an optimizer, on one device or sharded over the ranks of a mesh."""

    def __init__(self, plan: Plan, device: torch.device, mesh: Any = None) -> None:
        self.plan, self.device = plan, device
        self.model: nn.Module = ByteGPT(SIZES[plan.size], seed=SEED).to(device, torch.bfloat16)
        if mesh is not None:
            for layer in self.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        self.optimizer = BUILDERS[plan.optimizer](self.model)
        self._text = load_corpus(torch.device("cpu")).train
        length = SIZES[plan.size].context + 1
        self._starts = random_starts(self._text, num_steps=plan.num_steps, batch=BATCH, length=length, seed=SEED)
        self._length = length

    def train(self, first: int, last: int) -> tuple[list[float], dict[str, dict[str, int]]]:
        """Losses of steps first to last - 1, and the peaks of the last one by phase."""
        losses, peaks = [], {}
        for step in range(first, last):
            windows = windows_at(self._text, self._starts[step], self._length).to(self.device)
            loss, peaks = self._step(windows)
            losses.append(loss)
        return losses, peaks

    def _step(self, windows: torch.Tensor) -> tuple[float, dict[str, dict[str, int]]]:
        peaks = {}
        self._reset_peaks()
        with _fixed_order():
            logits = self.model(windows[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
            peaks["forward"] = self._peaks()
            loss.backward()
        peaks["backward"] = self._peaks()
        self.optimizer.step()
        peaks["step"] = self._peaks()
        self.optimizer.zero_grad()
        return loss.item(), peaks

    def _reset_peaks(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def _peaks(self) -> dict[str, int]:
        """Peaks since the last call."""
        if self.device.type != "cuda":
            return {}
        torch.cuda.synchronize()
        found = {
            "allocated_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
        }
        torch.cuda.reset_peak_memory_stats()
        return found

    def save(self, folder: Path) -> None:
        """Model and optimizer."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        """What another run saved, on however many ranks."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)

    def shapes(self) -> dict[str, list[int]]:
        """Sizes of the whole parameters."""
        return {name: list(parameter.shape) for name, parameter in self.model.named_parameters()}

    def state_bytes(self) -> dict[str, int]:
        """Bytes of this process's state by name, step counters left out."""
        found: Counter[str] = Counter()
        for state in self.optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and name != "step":
                    local = getattr(value, "_local_tensor", value)
                    found[name] += local.numel() * local.itemsize
        return dict(found)


def set_deterministic() -> None:
    """Products that add in a fixed order; to be called before the first of them."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # https://docs.nvidia.com/cuda/cublas/#results-reproducibility
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass adds in any order
    torch.utils.deterministic.fill_uninitialized_memory = False


@contextmanager
def _fixed_order() -> Iterator[None]:
    """Passes that add in a fixed order, FlashAttention's backward too, so that runs can be compared bit by bit."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def train_sharded(plan: Plan, device: torch.device, mesh: Any, folder: Path) -> dict[str, Any]:
    """Train on all ranks, with a checkpoint on the way; one rank's figures."""
    run = Run(plan, device, mesh)
    before, _ = run.train(0, plan.saved_after)
    run.save(folder / plan.optimizer)
    after, peaks = run.train(plan.saved_after, plan.num_steps)
    found = {"losses": before + after, "peaks": peaks, "state_bytes": run.state_bytes(), "shapes": run.shapes()}
    del run
    _free()
    return found


def train_alone(plan: Plan, device: torch.device, folder: Path) -> dict[str, Any]:
    """Train from the ranks' checkpoint, and from the start, in this process alone."""
    run = Run(plan, device)
    run.load(folder / plan.optimizer)
    resumed, _ = run.train(plan.saved_after, plan.num_steps)
    del run
    _free()
    run = Run(plan, device)
    whole, peaks = run.train(0, plan.num_steps)
    found = {"resumed_losses": resumed, "losses": whole, "peaks": peaks, "state_bytes": run.state_bytes()}
    del run
    _free()
    return found


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
