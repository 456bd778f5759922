"""The loss of Sec. 3.5: dice_weight * dice + focal_weight * focal, over logits and a mask.

With p = sigmoid(logit), t the target in [0, 1], and sums over the n pixels of one sample:

    dice  = 1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1)                        smoothed by 1
    focal = 1/n sum(alpha_t u^gamma bce),                              Lin et al. (2017), with
            u       = 1 - p_t = p (1 - t) + (1 - p) t
            alpha_t = alpha t + (1 - alpha) (1 - t)
            bce     = -t log p - (1 - t) log(1 - p)

Milletari et al. (2016), whom the paper cites, square p and t in dice's denominator; DETR's code
does not. The result is the mean over samples, in float32 (float64 for float64 logits), also under
autocast.

Why fuse. All that the loss takes from the pixels are four sums per sample: of p t, p, t and the
focal terms. Eager PyTorch writes every intermediate, each as large as the logits, and reads it
again: for 32 x 2 maps of 640 x 640 pixels (stage 2, float32) 4955 MB forward and 5505 MB backward.
One pass that keeps the intermediates in registers reads logits and target once and writes next to
nothing: 131 MB with a bool target. One pass back reads both once more and writes the gradient:
236 MB. Not counted: a target that is not bool is read once more, to check that it lies in [0, 1].
Between the passes only logits and target are kept. What follows from the sums, a few divisions, is
plain torch, shared with the reference, and autograd derives it.

The derivative of a focal term, with u' = p (1 - p) (1 - 2 t) and bce' = p - t:

    d/dlogit (alpha_t u^gamma bce) = alpha_t (u^gamma (p - t) + gamma u^(gamma - 1) u' bce)

How it is proven, and what a GPU has and has not run: docs/kernels.md.
"""

import torch
import torch.nn.functional as F

from kernels.backend import FLOATING, tl, triton, use_triton

# ---- in plain torch ----------------------------------------------------------------------------

def dice_focal_reference(logits, target, dice_weight=1.0, focal_weight=1.75, alpha=0.65, gamma=2.0):
    """The loss in plain torch. Shapes, dtypes and defaults as in `dice_focal`."""
    logits, target = _checked(logits, target)
    sums = _sums_reference(logits, target, alpha, gamma)
    return _loss(sums, logits.size(1), dice_weight, focal_weight)


def _sums_reference(logits, target, alpha, gamma):
    """sum(p t), sum(p), sum(t), sum(alpha_t u^gamma bce) of every sample.

    logits, target (B, n) -> (B, 4).
    """
    x = logits if logits.dtype == torch.float64 else logits.float()
    t = target.to(x.dtype)
    p = torch.sigmoid(x)
    u = p * (1 - t) + torch.sigmoid(-x) * t  # 1 - p would lose the small ones
    u = u.clamp_min(1e-37)  # the slope of u^gamma at 0 is infinite for gamma < 1
    bce = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    focal = (alpha * t + (1 - alpha) * (1 - t)) * u**gamma * bce
    return torch.stack([(p * t).sum(1), p.sum(1), t.sum(1), focal.sum(1)], dim=1)


def _loss(sums, n, dice_weight, focal_weight):
    """The loss from the four sums (B, 4) of each sample of n pixels."""
    pt, p, t, focal = sums.unbind(1)
    dice = 1 - (2 * pt + 1) / (p + t + 1)  # sum(u) / (p + t + 1): the same, its slope cancels
    return (dice_weight * dice + focal_weight * focal / n).mean()


# ---- the kernels -------------------------------------------------------------------------------
# This is the easier of the two files, so Triton is explained here.
#
# A GPU has many processors (an H100 132), each of which runs hundreds of threads at once. In Triton
# we do not write what a thread does but what a *program* does, and launch a grid of programs:
#
#     kernel[grid](arguments)       e.g. grid = (64, 25): 64 samples, each cut into 25 chunks
#     tl.program_id(0), (1)         which of them this program is
#     tl.arange(0, BLOCK)           a block: BLOCK numbers, spread over the program's threads
#     x_ptr + pixel                 a block of addresses; x_ptr is that of x's first number
#     tl.load, tl.store             access them all at once
#     mask=ok, other=0              but only where ok; elsewhere load gives `other`
#     tl.sum(x, axis=0)             over the block, across threads
#     tl.constexpr                  known when the kernel is compiled: an `if` on it costs nothing
#
# A block's size must be a power of two, so the last block of a sample has lanes past its end, and
# needs the mask. A jitted function that another calls becomes part of it. All the numbers of a
# block are kept in registers, which are the fastest memory. What does not fit into the 255 that a
# thread may have spills into memory, which is slow. So this is the plan of the forward kernel, with
# n pixels per sample (the backward kernel reads the same pixels and writes a gradient for each):
#
#     for every sample, for every chunk of it:              the grid: all at once
#         sums = 0
#         for every block of the chunk:                     the loop of one program
#             x, t = the block's logits and targets         read from memory once
#             sums += the block's terms                     in registers
#         write the four sums of the chunk                  added up at the end, in a fixed order
#
#     |<------------------------ n pixels of a sample ------------------------->|
#     |    chunk 0: one program      |    chunk 1: another       |  chunk 2     |
#     | block | block | ... 8 blocks | block | block | ...       | block | bl:::  ::: is masked
#
# A block has 2048 pixels: 8 for each of 256 threads (8 warps of 32), so that a thread loads at
# least 16 bytes of logits at once, and keeps everything in at most 80 registers. A processor has
# 65,536, enough for three programs or more, of which one computes while another waits for memory.
# A map of 640 x 640 is 25 chunks, so a batch of 64 maps keeps any GPU busy.
BLOCK = 2048
BLOCKS_PER_CHUNK = 8
# Terms of the series for log(1 + e): relative errors of 1.5e-8 and 2e-18.
TERMS = {torch.float32: 7, torch.float64: 17}


@triton.jit
def _load(x_ptr, t_ptr, pixel, ok, ACC: tl.constexpr):
    """Logits and targets of a block. Past the end: a logit so low that no sum changes."""
    x = tl.load(x_ptr + pixel, mask=ok, other=-1000.0).to(ACC)
    t = tl.load(t_ptr + pixel, mask=ok, other=0).to(ACC)
    return x, t


@triton.jit
def _terms(x, t, TERMS: tl.constexpr):
    """p, 1 - p, p (1 - t), (1 - p) t and bce, all from e = exp(-|x|), which cannot overflow.

    The log in bce is log(1 + e) = 2 artanh(s) with s = e / (2 + e) <= 1 / 3, as a series:
    2 s (1 + s^2 / 3 + s^4 / 5 + ...). A small e is not rounded away, as it would be in 1 + e.
    """
    e = tl.exp(-tl.abs(x))
    inverse = 1 / ((1 + e) * (2 + e))  # one division gives two
    larger = (2 + e) * inverse  # 1 / (1 + e), of p and 1 - p the larger
    smaller = e * larger  # 1 - larger would round small values to 0
    s = e * (1 + e) * inverse
    series = tl.zeros_like(s)
    for i in tl.static_range(TERMS):  # Horner's rule, unrolled
        series = series * (s * s) + 1 / (2 * (TERMS - i) - 1)
    bce = tl.maximum(x, 0.0) - x * t + 2 * s * series
    p = tl.where(x >= 0, larger, smaller)
    q = tl.where(x >= 0, smaller, larger)
    return p, q, p * (1 - t), q * t, bce


@triton.jit
def _power(u, EXPONENT: tl.constexpr):
    """u^EXPONENT for u >= 0. The paper's exponents, 2 and in the slope 1, cost next to nothing."""
    if EXPONENT == 2:
        power = u * u
    elif EXPONENT == 1:
        power = u
    else:
        power = tl.exp(EXPONENT * tl.log(tl.maximum(u, 1e-37)))  # log(0) is infinite
    return power


@triton.jit
def _sums_kernel(x_ptr, t_ptr, part_ptr, n, alpha, GAMMA: tl.constexpr, TERMS: tl.constexpr,
                 ACC: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """The four sums over this program's pixels, to row (sample, chunk) of part (B, chunks, 4).

    Logits and targets are loaded once.
    """
    sample, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x_ptr += sample * n  # may exceed 32 bits
    t_ptr += sample * n
    pt_sum = tl.zeros((BLOCK,), ACC)
    p_sum, t_sum, focal_sum = pt_sum, pt_sum, pt_sum
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, n), BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        x, t = _load(x_ptr, t_ptr, pixel, pixel < n, ACC=ACC)
        p, _, p_off, q_on, bce = _terms(x, t, TERMS=TERMS)
        alpha_t = alpha * t + (1 - alpha) * (1 - t)
        pt_sum += p * t
        p_sum += p
        t_sum += t
        focal_sum += alpha_t * _power(p_off + q_on, EXPONENT=GAMMA) * bce
    part_ptr += (sample * tl.cdiv(n, CHUNK) + chunk) * 4
    tl.store(part_ptr, tl.sum(pt_sum, axis=0))
    tl.store(part_ptr + 1, tl.sum(p_sum, axis=0))
    tl.store(part_ptr + 2, tl.sum(t_sum, axis=0))
    tl.store(part_ptr + 3, tl.sum(focal_sum, axis=0))


@triton.jit
def _gradient_kernel(x_ptr, t_ptr, dsums_ptr, dx_ptr, n, alpha, GAMMA: tl.constexpr,
                     TERMS: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr,
                     BLOCK: tl.constexpr):
    """dlogits from the gradients dsums (B, 4) of the four sums.

    Logits and targets are loaded once, the three numbers of a sample by each of its programs.
    """
    sample, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x_ptr += sample * n
    t_ptr += sample * n
    dx_ptr += sample * n
    dpt = tl.load(dsums_ptr + sample * 4)
    dp = tl.load(dsums_ptr + sample * 4 + 1)  # sum(t), at + 2, does not depend on the logits
    dfocal = tl.load(dsums_ptr + sample * 4 + 3)
    on, off = dfocal * alpha, dfocal * (1 - alpha)
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, n), BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        x, t = _load(x_ptr, t_ptr, pixel, pixel < n, ACC=ACC)
        p, q, p_off, q_on, bce = _terms(x, t, TERMS=TERMS)
        u, pq = p_off + q_on, p * q
        slope = _power(u, EXPONENT=GAMMA) * (p_off - q_on)  # p - t without cancellation
        slope += GAMMA * _power(u, EXPONENT=GAMMA - 1) * pq * (1 - 2 * t) * bce
        dx = pq * (dpt * t + dp) + (on * t + off * (1 - t)) * slope
        tl.store(dx_ptr + pixel, dx.to(dx_ptr.dtype.element_ty), mask=pixel < n)


# ---- launching them ----------------------------------------------------------------------------

def _accumulator(logits):
    """The dtype of all arithmetic."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _grid(logits):
    """A program for every chunk of every sample."""
    B, n = logits.shape
    return B, triton.cdiv(n, BLOCK * BLOCKS_PER_CHUNK)


def _options(logits, gamma):
    acc = _accumulator(logits)
    return dict(GAMMA=gamma, TERMS=TERMS[acc], ACC=getattr(tl, str(acc).removeprefix("torch.")),
                CHUNK=BLOCK * BLOCKS_PER_CHUNK, BLOCK=BLOCK, num_warps=8)


def forward(logits, target, alpha, gamma):
    """The four sums (B, 4) for logits and target (B, n)."""
    logits, target = logits.contiguous(), target.contiguous()
    B, chunks = grid = _grid(logits)
    parts = logits.new_empty(B, chunks, 4, dtype=_accumulator(logits))
    _sums_kernel[grid](logits, target, parts, logits.size(1), alpha, **_options(logits, gamma))
    return parts.sum(1)  # in a fixed order, unlike atomic additions


def backward(dsums, logits, target, alpha, gamma):
    """dlogits (B, n) from dsums (B, 4)."""
    dsums, logits, target = dsums.contiguous(), logits.contiguous(), target.contiguous()
    dlogits = torch.empty_like(logits)
    _gradient_kernel[_grid(logits)](logits, target, dsums, dlogits, logits.size(1), alpha,
                                    **_options(logits, gamma))
    return dlogits


# ---- autograd ----------------------------------------------------------------------------------
# torch.library makes `forward` one operator: torch.compile keeps it whole in its graph instead of
# breaking there, with the shapes told by register_fake and the derivative by register_autograd.

@torch.library.custom_op("risclip::pixel_sums", mutates_args=())
def _sums_op(logits: torch.Tensor, target: torch.Tensor, alpha: float, gamma: float
             ) -> torch.Tensor:
    with torch.cuda.device_of(logits):  # Triton launches on the current GPU; a CPU tensor has none
        return forward(logits, target, alpha, gamma)


@torch.library.custom_op("risclip::pixel_sums_backward", mutates_args=())
def _backward_op(dsums: torch.Tensor, logits: torch.Tensor, target: torch.Tensor, alpha: float,
                 gamma: float) -> torch.Tensor:
    with torch.cuda.device_of(logits):
        return backward(dsums, logits, target, alpha, gamma)


@_sums_op.register_fake
def _(logits, target, alpha, gamma):
    return logits.new_empty(logits.shape[0], 4, dtype=_accumulator(logits))


@_backward_op.register_fake
def _(dsums, logits, target, alpha, gamma):
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output):
    logits, target, ctx.alpha, ctx.gamma = inputs
    ctx.save_for_backward(logits, target)


def _backward(ctx, dsums):
    return _backward_op(dsums, *ctx.saved_tensors, ctx.alpha, ctx.gamma), None, None, None


_sums_op.register_autograd(_backward, setup_context=_setup_context)


# ---- what the model calls ----------------------------------------------------------------------

def dice_focal(logits, target, dice_weight=1.0, focal_weight=1.75, alpha=0.65, gamma=2.0):
    """The loss above, a scalar; the defaults are Table A1's. Which path runs: kernels/backend.py.

    logits (B, n) or (B, H, W): B samples. (B, C, H, W): B * C samples, each channel with a dice of
    its own.
    target of the same shape, in [0, 1]: bool, uint8 or floating point. It receives no gradient.
    A bool target's values need no check. The others are checked, which reads them once more and
    waits
    for the GPU once, so pass bool for a hard mask. Under torch.compile, which cannot look at
    values, they are not checked. Raises ValueError if the two do not fit each other.
    """
    logits, target = _checked(logits, target)
    if use_triton(logits):
        if target.dtype == torch.bool:
            target = target.view(torch.uint8)  # a byte each as well
        sums = _sums_op(logits, target, alpha, gamma)
    else:
        sums = _sums_reference(logits, target, alpha, gamma)
    return _loss(sums, logits.size(1), dice_weight, focal_weight)


def _checked(logits, target):
    """Both as (samples, pixels); a ValueError if they do not fit each other."""
    got = (f"logits {logits.dtype} of shape {tuple(logits.shape)} on {logits.device}, "
           f"target {target.dtype} of shape {tuple(target.shape)} on {target.device}")
    if logits.dtype not in FLOATING or logits.dim() < 2 or logits.numel() == 0:
        raise ValueError("logits must be floating point of shape (B, n), (B, H, W) or "
                         f"(B, C, H, W), not empty: {got}")
    if target.shape != logits.shape or target.device != logits.device:
        raise ValueError(f"target must have the shape and device of logits: {got}")
    if target.dtype not in (torch.bool, torch.uint8, *FLOATING):
        raise ValueError(f"target must be bool, uint8 or floating point: {got}")
    if target.dtype != torch.bool and not torch.compiler.is_compiling():
        low, high = torch.stack(target.aminmax()).tolist()  # waits for a GPU once, not twice
        if not (low >= 0 and high <= 1):
            raise ValueError(f"target must lie in [0, 1], but spans [{low}, {high}]: {got}")
    samples = 2 if logits.dim() == 4 else 1
    logits, target = (t.flatten(0, samples - 1).flatten(1) for t in (logits, target))
    return logits, target.detach()
