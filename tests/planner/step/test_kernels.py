"""Scratch of kernels as the allocator of an H200 recorded it (torch 2.11, cuDNN 9.19), one operation at a time."""

import pytest

from optplan.planner.step import kernels


@pytest.mark.parametrize(
    ("shape", "num_bytes"),
    [
        ((1, 4, 4, 128, 64), 133_376),
        ((3, 6, 6, 173, 64), 809_896),
        ((3, 6, 2, 173, 64), 1_607_080),
        ((1, 32, 32, 2048, 128), 33_816_832),
        ((1, 32, 8, 1024, 128), 33_685_760),
        ((2, 8, 1, 512, 256), 16_810_240),
        ((4, 9, 3, 900, 64), 16_718_656),
        ((1, 32, 32, 1000, 96), 12_416_256),
        ((1, 40, 40, 640, 80), 8_294_656),
    ],
)
def test_cudnn_attention_backward(shape, num_bytes):
    assert kernels.cudnn_backward_scratch(*shape) == num_bytes


@pytest.mark.parametrize(
    ("shape", "scratch"),
    [
        ((3, 6, 6, 173, 64), (18_432, 1_179_648)),
        ((3, 6, 2, 173, 64), (18_432, 1_179_648, 398_592, 398_592)),
        ((1, 32, 32, 2048, 128), (262_144, 33_554_432)),
        ((2, 8, 4, 700, 256), (49_152, 12_582_912, 5_734_400, 5_734_400)),
        ((1, 32, 32, 1000, 96), (131_072, 12_582_912)),
        ((1, 40, 40, 640, 80), (102_400, 9_830_400)),
        ((1, 8, 8, 512, 72), (16_384, 1_572_864)),
    ],
)
def test_flash_attention_backward(shape, scratch):
    assert kernels.flash_backward_scratch(*shape) == scratch


@pytest.mark.parametrize(
    ("shape", "itemsize", "num_bytes"),
    [
        ((1, 4, 128, 64), 4, 131_200),
        ((3, 6, 173, 64), 4, 885_600),
        ((1, 32, 2048, 128), 4, 33_570_816),
        ((1, 25, 700, 64), 4, 4_510_000),
        ((1, 32, 1000, 96), 4, 16_785_408),
        ((1, 40, 640, 80), 4, 13_113_600),
        ((1, 8, 512, 72), 4, 2_098_176),
        ((2, 8, 700, 256), 4, 12_589_056),
        ((1, 12, 1024, 64), 2, 3_148_800),
        ((1, 32, 1000, 96), 2, 16_781_312),
        ((1, 8, 512, 72), 2, 2_097_664),
    ],
)
def test_memory_efficient_attention_backward(shape, itemsize, num_bytes):
    assert kernels.efficient_backward_scratch(*shape, itemsize=itemsize) == num_bytes


@pytest.mark.parametrize(
    ("num_tokens", "num_rows", "segments"),
    [(3072, 32_000, None), (3073, 2003, 2310), (3073, 32_000, 3380), (4096, 50_257, 4505), (8192, 2003, 2822)],
)
def test_segments_of_an_embedding_gradient(num_tokens, num_rows, segments):
    assert kernels.embedding_partial_sums(num_tokens, num_rows) == segments


@pytest.mark.parametrize(("num_keys", "num_bytes"), [(3073, 67_583), (3505, 74_239), (4096, 83_455), (8192, 150_015)])
def test_sorting_scratch(num_keys, num_bytes):
    assert kernels.radix_sort_scratch(num_keys) == num_bytes


@pytest.mark.parametrize(
    ("num_images", "width", "itemsize", "num_bytes"),
    [
        (1, 384, 2, 2_161_424),
        (5, 384, 2, 4_515_600),
        (5, 384, 4, 4_980_240),
        (1, 384, 4, 0),
        (1, 108, 2, 981_488),
        (1, 108, 4, 0),
    ],
)
def test_the_weight_gradient_of_patches(num_images, width, itemsize, num_bytes):
    # Images of 3 channels and 176 x 176 pixels, patches of 16 x 16.
    images, patches, weight = num_images * 3 * 176 * 176, num_images * 121 * width, width * 3 * 16 * 16
    sizes = {"num_images": num_images, "sizes": (3, width), "itemsize": itemsize}
    assert kernels.patch_gradient_scratch(images, patches, weight, **sizes) == num_bytes
