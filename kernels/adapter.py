"""The Adapter of Sec. 3.1: y = x + scale * (relu(x @ w_down.T + b_down) @ w_up.T + b_up).

x is (..., D), the bottleneck H. w_down (H, D), b_down (H,), w_up (D, H), b_up (D,), scale (D,), y as x. Below N is the
number of rows, the product of x's leading dimensions: 32 images of 1601 tokens make N = 51,232 at D = 896, H = 448.

Why fuse. The products are narrow, so memory decides. Eager PyTorch writes every intermediate (two linear layers, relu,
times scale, plus x) and reads it again: 828 MB forward at the shape above, x in bf16. Here bias and relu are applied
while the product is still in registers, and so are scale and residual: x read, h written, h and x read, y written, in
all 369 MB.

    forward    1. h = relu(x w_down^T + b_down)                     reads x, writes h
               2. y = x + scale * (h w_up^T + b_up)                 reads h and x, writes y
    backward   3. dpre = (h > 0) * ((dy * scale) w_up)              reads dy and h, writes dpre
               4. dx = dy + dpre w_down                             reads dpre and dy, writes dx
               5. dw_down = dpre^T x                                reads dpre and x
               6. G = dy^T h                                        reads dy and h

Backward needs x and h and nothing else: with z = h w_up^T + b_up, the derivatives for w_up, b_up and scale are
dw_up = scale * G (by rows), db_up = scale * sum(dy), dscale = sum(dy * z) = rowsum(w_up * G) + b_up * sum(dy), so that
z, which eager PyTorch must keep (92 MB a layer), is never needed. sum(dy) and db_down = sum(dpre) are taken in steps 4
and 3 from tiles that are in registers anyway. 2484 MB forward and backward in eager become 1141 MB, x in bf16.

Dtypes. Outside autocast all six tensors have one dtype. Under autocast weights and biases are cast to autocast's dtype,
the matrix products run in it, and gradients flow back through the cast, as autocast does it for torch.nn.Linear. x, the
residual stream, keeps its own dtype, which is y's too, and so does scale. Sums are in float32 (float64 for float64).

Compiled ahead of time in bf16, fp16 and fp32 for NVIDIA sm_80 (A100), sm_90 (H100) and sm_100 (B200), and in bf16 for
sm_86, sm_89 and sm_120 (RTX) and AMD's gfx942 and gfx950 (MI300, MI350). Nothing spills but 2 registers on gfx942,
where _dpre_kernel does not fit: it asks for 256 bytes more shared memory than a block may have, and
RISCLIP_KERNELS=torch is the way out.
Values, gradients and memory accesses are tested in Triton's interpreter on a CPU. No GPU has run or timed it.
"""

import torch
import torch.nn.functional as F

from kernels.backend import FLOATING, tl, triton, use_triton


def adapter_reference(x, w_down, b_down, w_up, b_up, scale):
    """The Adapter in plain torch. Shapes and dtypes as in `adapter`."""
    return _reference(x, *_checked(x, w_down, b_down, w_up, b_up, scale))


def _reference(x, w_down, b_down, w_up, b_up, scale):
    h = F.relu(F.linear(x, w_down, b_down))  # (..., H)
    z = F.linear(h, w_up, b_up)  # (..., D)
    return x + (scale * z).to(x.dtype)


def _checked(x, w_down, b_down, w_up, b_up, scale):
    """The parameters, cast as autocast does; a ValueError if anything does not fit x."""
    if x.dtype not in FLOATING or x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be floating point (16 to 64 bits) of shape (..., D) with D > 0, got {x.dtype} of "
                         f"shape {tuple(x.shape)}")
    D, H = x.shape[-1], w_down.shape[0] if w_down.dim() else 0
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    autocast &= x.dtype != torch.float64  # which autocast leaves alone
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    needed = {"w_down": (H, D), "b_down": (H,), "w_up": (D, H), "b_up": (D,), "scale": (D,)}
    parameters = dict(w_down=w_down, b_down=b_down, w_up=w_up, b_up=b_up, scale=scale)
    for name, p in parameters.items():
        got = f"{name} is {p.dtype} of shape {tuple(p.shape)} on {p.device}"
        asked = f"x is {x.dtype} of shape {tuple(x.shape)} on {x.device}"
        if p.shape != needed[name]:
            raise ValueError(f"{got}, but shape {needed[name]} is needed: {asked}, w_down of {tuple(w_down.shape)}")
        if p.device != x.device or p.dtype not in FLOATING or (p.dtype != dtype and not autocast):
            raise ValueError(f"{got}, but {asked}: device and dtype must agree (autocast casts floating point)")
    return [*(p.to(dtype) for p in (w_down, b_down, w_up, b_up)), scale]  # scale is no operand of a matrix product


# ---- the kernels ----------------------------------------------------------------------------------------------------
# A Triton kernel is the program of one tile of the output. It is launched on a grid of programs, tl.program_id says
# which one it is, and its "tensors" are blocks of known size spread over the threads of one processor of the GPU.
# pointer + offsets is a block of addresses, which tl.load and tl.store access all at once. A block's sizes are powers
# of two, fixed when compiling (tl.constexpr), so a mask must leave out what lies past an edge. A jitted function that
# another calls becomes a part of it. What does not fit into a thread's registers spills into memory, which is slow.
# ACC is the dtype of sums (float32), DOT that of the numbers multiplied, which decides whether tensor cores run.
#
# 128 x 128 outputs for a tile: each element loaded is then used 128 times, enough to keep tensor cores busy, and the
# float32 sums take 64 registers of each of 256 threads (8 warps), a quarter of the 255 that a thread may have; the rest
# holds operands and addresses. The paper's widths D are multiples of 128, so that no tile of a D is cut.
BLOCK_M, BLOCK_N = 128, 128
# The sum over k goes in steps of 64 numbers of 2 bytes: a cache line (128 bytes) of each row. Three steps are in flight
# at once (num_stages): 3 * 2 tiles of 128 * 128 bytes are 96 KB of the 163 KB (A100) or 227 KB (H100, B200) there are.
# Under autocast one operand may be a float32 stream, and 32 of its numbers are a cache line. Where both are float32,
# tensor cores, which would round to tf32, are not used, and steps longer than 16 would spill registers.
BLOCK_K = {(2, 2): 64, (2, 4): 32, (4, 4): 16, (8, 8): 16}  # by the bytes of a number in weight (or like) and stream
# Weight gradients sum over all N rows and have few tiles (28 for B): too few for a GPU of 108 to 148 processors, so the
# rows are cut into parts and each part summed by programs of its own: 9 parts of 51,232 rows make 252 programs for B.
# The partial sums are added in a fixed order at the end, never atomically, so that the same input gives the same
# gradient, bit for bit.
ROWS_PER_PART = 6144


@triton.jit
def _tile(n_rows, n_cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row and column numbers of this program's tile of an (n_rows, n_cols) output.

    Neighbouring programs take neighbouring columns of the same rows: they run at the same time, so the long operand
    (x, h or dy) comes from memory once and then from the L2 cache, where the whole weight (0.8 MB) stays anyway.
    int64, because N * D outgrows 32 bits at 2.4 million rows.
    """
    tiles = tl.cdiv(n_cols, BLOCK_N)
    rows = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    return rows, cols, (rows < n_rows)[:, None], (cols < n_cols)[None, :]


@triton.jit
def _product(a_ptr, b_ptr, rows, cols, row_ok, col_ok, first, last, a_row, a_k, b_k, b_col,
             DOT: tl.constexpr, ACC: tl.constexpr, BLOCK_K: tl.constexpr, a_scale_ptr=None):
    """sum over first <= k < last of A[rows, k] * B[k, cols], a tile in registers. a_row ... b_col are strides.

    A stride is the distance in memory from one row (or k, or column) to the next: A^T is A with its strides swapped.
    Elements outside the matrices are loaded as 0, which adds nothing to the sum. (Elsewhere what a mask leaves out is
    undefined, and is not stored either.) With a_scale_ptr, column k of A is multiplied by element k of that vector.
    """
    k = first + tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + rows[:, None] * a_row + k[None, :] * a_k
    b_ptrs = b_ptr + k[:, None] * b_k + cols[None, :] * b_col
    acc = tl.zeros((rows.shape[0], cols.shape[0]), ACC)
    for start in range(first, last, BLOCK_K):
        k_ok = start + tl.arange(0, BLOCK_K) < last
        a = tl.load(a_ptrs, mask=row_ok & k_ok[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=k_ok[:, None] & col_ok, other=0.0)
        if a_scale_ptr is not None:  # known when compiling: the others have no trace of it
            a = a.to(ACC) * tl.load(a_scale_ptr + start + tl.arange(0, BLOCK_K), mask=k_ok, other=0.0).to(ACC)[None, :]
        acc = tl.dot(a.to(DOT), b.to(DOT), acc, input_precision="ieee")  # float32 is not rounded to tf32
        a_ptrs += BLOCK_K * a_k
        b_ptrs += BLOCK_K * b_k
    return acc


@triton.jit(do_not_specialize=["N"])
def _down_kernel(x_ptr, w_ptr, bias_ptr, h_ptr, N, D, H, DOT: tl.constexpr, ACC: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """1. h = relu(x w_down^T + b_down). x is loaded cdiv(H, BLOCK_N) times, w_down cdiv(N, BLOCK_M) times."""
    rows, cols, row_ok, col_ok = _tile(N, H, BLOCK_M, BLOCK_N)
    pre = _product(x_ptr, w_ptr, rows, cols, row_ok, col_ok, 0, D, D, 1, 1, D, DOT, ACC, BLOCK_K)
    pre += tl.load(bias_ptr + cols[None, :], mask=col_ok).to(ACC)
    h = tl.where(pre < 0, 0.0, pre)  # not maximum, which would hide a NaN
    tl.store(h_ptr + rows[:, None] * H + cols[None, :], h.to(h_ptr.dtype.element_ty), mask=row_ok & col_ok)


@triton.jit(do_not_specialize=["N"])
def _up_kernel(h_ptr, w_ptr, bias_ptr, scale_ptr, x_ptr, y_ptr, N, D, H, DOT: tl.constexpr, ACC: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """2. y = x + scale * (h w_up^T + b_up). h is loaded cdiv(D, BLOCK_N) times, w_up cdiv(N, BLOCK_M), x once."""
    rows, cols, row_ok, col_ok = _tile(N, D, BLOCK_M, BLOCK_N)
    z = _product(h_ptr, w_ptr, rows, cols, row_ok, col_ok, 0, H, H, 1, 1, H, DOT, ACC, BLOCK_K)
    z += tl.load(bias_ptr + cols[None, :], mask=col_ok).to(ACC)
    scale = tl.load(scale_ptr + cols[None, :], mask=col_ok).to(ACC)
    here = rows[:, None] * D + cols[None, :]
    x = tl.load(x_ptr + here, mask=row_ok & col_ok).to(ACC)
    tl.store(y_ptr + here, (x + scale * z).to(y_ptr.dtype.element_ty), mask=row_ok & col_ok)


@triton.jit(do_not_specialize=["N"])
def _dpre_kernel(dy_ptr, scale_ptr, w_ptr, h_ptr, dpre_ptr, sum_ptr, N, D, H, DOT: tl.constexpr, ACC: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """3. dpre = (h > 0) * ((dy * scale) w_up), and its column sums, one row of sum_ptr for each row of tiles.

    dy is loaded cdiv(H, BLOCK_N) times, w_up cdiv(N, BLOCK_M) times, scale by every program, h once.
    """
    rows, cols, row_ok, col_ok = _tile(N, H, BLOCK_M, BLOCK_N)
    dh = _product(dy_ptr, w_ptr, rows, cols, row_ok, col_ok, 0, D, D, 1, H, 1, DOT, ACC, BLOCK_K, scale_ptr)
    here = rows[:, None] * H + cols[None, :]
    h = tl.load(h_ptr + here, mask=row_ok & col_ok)
    dpre = tl.where(h <= 0, 0.0, dh)  # as torch's relu where h is NaN
    tl.store(dpre_ptr + here, dpre.to(dpre_ptr.dtype.element_ty), mask=row_ok & col_ok)
    sums = tl.sum(dpre, axis=0)[None, :]
    tl.store(sum_ptr + tl.program_id(0) // tl.cdiv(H, BLOCK_N) * H + cols[None, :], sums, mask=col_ok)


@triton.jit(do_not_specialize=["N"])
def _dx_kernel(dpre_ptr, w_ptr, dy_ptr, dx_ptr, sum_ptr, N, D, H, DOT: tl.constexpr, ACC: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """4. dx = dy + dpre w_down, and the column sums of dy, one row of sum_ptr for each row of tiles.

    dpre is loaded cdiv(D, BLOCK_N) times, w_down cdiv(N, BLOCK_M) times, dy once.
    """
    rows, cols, row_ok, col_ok = _tile(N, D, BLOCK_M, BLOCK_N)
    dx = _product(dpre_ptr, w_ptr, rows, cols, row_ok, col_ok, 0, H, H, 1, D, 1, DOT, ACC, BLOCK_K)
    here = rows[:, None] * D + cols[None, :]
    dy = tl.load(dy_ptr + here, mask=row_ok & col_ok, other=0.0).to(ACC)
    tl.store(dx_ptr + here, (dy + dx).to(dx_ptr.dtype.element_ty), mask=row_ok & col_ok)
    sums = tl.sum(dy, axis=0)[None, :]
    tl.store(sum_ptr + tl.program_id(0) // tl.cdiv(D, BLOCK_N) * D + cols[None, :], sums, mask=col_ok)


@triton.jit(do_not_specialize=["N"])
def _weight_kernel(a_ptr, b_ptr, part_ptr, N, P, Q, ROWS: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """5. and 6. A^T B for A (N, P), B (N, Q): part (parts, P, Q) holds the sum over each ROWS rows.

    A is loaded cdiv(Q, BLOCK_N) times, B cdiv(P, BLOCK_M) times.
    """
    rows, cols, row_ok, col_ok = _tile(P, Q, BLOCK_M, BLOCK_N)
    part = tl.program_id(1).to(tl.int64)
    first, last = part * ROWS, tl.minimum(part * ROWS + ROWS, N)
    acc = _product(a_ptr, b_ptr, rows, cols, row_ok, col_ok, first, last, 1, P, Q, 1, DOT, ACC, BLOCK_K)
    tl.store(part_ptr + part * P * Q + rows[:, None] * Q + cols[None, :], acc, mask=row_ok & col_ok)


# ---- launching them -------------------------------------------------------------------------------------------------

def _options(weight, stream):
    """What a launch is told: dtypes of products and sums, tile, warps of 32 threads, steps in flight.

    The products are of `weight`, or what is in its dtype (h, dpre), and `stream`, which autocast may leave in float32.
    """
    return dict(DOT=getattr(tl, str(weight.dtype).removeprefix("torch.")),
                ACC=tl.float64 if weight.dtype == torch.float64 else tl.float32,
                BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K[weight.element_size(), stream.element_size()],
                num_warps=8, num_stages=3)


def _grid(rows, cols, *parts):
    """As many programs as an output of rows x cols has tiles (times parts): kernel[grid](arguments) launches them."""
    return triton.cdiv(rows, BLOCK_M) * triton.cdiv(cols, BLOCK_N), *parts


def forward(x, w_down, b_down, w_up, b_up, scale):
    """y (N, D) and h (N, H) for x (N, D)."""
    x, w_down, b_down, w_up, b_up, scale = (t.contiguous() for t in (x, w_down, b_down, w_up, b_up, scale))
    (N, D), H = x.shape, w_down.shape[0]
    h, y = w_down.new_empty(N, H), torch.empty_like(x)
    _down_kernel[_grid(N, H)](x, w_down, b_down, h, N, D, H, **_options(w_down, x))
    _up_kernel[_grid(N, D)](h, w_up, b_up, scale, x, y, N, D, H, **_options(w_up, h))
    return y, h


def backward(dy, x, h, w_down, w_up, b_up, scale):
    """Gradients for x, w_down, b_down, w_up, b_up and scale, from dy (N, D) and what forward kept."""
    dy, x, h, w_down, w_up, scale = (t.contiguous() for t in (dy, x, h, w_down, w_up, scale))
    (N, D), H = x.shape, w_down.shape[0]
    acc = torch.float64 if w_down.dtype == torch.float64 else torch.float32
    row_tiles, parts = triton.cdiv(N, BLOCK_M), triton.cdiv(N, ROWS_PER_PART)
    dpre, dx = torch.empty_like(h), torch.empty_like(dy)
    dpre_sums, dy_sums = dy.new_empty(row_tiles, H, dtype=acc), dy.new_empty(row_tiles, D, dtype=acc)
    down_parts, up_parts = dy.new_empty(parts, H, D, dtype=acc), dy.new_empty(parts, D, H, dtype=acc)
    _dpre_kernel[_grid(N, H)](dy, scale, w_up, h, dpre, dpre_sums, N, D, H, **_options(w_up, dy))
    _dx_kernel[_grid(N, D)](dpre, w_down, dy, dx, dy_sums, N, D, H, **_options(w_down, dpre))
    _weight_kernel[_grid(H, D, parts)](dpre, x, down_parts, N, H, D, ROWS_PER_PART, **_options(dpre, x))
    _weight_kernel[_grid(D, H, parts)](dy, h, up_parts, N, D, H, ROWS_PER_PART, **_options(h, dy))
    # What is left is as small as the weights: torch adds the parts up.
    dy_sum, G = dy_sums.sum(0), up_parts.sum(0)  # (D,), (D, H)
    dscale = ((w_up.to(acc) * G).sum(1) + b_up.to(acc) * dy_sum).to(scale.dtype)
    scale = scale.to(acc)
    gradients = down_parts.sum(0), dpre_sums.sum(0), scale[:, None] * G, scale * dy_sum
    return dx, *(g.to(w_down.dtype) for g in gradients), dscale


# ---- autograd -------------------------------------------------------------------------------------------------------
# torch.library makes `forward` one operator: torch.compile keeps it whole in its graph instead of breaking there, with
# the shapes told by register_fake and the derivative by register_autograd.

@torch.library.custom_op("risclip::adapter", mutates_args=())
def _adapter_op(x: torch.Tensor, w_down: torch.Tensor, b_down: torch.Tensor, w_up: torch.Tensor, b_up: torch.Tensor,
                scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.cuda.device_of(x):  # Triton launches on the current GPU; nothing for a CPU tensor
        return forward(x, w_down, b_down, w_up, b_up, scale)


@torch.library.custom_op("risclip::adapter_backward", mutates_args=())
def _backward_op(dy: torch.Tensor, x: torch.Tensor, h: torch.Tensor, w_down: torch.Tensor, w_up: torch.Tensor,
                 b_up: torch.Tensor, scale: torch.Tensor
                 ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.cuda.device_of(x):
        return backward(dy, x, h, w_down, w_up, b_up, scale)


@_adapter_op.register_fake
def _(x, w_down, b_down, w_up, b_up, scale):
    return x.new_empty(x.shape), w_down.new_empty(x.shape[0], w_down.shape[0])


@_backward_op.register_fake
def _(dy, x, h, w_down, w_up, b_up, scale):
    return tuple(t.new_empty(t.shape) for t in (x, w_down, w_down[:, 0], w_up, b_up, scale))


def _keep(ctx, inputs, output):
    x, w_down, _, w_up, b_up, scale = inputs
    ctx.save_for_backward(x, output[1], w_down, w_up, b_up, scale)
    ctx.mark_non_differentiable(output[1])  # h, for backward only
    ctx.set_materialize_grads(False)  # no zeros the size of h for its gradient, which nobody reads


def _derivative(ctx, dy, _):
    return (None,) * 6 if dy is None else _backward_op(dy, *ctx.saved_tensors)


_adapter_op.register_autograd(_derivative, setup_context=_keep)


def adapter(x, w_down, b_down, w_up, b_up, scale):
    """x + scale * (relu(x @ w_down.T + b_down) @ w_up.T + b_up), Sec. 3.1; y as x.

    x (..., D) floating point, strides of any kind; w_down (H, D), b_down (H,), w_up (D, H), b_up (D,), scale (D,).
    Gradients for all six. Triton or plain torch: see kernels/backend.py.
    """
    w_down, b_down, w_up, b_up, scale = _checked(x, w_down, b_down, w_up, b_up, scale)
    if not use_triton(x):
        return _reference(x, w_down, b_down, w_up, b_up, scale)
    # Rows of an odd number of elements can only be loaded one element at a time. H is ours to choose: hidden units
    # without weights, up to the next multiple of 16, change nothing (449, Table A1, becomes 464), and autograd cuts
    # their gradients off again.
    pad = -w_down.shape[0] % 16
    if pad:
        w_down, b_down, w_up = F.pad(w_down, (0, 0, 0, pad)), F.pad(b_down, (0, pad)), F.pad(w_up, (0, pad))
    y, _ = _adapter_op(x.reshape(-1, x.shape[-1]), w_down, b_down, w_up, b_up, scale)
    return y.view(x.shape)
