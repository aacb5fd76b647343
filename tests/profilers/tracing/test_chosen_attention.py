"""The attention kernel that CUDA would take, and what a trace says about it."""

import pytest
import torch

from optplan.profilers.tracing.attention import Chooser

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("capability", "dtype", "heads", "kv_heads", "width", "masked", "kernel"),
    [
        ((9, 0), BF16, 8, 8, 64, False, "cudnn"),
        ((9, 0), BF16, 8, 2, 64, True, "cudnn"),
        ((8, 0), BF16, 8, 8, 64, False, "flash"),
        ((8, 0), FP16, 8, 2, 128, False, "flash"),
        ((8, 0), BF16, 8, 8, 64, True, "efficient"),
        ((8, 0), BF16, 8, 8, 512, False, "efficient"),
        ((8, 0), BF16, 8, 2, 64, True, "math"),
        ((7, 5), FP16, 8, 8, 64, False, "efficient"),
        ((7, 5), BF16, 8, 8, 64, False, "math"),
        ((8, 0), FP32, 8, 8, 64, False, "efficient"),
        ((9, 0), FP32, 8, 2, 64, False, "math"),
        ((9, 0), BF16, 9, 3, 86, False, "flash"),
        ((9, 0), BF16, 8, 8, 36, False, "flash"),
        ((9, 0), BF16, 8, 8, 36, True, "math"),
        ((9, 0), FP32, 8, 8, 36, True, "efficient"),
        ((9, 0), FP32, 8, 8, 86, False, "math"),
    ],
)
def test_the_kernel_follows_from_dtype_heads_width_mask_and_gpu(
    capability, dtype, heads, kv_heads, width, masked, kernel
):
    query = torch.empty(1, heads, 16, width, dtype=dtype, device="meta")
    key = torch.empty(1, kv_heads, 16, width, dtype=dtype, device="meta")
    mask = torch.empty(1, 1, 16, 16, dtype=torch.bool, device="meta") if masked else None
    chooser = Chooser(capability)
    assert chooser.choose(query, key, key, mask) == kernel
    assert chooser.chosen == [kernel]


def test_a_bias_that_learns_has_one_fused_kernel_that_reads_it_row_by_row():
    # Recorded on an H200 with T5: the decoder's bias of zeros, and the transposed table of the encoder.
    query = torch.empty(1, 8, 16, 64, dtype=BF16, device="meta")
    bias = torch.empty(1, 8, 16, 16, dtype=BF16, device="meta", requires_grad=True)
    assert Chooser((9, 0)).choose(query, query, query, bias) == "efficient"
    assert Chooser((9, 0)).choose(query, query, query, bias.permute(0, 3, 2, 1)) == "math"


def test_numbers_that_do_not_lie_row_by_row_have_no_fused_kernel():
    # Recorded on an H200 with T5 inside a reentrant checkpoint, where its transposed table asks for no gradient.
    query = torch.empty(1, 8, 16, 64, dtype=BF16, device="meta")
    bias = torch.empty(1, 16, 16, 8, dtype=BF16, device="meta")
    assert Chooser((9, 0)).choose(query, query, query, bias.permute(0, 3, 1, 2)) == "math"


def test_a_bias_that_learns_needs_heads_that_tensor_cores_can_load():
    query = torch.empty(1, 8, 16, 36, dtype=BF16, device="meta")
    bias = torch.empty(1, 8, 16, 16, dtype=BF16, device="meta", requires_grad=True)
    assert Chooser((9, 0)).choose(query, query, query, bias) == "math"
    assert Chooser((9, 0)).choose(query.float(), query.float(), query.float(), bias.float()) == "efficient"


def test_values_of_another_width_are_beyond_flash_attention():
    query = torch.empty(1, 8, 16, 64, dtype=BF16, device="meta")
    value = torch.empty(1, 8, 16, 32, dtype=BF16, device="meta")
    assert Chooser((8, 0)).choose(query, query, value, None) == "efficient"
