"""RISCLIP: Extending CLIP's Image-Text Alignment to Referring Image Segmentation
(Kim, Kang, Kim, Park, Kwak, NAACL 2024).

The whole model in the order of the paper's Sec. 3. The losses (3.5) are in kernels/dice_focal.py,
training is in train.py, and what the paper leaves open is in docs/paper.md.

    paper                 here                                       shape
    t_k, v_l              t, v: inputs of text layer k, image l      (B, T, D_t), (B, 1 + N, D_v)
    W_t2s, W_v2s          CFE.t2s, CFE.v2s                 Eq. 1     D_t -> d, D_v -> d
    t_k^s, v_l^s          t_s, v_s                         Eq. 1     (B, T, d), (B, 1 + N, d)
    t_k^m, v_l^m          t_m, v_m                         Eq. 2     (B, T, d), (B, 1 + N, d)
    W_s2t, W_s2v          CFE.s2t, CFE.s2v                 Eq. 3     d -> D_t, d -> D_v
    t_k^m', v_l^m'        CFE.s2t(t_m), CFE.s2v(v_m)       Eq. 3     as t_k, v_l
    V_patch, t_eos        patches, sentence                Sec. 3.1  (B, N, d), (B, d)
    map_patch             sigmoid(patch_logits)            Sec. 3.4  (B, h, w), h * w = N
    u(v_i)                Decoder.up                       Sec. 3.4  (B, C_i, h * 2^(4-i), ...)
    D_i, d_i              Decoder.blocks and doubling, d   Sec. 3.4  (B, C_i, h * 2^(5-i), ...)
    map_pixel             sigmoid(mask_logits)             Sec. 3.4  (B, 2, S, S)

B sentences, T tokens in the longest of them, N patches, S pixels per side of the image, d the width
of CLIP's shared space and of CFE's own. patch_logits = temperature * (cosine - threshold): both are
ours, since the sigmoid of a bare cosine is nearly flat (docs/paper.md).

Sec. 3.1 frozen CLIP, image_layer, text_layer, Adapter -- 3.2 CFE -- 3.3 SKE -- 3.4 Decoder --
Figure 2 is RISCLIP.forward, a line for each box.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import open_clip
import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
from kernels.attention import attend
from miniature.clip import TINY_CLIP, build_tiny_clip
from support.checkpoint import load_checkpoint, save_checkpoint
from support.files import DataError
from support.image_files import preprocess
from support.inference import autocast, autocast_dtype, recomputed, tokenize
from support.weights import load_open_clip, patch_size, seeded


@dataclass(frozen=True)
class Config:
    """Table A1. The widths and heads of the towers are CLIP's own and are read from it."""

    # The model (Table A1)
    backbone: str
    clip_name: str  # open_clip's name of the architecture, or "tiny" for the miniature's
    clip_tag: str  # open_clip's name of the weights, or a file in miniature/
    image_size: int  # pixels; an image is squashed to a square
    quick_gelu: bool = False  # OpenAI trained its CLIP with it
    adapter_bottlenecks: tuple[int, int] = (448, 320)  # image, text; 449 in Table A1 is a slip
    adapter_scale: float = 0.6
    cfe_layers: int = 6  # the deepest pairs of layers
    cfe_heads: int = 10
    cfe_scale: float = 0.5
    ske_layers: int = 6
    ske_heads: int = 8
    ske_scale: float = 0.5
    # Where the map starts; the paper does not say. The cosines of a frozen CLIP lie close together,
    # and the temperature spreads those around the threshold over the sigmoid. Both are learned.
    map_temperature: float = 20.0
    map_threshold: float = 0.4
    decoder_widths: tuple[int, ...] = (256, 128, 64, 32)  # C_4 ... C_1

    # What the ablations change (Sec. 4.4)
    modules: tuple[str, ...] = ("adapter", "cfe", "ske")  # Table 3
    adapter_layers: int | None = None  # the last N of each tower (Table 5a); None: all
    value_path: bool = True  # of the last image layer (Sec. 3.1); False: it is like any other
    fine_tuned: bool = False  # Table 3's last row: CLIP learns too and is part of a checkpoint

    # How it runs
    decoder: bool = False  # stage 2 adds it
    precision: str = "bf16"  # the locator's; the refiner's is fp32
    clip: str = "pretrained"  # where frozen CLIP comes from: pretrained, random or a file

    @property
    def ships_clip(self):
        """The miniature's CLIP ships with the code, and a checkpoint holds a copy of it."""
        return self.clip_name == "tiny"


CONFIGS = {
    "tiny": Config("tiny", "tiny", "tiny_clip.safetensors", image_size=96,
                   adapter_bottlenecks=(64, 64), cfe_layers=3, cfe_heads=4, ske_layers=2,
                   map_temperature=8.0, map_threshold=0.6, decoder_widths=(64, 48, 32, 16),
                   precision="fp32"),
    "B": Config("B", "ViT-B-16-plus-240", "laion400m_e32", image_size=640),
    "L": Config("L", "ViT-L-14-336", "openai", image_size=560, quick_gelu=True,
                adapter_bottlenecks=(512, 384), cfe_heads=12),
}


# ---- Sec. 3.1: frozen CLIP ---------------------------------------------------------------------

def check_image_size(config):
    """Raises DataError unless the image is a whole number of patches. Builds nothing."""
    patch = patch_size(config.clip_name) or TINY_CLIP["vision_cfg"]["patch_size"]
    if config.image_size < patch or config.image_size % patch:
        raise DataError(f"--image-size {config.image_size}: give a multiple of the patch size "
                        f"{patch}")


def build_clip(config):
    """open_clip's CLIP, its position embeddings resized to the image (bicubic, antialiased).

    `config.clip`: "pretrained" (the paper's weights, downloaded once; the miniature's ship),
    "random" (of seed 0) or a weight file. Raises DataError if the weights cannot be had.
    """
    check_image_size(config)
    with seeded(0):
        if config.ships_clip:
            return build_tiny_clip(config.image_size, config.clip)
        return load_open_clip(config.clip_name, config.clip_tag, config.clip,
                              force_image_size=config.image_size,
                              force_quick_gelu=config.quick_gelu)


def self_attention(block, x, causal=False):
    """The MHSA of a CLIP layer. x (B, N, D). open_clip packs q, k and v in one matrix."""
    qkv = F.linear(x, block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=-1)
    heads = (block.attn.num_heads, -1)
    q, k, v = (y.unflatten(-1, heads).transpose(1, 2) for y in qkv)  # (B, nh, N, D / nh)
    return block.attn.out_proj(attend(q, k, v, causal=causal).transpose(1, 2).flatten(2))


def values(block, x):
    """What each token of x (B, N, D) would offer to others in MHSA, projected: (B, N, D)."""
    D = x.size(-1)
    return block.attn.out_proj(F.linear(x, block.attn.in_proj_weight[2 * D:],
                                        block.attn.in_proj_bias[2 * D:]))


def image_layer(block, x, adapters, value_path=False):
    """A layer of the image tower with its two Adapters. x (B, 1 + N, D).

    value_path, in the last layer: each token's value takes the place of its attention output, so
    that a patch feature stays where its patch is. Sec. 3.1, 'Patch-level grounding map', after
    MaskCLIP.
    """
    after_mhsa, after_mlp = adapters
    y = block.ln_1(x)
    x = x + block.ls_1(values(block, y) if value_path else self_attention(block, y))
    x = after_mhsa(x)
    x = x + block.ls_2(block.mlp(block.ln_2(x)))
    return after_mlp(x)


def text_layer(block, x, adapters):
    """A layer of the text tower with its two Adapters. x (B, T, D)."""
    after_mhsa, after_mlp = adapters
    x = x + block.ls_1(self_attention(block, block.ln_1(x), causal=True))
    x = after_mhsa(x)
    x = x + block.ls_2(block.mlp(block.ln_2(x)))
    return after_mlp(x)


class Adapter(nn.Module):
    """A bottleneck on the residual stream: x + scale * up(relu(down(x))). Sec. 3.1, A.1.

    `up` starts at zero, so a new Adapter is the identity. x (..., width) -> the same shape.
    """

    def __init__(self, width, bottleneck, scale):
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        self.scale = nn.Parameter(torch.full((width,), scale))  # learnable, channel-wise
        nn.init.kaiming_normal_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        zero_(self.up)

    def forward(self, x):
        return kernels.adapter(x, self.down.weight, self.down.bias, self.up.weight, self.up.bias,
                               self.scale)


def make_adapters(config, layers, width, bottleneck):
    """A pair per layer, after MHSA and after MLP; identities where the config wants none."""
    last = layers if config.adapter_layers is None else config.adapter_layers
    first = layers - last if "adapter" in config.modules else layers

    def one(layer):
        if layer < first:
            return nn.Identity()
        return Adapter(width, bottleneck, config.adapter_scale)
    return nn.ModuleList(nn.ModuleList([one(i), one(i)]) for i in range(layers))


def zero_(linear):
    """Zeroes a linear layer, so that a new module changes nothing (A.1, 'Initializations')."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)


# ---- Sec. 3.2: Cross-modal Feature Extraction --------------------------------------------------

class Attention(nn.Module):
    """Multi-head attention: MHCA if `context` is the other modality, MHSA if it is x itself.

    x (B, Nq, d), context (B, Nk, d) -> (B, Nq, d). keep (B, Nk) bool or None: the keys that may be
    attended to. A.1, 'Additional techniques': each head has a learnable temperature. It is a factor
    of the query, as CLIP's logit_scale is, not a divisor; the map's temperature is a factor too.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        for linear in (self.q, self.k, self.v, self.out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def start_at_zero(self):
        zero_(self.v)

    def forward(self, x, context, keep=None):
        split = (self.heads, -1)
        q = self.q(x).unflatten(-1, split).transpose(1, 2)  # (B, nh, Nq, d / nh)
        k = self.k(context).unflatten(-1, split).transpose(1, 2)  # (B, nh, Nk, d / nh)
        v = self.v(context).unflatten(-1, split).transpose(1, 2)  # (B, nh, Nk, d / nh)
        q = q * self.temperature.to(q.dtype)
        y = attend(q, k, v, None if keep is None else keep[:, None, None, :])
        return self.out(y.transpose(1, 2).flatten(2))


class MHCA(nn.Module):
    """Words attend to patches, patches to words (Eq. 2). Table 4's others: experiments/fusions.py.

    t (B, T, d), v (B, N, d), is_word (B, T) bool: up to [EOS] -> t_m, v_m of the same shapes.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.text, self.image = Attention(width, heads), Attention(width, heads)

    def forward(self, t, v, is_word):
        return self.text(t, v), self.image(v, t, keep=is_word)


class CFE(nn.Module):
    """Lets the inputs of a text layer and an image layer see each other. Sec. 3.2, Eq. 1-3.

    t (B, T, D_t), v (B, 1 + N, D_v), is_word (B, T) bool -> t, v of the same shapes. W_s2t and
    W_s2v start at zero, so a new CFE changes nothing.
    """

    def __init__(self, text_width, image_width, shared_width, heads, scale, fuse=MHCA):
        super().__init__()
        self.t2s = nn.Linear(text_width, shared_width)
        self.v2s = nn.Linear(image_width, shared_width)
        self.fuse = fuse(shared_width, heads)
        self.s2t = nn.Linear(shared_width, text_width)
        self.s2v = nn.Linear(shared_width, image_width)
        self.text_scale = nn.Parameter(torch.full((text_width,), scale))
        self.image_scale = nn.Parameter(torch.full((image_width,), scale))
        zero_(self.s2t)
        zero_(self.s2v)

    def forward(self, t, v, is_word):
        t_s, v_s = self.t2s(t), self.v2s(v)  # Eq. 1
        t_m, v_m = self.fuse(t_s, v_s, is_word)  # Eq. 2
        if t_m is not None:  # None: a fusion of Table 4 in which the text sees no image
            t = t + self.text_scale * self.s2t(t_m)  # Eq. 3
        return t, v + self.image_scale * self.s2v(v_m)  # Eq. 3


# ---- Sec. 3.3: Shared-space Knowledge Exploitation ---------------------------------------------

class SKEStream(nn.Module):
    """One modality in an SKE: MHCA, MHSA, MLP, each behind an LN, each residual and scaled.

    x (B, T or N, d), m of the same shape: what SKE's MHCA brings, which SKE runs behind ln_mhca ->
    as x. MHSA's values and the MLP's last layer start at zero.
    """

    def __init__(self, width, heads, scale):
        super().__init__()
        self.ln_mhca, self.ln_mhsa, self.ln_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.mhsa = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(),
                                 nn.Linear(4 * width, width))
        self.scale_mhca, self.scale_mhsa, self.scale_mlp = (
            nn.Parameter(torch.full((width,), scale)) for _ in range(3))
        self.mhsa.start_at_zero()
        zero_(self.mlp[2])

    def forward(self, x, m, keep=None):
        if m is not None:
            x = x + self.scale_mhca * m
        y = autocast_dtype(self.ln_mhsa(x))  # cast once: q, k and v would each keep a copy
        x = x + self.scale_mhsa * self.mhsa(y, y, keep)
        return x + self.scale_mlp * self.mlp(self.ln_mlp(x))


class SKE(nn.Module):
    """Words and patches condition each other, then themselves, in CLIP's shared space. Sec. 3.3.

    t (B, T, d) projected words, v (B, N, d) projected patches, is_word (B, T) bool -> t, v of the
    same shapes. A new SKE changes nothing.
    """

    def __init__(self, width, heads, scale, fuse=MHCA):
        super().__init__()
        self.fuse = fuse(width, heads)
        for part in self.fuse.children():
            part.start_at_zero()
        self.text, self.image = SKEStream(width, heads, scale), SKEStream(width, heads, scale)

    def forward(self, t, v, is_word):
        y_t, y_v = autocast_dtype(self.text.ln_mhca(t)), autocast_dtype(self.image.ln_mhca(v))
        t_m, v_m = self.fuse(y_t, y_v, is_word)  # MHCA
        return self.text(t, t_m, keep=is_word), self.image(v, v_m)  # MHSA, MLP


# ---- Sec. 3.4: Decoder -------------------------------------------------------------------------

class Decoder(nn.Module):
    """Sharpens the patch map with the image tower's first four layers. Sec. 3.4:

        d_4 = D_4([v_4; map_patch]),  d_i = D_i([d_{i+1}; u(v_i)])

    Here the order is [u(v_i); d_{i+1}] throughout, and u of v_4 is a 1 x 1 convolution. Otherwise u
    is a transposed convolution with stride = kernel. Both reduce v_i to C_i channels. D_i is twice
    (3 x 3 convolution, ReLU, batch norm) and doubles the resolution, until a patch is pixels
    again: four doublings for patches of 16 and 14 (L's 640 x 640 scores are resized to its image's
    560), three for tiny's 8.
    """

    def __init__(self, image_width, patch_size, widths):
        super().__init__()
        self.doublings = math.ceil(math.log2(patch_size))
        ups, blocks, below = [], [], 1  # map_patch has one channel
        for step, C in enumerate(widths):  # i = 4, 3, 2, 1
            r = 2 ** min(step, self.doublings)  # d_{i+1} has r x r pixels per patch
            ups.append(nn.Conv2d(image_width, C, 1) if r == 1 else
                       nn.ConvTranspose2d(image_width, C, kernel_size=r, stride=r))
            blocks.append(nn.Sequential(
                nn.Conv2d(C + below, C, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(C),
                nn.Conv2d(C, C, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(C)))
            below = C
        self.up, self.blocks = nn.ModuleList(ups), nn.ModuleList(blocks)
        self.score = nn.Conv2d(below, 2, 1)

    def forward(self, features, map_patch, size):
        """features: v_1 ... v_4, each (B, D_v, h, w); map_patch (B, h, w) in [0, 1] -> background
        and foreground scores (B, 2, size, size)."""
        d = map_patch[:, None]
        for step, v_i in enumerate(reversed(features)):  # i = 4, 3, 2, 1
            d = self.blocks[step](torch.cat([self.up[step](v_i), d], dim=1))
            if step < self.doublings:
                d = F.interpolate(d, scale_factor=2, mode="bilinear", align_corners=False)
        return resize(self.score(d), (size, size))


def resize(scores, size):
    """Scores (B, C, H, W), resized bilinearly to (B, C, *size)."""
    if scores.shape[-2:] == size:
        return scores
    return F.interpolate(scores, size=size, mode="bilinear", align_corners=False)


def score_maps(output, size):
    """RISCLIP's output -> background and foreground scores (B, 2, *size). Sec. 3.4.

    The binary mask is their argmax. Without a decoder they are the patch map and its negative, so
    that the argmax cuts the map at one half.
    """
    scores = output.get("mask_logits")
    if scores is None:
        scores = torch.stack([-output["patch_logits"], output["patch_logits"]], dim=1)
    return resize(scores, tuple(size))


# ---- The whole model (Figure 2) ----------------------------------------------------------------

class RISCLIP(nn.Module):
    """The locator (frozen CLIP, Adapters, CFE, SKE) and, from stage 2 on, the decoder.

    >>> model = RISCLIP(CONFIGS["tiny"])
    >>> model(torch.zeros(1, 3, 96, 96), model.tokenize(["the red circle"]))["patch_logits"].shape
    torch.Size([1, 12, 12])
    """

    def __init__(self, config, fuse=MHCA):
        """fuse: the class of Eq. 2's attention, MHCA or one of experiments/fusions.py."""
        super().__init__()
        self.config = config
        self.clip = build_clip(config).eval().requires_grad_(False)
        self.patch_size = self.visual.patch_size[0]
        side = config.image_size // self.patch_size
        self.grid = side, side  # h, w
        D_v, D_t = self.visual.conv1.out_channels, self.clip.token_embedding.embedding_dim
        d = self.visual.proj.size(1)
        image_layers, text_layers = len(self.image_blocks), len(self.text_blocks)
        cfe_layers = config.cfe_layers if "cfe" in config.modules else 0
        ske_layers = config.ske_layers if "ske" in config.modules else 0

        image_bottleneck, text_bottleneck = config.adapter_bottlenecks
        self.image_adapters = make_adapters(config, image_layers, D_v, image_bottleneck)
        self.text_adapters = make_adapters(config, text_layers, D_t, text_bottleneck)
        self.cfe = nn.ModuleList(CFE(D_t, D_v, d, config.cfe_heads, config.cfe_scale, fuse)
                                 for _ in range(cfe_layers))
        self.image_below, self.text_below = image_layers - cfe_layers, text_layers - cfe_layers
        self.ske = nn.ModuleList(SKE(d, config.ske_heads, config.ske_scale, fuse)
                                 for _ in range(ske_layers))
        # The logarithm, as CLIP learns its own temperature: Adam moves every parameter by about
        # the learning rate, which on these two is enough to calibrate the map.
        self.map_log_temperature = nn.Parameter(torch.tensor(config.map_temperature).log())
        self.map_threshold = nn.Parameter(torch.tensor(config.map_threshold))
        self.recompute = not config.ships_clip  # SKE's insides in backward, to save memory
        self.decoder = None
        if config.decoder:
            self.add_decoder()
        self.tokenizer = open_clip.SimpleTokenizer(context_length=self.clip.context_length)

    @property
    def visual(self):
        return self.clip.visual

    @property
    def image_blocks(self):
        return self.visual.transformer.resblocks

    @property
    def text_blocks(self):
        return self.clip.transformer.resblocks

    def add_decoder(self):
        """Stage 2's decoder, new. The locator is frozen from here on (Sec. 3.5)."""
        self.config = replace(self.config, decoder=True)
        self.requires_grad_(False)
        self.decoder = Decoder(self.visual.conv1.out_channels, self.patch_size,
                               self.config.decoder_widths).to(self.map_threshold.device)

    def train(self, mode=True):
        super().train(mode)
        self.clip.eval()  # always, even when it is fine-tuned
        return self

    def tokenize(self, texts):
        """Sentences -> BPE token ids (B, T), T of the longest; 0 pads (Sec. 3.1).

        A sentence longer than CLIP's context (77 tokens; tiny's 40) is cut there, with a warning.
        Raises DataError for an empty one.
        """
        return tokenize(self.tokenizer, texts)

    def forward(self, images, tokens, image_index=None, lower=None):
        """Figure 2. images (I, 3, S, S) normalised, tokens (B, T), image_index (B,): the image
        that each sentence is about (default: one each).

        -> {"patch_logits": (B, h, w)} and, once there is a decoder, "mask_logits" (B, 2, S, S).
        lower: lower_layers of the images, if they have been run.
        """
        B, T = tokens.size()
        eos = tokens.argmax(dim=1)  # [EOS] has the largest id
        is_word = torch.arange(T, device=tokens.device) <= eos[:, None]  # (B, T)
        with autocast(self, images.device):
            v, features = lower or self.lower_layers(images)
            if image_index is None:
                image_index = torch.arange(B, device=tokens.device)
            # index_select: on a CPU its gradient is summed in a fixed order, v[image_index]'s not
            v, *features = (x.index_select(0, image_index) for x in (v, *features))

            t = self.clip.token_embedding(tokens) + self.clip.positional_embedding[:T]
            for k in range(self.text_below):
                t = text_layer(self.text_blocks[k], t, self.text_adapters[k])
            for m, cfe in enumerate(self.cfe):  # Sec. 3.2
                t, v = cfe(t, v, is_word)
                k, i = self.text_below + m, self.image_below + m
                t = text_layer(self.text_blocks[k], t, self.text_adapters[k])
                v = self.image_layer(i, v, features)
            t = self.clip.ln_final(t) @ self.clip.text_projection  # (B, T, d)
            v = self.visual.ln_post(v[:, 1:]) @ self.visual.proj  # (B, N, d)
            for ske in self.ske:  # Sec. 3.3
                t, v = recomputed(ske, t, v, is_word) if self.recompute else ske(t, v, is_word)

        output = {"patch_logits": self.grounding_map(t, v, eos)}  # Sec. 3.1
        if self.decoder is not None:  # Sec. 3.4
            # (B, N, D_v) -> (B, D_v, h, w), in the refiner's precision (Table A1)
            features = [v_i.transpose(1, 2).unflatten(2, self.grid).float() for v_i in features]
            map_patch = output["patch_logits"].sigmoid()
            output["mask_logits"] = self.decoder(features, map_patch, self.config.image_size)
        return output

    def lower_layers(self, images):
        """The image layers below the first CFE, which know no sentence: once per image.

        images (I, 3, S, S) -> v (I, 1 + N, D_v), and those of v_1 ... v_4 that are among them.
        """
        # Patches, [CLS], positions, ln_pre; open_clip has no public name for it.
        v, features = self.visual._embeds(images), []
        for i in range(self.image_below):
            v = self.image_layer(i, v, features)
        return v, features

    def image_layer(self, i, v, features):
        """Image layer i. v (B, 1 + N, D_v) -> the same; v_1 ... v_4 are added to features."""
        value_path = self.config.value_path and i == len(self.image_blocks) - 1
        v = image_layer(self.image_blocks[i], v, self.image_adapters[i], value_path)
        if i < 4:
            features.append(v[:, 1:])
        return v

    def grounding_map(self, t, v, eos):
        """The cosine of V_patch and t_eos, on the scale of a logit. Sec. 3.1, 'Patch-level
        grounding map'.

        t (B, T, d), v (B, N, d), eos (B,) -> (B, h, w). In fp32: bf16 has three digits.
        """
        sentence = F.normalize(t[torch.arange(len(t), device=t.device), eos].float(), dim=-1)
        patches = F.normalize(v.float(), dim=-1)
        cosine = torch.einsum("bnd,bd->bn", patches, sentence)
        logits = self.map_log_temperature.exp() * (cosine - self.map_threshold)
        return logits.unflatten(1, self.grid)

    @torch.inference_mode()
    def segment(self, image, text):
        """PIL image and a sentence -> bool array (height, width) of the image's own size."""
        was_training, device = self.training, self.map_threshold.device
        pixels = preprocess(image, self.config.image_size)[None].to(device)
        output = self.eval()(pixels, self.tokenize([text]).to(device))
        self.train(was_training)
        return score_maps(output, image.size[::-1]).argmax(dim=1)[0].bool().cpu().numpy()

    def save_pretrained(self, directory):
        """config.json and model.safetensors: what was trained, and tiny's CLIP."""
        save_checkpoint(self, directory)

    @classmethod
    def from_pretrained(cls, source, fuse=MHCA, **changes):
        """A checkpoint, a run's --out or a name on the Hugging Face Hub -> model in eval mode.

        `changes` override the checkpoint's config. Raises DataError if a file is missing or
        broken, a weight is missing or unexpected, or frozen CLIP is not the one that the
        checkpoint was trained on.
        """
        return load_checkpoint(partial(cls, fuse=fuse), CONFIGS, source, changes)
