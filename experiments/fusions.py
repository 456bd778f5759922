"""What Table 4 puts in the place of MHCA in CFE (Eq. 2) and SKE (Sec. 4.4, 'Fusion ablation').

    name           Table 4                        t_m, v_m
    mhsa           MHSA on Concat                 self-attention over words and patches in one row
    mhca-concat    MHCA on Concat                 MHCA whose keys and values are words and patches in one row
    pwam, pwam-2   PWAM (LAVT, CVPR 2022)         attention weighs the values, which then gate the features; one head
    sdf, sdf-2     SDF (VLT, TPAMI 2023)          attention gives each place a sentence of its own to be fused with

PWAM and SDF condition the image on the text; with -2, in the same way, the text on the image as well. Both are without
what their own networks have around them (LAVT's language gate: our scaler and residual take its place). Every fusion
takes words t (B, T, d), patches v (B, N, d) and words (B, T) bool, those up to [EOS], and gives t_m (B, T, d), or None
where the text sees no image, and v_m (B, N, d).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from risclip import Attention
from support.files import DataError


class MHSAOnConcat(nn.Module):
    """One attention for words and patches alike: T + N queries, T + N keys."""

    def __init__(self, width, heads):
        super().__init__()
        self.attention = Attention(width, heads)

    def forward(self, t, v, words):
        both, keep = in_one_row(t, v, words)
        return self.attention(both, both, keep).split([t.size(1), v.size(1)], dim=1)


class MHCAOnConcat(nn.Module):
    """An attention for each modality's queries, and T + N keys for both."""

    def __init__(self, width, heads):
        super().__init__()
        self.text_attends, self.image_attends = Attention(width, heads), Attention(width, heads)

    def forward(self, t, v, words):
        both, keep = in_one_row(t, v, words)
        return self.text_attends(t, both, keep), self.image_attends(v, both, keep)


def in_one_row(t, v, words):
    """Words and patches as one sequence (B, T + N, d), and which of it may be attended to (B, T + N)."""
    return torch.cat([t, v], dim=1), torch.cat([words, words.new_ones(v.shape[:2])], dim=1)


def attend(q, k, v, keep):
    """Attention with one head. q (B, Nq, d), k and v (B, Nk, d), keep (B, Nk) bool -> (B, Nq, d)."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None])


def instance_norm(x, keep):
    """Mean 0 and variance 1 over the tokens to keep, channel by channel: x (B, N, d), keep (B, N) bool."""
    weight = keep[..., None] / keep.sum(1)[:, None, None]
    x = x - (weight * x).sum(1, keepdim=True)
    return x * ((weight * x**2).sum(1, keepdim=True) + 1e-5).rsqrt()


class PWAM(nn.Module):
    """LAVT's Pixel-Word Attention Module: gelu(out(gelu(m(x)) * norm(w(attention of x to context)))).

    As in LAVT's code: one head, instance norm of the queries and of what they saw, none of keys, which padding would
    spoil. In CFE, [CLS] is one more of the places that are normalised over; LAVT has none.
    """

    def __init__(self, width):
        super().__init__()
        self.q, self.k, self.v, self.w, self.m, self.out = (nn.Linear(width, width) for _ in range(6))

    def forward(self, x, context, keep, keep_context):
        seen = attend(instance_norm(self.q(x), keep), self.k(context), self.v(context), keep_context)
        return F.gelu(self.out(F.gelu(self.m(x)) * instance_norm(self.w(seen), keep)))


class SDF(nn.Module):
    """VLT's Spatial-Dynamic Fusion: where others tile one sentence feature over the image, each place has its own.

    VLT's public code is the version before SDF, which tiles. What the idea leaves open is chosen here: one head, ReLU
    after q, k and v as in the attention that makes that code's queries, and a linear layer over place and sentence.
    """

    def __init__(self, width):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(2 * width, width)

    def forward(self, x, context, keep, keep_context):
        seen = attend(F.relu(self.q(x)), F.relu(self.k(context)), F.relu(self.v(context)), keep_context)
        return self.out(torch.cat([x, seen], dim=-1))


class Directions(nn.Module):
    """`module` from text to image and, if both, a second one from image to text."""

    def __init__(self, module, width, both):
        super().__init__()
        self.image = module(width)
        self.text = module(width) if both else None

    def forward(self, t, v, words):
        patches = words.new_ones(v.shape[:2])
        t_m = None if self.text is None else self.text(t, v, words, patches)
        return t_m, self.image(v, t, patches, words)


FUSIONS = {
    "mhsa": MHSAOnConcat,
    "mhca-concat": MHCAOnConcat,
    "pwam": lambda width, heads: Directions(PWAM, width, both=False),
    "pwam-2": lambda width, heads: Directions(PWAM, width, both=True),
    "sdf": lambda width, heads: Directions(SDF, width, both=False),
    "sdf-2": lambda width, heads: Directions(SDF, width, both=True),
}


class FusedCFE(nn.Module):
    """A CFE whose Eq. 2 is `fuse`. Where the text sees no image, nothing is projected back to it."""

    def __init__(self, cfe, fuse):
        super().__init__()
        del cfe.text_attends, cfe.image_attends
        if getattr(fuse, "text", self) is None:
            del cfe.s2t, cfe.text_scale
        self.cfe, self.fuse = cfe, fuse

    def forward(self, t, v, words):
        cfe = self.cfe
        t_m, v_m = self.fuse(cfe.t2s(t), cfe.v2s(v), words)
        return (t if t_m is None else t + cfe.text_scale * cfe.s2t(t_m)), v + cfe.image_scale * cfe.s2v(v_m)


class FusedSKE(nn.Module):
    """An SKE whose MHCA is `fuse`; MHSA and MLP as before. What it adds is zero at the start, as MHCA's is (A.1)."""

    def __init__(self, ske, fuse):
        super().__init__()
        del ske.text.cross_attention, ske.image.cross_attention
        self.ske, self.fuse = ske, fuse
        for module in fuse.modules():
            if isinstance(module, (Attention, PWAM, SDF)):
                last = module.v if isinstance(module, Attention) else module.out
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)

    def forward(self, t, v, words):
        text, image = self.ske.text, self.ske.image
        t_m, v_m = self.fuse(text.ln_cross(t), image.ln_cross(v), words)
        t = t if t_m is None else t + text.scales[0] * t_m
        return text.within(t, words), image.within(v + image.scales[0] * v_m)


def replace_attention(model, name):
    """Puts a fusion of FUSIONS in the place of MHCA in every CFE and SKE of a new RISCLIP.

    Raises DataError for an unknown one.
    """
    if name not in FUSIONS:
        raise DataError(f"fusion {name!r}: know mhca, {', '.join(FUSIONS)}")
    config, width = model.config, model.visual.proj.size(1)
    for i, cfe in enumerate(model.cfe):
        model.cfe[i] = FusedCFE(cfe, FUSIONS[name](width, config.cfe_heads))
    for i, ske in enumerate(model.ske):
        model.ske[i] = FusedSKE(ske, FUSIONS[name](width, config.ske_heads))
