import pytest

from optplan.planner.step.attention import choose_backend
from optplan.planner.step.attention_shape import AttentionShape

A100, H100, H200, B200, RTX_4090, T4 = (8, 0), (9, 0), (9, 0), (10, 0), (8, 9), (7, 5)
PLAIN = AttentionShape(batch=2, seq=1024, heads=32, kv_heads=32, width=128)
GROUPED = AttentionShape(batch=2, seq=1024, heads=32, kv_heads=8, width=128)
WIDE = AttentionShape(batch=2, seq=1024, heads=8, kv_heads=8, width=512)
ONE_TOKEN = AttentionShape(batch=2, seq=1, heads=8, kv_heads=8, width=64)


def plain(width):
    return AttentionShape(batch=2, seq=1024, heads=9, kv_heads=9, width=width)


def grouped(width):
    return AttentionShape(batch=2, seq=1024, heads=9, kv_heads=3, width=width)


@pytest.mark.parametrize(
    ("dtype", "shape", "masked", "capability", "backend"),
    [
        ("bfloat16", PLAIN, False, H200, "cudnn"),
        ("bfloat16", GROUPED, False, H200, "cudnn"),
        ("bfloat16", PLAIN, True, H100, "cudnn"),
        ("bfloat16", GROUPED, False, B200, "cudnn"),
        ("bfloat16", PLAIN, False, A100, "flash"),
        ("float16", GROUPED, False, RTX_4090, "flash"),
        ("bfloat16", PLAIN, True, A100, "efficient"),
        ("bfloat16", WIDE, False, A100, "efficient"),
        ("float32", PLAIN, False, H200, "efficient"),
        ("float32", PLAIN, True, A100, "efficient"),
        ("float32", GROUPED, False, H200, "math"),
        ("float32", GROUPED, False, A100, "math"),
        ("float16", PLAIN, False, T4, "efficient"),
        ("bfloat16", PLAIN, False, T4, "math"),
        ("bfloat16", ONE_TOKEN, False, H200, "flash"),
        # Heads of 86 and 36 elements were measured on an H200: tests/records/h200_steps.jsonl.
        ("bfloat16", plain(36), False, H200, "flash"),
        ("bfloat16", grouped(86), False, H200, "flash"),
        ("float16", plain(86), False, A100, "flash"),
        ("bfloat16", plain(86), True, H200, "math"),
        ("bfloat16", plain(88), True, A100, "efficient"),
        ("float32", plain(36), False, H200, "efficient"),
        ("float32", plain(86), False, H200, "math"),
        ("float32", plain(86), False, T4, "efficient"),
        ("float16", plain(86), False, T4, "math"),
        ("float16", plain(88), False, T4, "efficient"),
        ("bfloat16", plain(224), False, RTX_4090, "efficient"),
        ("bfloat16", grouped(224), False, RTX_4090, "math"),
        ("bfloat16", plain(256), False, RTX_4090, "flash"),
        ("bfloat16", plain(192), False, RTX_4090, "flash"),
    ],
)
def test_the_kernel_that_sdpa_runs(dtype, shape, masked, capability, backend):
    assert choose_backend(dtype, shape, masked=masked, capability=capability) == backend


def test_dropout_takes_the_widest_heads_from_flash_attention_on_small_gpus():
    assert choose_backend("bfloat16", plain(256), masked=False, capability=RTX_4090, drops=True) == "efficient"
    assert choose_backend("bfloat16", plain(256), masked=False, capability=A100, drops=True) == "flash"
