"""What `PYTORCH_CUDA_ALLOC_CONF` says, against torch's documented behaviour and torch's own parser."""

import pytest

from optplan.planner.allocator.settings import AllocatorSettings, parse_alloc_conf
from optplan.planner.errors import ConfigError
from optplan.planner.units import MIB


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", AllocatorSettings()),
        ("backend:native", AllocatorSettings()),
        (
            "max_split_size_mb:128",
            AllocatorSettings(max_split_bytes=128 * MIB),
        ),
        (" max_split_size_mb : 40 , ", AllocatorSettings(max_split_bytes=40 * MIB)),
        (
            "expandable_segments:True,garbage_collection_threshold:0.8",
            AllocatorSettings(expandable_segments=True, garbage_collection_threshold=0.8),
        ),
        ("expandable_segments:True,expandable_segments:False", AllocatorSettings()),
        ("roundup_power2_divisions:4", AllocatorSettings(roundup_power2_divisions=(4,) * 16)),
        # Below the first size its divisions hold too; sizes not named have none; > is all above the last named.
        (
            "roundup_power2_divisions:[256:1,512:2,1024:4,>:8]",
            AllocatorSettings(roundup_power2_divisions=(1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 4, 8, 8, 8, 8, 8)),
        ),
        (
            "roundup_power2_divisions:[2:8,16:2]",
            AllocatorSettings(roundup_power2_divisions=(8, 8, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)),
        ),
        (
            "roundup_power2_divisions:[>:8]",
            AllocatorSettings(roundup_power2_divisions=(0, *(8,) * 15)),
        ),
        # The large segment is read first, wherever it stands.
        (
            "max_split_size_mb:15,large_segment_size_mb:12",
            AllocatorSettings(
                max_split_bytes=15 * MIB, large_segment_bytes=12 * MIB, max_non_split_rounding_bytes=12 * MIB
            ),
        ),
        (
            "max_split_size_mb:32,max_non_split_rounding_mb:48",
            AllocatorSettings(max_split_bytes=32 * MIB, max_non_split_rounding_bytes=48 * MIB),
        ),
        (
            "pinned_num_register_threads:8,release_lock_on_cudamalloc:True",
            AllocatorSettings(ignored=("pinned_num_register_threads", "release_lock_on_cudamalloc")),
        ),
        ("per_process_memory_fraction:0.5", AllocatorSettings(memory_fraction=0.5)),
    ],
)
def test_a_text_makes_these_settings(text, expected):
    assert parse_alloc_conf(text) == expected


REFUSED = [
    (
        "expandble_segments:True",
        "unknown setting in --alloc-conf 'expandble_segments'; nearest: expandable_segments, large_segment_size_mb,"
        " pinned_reserve_segment_size_mb",
    ),
    (
        "max_split_size_mb=40",
        "--alloc-conf 'max_split_size_mb=40' is not a list of settings; write it like"
        " max_split_size_mb:128,expandable_segments:True",
    ),
    (
        "roundup_power2_divisions:[256:1",
        "--alloc-conf 'roundup_power2_divisions:[256:1' is not a list of settings; write it like"
        " max_split_size_mb:128,expandable_segments:True",
    ),
    ("max_split_size_mb:19", "max_split_size_mb in --alloc-conf must be an integer of at least 20, got '19'"),
    ("max_split_size_mb:-1", "max_split_size_mb in --alloc-conf must be an integer of at least 20, got '-1'"),
    (
        "max_split_size_mb:25,large_segment_size_mb:30",
        "max_split_size_mb in --alloc-conf must be an integer of at least 30, got '25'",
    ),
    ("large_segment_size_mb:10", "large_segment_size_mb in --alloc-conf must be an integer of at least 11, got '10'"),
    (
        "garbage_collection_threshold:1.0",
        "garbage_collection_threshold in --alloc-conf must be above 0 and below 1, got '1.0'",
    ),
    (
        "garbage_collection_threshold:nan",
        "garbage_collection_threshold in --alloc-conf must be above 0 and below 1, got 'nan'",
    ),
    ("expandable_segments:true", "expandable_segments in --alloc-conf must be True or False, got 'true'"),
    (
        "roundup_power2_divisions:3",
        "roundup_power2_divisions in --alloc-conf must be divisions that are a power of two, got '3'",
    ),
    (
        "roundup_power2_divisions:[256:3]",
        "roundup_power2_divisions in --alloc-conf must be divisions that are a power of two or 0, got '3'",
    ),
    (
        "roundup_power2_divisions:[100:2]",
        "roundup_power2_divisions in --alloc-conf must be sizes in MiB that are powers of two, or >, got '100'",
    ),
    ("backend:cudaMallocAsync", "backend 'cudaMallocAsync' in --alloc-conf is not modelled; allowed: native"),
    (
        "per_process_memory_fraction:1.5",
        "per_process_memory_fraction in --alloc-conf must be between 0 and 1, got '1.5'",
    ),
]


@pytest.mark.parametrize(("text", "sentence"), REFUSED)
def test_what_cannot_be_read_is_refused(text, sentence):
    with pytest.raises(ConfigError) as error:
        parse_alloc_conf(text)
    assert str(error.value) == sentence


TORCH_ACCEPTS = [
    ("max_split_size_mb:20", True),
    ("max_split_size_mb:19", False),
    ("max_split_size_mb:15,large_segment_size_mb:12", True),
    ("max_split_size_mb:25,large_segment_size_mb:30", False),
    ("large_segment_size_mb:10", False),
    ("max_non_split_rounding_mb:19", False),
    ("garbage_collection_threshold:0.8", True),
    ("garbage_collection_threshold:0", False),
    ("garbage_collection_threshold:1.0", False),
    ("expandable_segments:True", True),
    ("expandable_segments:true", False),
    ("roundup_power2_divisions:8", True),
    ("roundup_power2_divisions:0", False),
    ("roundup_power2_divisions:3", False),
    ("roundup_power2_divisions:[256:1,512:2,>:8]", True),
    ("roundup_power2_divisions:[256:0]", True),
    ("roundup_power2_divisions:[256:3]", False),
    ("roundup_power2_divisions:[100:2]", False),
    ("roundup_power2_divisions:[256:1", False),
    (" max_split_size_mb : 40 , ", True),
    ("max_split_size_mb=40", False),
    ("max_split_size_mb", False),
]


@pytest.mark.parametrize(("text", "accepted"), TORCH_ACCEPTS)
def test_torch_s_own_parser_accepts_the_same(text, accepted):
    torch = pytest.importorskip("torch")
    if not hasattr(torch._C, "_accelerator_setAllocatorSettings"):
        pytest.skip("this torch does not offer its parser")
    for parse, refusal in (
        (torch._C._accelerator_setAllocatorSettings, (ValueError, RuntimeError)),
        (parse_alloc_conf, ConfigError),
    ):
        try:
            parse(text)
            took = True
        except refusal:
            took = False
        assert took is accepted, parse
    torch._C._accelerator_setAllocatorSettings("")


@pytest.mark.parametrize(
    ("divisions", "requested", "rounded"),
    [
        # Between 1024 and 2048 four divisions end at 1280, 1536 and 1792; but 4 * 512 bytes and less are not divided.
        (4, 1200, 1536),
        (4, 2048, 2048),
        (4, 2049, 2560),
        (4, 1 * MIB + 1, MIB + MIB // 4),
        (4, 3 * MIB + 1, 3 * MIB + MIB // 2),
        (4, 4 * MIB, 4 * MIB),
        (1, 1200, 1536),
        (2, 9 * MIB, 12 * MIB),
        (8, 100, 512),
    ],
)
def test_requests_are_rounded_up_to_a_division_of_a_power_of_two(divisions, requested, rounded):
    assert parse_alloc_conf(f"roundup_power2_divisions:{divisions}").rounded(requested) == rounded


@pytest.mark.parametrize(
    ("text", "size", "segment"),
    [
        ("", MIB, 2 * MIB),
        ("", MIB + 512, 20 * MIB),
        ("large_segment_size_mb:40", MIB + 512, 40 * MIB),
        ("large_segment_size_mb:40", 10 * MIB, 10 * MIB),
        ("large_segment_size_mb:40", 11 * MIB, 12 * MIB),
    ],
)
def test_the_large_segment_s_size_is_a_setting(text, size, segment):
    assert parse_alloc_conf(text).segment_bytes(size) == segment
