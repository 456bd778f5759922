"""The Adapter of Sec. 3.1: y = x + scale * (relu(x w_down^T + b_down) w_up^T + b_up).

x is (..., D), the bottleneck H. w_down (H, D), b_down (H,), w_up (D, H), b_up (D,), scale (D,),
y as x. Below, N is the number of rows, the product of x's leading dimensions: 32 images of 1601
tokens make N = 51,232 at D = 896, H = 448. Read kernels/dice_focal.py first: it explains Triton.

Why fuse. The products are narrow, so memory decides. Eager PyTorch writes every intermediate (two
linear layers, relu, times scale, plus x) and reads it again: 828 MB forward at the shape above, x
in bf16. Here bias and relu are applied while the product is still in registers, and so are scale
and residual: x read, h written, h and x read, y written, in all 369 MB.

    forward    1. h = relu(x w_down^T + b_down)                 reads x, writes h
               2. y = x + scale * (h w_up^T + b_up)             reads h and x, writes y
    backward   3. dpre = (h > 0) * ((dy * scale) w_up)          reads dy and h, writes dpre
               4. dx = dy + dpre w_down                         reads dpre and dy, writes dx
               5. dw_down = dpre^T x                            reads dpre and x
               6. G = dy^T h                                    reads dy and h

Steps 1 to 4 are kernels. Nothing is left to fuse to 5 and 6, so they are torch.mm.

Backward needs x and h and nothing else: with z = h w_up^T + b_up, the derivatives for w_up, b_up
and scale are dw_up = scale * G (by rows), db_up = scale * sum(dy), and
dscale = sum(dy * z) = rowsum(w_up * G) + b_up * sum(dy), so that z, which eager PyTorch must keep
(92 MB per Adapter), is never needed. sum(dy) and db_down = sum(dpre) are taken in steps 4 and 3
from tiles that are in registers anyway. 2484 MB forward and backward in eager become 1087 MB.

Dtypes. Outside autocast all six tensors have one dtype. Under autocast weights and biases are cast
to autocast's dtype, the matrix products run in it, and gradients flow back through the cast, as
autocast does it for torch.nn.Linear. x, the residual stream, keeps its own dtype, which is y's
too, and so does scale. Sums are in float32 (float64 for float64).

How it is proven, and what a GPU has and has not run: docs/kernels.md.
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


# ---- the kernels -------------------------------------------------------------------------------
# Every one of the four is a matrix product out = A W^T, with A (N, K) long and W (C, K) small, and
# something fused to its end. A program computes one tile of the output:
#
#                                    W^T  (K, C)
#                                  k  +-----+-----+--:
#                                  |  |     |#####|  :
#                                  v  |     |#####|  :     for every tile of out:    the grid
#           A  (N, K)                 +-----+-----+--:         acc = zeros(128, 128)
#           k ->                         out  (N, C)           for k in steps of 64:
#        +-----+-----+-----+          +-----+-----+--:             a = A[rows, k:k + 64]
#        |     |     |     |          |     |     |  :             w = W[cols, k:k + 64]
#        +-----+-----+-----+          +-----+-----+--:             acc += a w^T
#   rows |#####|#####|#####|          |     | tile|  :         out[rows, cols] = end(acc)
#        +-----+-----+-----+          +-----+-----+--:
#        :.....:.....:.....:          :.....:.....:..:     dots: past the end of N or C
#
# 128 x 128 outputs per tile: each element loaded is then used 128 times, enough to keep tensor
# cores busy, and the float32 sums take 64 registers of each of 256 threads (8 warps), a quarter of
# the 255 that a thread may have; the rest holds operands and addresses. The paper's widths D are
# multiples of 128, so that no tile of a D is cut.
#
# ACC is the dtype of sums (float32), DOT that of the numbers multiplied, which decides whether
# tensor cores run.
BLOCK_M, BLOCK_N = 128, 128
# The sum over k goes in steps of 64 numbers of 2 bytes: a cache line (128 bytes) of each row. Three
# steps are in flight at once (num_stages): 3 * 2 tiles of 128 * 128 bytes are 96 KB of the 163 KB
# (A100) or 227 KB (H100, B200) there are. Under autocast one operand may be a float32 stream, and
# 32 of its numbers are a cache line. Where both are float32, tensor cores, which would round to
# tf32, are not used, and steps longer than 16 would spill registers.
BLOCK_K = {(2, 2): 64, (2, 4): 32, (4, 4): 16, (8, 8): 16}  # by bytes per number of W and A


@triton.jit
def _tile(N, n_cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's tile of an (N, n_cols) output.

    -> its first row and how many rows it has; row numbers from there on, column numbers; and which
    of them are in the output. Neighbouring programs take neighbouring columns of the same rows:
    they run at the same time, so the long operand (x, h or dy) comes from memory once and then
    from the L2 cache, where all of the small one (0.8 MB) stays anyway.
    """
    tiles = tl.cdiv(n_cols, BLOCK_N)
    first = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M  # first * D may exceed 32 bits
    n_rows = tl.minimum(N - first, BLOCK_M).to(tl.int32)
    rows = tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    return first, n_rows, rows, cols, (rows < n_rows)[:, None], (cols < n_cols)[None, :]


@triton.jit
def _product(a_ptr, w_ptr, rows, cols, n_rows, n_cols, K, EVEN: tl.constexpr, DOT: tl.constexpr,
             ACC: tl.constexpr, BLOCK_K: tl.constexpr, scale_ptr=None):
    """The tile A[rows] W[cols]^T, in registers. A (n_rows, K), W (n_cols, K). With scale_ptr,
    column k of A is multiplied by element k of that vector.

    Rows and columns past the end load the last one again: their results are not stored, and the
    loop needs no mask. What is past the end of k would be added to the sum, so unless K is a whole
    number of steps (EVEN), it is masked.
    """
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + tl.minimum(rows, n_rows - 1)[:, None] * K + k[None, :]
    w_ptrs = w_ptr + tl.minimum(cols, n_cols - 1)[None, :] * K + k[:, None]
    acc = tl.zeros((rows.shape[0], cols.shape[0]), ACC)
    for start in range(0, K, BLOCK_K):
        if EVEN:
            a, w = tl.load(a_ptrs), tl.load(w_ptrs)
        else:
            k_ok = k < K - start
            a = tl.load(a_ptrs, mask=k_ok[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=k_ok[:, None], other=0.0)
        if scale_ptr is not None:  # known when compiling: the others have no trace of it
            scale = tl.load(scale_ptr + start + k, mask=EVEN | (k < K - start), other=0.0)
            a = a.to(ACC) * scale.to(ACC)[None, :]
        # "ieee": float32 is not rounded to tf32
        acc = tl.dot(a.to(DOT), w.to(DOT), acc, input_precision="ieee", out_dtype=ACC)
        a_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    return acc


@triton.jit(do_not_specialize=["N"])
def _down_kernel(x_ptr, w_ptr, bias_ptr, h_ptr, N, D, H, EVEN: tl.constexpr, DOT: tl.constexpr,
                 ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                 BLOCK_K: tl.constexpr):
    """1. h = relu(x w_down^T + b_down). x is loaded cdiv(H, BLOCK_N) times, w_down
    cdiv(N, BLOCK_M) times."""
    first, n_rows, rows, cols, row_ok, col_ok = _tile(N, H, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N)
    pre = _product(x_ptr + first * D, w_ptr, rows, cols, n_rows=n_rows, n_cols=H, K=D, EVEN=EVEN,
                   DOT=DOT, ACC=ACC, BLOCK_K=BLOCK_K)
    pre += tl.load(bias_ptr + cols[None, :], mask=col_ok).to(ACC)
    h = tl.where(pre < 0, 0.0, pre)  # not maximum, which would hide a NaN
    here = rows[:, None] * H + cols[None, :]
    tl.store(h_ptr + first * H + here, h.to(h_ptr.dtype.element_ty), mask=row_ok & col_ok)


@triton.jit(do_not_specialize=["N"])
def _up_kernel(h_ptr, w_ptr, bias_ptr, scale_ptr, x_ptr, y_ptr, N, D, H, EVEN: tl.constexpr,
               DOT: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
               BLOCK_K: tl.constexpr):
    """2. y = x + scale * (h w_up^T + b_up). h is loaded cdiv(D, BLOCK_N) times, w_up
    cdiv(N, BLOCK_M) times, x once."""
    first, n_rows, rows, cols, row_ok, col_ok = _tile(N, D, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N)
    z = _product(h_ptr + first * H, w_ptr, rows, cols, n_rows=n_rows, n_cols=D, K=H, EVEN=EVEN,
                 DOT=DOT, ACC=ACC, BLOCK_K=BLOCK_K)
    z += tl.load(bias_ptr + cols[None, :], mask=col_ok).to(ACC)
    scale = tl.load(scale_ptr + cols[None, :], mask=col_ok).to(ACC)
    here = rows[:, None] * D + cols[None, :]
    x = tl.load(x_ptr + first * D + here, mask=row_ok & col_ok).to(ACC)
    y = (x + scale * z).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + first * D + here, y, mask=row_ok & col_ok)


@triton.jit(do_not_specialize=["N"])
def _dpre_kernel(dy_ptr, scale_ptr, w_ptr, h_ptr, dpre_ptr, sum_ptr, N, D, H, EVEN: tl.constexpr,
                 DOT: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                 BLOCK_K: tl.constexpr):
    """3. dpre = (h > 0) * ((dy * scale) W^T), W (H, D) w_up transposed; and dpre's column sums, one
    row of sum_ptr for each row of tiles.

    dy is loaded cdiv(H, BLOCK_N) times, W cdiv(N, BLOCK_M) times, scale by every program, h once.
    """
    first, n_rows, rows, cols, row_ok, col_ok = _tile(N, H, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N)
    dh = _product(dy_ptr + first * D, w_ptr, rows, cols, n_rows=n_rows, n_cols=H, K=D, EVEN=EVEN,
                  DOT=DOT, ACC=ACC, BLOCK_K=BLOCK_K, scale_ptr=scale_ptr)
    here = rows[:, None] * H + cols[None, :]
    h = tl.load(h_ptr + first * H + here, mask=row_ok & col_ok, other=0.0)
    dpre = tl.where(h <= 0, 0.0, dh)  # as torch's relu where h is NaN; 0 past the end
    tl.store(dpre_ptr + first * H + here, dpre.to(dpre_ptr.dtype.element_ty), mask=row_ok & col_ok)
    sums = tl.sum(dpre, axis=0)[None, :]
    tl.store(sum_ptr + first // BLOCK_M * H + cols[None, :], sums, mask=col_ok)


@triton.jit(do_not_specialize=["N"])
def _dx_kernel(dpre_ptr, w_ptr, dy_ptr, dx_ptr, sum_ptr, N, D, H, EVEN: tl.constexpr,
               DOT: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
               BLOCK_K: tl.constexpr):
    """4. dx = dy + dpre W^T, W (D, H) w_down transposed; and the column sums of dy, one row of
    sum_ptr for each row of tiles.

    dpre is loaded cdiv(D, BLOCK_N) times, W cdiv(N, BLOCK_M) times, dy once.
    """
    first, n_rows, rows, cols, row_ok, col_ok = _tile(N, D, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N)
    dx = _product(dpre_ptr + first * H, w_ptr, rows, cols, n_rows=n_rows, n_cols=D, K=H, EVEN=EVEN,
                  DOT=DOT, ACC=ACC, BLOCK_K=BLOCK_K)
    here = rows[:, None] * D + cols[None, :]
    dy = tl.load(dy_ptr + first * D + here, mask=row_ok & col_ok, other=0.0).to(ACC)
    dx = (dy + dx).to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + first * D + here, dx, mask=row_ok & col_ok)
    sums = tl.sum(dy, axis=0)[None, :]
    tl.store(sum_ptr + first // BLOCK_M * D + cols[None, :], sums, mask=col_ok)


# ---- launching them ----------------------------------------------------------------------------

def _options(w, a):
    """What a launch is told: dtypes of products and sums, tile, warps of 32 threads, steps in
    flight. The products are in W's dtype; A may be a stream that autocast leaves in float32."""
    step = BLOCK_K[w.element_size(), a.element_size()]
    return dict(EVEN=w.size(1) % step == 0, DOT=getattr(tl, str(w.dtype).removeprefix("torch.")),
                ACC=tl.float64 if w.dtype == torch.float64 else tl.float32,
                BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=step, num_warps=8, num_stages=3)


def _grid(rows, cols):
    """A program for every tile of an output of rows x cols."""
    return (triton.cdiv(rows, BLOCK_M) * triton.cdiv(cols, BLOCK_N),)


def _sum_of_rows(a, b, acc):
    """a^T b, summed over their N rows, in dtype acc. a (N, P), b (N, Q) -> (P, Q).

    No kernel of ours: nothing is left to fuse to it, and cuBLAS sums over long N well.
    """
    if a.dtype == acc == b.dtype:
        return a.t() @ b
    half = a.dtype if b.dtype == acc else b.dtype  # one of them may be a stream in float32
    a, b = a.to(half).t(), b.to(half)
    if a.device.type == "cpu":  # in the interpreter; torch.mm has no out_dtype there
        return a.to(acc) @ b.to(acc)
    return torch.mm(a, b, out_dtype=acc)


def forward(x, w_down, b_down, w_up, b_up, scale):
    """y (N, D) and h (N, H) for x (N, D)."""
    x, w_down, b_down, w_up, b_up, scale = (
        t.contiguous() for t in (x, w_down, b_down, w_up, b_up, scale))
    (N, D), H = x.shape, w_down.shape[0]
    h, y = w_down.new_empty(N, H), torch.empty_like(x)
    _down_kernel[_grid(N, H)](x, w_down, b_down, h, N, D, H, **_options(w_down, x))
    _up_kernel[_grid(N, D)](h, w_up, b_up, scale, x, y, N, D, H, **_options(w_up, h))
    return y, h


def backward(dy, x, h, w_down, w_up, b_up, scale):
    """Gradients for x, w_down, b_down, w_up, b_up and scale, from dy (N, D) and what forward kept.
    """
    dy, x, h, scale = (t.contiguous() for t in (dy, x, h, scale))
    (N, D), H = x.shape, w_down.shape[0]
    acc = torch.float64 if w_down.dtype == torch.float64 else torch.float32
    # Transposed, so that every kernel is a product A W^T. scale multiplies dy, as in autograd, and
    # not w_up, which would be cheaper: rounding errors that all rows share do not cancel in sums.
    up, down = w_up.t().contiguous(), w_down.t().contiguous()  # (H, D), (D, H)
    dpre, dx = torch.empty_like(h), torch.empty_like(dy)
    row_tiles = triton.cdiv(N, BLOCK_M)
    dpre_sums = dy.new_empty(row_tiles, H, dtype=acc)
    dy_sums = dy.new_empty(row_tiles, D, dtype=acc)
    _dpre_kernel[_grid(N, H)](dy, scale, up, h, dpre, dpre_sums, N, D, H, **_options(up, dy))
    _dx_kernel[_grid(N, D)](dpre, down, dy, dx, dy_sums, N, D, H, **_options(down, dpre))
    # The rest is as small as the weights.
    dw_down, G = _sum_of_rows(dpre, x, acc), _sum_of_rows(dy, h, acc)  # (H, D), (D, H)
    dy_sum = dy_sums.sum(0)  # (D,)
    dscale = ((w_up.to(acc) * G).sum(1) + b_up.to(acc) * dy_sum).to(scale.dtype)
    scale = scale.to(acc)
    gradients = dw_down, dpre_sums.sum(0), scale[:, None] * G, scale * dy_sum
    return dx, *(g.to(w_down.dtype) for g in gradients), dscale


# ---- autograd: as in kernels/dice_focal.py -----------------------------------------------------

@torch.library.custom_op("risclip::adapter", mutates_args=())
def _adapter_op(x: torch.Tensor, w_down: torch.Tensor, b_down: torch.Tensor, w_up: torch.Tensor,
                b_up: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.cuda.device_of(x):
        return forward(x, w_down, b_down, w_up, b_up, scale)


@torch.library.custom_op("risclip::adapter_backward", mutates_args=())
def _backward_op(dy: torch.Tensor, x: torch.Tensor, h: torch.Tensor, w_down: torch.Tensor,
                 w_up: torch.Tensor, b_up: torch.Tensor, scale: torch.Tensor
                 ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
                            torch.Tensor]:
    # Backward may run under autocast, which would round the products of _sum_of_rows.
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        return backward(dy, x, h, w_down, w_up, b_up, scale)


@_adapter_op.register_fake
def _(x, w_down, b_down, w_up, b_up, scale):
    return x.new_empty(x.shape), w_down.new_empty(x.shape[0], w_down.shape[0])


@_backward_op.register_fake
def _(dy, x, h, w_down, w_up, b_up, scale):
    return tuple(t.new_empty(t.shape) for t in (x, w_down, w_down[:, 0], w_up, b_up, scale))


def _setup_context(ctx, inputs, output):
    x, w_down, _, w_up, b_up, scale = inputs
    ctx.save_for_backward(x, output[1], w_down, w_up, b_up, scale)
    ctx.mark_non_differentiable(output[1])  # h, for backward only
    ctx.set_materialize_grads(False)  # no zeros the size of h for its gradient, which nobody reads


def _backward(ctx, dy, _):
    return (None,) * 6 if dy is None else _backward_op(dy, *ctx.saved_tensors)


_adapter_op.register_autograd(_backward, setup_context=_setup_context)


# ---- what the model calls ----------------------------------------------------------------------

def adapter(x, w_down, b_down, w_up, b_up, scale):
    """The Adapter above. y as x, which is (..., D), floating point, strides of any kind.

    Gradients for all six. Which path runs: kernels/backend.py. Raises ValueError if a parameter
    does not fit x in shape, dtype or device.
    """
    w_down, b_down, w_up, b_up, scale = _checked(x, w_down, b_down, w_up, b_up, scale)
    # Few rows do not pay for the launches, and float32 products have no tensor cores to feed.
    worthwhile = x.numel() >= FEWEST_ROWS * x.shape[-1] and w_down.dtype != torch.float32
    if not use_triton(x, worthwhile):
        return _reference(x, w_down, b_down, w_up, b_up, scale)
    # Rows of an odd number of elements can only be loaded one element at a time. H is ours to
    # choose: hidden units without weights, up to the next multiple of 16, change nothing (449,
    # Table A1, becomes 464), and autograd cuts their gradients off again.
    pad = -w_down.shape[0] % 16
    if pad:
        w_down, b_down = F.pad(w_down, (0, 0, 0, pad)), F.pad(b_down, (0, pad))
        w_up = F.pad(w_up, (0, pad))
    y, _ = _adapter_op(x.reshape(-1, x.shape[-1]), w_down, b_down, w_up, b_up, scale)
    return y.view(x.shape)


FEWEST_ROWS = 8192  # for Triton, unless it is forced: an estimate, no GPU has been asked


def _checked(x, w_down, b_down, w_up, b_up, scale):
    """The parameters, cast as autocast does; a ValueError if anything does not fit x."""
    if x.dtype not in FLOATING or x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError("x must be floating point (16 to 64 bits) of shape (..., D) with D > 0, "
                         f"got {x.dtype} of shape {tuple(x.shape)}")
    D, H = x.shape[-1], w_down.shape[0] if w_down.dim() else 0
    device = x.device.type
    autocast = (device != "meta" and x.dtype != torch.float64  # which autocast leaves alone
                and torch.is_autocast_enabled(device))
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    needed = {"w_down": (H, D), "b_down": (H,), "w_up": (D, H), "b_up": (D,), "scale": (D,)}
    for (name, shape), p in zip(needed.items(), (w_down, b_down, w_up, b_up, scale)):
        got = f"{name} is {p.dtype} of shape {tuple(p.shape)} on {p.device}"
        asked = f"x is {x.dtype} of shape {tuple(x.shape)} on {x.device}"
        if p.shape != shape:
            raise ValueError(f"{got}, but shape {shape} is needed: {asked}, w_down of "
                             f"{tuple(w_down.shape)}")
        if p.device != x.device or p.dtype not in FLOATING or (p.dtype != dtype and not autocast):
            raise ValueError(f"{got}, but {asked}: device and dtype must agree (autocast casts "
                             "floating point)")
    # scale is no operand of a matrix product, so autocast leaves it alone
    return [*(p.to(dtype) for p in (w_down, b_down, w_up, b_up)), scale]
