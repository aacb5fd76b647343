"""What a CUDA GPU shows of AdamW beside what it shows of every optimizer: torch's fused one as the yardstick."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
_contract = runpy.run_path(str(Path(__file__).parents[1] / "optimizer_contract.py"))
Training, SUBJECT = _contract["Training"], _contract["SUBJECTS"]["adamw"]


def test_fp32_is_within_rounding_of_torch() -> None:
    ours, theirs = (Training(SUBJECT, torch.float32, device="cuda") for _ in range(2))
    theirs.optimizer = torch.optim.AdamW(theirs.parameters, lr=1e-2, weight_decay=0.1, fused=True)
    for a, b in zip(ours.run(20).parameters, theirs.run(20).parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


def test_unaligned_and_transposed_tensors() -> None:
    starts = [torch.randn(10001, device="cuda")[1:], torch.randn(64, 33, device="cuda").t()]
    ours = Training(SUBJECT, torch.float32, device="cuda", starts=starts)
    theirs = Training(SUBJECT, torch.float32, device="cuda", starts=[start.clone() for start in starts])
    theirs.optimizer = torch.optim.AdamW(theirs.parameters, lr=1e-2, weight_decay=0.1)
    assert not ours.parameters[1].is_contiguous()
    for a, b in zip(ours.run(3).parameters, theirs.run(3).parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)
