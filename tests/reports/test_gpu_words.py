"""How many GPUs, and which figures are of each, in words."""

from typing import Any

import msgspec
import pytest

from optplan.planner.records import StepConfig
from optplan.reports.gpu_words import gpus_in_words, per_copy, per_gpu

ONE = StepConfig("mixed", 1, 2048, 1, "full", "sdpa", 1, "none")


@pytest.mark.parametrize(
    ("settings", "words", "figure", "batch"),
    [
        ({}, "one GPU", "", ""),
        ({"gpus": 2, "sharding": "ddp"}, "2 GPUs, ddp", " per GPU", " per GPU"),
        ({"gpus": 48, "nodes": 6, "sharding": "fsdp2"}, "48 GPUs on 6 nodes, fsdp2", " per GPU", " per GPU"),
        (
            {"gpus": 64, "nodes": 8, "sharding": "zero1", "tensor_parallel": 8, "sequence_parallel": True},
            "64 GPUs on 8 nodes, zero1, tensor parallel 8, sequence parallel", " per GPU", " per copy of the model",
        ),
        (
            {"gpus": 4, "pipeline_parallel": 4, "pipeline_schedule": "gpipe"},
            "4 GPUs, 4 stages, gpipe", " per GPU", " per copy of the model",
        ),
    ],
)  # fmt: skip
def test_gpus_and_what_is_of_each(settings: dict[str, Any], words: str, figure: str, batch: str) -> None:
    config = msgspec.structs.replace(ONE, **settings)
    assert (gpus_in_words(config), per_gpu(config), per_copy(config)) == (words, figure, batch)
