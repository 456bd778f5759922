"""Attention, softmax(q k^T / sqrt(d)) v, with a path of its own for bf16 on CPUs.

Everywhere else this is torch's fused kernel. On a CPU in bf16 that kernel is slow for long
sequences: the two products by themselves, one head at a time, take two thirds of its time. One
head at a time matters, because the scores (Nq, Nk) of one head fit the processor's cache and those
of all heads do not (1,601 tokens: 5 MB a head in bf16).

The fused kernel never keeps the scores for backward. The loop must not either: the scores of B's
image tower at 640 pixels would be 72 MB per layer and sentence. So backward computes them again.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

LONG = 512  # tokens; up to here the fused kernel is as fast


def attend(q, k, v, keep=None, causal=False):
    """Each query's mean of the values, weighted by the softmax of its scores: (B, nh, Nq, d).

    q (B, nh, Nq, d); k, v (B, nh, Nk, d).
    keep (B, 1, 1, Nk) bool or None: the keys that may be attended to.
    causal: a query attends to no key that comes after it.
    """
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if slow and min(q.size(2), k.size(2)) > LONG and keep is None and not causal:
        return _head_by_head(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, is_causal=causal)


def _head_by_head(q, k, v):
    q = q / q.size(-1) ** 0.5
    heads = zip(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))  # (N, d) each, B * nh times
    if q.requires_grad or k.requires_grad:  # otherwise backward needs no scores but those of v
        y = [checkpoint(_one_head, *head, use_reentrant=False) for head in heads]
    else:
        y = [_one_head(*head) for head in heads]
    return torch.stack(y).unflatten(0, k.shape[:2])


def _one_head(q, k, v):
    return (q @ k.T).softmax(dim=-1) @ v
