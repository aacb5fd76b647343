"""What CUDA kernels allocate while they run, beside their results; bytes unless said otherwise.

Source: pytorch `aten/src/ATen/native/cuda/EmbeddingBackwardKernel.cu`,
`native/transformers/cuda/mem_eff_attention/kernel_backward.h`, flash-attention's `flash_api.cpp`; cuDNN's workspace was
read off an H200. All of them are held against recorded allocations in the tests.
"""

from __future__ import annotations

from optplan.planner.units import round_up

SCAN_SCRATCH = 1279
"""What cub's scan allocates, where a cumulative sum has one row."""
NARROW_SCAN_SCRATCH = 1023
"""The same where 32-bit integers are summed."""
SMALL_SORT = 4096
"""Up to this many elements `torch.sort` takes no scratch."""
_ONE_TILE = 2304
"""Up to this many 64-bit keys with 64-bit values, one thread block sorts them all."""
_SORT_TILE = 4608
"""Such keys that one thread block of a larger sort takes."""
_TF32_BYTES = 4
_GROUP_BYTES = 60
"""What a grouped product keeps of each group: pointers, shapes and strides."""
GROUPED_ALIGNMENT_BYTES = 16
"""Multiple of which the rows of a grouped product's matrices must be long (`native/GroupedMMUtils.h`)."""
_FEW_ROWS = 64
"""Rows of an embedding up to which its gradient's segments are added to the rows at once: so of 2 and 32, not 2003."""
_EMBEDDING_SORT_LIMIT = 3072
"""Up to this many tokens the gradient of an embedding is made by a kernel that needs no scratch."""


def embedding_partial_sums(num_tokens: int, num_rows: int) -> int | None:
    """Segments whose partial sums a sorting embedding backward keeps, None where the simple kernel is used."""
    if num_tokens <= _EMBEDDING_SORT_LIMIT:
        return None
    return num_tokens // 10 + min(num_tokens, num_rows)


def embedding_segment_scratch(segments: int, num_rows: int, width: int, *, is_fp32: bool) -> tuple[int, ...]:
    """What the sums of an embedding's segments take: a sum of each, or where rows are few a sum of each row in fp32."""
    if num_rows <= _FEW_ROWS:
        return (8 * segments,) if is_fp32 else (8 * segments, 4 * num_rows * width)
    return (4 * segments * width,)


def radix_sort_scratch(num_keys: int) -> int:
    """Scratch of cub's radix sort of 64-bit keys with 64-bit values: two buffers and histograms."""
    return 2 * round_up(8 * num_keys, 256) + 16_895 + 1024 * -(-num_keys // _SORT_TILE)


def pair_sort_scratch(count: int, num_rows: int) -> int:
    """Scratch of cub's radix sort of row numbers with positions: it looks at as many bits as the rows need."""
    if count <= _ONE_TILE:
        return 1
    passes = -(-max(num_rows - 1, 1).bit_length() // 8)
    return 2 * round_up(8 * count, 256) + 511 + 2048 * passes + 1024 * -(-count // _SORT_TILE)


def patch_gradient_scratch(
    images: int, patches: int, weight: int, *, num_images: int, sizes: tuple[int, int], itemsize: int
) -> int:
    """Workspace of cuDNN's weight gradient of a convolution that cuts images into patches, on tensor cores.

    It holds the images, the weight's gradient and the patches' gradient with their channels last, those of an image and
    those of a patch filled up to 16 bytes each: on an H200 to the byte, in bf16 of 1 and 5 images and in fp32 (as TF32)
    of 5. In fp32 of a single image cuDNN chose a kernel without workspace there, for patches of 108 and 384 channels.

    Args:
        images: Elements of all images.
        patches: Elements of all patches' gradients.
        weight: Elements of the weight.
        num_images: Images.
        sizes: Channels of an image and of a patch.
        itemsize: Bytes of an element.
    """
    if itemsize == _TF32_BYTES and num_images == 1:
        return 0
    channels, width = sizes
    pixel, patch = (round_up(size * itemsize, 16) for size in sizes)
    return (
        images // channels * pixel
        + weight // (channels * width) * pixel * patch // itemsize
        + patches // width * patch
        + 16
    )


def grouped_product_scratch(num_groups: int, resident_threads: int) -> tuple[int, int]:
    """What a grouped product in 16 bits takes: the groups' arguments, and 512 bytes for each multiprocessor."""
    return _GROUP_BYTES * num_groups, 512 * (resident_threads // 2048)


def flash_backward_scratch(batch: int, heads: int, kv_heads: int, seq: int, head_dim: int) -> tuple[int, ...]:
    """Scratch of flash-attention's backward: row sums, fp32 gradient of the queries, per-head dk and dv if grouped."""
    rows = batch * heads * round_up(seq, 128)
    width = round_up(head_dim, 32) if head_dim <= 128 else round_up(head_dim, 64)
    grouped = () if kv_heads == heads else (2 * batch * seq * heads * head_dim,) * 2
    return (4 * rows, 4 * rows * width, *grouped)


def cudnn_backward_scratch(batch: int, heads: int, kv_heads: int, seq: int, head_dim: int) -> int:
    """Workspace of cuDNN's attention backward: fp32 query gradient, row sums, per-head dk and dv if grouped."""
    elements = batch * heads * seq * head_dim
    return 4 * elements + 4 * batch * heads * seq + 256 + (0 if kv_heads == heads else 4 * elements)


def efficient_backward_scratch(batch: int, heads: int, seq: int, head_dim: int, *, itemsize: int) -> int:
    """Workspace of memory-efficient attention's backward: the gradient of the queries in tiles with a lock each."""
    tile_rows = 64 if head_dim <= 64 else 128
    tile_columns = 128 if head_dim > 64 and itemsize == 2 else 64
    tiles = -(-seq // tile_rows) * -(-head_dim // tile_columns)
    return 4 * batch * heads * tiles * (tile_rows * tile_columns + 4)
