from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def attend(q, k, v, keep=None, causal=False):
    """softmax(q k^T / sqrt(d)) v. q (B, heads, Nq, d); k, v (B, heads, Nk, d); keep (B, 1, 1, Nk) bool: the keys that
    may be attended to; causal: none that comes after the query.

    torch's fused kernel, unless it is slow: on a CPU in bf16 its products by themselves take two thirds of the time,
    head by head so that the scores fit the cache. They are computed again in backward.
    """
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and min(q.size(2), k.size(2)) > 512
    if keep is not None or causal or not slow:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, is_causal=causal)

    def head(q, k, v):
        return (q @ k.T).softmax(dim=-1) @ v

    if q.requires_grad or k.requires_grad:
        head = partial(checkpoint, head, use_reentrant=False)
    heads = zip((q / q.size(-1) ** 0.5).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
    return torch.stack([head(*one) for one in heads]).unflatten(0, q.shape[:2])
