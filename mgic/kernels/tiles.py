"""The Triton programs. Features are NHWC; weights lie ``(row, column, input, output)``, so that both load along channels.

A program owns some pixels and a bundle of whole groups, enough of them that a row of a feature map loads at least 128 bytes.
Inside it a bundle is one small dense layer whose weight is block-diagonal: where two channels belong to different groups,
the weight is zero and nothing is read. On these layers memory is the limit, the multiplications with zero are free.

``DOT`` is the type in which tiles are multiplied: that of the features, but float32 for Triton's interpreter, which takes the
bits of bfloat16 for integers. What an unfused network stores between two convolutions is rounded here too.
"""

import triton
import triton.language as tl


@triton.jit
def _activate(v, ACT: tl.constexpr):
    if ACT == "relu":
        v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "hard_swish":
        gate = tl.maximum(v + 3.0, 0.0, propagate_nan=tl.PropagateNan.ALL)
        v = v * tl.minimum(gate, 6.0, propagate_nan=tl.PropagateNan.ALL) * (1.0 / 6.0)
    return v


@triton.jit
def _weights(weight, k, n, first, total, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, MERGED: tl.constexpr):
    """Block-diagonal weight of a bundle: inputs ``k`` and outputs ``n`` count from its first channel, ``first``."""
    same_group = (k[:, None] // INPUTS) == (n[None, :] // OUTPUTS)
    there = (k < MERGED * INPUTS)[:, None] & ((n < MERGED * OUTPUTS) & (first + n < total))[None, :]
    at = (k % INPUTS)[:, None] * total + (first + n)[None, :]
    return tl.load(weight + at, mask=same_group & there, other=0.0)


@triton.jit
def grouped_conv(
    x,
    weight,
    bias,
    before,
    after,
    y,
    pixels,
    height,
    width,
    out_height,
    out_width,
    groups,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    ACT: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    MERGED: tl.constexpr,
    PIXELS: tl.constexpr,
    TILE_IN: tl.constexpr,
    TILE_OUT: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``y = act(conv(x) + bias + before) + AFTER * after``: implicit GEMM over taps and channels."""
    parts: tl.constexpr = (MERGED * OUTPUTS + TILE_OUT - 1) // TILE_OUT
    steps: tl.constexpr = (MERGED * INPUTS + TILE_IN - 1) // TILE_IN
    bundle, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    n = part * TILE_OUT + tl.arange(0, TILE_OUT)
    first_in, first_out = bundle * MERGED * INPUTS, bundle * MERGED * OUTPUTS
    all_in, all_out = groups * INPUTS, groups * OUTPUTS

    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    image, place = p // (out_height * out_width), p % (out_height * out_width)
    row, column = place // out_width * STRIDE - KERNEL // 2, place % out_width * STRIDE - KERNEL // 2

    sums = tl.zeros((PIXELS, TILE_OUT), tl.float32)
    for i in range(KERNEL * KERNEL * steps):
        tap = i // steps
        k = i % steps * TILE_IN + tl.arange(0, TILE_IN)
        r, c = row + tap // KERNEL, column + tap % KERNEL
        inside = (p < pixels) & (r >= 0) & (r < height) & (c >= 0) & (c < width)
        there = (k < MERGED * INPUTS) & (first_in + k < all_in)
        at = ((image * height + r) * width + c).to(tl.int64) * all_in
        a = tl.load(x + at[:, None] + (first_in + k)[None, :], mask=inside[:, None] & there[None, :], other=0.0)
        w = _weights(weight + tap * INPUTS * all_out, k, n, first_out, all_out, INPUTS, OUTPUTS, MERGED)
        sums = tl.dot(a.to(DOT), w.to(DOT), sums, input_precision=PRECISION)

    there = (n < MERGED * OUTPUTS) & (first_out + n < all_out)
    mask = (p < pixels)[:, None] & there[None, :]
    at = p.to(tl.int64)[:, None] * all_out + (first_out + n)[None, :]
    v = sums + tl.load(bias + first_out + n, mask=there, other=0.0)[None, :]
    if BEFORE:
        v += tl.load(before + at, mask=mask, other=0.0).to(tl.float32)
    v = _activate(v, ACT)
    if AFTER != 0:
        v += AFTER * tl.load(after + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, v.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _restrict(
    x,
    weight,
    y,
    p,
    pixels,
    bundle,
    total,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    MERGED: tl.constexpr,
    TILE_IN: tl.constexpr,
    TILE_OUT: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One restriction of features that are in registers; stored, and returned for the next one."""
    n = tl.arange(0, TILE_OUT)
    first = bundle * MERGED * OUTPUTS
    w = _weights(weight, tl.arange(0, TILE_IN), n, first, total, INPUTS, OUTPUTS, MERGED)
    v = tl.dot(x.to(DOT), w.to(DOT), input_precision=PRECISION).to(y.dtype.element_ty)
    mask = (p < pixels)[:, None] & ((n < MERGED * OUTPUTS) & (first + n < total))[None, :]
    tl.store(y + p.to(tl.int64)[:, None] * total + (first + n)[None, :], v, mask=mask)
    return v


@triton.jit
def restriction_chain(
    x,
    weight1,
    weight2,
    weight3,
    y1,
    y2,
    y3,
    pixels,
    channels,
    channels1,
    channels2,
    channels3,
    INPUTS1: tl.constexpr,
    OUTPUTS1: tl.constexpr,
    MERGED1: tl.constexpr,
    INPUTS2: tl.constexpr,
    OUTPUTS2: tl.constexpr,
    MERGED2: tl.constexpr,
    INPUTS3: tl.constexpr,
    OUTPUTS3: tl.constexpr,
    MERGED3: tl.constexpr,
    LENGTH: tl.constexpr,
    PIXELS: tl.constexpr,
    TILE0: tl.constexpr,
    TILE1: tl.constexpr,
    TILE2: tl.constexpr,
    TILE3: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``y1 = R1 x``, ``y2 = R2 y1``, ``y3 = R3 y2``: a program owns whole trees of groups, so nothing is read twice."""
    bundle = tl.program_id(1)
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    k = tl.arange(0, TILE0)
    first = bundle * MERGED1 * INPUTS1
    mask = (p < pixels)[:, None] & ((k < MERGED1 * INPUTS1) & (first + k < channels))[None, :]
    v = tl.load(x + p.to(tl.int64)[:, None] * channels + (first + k)[None, :], mask=mask, other=0.0)
    v = _restrict(
        v, weight1, y1, p, pixels, bundle, channels1, INPUTS1, OUTPUTS1, MERGED1, TILE0, TILE1, DOT, PRECISION
    )
    v = _restrict(
        v, weight2, y2, p, pixels, bundle, channels2, INPUTS2, OUTPUTS2, MERGED2, TILE1, TILE2, DOT, PRECISION
    )
    if LENGTH == 3:
        _restrict(
            v, weight3, y3, p, pixels, bundle, channels3, INPUTS3, OUTPUTS3, MERGED3, TILE2, TILE3, DOT, PRECISION
        )


@triton.jit
def _pointwise(
    a,
    weight,
    bundle,
    total,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    MERGED: tl.constexpr,
    TILE_IN: tl.constexpr,
    TILE_OUT: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    k, n = tl.arange(0, TILE_IN), tl.arange(0, TILE_OUT)
    w = _weights(weight, k, n, bundle * MERGED * OUTPUTS, total, INPUTS, OUTPUTS, MERGED)
    return tl.dot(a.to(DOT), w.to(DOT), input_precision=PRECISION)


@triton.jit
def _three_by_three(
    a,
    weight,
    bundle,
    total,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    MERGED: tl.constexpr,
    TILE_IN: tl.constexpr,
    TILE_OUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """3x3 over a tile that is on the chip: each tap is a gather of its rows. The outermost ring of results is void."""
    here = tl.arange(0, ROWS * COLUMNS)
    k, n = tl.arange(0, TILE_IN), tl.arange(0, TILE_OUT)
    sums = tl.zeros((ROWS * COLUMNS, TILE_OUT), tl.float32)
    for tap in range(9):
        there = here + (tap // 3 - 1) * COLUMNS + tap % 3 - 1
        there = tl.minimum(tl.maximum(there, 0), ROWS * COLUMNS - 1)
        shifted = tl.gather(a, tl.broadcast_to(there[:, None], (ROWS * COLUMNS, TILE_IN)), 0)
        w = _weights(weight + tap * INPUTS * total, k, n, bundle * MERGED * OUTPUTS, total, INPUTS, OUTPUTS, MERGED)
        sums = tl.dot(shifted.to(DOT), w.to(DOT), sums, input_precision=PRECISION)
    return sums


@triton.jit
def _bias(bias, bundle, total, OUTPUTS: tl.constexpr, MERGED: tl.constexpr, TILE: tl.constexpr):
    n = tl.arange(0, TILE)
    there = (n < MERGED * OUTPUTS) & (bundle * MERGED * OUTPUTS + n < total)
    return tl.load(bias + bundle * MERGED * OUTPUTS + n, mask=there, other=0.0)[None, :]


@triton.jit
def level(
    x,
    coarse,
    weight_p,
    bias_p,
    weight1,
    bias1,
    weight2,
    bias2,
    weight3,
    bias3,
    y,
    height,
    width,
    down,
    across,
    groups,
    CHANNELS: tl.constexpr,
    COARSE: tl.constexpr,
    HIDDEN: tl.constexpr,
    BOTTLENECK: tl.constexpr,
    CHANGE: tl.constexpr,
    ACT: tl.constexpr,
    MERGED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE_X: tl.constexpr,
    TILE_COARSE: tl.constexpr,
    TILE_HIDDEN: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One level on the way up: ``z = x + P coarse``, ``y = act(z + K act(K act(K z))) - x``, nothing between stored.

    A program computes ``ROWS x COLUMNS`` pixels and stores those whose neighbours it had: the ring around them, one pixel
    for a bottleneck and two for two 3x3 convolutions, is computed again by the tile beside.
    """
    HALO: tl.constexpr = 1 if BOTTLENECK else 2
    all_x, all_coarse, all_hidden = groups * CHANNELS, groups * COARSE, groups * HIDDEN
    bundle, tile = tl.program_id(1), tl.program_id(0)
    image, place = tile // (down * across), tile % (down * across)
    here = tl.arange(0, ROWS * COLUMNS)
    row = place // across * (ROWS - 2 * HALO) + here // COLUMNS - HALO
    column = place % across * (COLUMNS - 2 * HALO) + here % COLUMNS - HALO
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    pixel = ((image * height + row) * width + column).to(tl.int64)

    n = tl.arange(0, TILE_X)
    first = bundle * MERGED * CHANNELS
    there = (n < MERGED * CHANNELS) & (first + n < all_x)
    at = pixel[:, None] * all_x + (first + n)[None, :]
    mask = inside[:, None] & there[None, :]
    z = tl.load(x + at, mask=mask, other=0.0)
    if COARSE:
        k = tl.arange(0, TILE_COARSE)
        some = (k < MERGED * COARSE) & (bundle * MERGED * COARSE + k < all_coarse)
        c = tl.load(
            coarse + pixel[:, None] * all_coarse + (bundle * MERGED * COARSE + k)[None, :],
            mask=inside[:, None] & some[None, :],
            other=0.0,
        )
        v = _pointwise(
            c, weight_p, bundle, all_x, COARSE, CHANNELS, MERGED, TILE_COARSE, TILE_X, DOT, PRECISION
        )  # outside the image P adds its bias: the mask takes it away again
        v += _bias(bias_p, bundle, all_x, CHANNELS, MERGED, TILE_X)
        z = tl.where(mask, z.to(tl.float32) + v, 0.0).to(x.dtype.element_ty)

    if BOTTLENECK:
        v = _pointwise(z, weight1, bundle, all_hidden, CHANNELS, HIDDEN, MERGED, TILE_X, TILE_HIDDEN, DOT, PRECISION)
        v = _activate(v + _bias(bias1, bundle, all_hidden, HIDDEN, MERGED, TILE_HIDDEN), ACT)
        a = tl.where(inside[:, None], v, 0.0).to(x.dtype.element_ty)
        v = _three_by_three(
            a,
            weight2,
            bundle,
            all_hidden,
            HIDDEN,
            HIDDEN,
            MERGED,
            TILE_HIDDEN,
            TILE_HIDDEN,
            ROWS,
            COLUMNS,
            DOT,
            PRECISION,
        )
        v = _activate(v + _bias(bias2, bundle, all_hidden, HIDDEN, MERGED, TILE_HIDDEN), ACT)
        a = v.to(x.dtype.element_ty)
        v = _pointwise(a, weight3, bundle, all_x, HIDDEN, CHANNELS, MERGED, TILE_HIDDEN, TILE_X, DOT, PRECISION)
        v += _bias(bias3, bundle, all_x, CHANNELS, MERGED, TILE_X)
    else:
        v = _three_by_three(
            z, weight1, bundle, all_hidden, CHANNELS, HIDDEN, MERGED, TILE_X, TILE_HIDDEN, ROWS, COLUMNS, DOT, PRECISION
        )
        v = _activate(v + _bias(bias1, bundle, all_hidden, HIDDEN, MERGED, TILE_HIDDEN), ACT)
        a = tl.where(inside[:, None], v, 0.0).to(x.dtype.element_ty)
        v = _three_by_three(
            a, weight2, bundle, all_x, HIDDEN, CHANNELS, MERGED, TILE_HIDDEN, TILE_X, ROWS, COLUMNS, DOT, PRECISION
        )
        v += _bias(bias2, bundle, all_x, CHANNELS, MERGED, TILE_X)
    v = _activate(v + z.to(tl.float32), ACT)
    if CHANGE:
        v -= tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    down_row, right_column = here // COLUMNS, here % COLUMNS
    own = (down_row >= HALO) & (down_row < ROWS - HALO) & (right_column >= HALO) & (right_column < COLUMNS - HALO)
    tl.store(y + at, v.to(y.dtype.element_ty), mask=mask & own[:, None])
