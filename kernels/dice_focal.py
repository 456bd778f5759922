"""The loss of Sec. 3.5: dice_weight * dice + focal_weight * focal, over logits and a mask.

With p = sigmoid(logit), t the target in [0, 1], and sums over the n pixels of one sample:

    dice  = 1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1)                                        smoothed by 1
    focal = 1/n sum(alpha_t u^gamma bce),   u = 1 - p_t = p (1 - t) + (1 - p) t                 Lin et al. (2017)
            alpha_t = alpha t + (1 - alpha) (1 - t),   bce = -t log p - (1 - t) log(1 - p)

Milletari et al. (2016), whom the paper cites, square p and t in dice's denominator; DETR's code does not.
The result is the mean over samples, always in float32 (float64 for float64 logits), also under autocast.

Why fuse. All that the loss takes from the pixels are four sums for each sample: of p t, p, t and the focal terms. Eager
PyTorch writes every intermediate, each as large as the logits, and reads it again: for 32 x 2 maps of 640 x 640 pixels
(stage 2, float32) 4955 MB forward and 5505 MB backward. One pass that keeps the intermediates in registers reads logits
and target once and writes next to nothing: 131 MB with a bool target. One pass back reads both once more and writes the
gradient: 236 MB. Not counted: a target that is not bool is read once more, to check that it lies in [0, 1], except
under torch.compile, where nobody looks. Between the passes only logits and target are kept. What follows from the sums,
a few divisions, is plain torch, shared with the reference, and autograd derives it.

The derivative of a focal term, with u' = p (1 - p) (1 - 2 t) and bce' = p - t:

    d/dlogit (alpha_t u^gamma bce) = alpha_t (u^gamma (p - t) + gamma u^(gamma - 1) u' bce)

Compiled ahead of time for NVIDIA sm_80 (A100), sm_90 (H100), sm_100 (B200), sm_86, sm_89 and sm_120 (RTX) and for AMD's
gfx942 and gfx950 (MI300, MI350), no register spilled. Values, gradients and memory accesses are tested in Triton's
interpreter on a CPU. No GPU has run or timed it.
"""

import torch
import torch.nn.functional as F

from kernels.backend import FLOATING, tl, triton, use_triton


def dice_focal_reference(logits, target, dice_weight=1.0, focal_weight=1.75, alpha=0.65, gamma=2.0):
    """The loss in plain torch. Shapes, dtypes and defaults as in `dice_focal`."""
    logits, target = _checked(logits, target)
    sums = _sums_reference(logits, target, alpha, gamma)
    return _loss(sums, logits.size(1), dice_weight, focal_weight)


def _sums_reference(logits, target, alpha, gamma):
    """sum(p t), sum(p), sum(t), sum(alpha_t u^gamma bce) of every sample. logits, target (B, n) -> (B, 4)."""
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
    dice = 1 - (2 * pt + 1) / (p + t + 1)  # sum(u) / (p + t + 1) is the same, with a slope that cancels
    return (dice_weight * dice + focal_weight * focal / n).mean()


def _checked(logits, target):
    """Both as (samples, pixels); a ValueError if they do not fit each other."""
    got = f"logits {logits.dtype} of shape {tuple(logits.shape)} on {logits.device}"
    got = f"{got}, target {target.dtype} of shape {tuple(target.shape)} on {target.device}"
    if logits.dtype not in FLOATING or logits.dim() < 2 or logits.numel() == 0:
        raise ValueError(f"logits must be floating point of shape (B, n), (B, H, W) or (B, C, H, W), not empty: {got}")
    if target.shape != logits.shape or target.device != logits.device:
        raise ValueError(f"target must have the shape and device of logits: {got}")
    if target.dtype not in (torch.bool, torch.uint8, *FLOATING):
        raise ValueError(f"target must be bool, uint8 or floating point: {got}")
    if target.dtype != torch.bool and not torch.compiler.is_compiling():  # a compiled graph cannot look at values
        low, high = torch.stack(target.aminmax()).tolist()  # waits for a GPU once, not twice
        if not (low >= 0 and high <= 1):
            raise ValueError(f"target must lie in [0, 1], but spans [{low}, {high}]: {got}")
    samples = 2 if logits.dim() == 4 else 1
    return logits.flatten(0, samples - 1).flatten(1), target.detach().flatten(0, samples - 1).flatten(1)


# ---- the kernels ----------------------------------------------------------------------------------------------------
# A Triton kernel is the program of one block of the data. It is launched on a grid of programs, tl.program_id says
# which one it is, and its "tensors" are blocks of known size spread over the threads of one processor of the GPU.
# pointer + offsets is a block of addresses, and a mask leaves out those past the end. kernels/adapter.py says more.
#
# 2048 pixels for a program: 8 for each of 256 threads (8 warps of 32), so that a thread loads at least 16 bytes of
# logits at once and keeps all intermediates in at most 80 registers. A processor's 65,536 are enough for three programs
# or more, of which one computes while another waits for memory. A map of 640 x 640 is 200 programs, a batch of 64 keeps
# any GPU busy. ACC is the dtype of all arithmetic.
BLOCK = 2048


@triton.jit
def _load(x_ptr, t_ptr, n, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Place, validity, logit and target of this program's pixels. No program holds pixels of two samples."""
    blocks = tl.cdiv(n, BLOCK)
    sample = (tl.program_id(0) // blocks).to(tl.int64)  # sample * n may exceed 32 bits
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    ok = pixel < n
    here = sample * n + pixel
    x = tl.load(x_ptr + here, mask=ok).to(ACC)  # undefined where not ok
    t = tl.load(t_ptr + here, mask=ok, other=0).to(ACC)
    return sample, here, ok, x, t


@triton.jit
def _terms(x, t, alpha):
    """p, 1 - p, u, bce and alpha_t, all from e = exp(-|x|), which cannot overflow."""
    e = tl.exp(-tl.abs(x))
    one_e = 1 + e
    p = tl.where(x >= 0, 1 / one_e, e / one_e)
    q = tl.where(x >= 0, e / one_e, 1 / one_e)  # 1 - p would round small values to 0
    # log(1 + e) as log of the rounded sum plus what rounding took from e: a small e is not lost.
    bce = tl.maximum(x, 0.0) - x * t + tl.log(one_e) + (e - (one_e - 1))
    u = tl.maximum(p * (1 - t) + q * t, 1e-37)
    return p, q, u, bce, alpha * t + (1 - alpha) * (1 - t)


@triton.jit
def _sums_kernel(x_ptr, t_ptr, part_ptr, n, alpha, gamma, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """The four sums over this program's pixels: row tl.program_id(0) of part (samples * blocks, 4).

    Logits and target are loaded once.
    """
    sample, here, ok, x, t = _load(x_ptr, t_ptr, n, ACC, BLOCK)
    p, q, u, bce, alpha_t = _terms(x, t, alpha)
    focal = alpha_t * tl.exp(gamma * tl.log(u)) * bce
    part_ptr += tl.program_id(0) * 4
    tl.store(part_ptr, tl.sum(tl.where(ok, p * t, 0.0), axis=0))
    tl.store(part_ptr + 1, tl.sum(tl.where(ok, p, 0.0), axis=0))
    tl.store(part_ptr + 2, tl.sum(t, axis=0))  # 0 past the end
    tl.store(part_ptr + 3, tl.sum(tl.where(ok, focal, 0.0), axis=0))


@triton.jit
def _gradient_kernel(x_ptr, t_ptr, dsums_ptr, dx_ptr, n, alpha, gamma, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """dlogits from the gradients dsums (samples, 4) of the four sums. Logits and target are loaded once."""
    sample, here, ok, x, t = _load(x_ptr, t_ptr, n, ACC, BLOCK)
    p, q, u, bce, alpha_t = _terms(x, t, alpha)
    dpt = tl.load(dsums_ptr + sample * 4)
    dp = tl.load(dsums_ptr + sample * 4 + 1)  # sum(t), at + 2, does not depend on the logits
    dfocal = tl.load(dsums_ptr + sample * 4 + 3)
    log_u = tl.log(u)
    slope = tl.exp(gamma * log_u) * (p * (1 - t) - q * t)  # p - t without cancellation
    slope += gamma * tl.exp((gamma - 1) * log_u) * p * q * (1 - 2 * t) * bce
    dx = p * q * (dpt * t + dp) + dfocal * alpha_t * slope
    tl.store(dx_ptr + here, dx.to(dx_ptr.dtype.element_ty), mask=ok)


# ---- launching them -------------------------------------------------------------------------------------------------

def _options(logits):
    return dict(ACC=tl.float64 if logits.dtype == torch.float64 else tl.float32, BLOCK=BLOCK, num_warps=8)


def forward(logits, target, alpha, gamma):
    """The four sums (B, 4) for logits and target (B, n)."""
    (B, n), blocks = logits.shape, triton.cdiv(logits.shape[1], BLOCK)
    logits, target = logits.contiguous(), target.contiguous()
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    parts = logits.new_empty(B, blocks, 4, dtype=acc)
    _sums_kernel[(B * blocks,)](logits, target, parts, n, alpha, gamma, **_options(logits))
    return parts.sum(1)  # in a fixed order, unlike atomic additions


def backward(dsums, logits, target, alpha, gamma):
    """dlogits (B, n) from dsums (B, 4)."""
    (B, n), blocks = logits.shape, triton.cdiv(logits.shape[1], BLOCK)
    dsums, logits, target = dsums.contiguous(), logits.contiguous(), target.contiguous()
    dlogits = torch.empty_like(logits)
    _gradient_kernel[(B * blocks,)](logits, target, dsums, dlogits, n, alpha, gamma, **_options(logits))
    return dlogits


# ---- autograd -------------------------------------------------------------------------------------------------------
# torch.library makes `forward` one operator: torch.compile keeps it whole in its graph instead of breaking there, with
# the shapes told by register_fake and the derivative by register_autograd.

@torch.library.custom_op("risclip::pixel_sums", mutates_args=())
def _sums_op(logits: torch.Tensor, target: torch.Tensor, alpha: float, gamma: float) -> torch.Tensor:
    with torch.cuda.device_of(logits):  # Triton launches on the current GPU; nothing for a CPU tensor
        return forward(logits, target, alpha, gamma)


@torch.library.custom_op("risclip::pixel_sums_backward", mutates_args=())
def _backward_op(dsums: torch.Tensor, logits: torch.Tensor, target: torch.Tensor, alpha: float, gamma: float
                 ) -> torch.Tensor:
    with torch.cuda.device_of(logits):
        return backward(dsums, logits, target, alpha, gamma)


@_sums_op.register_fake
def _(logits, target, alpha, gamma):
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(logits.shape[0], 4, dtype=acc)


@_backward_op.register_fake
def _(dsums, logits, target, alpha, gamma):
    return logits.new_empty(logits.shape)


def _keep(ctx, inputs, output):
    logits, target, ctx.alpha, ctx.gamma = inputs
    ctx.save_for_backward(logits, target)


def _derivative(ctx, dsums):
    return _backward_op(dsums, *ctx.saved_tensors, ctx.alpha, ctx.gamma), None, None, None


_sums_op.register_autograd(_derivative, setup_context=_keep)


def dice_focal(logits, target, dice_weight=1.0, focal_weight=1.75, alpha=0.65, gamma=2.0):
    """Mean over samples of dice_weight * dice + focal_weight * focal (Sec. 3.5; Table A1 has the defaults). A scalar.

    logits (B, n) or (B, H, W): B samples. (B, C, H, W): B * C samples, every channel with a dice of its own.
    target of the same shape, in [0, 1]: bool, uint8 or floating point. It receives no gradient. bool is never looked
    at; the others are checked, which reads them once more and waits for a GPU once, so pass bool for a hard mask.
    Under torch.compile, which cannot look at values, they are not checked.
    Triton or plain torch: see kernels/backend.py.
    """
    logits, target = _checked(logits, target)
    if use_triton(logits):
        target = target.view(torch.uint8) if target.dtype == torch.bool else target  # a byte each as well
        sums = _sums_op(logits, target, alpha, gamma)
    else:
        sums = _sums_reference(logits, target, alpha, gamma)
    return _loss(sums, logits.size(1), dice_weight, focal_weight)
