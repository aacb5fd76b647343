import pytest

from optplan.planner.step.attention import choose_backend
from optplan.planner.step.attention_shape import AttentionShape

A100, H100, H200, B200, RTX_4090, T4 = (8, 0), (9, 0), (9, 0), (10, 0), (8, 9), (7, 5)
PLAIN = AttentionShape(batch=2, seq=1024, heads=32, kv_heads=32, width=128)
GROUPED = AttentionShape(batch=2, seq=1024, heads=32, kv_heads=8, width=128)
WIDE = AttentionShape(batch=2, seq=1024, heads=8, kv_heads=8, width=512)


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
    ],
)
def test_the_kernel_that_sdpa_runs(dtype, shape, masked, capability, backend):
    assert choose_backend(dtype, shape, masked=masked, capability=capability) == backend
