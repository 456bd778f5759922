"""The loss of Sec. 3.5: dice_weight * dice + focal_weight * focal, over logits and a mask.

With p = sigmoid(logit), t the target in [0, 1], and sums over the n pixels of one sample:

    dice  = 1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1)                          Milletari et al. (2016), smoothed by 1
    focal = 1/n sum(alpha_t * u^gamma * bce),   u = 1 - p_t = p (1 - t) + (1 - p) t             Lin et al. (2017)
            alpha_t = alpha t + (1 - alpha) (1 - t),   bce = -t log p - (1 - t) log(1 - p)

The result is the mean over samples. It is always computed in float32 (float64 for float64 logits), also under autocast.
"""

import torch
import torch.nn.functional as F


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
    u = u.clamp_min(torch.finfo(torch.float32).tiny)  # u^gamma has no slope at 0 for gamma < 1
    bce = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    focal = (alpha * t + (1 - alpha) * (1 - t)) * u**gamma * bce
    return torch.stack([(p * t).sum(1), p.sum(1), t.sum(1), focal.sum(1)], dim=1)


def _loss(sums, n, dice_weight, focal_weight):
    """The loss from the four sums (B, 4) of each sample of n pixels."""
    pt, p, t, focal = sums.unbind(1)
    dice = 1 - (2 * pt + 1) / (p + t + 1)
    return (dice_weight * dice + focal_weight * focal / n).mean()


def _checked(logits, target):
    """Both as (samples, pixels); a ValueError if they do not fit each other."""
    got = f"logits {logits.dtype} of shape {tuple(logits.shape)} on {logits.device}"
    got = f"{got}, target {target.dtype} of shape {tuple(target.shape)} on {target.device}"
    if not logits.is_floating_point() or logits.dim() < 2 or logits.numel() == 0:
        raise ValueError(f"logits must be floating point of shape (B, n), (B, H, W) or (B, C, H, W), not empty: {got}")
    if target.shape != logits.shape or target.device != logits.device:
        raise ValueError(f"target must have the shape and device of logits: {got}")
    if target.dtype not in (torch.bool, torch.uint8) and not target.is_floating_point():
        raise ValueError(f"target must be bool, uint8 or floating point: {got}")
    if target.dtype != torch.bool and not torch.compiler.is_compiling():  # a compiled graph cannot look at values
        low, high = (bound.item() for bound in target.aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"target must lie in [0, 1], but spans [{low}, {high}]: {got}")
    samples = 2 if logits.dim() == 4 else 1
    return logits.flatten(0, samples - 1).flatten(1), target.detach().flatten(0, samples - 1).flatten(1)


def dice_focal(logits, target, dice_weight=1.0, focal_weight=1.75, alpha=0.65, gamma=2.0):
    """Mean over samples of dice_weight * dice + focal_weight * focal (Sec. 3.5; Table A1 has the defaults). A scalar.

    logits (B, n) or (B, H, W): B samples. (B, C, H, W): B * C samples, every channel with a dice of its own.
    target of the same shape, in [0, 1]: bool, uint8 or floating point. It receives no gradient. bool is never looked
    at; the others are checked, which on a GPU waits for it once, so pass bool where the mask is hard.
    """
    logits, target = _checked(logits, target)
    sums = _sums_reference(logits, target, alpha, gamma)
    return _loss(sums, logits.size(1), dice_weight, focal_weight)
