"""The Triton kernels of neighbourhood attention; triton_operator.py launches them. Imported only where Triton is.

One program works on a tile of TH x TW positions of one residue group (the positions with one residue of the dilation per axis)
of one image and head, M = TH * TW in all, against the positions that the tile's windows cover. y and x are positions inside the
group; m runs over the tile, n over a chunk of the other side; BD is the head dim rounded up to a power of two, its surplus
loaded as zeros and never stored. A pair is visible when start(y) <= key y < start(y) + KH and the same in x; `start` slides
windows inwards at the borders (reference.py). Every load of a position outside the group is masked, and every score that is not
visible becomes -inf, so what was loaded there does not matter.

Scores are in units of log2 (scale and bias carry log2(e)). Sums are float32; products take the inputs' dtype, float32 without
TF32.

Why these loops: the forward and dq go over key rows in chunks of ROWS x BW (BW a power of two that holds the window's columns,
so that an index splits by shifts); dk and dv go over the queries that see the key tile, the inverse window, whose width varies
at the borders, in one flat range. Both write each result once, without atomics. The bias gradient needs a sum over all images
of every (query, key) pair, so its kernel keeps one chunk of the tile and walks over the batch before it adds to the table.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _start(position, size, KERNEL: tl.constexpr):
    """First position of the window of a query; `size` positions in its group."""
    return tl.minimum(tl.maximum(position - KERNEL // 2, 0), size - KERNEL)


@triton.jit
def _tile(index, H, W, DH, DW, HEADS, TH: tl.constexpr, TW: tl.constexpr):
    """Program index -> image, head, residues, group sizes, first position of the tile."""
    tiles_x = tl.cdiv(tl.cdiv(W, DW), TW)
    tiles_y = tl.cdiv(tl.cdiv(H, DH), TH)
    x0 = index % tiles_x * TW
    index = index // tiles_x
    y0 = index % tiles_y * TH
    index = index // tiles_y
    rx = index % DW
    index = index // DW
    ry = index % DH
    index = index // DH
    return index // HEADS, index % HEADS, ry, rx, (H - ry + DH - 1) // DH, (W - rx + DW - 1) // DW, y0, x0


@triton.jit
def _pixel(y, x, ry, rx, DH, DW):
    """Row and column in the map of a position of the group."""
    return ry + y * DH, rx + x * DW


@triton.jit
def _scores(a, b, bias_ptr, head, scale, qy, qx, ky, kx, gh, gw, KH: tl.constexpr, KW: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Scores in log2 of the pairs a b^T, -inf where not visible. qy, qx, ky, kx broadcast to a's rows by b's rows."""
    sy = _start(qy, gh, KH)
    sx = _start(qx, gw, KW)
    visible = (ky >= sy) & (ky < sy + KH) & (kx >= sx) & (kx < sx + KW)
    s = tl.dot(a, tl.trans(b), input_precision="ieee") * (scale * LOG2E)
    if HAS_BIAS:
        entry = (head * (2 * KH - 1) + ky - qy + KH - 1) * (2 * KW - 1) + kx - qx + KW - 1
        s += tl.load(bias_ptr + entry, mask=visible, other=0.0) * LOG2E
    return tl.where(visible, s, float("-inf"))


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr, scale, H, W, DH, DW, HEADS,
    q_b, q_y, q_x, q_h, k_b, k_y, k_x, k_h, v_b, v_y, v_x, v_h,
    D: tl.constexpr, BD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
    ROWS: tl.constexpr, BW: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """out [B, H, W, heads, D] contiguous; lse [B, heads, H, W] float32 in log2."""
    image, head, ry, rx, gh, gw, y0, x0 = _tile(tl.program_id(0), H, W, DH, DW, HEADS, TH, TW)
    image = image.to(tl.int64)
    m = tl.arange(0, TH * TW)
    d = tl.arange(0, BD)
    inside = (y0 + m // TW < gh) & (x0 + m % TW < gw)
    qy = tl.minimum(y0 + m // TW, gh - 1)  # surplus queries repeat the last one and are not stored
    qx = tl.minimum(x0 + m % TW, gw - 1)
    py, px = _pixel(qy, qx, ry, rx, DH, DW)
    q = tl.load(
        q_ptr + image * q_b + head * q_h + (py * q_y + px * q_x)[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0
    )
    wy = _start(y0, gh, KH)
    wx = _start(x0, gw, KW)
    rows = _start(tl.minimum(y0 + TH, gh) - 1, gh, KH) + KH - wy

    n = tl.arange(0, ROWS * BW)
    top = tl.full([TH * TW], -1.0e30, tl.float32)  # finite: a chunk may hold no visible key of a query
    total = tl.zeros([TH * TW], tl.float32)
    acc = tl.zeros([TH * TW, BD], tl.float32)
    for row in range(0, rows, ROWS):
        ky = wy + row + n // BW
        kx = wx + n % BW
        py_k, px_k = _pixel(ky, kx, ry, rx, DH, DW)
        there = ((ky < gh) & (kx < gw))[:, None] & (d < D)[None, :]
        k = tl.load(k_ptr + image * k_b + head * k_h + (py_k * k_y + px_k * k_x)[:, None] + d[None, :], mask=there, other=0.0)
        v = tl.load(v_ptr + image * v_b + head * v_h + (py_k * v_y + px_k * v_x)[:, None] + d[None, :], mask=there, other=0.0)
        s = _scores(q, k, bias_ptr, head, scale, qy[:, None], qx[:, None], ky[None, :], kx[None, :], gh, gw, KH, KW, HAS_BIAS)
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = higher
    pixel = (image * H + py) * W + px
    tl.store(
        out_ptr + (pixel * HEADS + head)[:, None] * D + d[None, :],
        (acc / total[:, None]).to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & (d < D)[None, :],
    )
    tl.store(lse_ptr + ((image * HEADS + head) * H + py) * W + px, top + tl.log2(total), mask=inside)


@triton.jit
def dq_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr, dout_ptr, delta_ptr, dq_ptr, scale, H, W, DH, DW, HEADS,
    q_b, q_y, q_x, q_h, k_b, k_y, k_x, k_h, v_b, v_y, v_x, v_h,
    D: tl.constexpr, BD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
    ROWS: tl.constexpr, BW: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """dq, and delta = sum over d of dout * out, which the other two kernels read. out, dout, dq contiguous; delta as lse."""
    image, head, ry, rx, gh, gw, y0, x0 = _tile(tl.program_id(0), H, W, DH, DW, HEADS, TH, TW)
    image = image.to(tl.int64)
    m = tl.arange(0, TH * TW)
    d = tl.arange(0, BD)
    inside = (y0 + m // TW < gh) & (x0 + m % TW < gw)
    qy = tl.minimum(y0 + m // TW, gh - 1)
    qx = tl.minimum(x0 + m % TW, gw - 1)
    py, px = _pixel(qy, qx, ry, rx, DH, DW)
    real = (d < D)[None, :]
    token = (((image * H + py) * W + px) * HEADS + head)[:, None] * D + d[None, :]
    number = ((image * HEADS + head) * H + py) * W + px
    q = tl.load(q_ptr + image * q_b + head * q_h + (py * q_y + px * q_x)[:, None] + d[None, :], mask=real, other=0.0)
    dout = tl.load(dout_ptr + token, mask=real, other=0.0)
    out = tl.load(out_ptr + token, mask=real, other=0.0)
    lse = tl.load(lse_ptr + number)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + number, delta, mask=inside)
    wy = _start(y0, gh, KH)
    wx = _start(x0, gw, KW)
    rows = _start(tl.minimum(y0 + TH, gh) - 1, gh, KH) + KH - wy

    n = tl.arange(0, ROWS * BW)
    dq = tl.zeros([TH * TW, BD], tl.float32)
    for row in range(0, rows, ROWS):
        ky = wy + row + n // BW
        kx = wx + n % BW
        py_k, px_k = _pixel(ky, kx, ry, rx, DH, DW)
        there = ((ky < gh) & (kx < gw))[:, None] & real
        k = tl.load(k_ptr + image * k_b + head * k_h + (py_k * k_y + px_k * k_x)[:, None] + d[None, :], mask=there, other=0.0)
        v = tl.load(v_ptr + image * v_b + head * v_h + (py_k * v_y + px_k * v_x)[:, None] + d[None, :], mask=there, other=0.0)
        s = _scores(q, k, bias_ptr, head, scale, qy[:, None], qx[:, None], ky[None, :], kx[None, :], gh, gw, KH, KW, HAS_BIAS)
        ds = tl.exp2(s - lse[:, None]) * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    tl.store(dq_ptr + token, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside[:, None] & real)


@triton.jit
def dkdv_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, lse_ptr, dout_ptr, delta_ptr, dk_ptr, dv_ptr, scale, H, W, DH, DW, HEADS,
    q_b, q_y, q_x, q_h, k_b, k_y, k_x, k_h, v_b, v_y, v_x, v_h,
    D: tl.constexpr, BD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
    BN: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """dk, dv of a tile of keys, [M, BD] each, from the queries that see it: [M, BN] scores per chunk of BN queries."""
    image, head, ry, rx, gh, gw, y0, x0 = _tile(tl.program_id(0), H, W, DH, DW, HEADS, TH, TW)
    image = image.to(tl.int64)
    m = tl.arange(0, TH * TW)
    d = tl.arange(0, BD)
    real = (d < D)[None, :]
    ky = y0 + m // TW
    kx = x0 + m % TW
    inside = (ky < gh) & (kx < gw)
    py, px = _pixel(ky, kx, ry, rx, DH, DW)
    there = inside[:, None] & real
    k = tl.load(k_ptr + image * k_b + head * k_h + (py * k_y + px * k_x)[:, None] + d[None, :], mask=there, other=0.0)
    v = tl.load(v_ptr + image * v_b + head * v_h + (py * v_y + px * v_x)[:, None] + d[None, :], mask=there, other=0.0)
    # A key p is seen from p - K // 2 (from 0 if p < K) to p + K // 2 (to the end if p >= size - K).
    y_last = tl.minimum(y0 + TH, gh) - 1
    x_last = tl.minimum(x0 + TW, gw) - 1
    qy0 = tl.where(y0 < KH, 0, y0 - KH // 2)
    qx0 = tl.where(x0 < KW, 0, x0 - KW // 2)
    height = tl.where(y_last >= gh - KH, gh, y_last + KH // 2 + 1) - qy0
    width = tl.where(x_last >= gw - KW, gw, x_last + KW // 2 + 1) - qx0

    dk = tl.zeros([TH * TW, BD], tl.float32)
    dv = tl.zeros([TH * TW, BD], tl.float32)
    for first in range(0, height * width, BN):
        n = first + tl.arange(0, BN)
        some = n < height * width
        n = tl.minimum(n, height * width - 1)  # past the end, a visible pair would look beyond the bias table
        qy = qy0 + n // width
        qx = qx0 + n % width
        py_q, px_q = _pixel(qy, qx, ry, rx, DH, DW)
        use = some[:, None] & real
        q = tl.load(q_ptr + image * q_b + head * q_h + (py_q * q_y + px_q * q_x)[:, None] + d[None, :], mask=use, other=0.0)
        token = (((image * H + py_q) * W + px_q) * HEADS + head)[:, None] * D + d[None, :]
        dout = tl.load(dout_ptr + token, mask=use, other=0.0)
        number = ((image * HEADS + head) * H + py_q) * W + px_q
        lse = tl.load(lse_ptr + number, mask=some, other=float("inf"))  # a query past the end weighs 2^-inf = 0
        delta = tl.load(delta_ptr + number, mask=some, other=0.0)
        s = _scores(k, q, bias_ptr, head, scale, qy[None, :], qx[None, :], ky[:, None], kx[:, None], gh, gw, KH, KW, HAS_BIAS)
        p = tl.exp2(s - lse[None, :])
        ds = p * (tl.dot(v, tl.trans(dout), input_precision="ieee") - delta[None, :])
        dv += tl.dot(p.to(dout.dtype), dout, input_precision="ieee")
        dk += tl.dot(ds.to(q.dtype), q, input_precision="ieee")
    token = (((image * H + py) * W + px) * HEADS + head)[:, None] * D + d[None, :]
    tl.store(dk_ptr + token, (dk * scale).to(dk_ptr.dtype.element_ty), mask=there)
    tl.store(dv_ptr + token, dv.to(dv_ptr.dtype.element_ty), mask=there)


@triton.jit
def dbias_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, lse_ptr, dout_ptr, delta_ptr, dbias_ptr, scale, B, SPLITS, H, W, DH, DW, HEADS,
    q_b, q_y, q_x, q_h, k_b, k_y, k_x, k_h, v_b, v_y, v_x, v_h,
    D: tl.constexpr, BD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
    ROWS: tl.constexpr, BW: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """dbias [heads, 2 KH - 1, 2 KW - 1] float32, added to. One tile, one of its CHUNKS of keys, every SPLITS-th image."""
    split, head, ry, rx, gh, gw, y0, x0 = _tile(tl.program_id(0) // CHUNKS, H, W, DH, DW, HEADS, TH, TW)
    m = tl.arange(0, TH * TW)
    n = tl.arange(0, ROWS * BW)
    d = tl.arange(0, BD)
    real = (d < D)[None, :]
    inside = (y0 + m // TW < gh) & (x0 + m % TW < gw)
    qy = tl.minimum(y0 + m // TW, gh - 1)
    qx = tl.minimum(x0 + m % TW, gw - 1)
    ky = _start(y0, gh, KH) + tl.program_id(0) % CHUNKS * ROWS + n // BW
    kx = _start(x0, gw, KW) + n % BW
    py, px = _pixel(qy, qx, ry, rx, DH, DW)
    py_k, px_k = _pixel(ky, kx, ry, rx, DH, DW)
    there = ((ky < gh) & (kx < gw))[:, None] & real

    acc = tl.zeros([TH * TW, ROWS * BW], tl.float32)
    image = split.to(tl.int64)
    for _ in range(split, B, SPLITS):
        q = tl.load(q_ptr + image * q_b + head * q_h + (py * q_y + px * q_x)[:, None] + d[None, :], mask=real, other=0.0)
        k = tl.load(k_ptr + image * k_b + head * k_h + (py_k * k_y + px_k * k_x)[:, None] + d[None, :], mask=there, other=0.0)
        v = tl.load(v_ptr + image * v_b + head * v_h + (py_k * v_y + px_k * v_x)[:, None] + d[None, :], mask=there, other=0.0)
        token = (((image * H + py) * W + px) * HEADS + head)[:, None] * D + d[None, :]
        dout = tl.load(dout_ptr + token, mask=real, other=0.0)
        number = ((image * HEADS + head) * H + py) * W + px
        lse = tl.load(lse_ptr + number)
        delta = tl.load(delta_ptr + number)
        s = _scores(q, k, bias_ptr, head, scale, qy[:, None], qx[:, None], ky[None, :], kx[None, :], gh, gw, KH, KW, True)
        acc += tl.exp2(s - lse[:, None]) * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
        image += SPLITS

    dy = ky[None, :] - _start(qy, gh, KH)[:, None]
    dx = kx[None, :] - _start(qx, gw, KW)[:, None]
    visible = (dy >= 0) & (dy < KH) & (dx >= 0) & (dx < KW) & inside[:, None]
    up = ky[None, :] - qy[:, None] + KH - 1
    across = kx[None, :] - qx[:, None] + KW - 1
    tl.atomic_add(dbias_ptr + (head * (2 * KH - 1) + up) * (2 * KW - 1) + across, acc, mask=visible)
