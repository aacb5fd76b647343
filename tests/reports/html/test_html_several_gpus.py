"""A page about several GPUs says how many, how they divide the work, and which figures are of each."""

from __future__ import annotations

import html
import re
from typing import Any

import msgspec
import pytest

import optplan
from optplan.planner.estimate_details import details_of
from optplan.reports.html.estimate_page import estimate_page
from optplan.reports.markdown.estimate import estimate_markdown

STEP = {"precision": "mixed", "checkpointing": "full", "gpus": 16, "sharding": "fsdp2"}
REPORT = optplan.estimate("llama-3.2-1b", gpu="h100", optimizer=["adamw", "adam-mini"], **STEP)  # type: ignore[arg-type]
PAGE = estimate_page(REPORT, details_of(REPORT))
ALONE = optplan.estimate("gpt2", gpu="h100", optimizer="adamw")


def texts(page: str, element: str) -> list[str]:
    """What the page's elements of a kind say, without their markup."""
    found = re.findall(rf"<{element}\b[^>]*>(.*?)</{element}>", page, flags=re.DOTALL)
    return [" ".join(html.unescape(re.sub(r"<[^>]*>", "", text)).split()) for text in found]


def test_the_setting_names_gpus_nodes_and_sharding() -> None:
    assert (
        "1,235,814,400 parameters · mixed · micro-batch 1 × 2048 tokens per GPU · checkpointing full · sdpa attention "
        "· 16 GPUs on 2 nodes, fsdp2; memory is that of each GPU"
    ) in texts(PAGE, "p")
    assert "one GPU" not in PAGE
    (setting,) = [text for text in texts(estimate_page(ALONE), "p") if "parameters ·" in text]
    assert setting.endswith("micro-batch 1 × 1024 tokens · checkpointing none · sdpa attention · one GPU")


def test_the_headline_counts_them() -> None:
    assert texts(PAGE, "h1") == ["llama-3.2-1b fits on 16 × h100-80g"]
    assert texts(estimate_page(ALONE), "h1") == ["gpt2 with adamw fits on h100-80g"]


def test_what_the_allocator_has_is_said_of_each() -> None:
    assert (
        "adamw at the peak of a steady step on each of 16 GPUs, beside what h100-80g leaves to torch's allocator: "
        "77.60 GiB of 79.18 GiB. The context takes 0.75 GiB and NCCL 0.83 GiB before."
    ) in texts(PAGE, "p")


def test_every_first_number_says_whose_it_is() -> None:
    assert texts(PAGE, "dt")[:6] == [
        "peak allocated per GPU, in backward", "headroom per GPU", "peak reserved per GPU", "usable per GPU",
        "time of a step", "largest micro-batch per GPU",
    ]  # fmt: skip
    assert texts(estimate_page(ALONE), "dt")[:6] == [
        "peak allocated, in backward", "headroom", "peak reserved", "usable", "time of a step", "largest micro-batch",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "title",
    [
        "Each GPU's memory at the peak",
        "Alive per GPU at each optimizer's peak",
        "What survives of each saving per GPU",
        "Peak memory per GPU against the time of a step",
        "Allocated memory per GPU over a steady step",
        "State per GPU by module",
    ],
)
def test_every_figure_says_whose_memory_it_shows(title: str) -> None:
    assert title in texts(PAGE, "h3")


def test_the_switches_say_whose_memory_they_show() -> None:
    assert (
        "Every combination was worked out by the planner when this page was written; the page looks it up and "
        "calculates nothing. Memory is that of each of 16 GPUs."
    ) in texts(PAGE, "p")


@pytest.mark.parametrize(
    ("optimizer", "step"),
    [
        (["adamw", "adam-mini"], STEP),
        # Sixteen GPUs are taken for two nodes unless something else is said.
        ("adamw", {**STEP, "nodes": 1}),
        ("adam-mini", {"state_dtype": "fp32"}),
    ],
)
def test_the_call_in_python_makes_the_same_estimate(optimizer: str | list[str], step: dict[str, Any]) -> None:
    report = optplan.estimate("llama-3.2-1b", gpu="h100", optimizer=optimizer, **step)
    page, shown = estimate_page(report), report.recommendation
    (call,) = [text for text in re.findall(r"<pre[^>]*>(.*?)</pre>", page, flags=re.DOTALL) if "import optplan" in text]
    scope: dict[str, optplan.EstimateReport] = {}
    exec(html.unescape(re.sub(r"<[^>]*>", "", call)), scope)
    made = scope["report"]
    assert shown is not None
    assert made.config == shown.config
    assert made.estimates[0].peak_allocated_bytes == report.estimates[0].peak_allocated_bytes


def test_the_call_in_python_on_a_traced_step_traces_it() -> None:
    traced = msgspec.structs.replace(ALONE, engine="trace")
    (call,) = [text for text in texts(estimate_page(traced), "pre") if "report = " in text]
    assert call.startswith("from optplan.profilers.estimation import traced_estimate report = traced_estimate( 'gpt2'")


def test_the_headline_names_fragmentation_where_it_refuses_the_only_step() -> None:
    refused = optplan.estimate("llama-7b", gpu="a100-40g", optimizer="adam-mini")
    (headline,) = texts(estimate_page(refused), "h1")
    assert headline == "llama-1-7b does not fit on a100-40g: 1.04 GiB to spare by bytes, lost to fragmentation"
    assert estimate_markdown(refused).splitlines()[0] == (
        "### llama-1-7b with adam-mini does not fit on a100-40g: 1.04 GiB to spare by bytes, lost to fragmentation"
    )


def test_markdown_names_them_too() -> None:
    assert estimate_markdown(REPORT).splitlines()[2] == (
        "1,235,814,400 parameters, mixed, micro-batch 1 x 2048 tokens per GPU, checkpointing full, sdpa attention; "
        "16 GPUs on 2 nodes, fsdp2; each: 77.60 GiB usable of 79.18 GiB"
    )
