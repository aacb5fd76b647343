import datetime
import re

import pytest

from optplan.planner.errors import ConfigError
from optplan.planner.gpus import custom_gpu, estimate_context_bytes, gpu_ids, load_gpu, load_gpus
from optplan.planner.units import GIB, MIB, parse_size

ALL = sorted(load_gpus().values(), key=lambda gpu: gpu.id)
every_gpu = pytest.mark.parametrize("gpu", ALL, ids=lambda gpu: gpu.id)


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ("a100-40g", "a100-40g"),
        ("A100_40GB", "a100-40g"),
        ("a100 40 GiB", "a100-40g"),
        ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("NVIDIA A100-PCIE-40GB", "a100-40g"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80g"),
        ("NVIDIA A10G", "a10g-24g"),
        ("a10", "a10-24g"),
        ("h100", "h100-80g"),
        ("NVIDIA H100 80GB HBM3", "h100-80g"),
        ("NVIDIA H100 PCIe", "h100-pcie-80g"),
        ("NVIDIA H100 NVL", "h100-nvl-94g"),
        ("h200", "h200-141g"),
        ("NVIDIA H200", "h200-141g"),
        ("NVIDIA GH200 480GB", "gh200-96g"),
        ("b200", "b200-192g"),
        ("b200-180g", "b200-192g"),
        ("NVIDIA B300 SXM6 AC", "b300-288g"),
        ("NVIDIA GB200", "gb200-186g"),
        ("l4", "l4-24g"),
        ("l40", "l40-48g"),
        ("L40S", "l40s-48g"),
        ("Tesla T4", "t4-16g"),
        ("Tesla V100-SXM2-32GB", "v100-32g"),
        ("rtx4090", "rtx-4090-24g"),
        ("4090", "rtx-4090-24g"),
        ("NVIDIA GeForce RTX 3080 Ti", "rtx-3080ti-12g"),
        ("RTX A6000", "rtx-a6000-48g"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada-48g"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx-pro-6000-96g"),
        ("mi250x-128g", "mi250x-64g"),
        ("AMD Instinct MI300X", "mi300x-192g"),
    ],
)
def test_close_spellings_and_driver_names_are_understood(spelling, expected):
    assert load_gpu(spelling).id == expected


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("a100", "GPU 'a100' is ambiguous; say which: a100-40g, a100-80g"),
        ("V100", "GPU 'V100' is ambiguous; say which: v100-16g, v100-32g"),
        (
            "NVIDIA GeForce RTX 3080",
            "GPU 'NVIDIA GeForce RTX 3080' is ambiguous; say which: rtx-3080-10g, rtx-3080-12g",
        ),
        (
            "h300",
            "unknown GPU 'h300'; nearest: h200, h100, b300; run `optplan gpus` for the list, or give --memory 38GiB",
        ),
        (
            "rtx-9090",
            (
                "unknown GPU 'rtx-9090'; nearest: rtx-5090, rtx-4090, rtx-3090; "
                "run `optplan gpus` for the list, or give --memory 38GiB"
            ),
        ),
    ],
)
def test_names_that_mean_no_gpu_or_several_are_refused_in_one_sentence(name, sentence):
    with pytest.raises(ConfigError) as caught:
        load_gpu(name)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("name", ["", "-", "NVIDIA", "x" * 10**6, "\x1b[31m", "a100-40g\n\n" * 1000])
def test_hostile_names_are_refused_in_a_short_printable_line(name):
    with pytest.raises(ConfigError) as caught:
        load_gpu(name)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_the_catalogue_is_sorted_and_holds_the_promised_gpus():
    promised = (
        "a100-40g a100-80g h100-80g h200-141g b200-192g l4-24g l40s-48g a10-24g t4-16g v100-16g v100-32g rtx-3090-24g "
        "rtx-4090-24g rtx-5090-32g rtx-a6000-48g mi300x-192g"
    )
    ids = gpu_ids()
    assert list(ids) == sorted(set(ids))
    assert len(ids) >= 34
    assert set(promised.split()) <= set(ids)


def test_every_spelling_in_the_table_leads_back_to_its_row():
    shared = {"geforce-rtx-3080"}  # the driver gives both sizes this name
    for gpu in ALL:
        for name in (gpu.id, gpu.id.upper().replace("-", "_"), gpu.name, *gpu.aliases):
            assert name in shared or load_gpu(name) is gpu


@every_gpu
def test_row_is_complete_with_source_and_date(gpu):
    assert re.fullmatch(r"[a-z0-9-]+-[0-9]+g", gpu.id)
    assert gpu.source.startswith("https://")
    assert datetime.date(2024, 1, 1) <= datetime.date.fromisoformat(gpu.as_of)
    assert gpu.total_source
    assert gpu.context_source
    assert gpu.sm_count > 0
    assert gpu.host_link
    assert (gpu.peer_link is None) == (gpu.peer_link_bytes_per_s is None)
    assert gpu.vendor == ("nvidia" if gpu.architecture.startswith("sm_") else "amd")


@every_gpu
def test_sizes_are_plausible(gpu):
    assert gpu.id.endswith(f"-{gpu.marketing_gib}g")
    assert gpu.marketing_bytes == gpu.marketing_gib * GIB
    assert 0.90 * gpu.marketing_bytes < gpu.total_bytes < gpu.marketing_bytes
    assert 150 * MIB < gpu.context_bytes <= 1024 * MIB
    assert gpu.usable_bytes == gpu.total_bytes - gpu.context_bytes > 0.9 * gpu.total_bytes


@every_gpu
def test_speeds_are_plausible(gpu):
    assert 1e11 < gpu.memory_bandwidth_bytes_per_s < 1e13
    assert 0.5 * gpu.memory_bandwidth_bytes_per_s < gpu.achievable_bandwidth_bytes_per_s
    assert gpu.achievable_bandwidth_bytes_per_s < gpu.memory_bandwidth_bytes_per_s
    assert set(gpu.peak_flops) <= {"fp32", "tf32", "fp16", "bf16", "fp8"}
    speeds = [gpu.peak_flops[dtype] for dtype in ("fp32", "tf32", "fp16", "fp8") if dtype in gpu.peak_flops]
    assert speeds == sorted(speeds)
    assert 1e12 < speeds[0] < 2e14
    assert gpu.peak_flops.get("bf16", gpu.peak_flops["fp16"]) == gpu.peak_flops["fp16"]
    assert gpu.host_link_bytes_per_s >= 1.5e10


@pytest.mark.parametrize(
    ("gpu", "bf16", "fp8", "capability"),
    [
        ("p100-16g", False, False, (6, 0)),
        ("v100-32g", False, False, (7, 0)),
        ("t4-16g", False, False, (7, 5)),
        ("titan-rtx-24g", False, False, (7, 5)),
        ("a100-80g", True, False, (8, 0)),
        ("rtx-3090-24g", True, False, (8, 6)),
        ("l4-24g", True, True, (8, 9)),
        ("h200-141g", True, True, (9, 0)),
        ("b200-192g", True, True, (10, 0)),
        ("b300-288g", True, True, (10, 3)),
        ("rtx-5090-32g", True, True, (12, 0)),
        ("mi250x-64g", True, False, None),
        ("mi300x-192g", True, True, None),
    ],
)
def test_dtypes_follow_the_generation(gpu, bf16, fp8, capability):
    row = load_gpu(gpu)
    assert (row.supports_bf16, row.supports_fp8, row.compute_capability) == (bf16, fp8, capability)


def test_h200_row_holds_what_was_measured():
    gpu = load_gpu("h200")
    assert (gpu.total_bytes, gpu.total_basis) == (150_109_880_320, "measured")
    assert (gpu.context_bytes, gpu.context_basis) == (804_061_184, "measured")
    assert gpu.usable_bytes == 149_305_819_136
    assert gpu.copy_bandwidth_bytes_per_s == 4.28e12


@pytest.mark.parametrize(
    ("gpu", "reported_mib"),
    [  # fresh contexts as nvidia-smi shows them per process, which leaves the driver's own share out
        ("rtx-6000-ada-48g", 426),
        ("b200-192g", 612),
        ("rtx-3090-24g", 256),
    ],
)
def test_estimated_context_is_a_little_above_public_reports(gpu, reported_mib):
    row = load_gpu(gpu)
    fresh_mib = row.context_bytes / MIB - 148
    assert row.context_basis == "estimated"
    assert 0 <= fresh_mib - reported_mib <= 100


def test_context_estimate_reproduces_the_h200_it_was_taken_from():
    assert estimate_context_bytes(sm_count=132, threads_per_sm=2048) == pytest.approx(804_061_184, rel=0.001)


@pytest.mark.parametrize(
    ("num_bytes", "name", "flag"),
    [
        (38 * GIB, "38 GiB", "38GiB"),
        (40 * 10**9, "37.25 GiB", "39062500KiB"),
        (1536 * MIB, "1.5 GiB", "1536MiB"),
        (12_345_678_901, "11.5 GiB", "12345678901B"),
        (1, "1 B", "1B"),
    ],
)
def test_budget_stands_in_for_a_gpu_and_names_itself_again(num_bytes, name, flag):
    gpu = custom_gpu(num_bytes)
    assert (gpu.id, gpu.total_bytes, gpu.context_bytes, gpu.usable_bytes) == (name, num_bytes, 0, num_bytes)
    assert gpu.flags == ("--memory", flag)
    assert parse_size(flag) == num_bytes
    assert gpu.supports_bf16
    assert gpu.achievable_bandwidth_bytes_per_s is None


def test_gpu_names_itself_again():
    assert load_gpu("H200").flags == ("--gpu", "h200-141g")


@pytest.mark.parametrize("budget", [0, -1, 2**50 + 1, 1.5, True, None])
def test_absurd_budgets_are_refused(budget):
    with pytest.raises(ConfigError) as caught:
        custom_gpu(budget)
    assert str(caught.value) == f"--memory must be above 0 and at most 1024 TiB, got {budget} bytes"
