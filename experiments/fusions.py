"""What Table 4 puts in the place of MHCA in CFE (Eq. 2) and SKE (Sec. 4.4, 'Fusion ablation').

    name           Table 4                    t_m, v_m
    mhsa           MHSA on Concat             self-attention over words and patches in one row
    mhca-concat    MHCA on Concat             MHCA whose keys are words and patches in one row
    pwam, pwam-2   PWAM (LAVT, CVPR 2022)     attention weighs the values, which gate the features
    sdf, sdf-2     SDF (VLT, TPAMI 2023)      attention gives each place a sentence of its own

PWAM and SDF condition the image on the text; with -2, in the same way, the text on the image too.
Both come without what their own networks have around them: our scaler and residual take the place
of LAVT's language gate. RISCLIP(config, fuse=FUSIONS[name]) is a model with one of them.

Every fusion takes t (B, T, d), v (B, N, d) and is_word (B, T) bool, and gives t_m (B, T, d), or
None where the text sees no image, and v_m (B, N, d). SKE calls `start_at_zero` of its parts, so
that a new SKE changes nothing (A.1).
"""

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from risclip import Attention, zero_


class MHSAOnConcat(nn.Module):
    """One attention for words and patches alike: T + N queries, T + N keys."""

    def __init__(self, width, heads):
        super().__init__()
        self.attention = Attention(width, heads)

    def forward(self, t, v, is_word):
        both, keep = in_one_row(t, v, is_word)
        return self.attention(both, both, keep).split([t.size(1), v.size(1)], dim=1)


class MHCAOnConcat(nn.Module):
    """An attention per modality for the queries, and T + N keys for both."""

    def __init__(self, width, heads):
        super().__init__()
        # Not MHCA's names, so that a checkpoint of the one is never taken for the other's.
        self.words, self.patches = Attention(width, heads), Attention(width, heads)

    def forward(self, t, v, is_word):
        both, keep = in_one_row(t, v, is_word)
        return self.words(t, both, keep), self.patches(v, both, keep)


def in_one_row(t, v, is_word):
    """Words and patches in one row (B, T + N, d), and which may be attended to (B, T + N)."""
    keep = torch.cat([is_word, is_word.new_ones(v.shape[:2])], dim=1)
    return torch.cat([t, v], dim=1), keep


def attend(q, k, v, keep):
    """Attention with one head. q (B, Nq, d), k and v (B, Nk, d), keep (B, Nk) bool -> (B, Nq, d).
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None])


def instance_norm(x, keep):
    """Mean 0 and variance 1 per channel over the tokens to keep. x (B, N, d), keep (B, N) bool."""
    weight = keep[..., None] / keep.sum(1)[:, None, None]
    x = x - (weight * x).sum(1, keepdim=True)
    return x * ((weight * x**2).sum(1, keepdim=True) + 1e-5).rsqrt()


class PWAM(nn.Module):
    """LAVT's Pixel-Word Attention Module: gelu(out(gelu(m(x)) * norm(w(attention to context)))).

    As in LAVT's code: one head, an instance norm of the queries and of what they saw, none of the
    keys, which padding would spoil. In CFE, [CLS] is one more place to normalise over; LAVT has
    none.
    """

    def __init__(self, width):
        super().__init__()
        self.q, self.k, self.v, self.w, self.m, self.out = (
            nn.Linear(width, width) for _ in range(6))

    def start_at_zero(self):
        zero_(self.out)

    def forward(self, x, context, keep, keep_context):
        q = instance_norm(self.q(x), keep)
        seen = attend(q, self.k(context), self.v(context), keep_context)
        return F.gelu(self.out(F.gelu(self.m(x)) * instance_norm(self.w(seen), keep)))


class SDF(nn.Module):
    """VLT's Spatial-Dynamic Fusion: each place has a sentence feature of its own.

    VLT's public code is the version before SDF, which tiles one sentence feature over the image.
    What the idea leaves open is chosen here: one head, ReLU after q, k and v as in the attention
    that makes that code's queries, and a linear layer over place and sentence.
    """

    def __init__(self, width):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(2 * width, width)

    def start_at_zero(self):
        zero_(self.out)

    def forward(self, x, context, keep, keep_context):
        q, k, v = F.relu(self.q(x)), F.relu(self.k(context)), F.relu(self.v(context))
        return self.out(torch.cat([x, attend(q, k, v, keep_context)], dim=-1))


class Directions(nn.Module):
    """`module` from text to image and, if both, a second one from image to text."""

    def __init__(self, width, heads, module, both):
        super().__init__()
        self.image = module(width)
        self.text = module(width) if both else None

    def forward(self, t, v, is_word):
        is_patch = is_word.new_ones(v.shape[:2])
        t_m = None if self.text is None else self.text(t, v, is_word, is_patch)
        return t_m, self.image(v, t, is_patch, is_word)


FUSIONS = {
    "mhsa": MHSAOnConcat,
    "mhca-concat": MHCAOnConcat,
    "pwam": partial(Directions, module=PWAM, both=False),
    "pwam-2": partial(Directions, module=PWAM, both=True),
    "sdf": partial(Directions, module=SDF, both=False),
    "sdf-2": partial(Directions, module=SDF, both=True),
}
