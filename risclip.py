"""RISCLIP: Extending CLIP's Image-Text Alignment to Referring Image Segmentation (Kim, Kang, Kim, Park, Kwak, 2024).

The whole model, in the order of the paper's Sec. 3; losses (3.5) are in kernels/dice_focal.py, training in train.py.

    paper                   here                                      shape
    t_k, v_l                t, v: inputs of text layer k, image l     (B, T, D_t), (B, 1 + N, D_v)
    W_t2s, W_v2s            CFE.t2s, CFE.v2s                Eq. 1     D_t -> d, D_v -> d
    t_k^s, v_l^s            t_s, v_s                        Eq. 1     (B, T, d), (B, 1 + N, d)
    t_k^m, v_l^m            t_m, v_m                        Eq. 2     (B, T, d), (B, 1 + N, d)
    W_s2t, W_s2v            CFE.s2t, CFE.s2v                Eq. 3     d -> D_t, d -> D_v
    V_patch, t_eos          patches, sentence               Sec. 3.1  (B, N, d), (B, d)
    map_patch               sigmoid(patch_logits)           Sec. 3.4  (B, h, w), h * w = N
    D_i, d_i, u(v_i)        Decoder.blocks, x, Decoder.up   Sec. 3.4  (B, C_i, h * 2^j, w * 2^j)
    map_pixel               sigmoid(mask_logits)            Sec. 3.4  (B, 2, H, W), background and foreground

B sentences, T tokens of the longest of them, N patches, d CLIP's shared image-text space.

Sec. 3.1 build_clip, image_layer, text_layer, Adapter -- 3.2 CFE -- 3.3 SKE -- 3.4 Decoder -- Figure 2 RISCLIP.forward

Where the paper contradicts itself or is silent we decided (the README says why):
- Table A1 swaps the weight sources: B is OpenCLIP's ViT-B/16-plus-240 (LAION-400M), L is OpenAI's ViT-L/14-336.
- B's image Adapter has bottleneck 448, half its width as all others, not 449.
- Adapters work on the residual stream after each MHSA and MLP, inside every layer, and in the last one's value path.
- CFE reads its layer's inputs, without LN; "the embedding projections in the MHSA" that start at zero are W_s2t, W_s2v.
- SKE reads the projected patches and words; each submodule's residual has a channel-wise scaler of its own.
- map_patch = sigmoid(temperature * (cosine - threshold)): the sigmoid of a bare cosine cannot leave 0.27-0.73.
- Words after [EOS] are never attended to, so that a sentence does not depend on what it is batched with.
- The decoder's u is a transposed convolution with stride = kernel, of v_4 a 1 x 1 one: it also reduces the channels.
"""

import json
import logging
import math
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn as nn
import torch.nn.functional as F
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import save
from torch.utils.checkpoint import checkpoint

import kernels
from experiments.fusions import replace_attention
from miniature.clip import TINY_CLIP, clip_state, load_clip_state
from support.checkpoint import (
    download,
    find_checkpoint,
    fingerprint,
    is_stored,
    read_config,
    read_safetensors,
)
from support.files import DataError, one_line
from support.image_files import _rgb

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Config:
    """Table A1. Widths and head numbers of the towers are CLIP's own and are read from it."""

    backbone: str
    clip_name: str  # open_clip's name of the architecture, or "tiny" for TINY_CLIP below
    clip_tag: str  # open_clip's name of the weights, or a file in assets/
    image_size: int  # pixels; images are squashed to a square
    quick_gelu: bool = False  # OpenAI's weights were trained with it
    modules: tuple[str, ...] = ("adapter", "cfe", "ske")  # Table 3 takes them away one by one
    adapter_bottlenecks: tuple[int, int] = (448, 320)  # image, text
    adapter_layers: int | None = None  # the last N layers of each tower (Table 5a); None: all
    adapter_scale: float = 0.6
    cfe_layers: int = 6  # the deepest pairs of layers (Table 5b)
    cfe_heads: int = 10
    cfe_scale: float = 0.5
    ske_layers: int = 6  # Table 5c
    ske_heads: int = 8
    ske_scale: float = 0.5
    fusion: str = "mhca"  # what CFE and SKE fuse with; Table 4's others are in fusions.py
    value_path: bool = True  # of the last image layer (Sec. 3.1); False: it is like any other
    fine_tuned: bool = False  # Table 3's last row: CLIP learns as well, and is then part of a checkpoint
    map_temperature: float = 20.0  # of the cosine map, at the start; it and the threshold are learned
    map_threshold: float = 0.4  # the cosine at which map_patch is one half
    decoder_widths: tuple[int, ...] = (256, 128, 64, 32)  # D_4 ... D_1; the paper gives none
    decoder: bool = False  # stage 2 adds it
    precision: str = "bf16"  # the locator's; the refiner's is fp32
    clip: str = "pretrained"  # where the frozen weights come from: pretrained, random or a file


CONFIGS = {
    "tiny": Config("tiny", "tiny", "tiny_clip.safetensors", image_size=96, adapter_bottlenecks=(64, 64), cfe_layers=3,
                   cfe_heads=4, ske_layers=2, map_temperature=8.0, map_threshold=0.6, decoder_widths=(64, 48, 32, 16),
                   precision="fp32"),
    "B": Config("B", "ViT-B-16-plus-240", "laion400m_e32", image_size=640),
    "L": Config("L", "ViT-L-14-336", "openai", image_size=560, quick_gelu=True, adapter_bottlenecks=(512, 384),
                cfe_heads=12),
}


# ---- Sec. 3.1: frozen CLIP ------------------------------------------------------------------------------------------

def check_image_size(config):
    """Raises DataError unless the image is a whole number of patches; builds and downloads nothing."""
    architecture = TINY_CLIP if config.clip_name == "tiny" else open_clip.get_model_config(config.clip_name)
    patch = architecture["vision_cfg"]["patch_size"]
    if config.image_size < patch or config.image_size % patch:
        raise DataError(f"--image-size {config.image_size}: give a multiple of the patch size {patch}")


def build_clip(config):
    """open_clip's CLIP (Sec. 3.1) at the config's image size; it resizes position embeddings (bicubic, antialiased).

    `config.clip` is "pretrained" (the paper's weights, downloaded once; tiny's ship in assets/), "random" (drawn from
    seed 0: for trying the code) or a weight file. Raises DataError if the weights cannot be had.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the GPUs as well
        if config.clip_name == "tiny":
            size = dict(TINY_CLIP["vision_cfg"], image_size=config.image_size)
            clip = CLIP(**dict(TINY_CLIP, vision_cfg=size))
            if config.clip != "random":
                path = ASSETS / config.clip_tag if config.clip == "pretrained" else Path(config.clip)
                load_clip_state(clip, read_safetensors(path))
            return clip.half().float()  # as its file in half precision gives it back
        tag = {"random": None, "pretrained": config.clip_tag}.get(config.clip, config.clip)
        if config.clip not in ("random", "pretrained") and not Path(tag).is_file():
            raise DataError(f"--clip {tag}: no such file")
        logging.disable(logging.CRITICAL)  # open_clip warns of weights left random; what fails is raised as well
        try:
            return open_clip.create_model(config.clip_name, pretrained=tag, force_image_size=config.image_size,
                                          force_quick_gelu=config.quick_gelu, require_pretrained=tag is not None,
                                          device=torch.get_default_device())
        except Exception as error:  # hubs fail in many ways: name the mend, keep the cause
            raise DataError(f"CLIP weights {config.clip_name}/{tag} cannot be loaded ({one_line(error)[:99]}); give a "
                            "state dict's file with --clip PATH, or try the code with --clip random") from error
        finally:
            logging.disable(logging.NOTSET)


def self_attention(block, y, causal=False):
    """The MHSA of a CLIP layer on y (B, N, D), whose q, k and v open_clip packs in one matrix."""
    qkv = F.linear(y, block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=-1)
    q, k, v = (x.unflatten(-1, (block.attn.num_heads, -1)).transpose(1, 2) for x in qkv)  # (B, heads, N, D / heads)
    return block.attn.out_proj(attend(q, k, v, causal=causal).transpose(1, 2).flatten(2))


def image_layer(block, x, adapters, value_path=False):
    """A layer of the image tower with its two Adapters (either may be None). x (B, 1 + N, D).

    value_path (the last layer, after MaskCLIP): each token's value takes the place of its attention output, so that a
    patch feature stays where its patch is. Sec. 3.1, 'Patch-level grounding map'.
    """
    y = block.ln_1(x)
    if value_path:
        D = x.size(-1)  # open_clip packs q, k, v in one matrix
        v = F.linear(y, block.attn.in_proj_weight[2 * D:], block.attn.in_proj_bias[2 * D:])
        x = x + block.ls_1(block.attn.out_proj(v))
    else:
        x = x + block.ls_1(self_attention(block, y))
    x = adapters[0](x)
    x = x + block.ls_2(block.mlp(block.ln_2(x)))
    return adapters[1](x)


def text_layer(block, x, adapters):
    """A layer of the text tower with its two Adapters (Sec. 3.1). x (B, T, D)."""
    x = x + block.ls_1(self_attention(block, block.ln_1(x), causal=True))
    x = adapters[0](x)
    x = x + block.ls_2(block.mlp(block.ln_2(x)))
    return adapters[1](x)


class Adapter(nn.Module):
    """x + scale * up(relu(down(x))): a bottleneck on the residual stream (Sec. 3.1; initial values A.1).

    `up` starts at zero, so that a new Adapter is the identity. x (..., width).
    """

    def __init__(self, width, bottleneck, scale):
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        self.scale = nn.Parameter(torch.full((width,), scale))  # learnable, channel-wise
        nn.init.kaiming_normal_(self.down.weight)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x):
        return kernels.adapter(x, self.down.weight, self.down.bias, self.up.weight, self.up.bias, self.scale)


def make_adapters(layers, last, width, bottleneck, scale):
    """A pair (Sec. 3.1) for each of the last `last` of `layers` layers: after MHSA and MLP; identities below."""
    def one(layer):
        return Adapter(width, bottleneck, scale) if layer >= layers - last else nn.Identity()
    return nn.ModuleList(nn.ModuleList([one(i), one(i)]) for i in range(layers))


# ---- Sec. 3.2: Cross-modal Feature Extraction -----------------------------------------------------------------------

class Attention(nn.Module):
    """Multi-head attention (Eq. 2, Sec. 3.3) with a learnable temperature per head (A.1, 'Additional techniques').

    MHCA where `context` is the other modality, MHSA where it is `x` itself. x (B, Nq, d), context (B, Nk, d),
    keep (B, Nk) bool or None: the keys that may be attended to.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        for linear in (self.q, self.k, self.v, self.out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x, context, keep=None):
        q, k, v = (w(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, d / heads)
                   for w, y in ((self.q, x), (self.k, context), (self.v, context)))
        y = attend(q * self.temperature.to(q.dtype), k, v, None if keep is None else keep[:, None, None, :])
        return self.out(y.transpose(1, 2).flatten(2))


class CFE(nn.Module):
    """Lets a text layer's and an image layer's inputs see each other before the layers run (Sec. 3.2, Eq. 1-3).

    t (B, T, D_t), v (B, 1 + N, D_v), words (B, T) bool: up to [EOS] -> the same shapes. W_s2t and W_s2v start at
    zero: a new CFE changes nothing.
    """

    def __init__(self, text_width, image_width, shared_width, heads, scale):
        super().__init__()
        self.t2s, self.v2s = nn.Linear(text_width, shared_width), nn.Linear(image_width, shared_width)
        self.text_attends, self.image_attends = Attention(shared_width, heads), Attention(shared_width, heads)
        self.s2t, self.s2v = nn.Linear(shared_width, text_width), nn.Linear(shared_width, image_width)
        self.text_scale = nn.Parameter(torch.full((text_width,), scale))
        self.image_scale = nn.Parameter(torch.full((image_width,), scale))
        for linear in (self.s2t, self.s2v):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, t, v, words):
        t_s, v_s = self.t2s(t), self.v2s(v)  # Eq. 1
        t_m, v_m = self.text_attends(t_s, v_s), self.image_attends(v_s, t_s, keep=words)  # Eq. 2
        return t + self.text_scale * self.s2t(t_m), v + self.image_scale * self.s2v(v_m)  # Eq. 3


# ---- Sec. 3.3: Shared-space Knowledge Exploitation ------------------------------------------------------------------

def cast(x):
    """x in autocast's dtype, once for all products that take it: backward would keep a copy for each."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class SKEStream(nn.Module):
    """One modality's half of an SKE module (Sec. 3.3): MHCA, MHSA, MLP, each behind an LN, residual and scaled.

    Value projections and the MLP's last layer start at zero: a new stream is the identity.
    """

    def __init__(self, width, heads, scale):
        super().__init__()
        self.ln_cross, self.ln_self, self.ln_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.cross_attention, self.self_attention = Attention(width, heads), Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.scales = nn.Parameter(torch.full((3, width), scale))
        for linear in (self.cross_attention.v, self.self_attention.v, self.mlp[2]):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x, own, other, keep=None, keep_other=None):
        """x (B, N, d); own, other: both modalities behind their `ln_cross`; keep: keys allowed in each."""
        return self.within(x + self.scales[0] * self.cross_attention(own, other, keep_other), keep)

    def within(self, x, keep=None):
        """MHSA and MLP: the modality by itself."""
        y = cast(self.ln_self(x))
        x = x + self.scales[1] * self.self_attention(y, y, keep)
        return x + self.scales[2] * self.mlp(self.ln_mlp(x))


class SKE(nn.Module):
    """Words and patches condition each other and themselves in CLIP's shared space (Sec. 3.3).

    t (B, T, d) projected words, v (B, N, d) projected patches, words (B, T) bool -> the same shapes.
    """

    def __init__(self, width, heads, scale):
        super().__init__()
        self.text, self.image = SKEStream(width, heads, scale), SKEStream(width, heads, scale)

    def forward(self, t, v, words):
        t_n, v_n = cast(self.text.ln_cross(t)), cast(self.image.ln_cross(v))
        return self.text(t, t_n, v_n, keep=words), self.image(v, v_n, t_n, keep_other=words)


# ---- Sec. 3.4: Decoder ----------------------------------------------------------------------------------------------

class Decoder(nn.Module):
    """Sharpens the patch map with the image tower's first four layers (Sec. 3.4): d_4 = D_4([u(v_4); map_patch]),
    d_i = D_i([u(v_i); d_{i+1}]).

    Each D_i is twice (3 x 3 convolution, ReLU, batch norm), then doubles the resolution, until a patch is pixels again:
    four doublings for patches of 16 and 14 (L's 640 x 640 are resized to the image's 560), three for tiny's 8.
    """

    def __init__(self, image_width, patch_size, widths):
        super().__init__()
        self.doublings = math.ceil(math.log2(patch_size))
        grown = [2 ** min(i, self.doublings) for i in range(4)]  # resolution of D_4 ... D_1's inputs, in patches
        self.up = nn.ModuleList(nn.Conv2d(image_width, c, 1) if r == 1 else nn.ConvTranspose2d(image_width, c, r, r)
                                for c, r in zip(widths, grown))
        inputs = [1, *widths[:-1]]
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(x + c, c, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(c),
                          nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(c))
            for x, c in zip(inputs, widths))
        self.score = nn.Conv2d(widths[-1], 2, 1)

    def forward(self, features, map_patch, size):
        """features: v_1 ... v_4, each (B, D, h, w); map_patch (B, h, w) in [0, 1] -> score maps (B, 2, size, size)."""
        x = map_patch[:, None]
        for i, (u, block, v) in enumerate(zip(self.up, self.blocks, reversed(features))):
            x = block(torch.cat([u(v), x], dim=1))
            if i < self.doublings:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        x = self.score(x)
        return x if x.size(-1) == size else F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)


# ---- The whole model (Figure 2) -------------------------------------------------------------------------------------

class RISCLIP(nn.Module):
    """The locator (frozen CLIP, Adapters, CFE, SKE; BF16) and, from stage 2 on, the refiner (decoder; FP32).

    >>> model = RISCLIP(replace(CONFIGS["tiny"], clip="pretrained"))
    >>> model(images, model.tokenize(["the small red circle"]))["patch_logits"]  # (1, h, w)
    """

    def __init__(self, config):
        super().__init__()
        check_image_size(config)
        self.config = config
        self.clip = build_clip(config).eval().requires_grad_(False)
        image_blocks, text_blocks = self.visual.transformer.resblocks, self.clip.transformer.resblocks
        image_width, text_width = self.visual.conv1.out_channels, self.clip.token_embedding.embedding_dim
        shared_width, self.patch_size = self.visual.proj.size(1), self.visual.patch_size[0]

        def adapters(blocks, width, bottleneck):
            last = len(blocks) if config.adapter_layers is None else config.adapter_layers
            last *= "adapter" in config.modules
            return make_adapters(len(blocks), last, width, bottleneck, config.adapter_scale)
        self.image_adapters = adapters(image_blocks, image_width, config.adapter_bottlenecks[0])
        self.text_adapters = adapters(text_blocks, text_width, config.adapter_bottlenecks[1])
        self.cfe = nn.ModuleList(CFE(text_width, image_width, shared_width, config.cfe_heads, config.cfe_scale)
                                 for _ in range(config.cfe_layers * ("cfe" in config.modules)))
        self.ske = nn.ModuleList(SKE(shared_width, config.ske_heads, config.ske_scale)
                                 for _ in range(config.ske_layers * ("ske" in config.modules)))
        if config.fusion != "mhca":
            replace_attention(self, config.fusion)
        # As a logarithm, like CLIP's own temperature, and a threshold rather than a bias: Adam moves each parameter by
        # about the learning rate a step, which on these two is enough to calibrate the map.
        self.map_scale = nn.Parameter(torch.tensor(config.map_temperature).log())
        self.map_threshold = nn.Parameter(torch.tensor(config.map_threshold))
        self.recompute = config.backbone != "tiny"  # in backward, rather than keep for it, the insides of SKE
        self.decoder = None
        if config.decoder:
            self.add_decoder()
        self.tokenizer = open_clip.SimpleTokenizer(context_length=self.clip.context_length)

    @property
    def visual(self):
        return self.clip.visual

    def add_decoder(self):
        """The refiner of stage 2, new; the locator's parameters are frozen from here on (Sec. 3.5)."""
        self.config = replace(self.config, decoder=True)
        self.requires_grad_(False)
        self.decoder = Decoder(self.visual.conv1.out_channels, self.patch_size, self.config.decoder_widths)
        self.decoder.to(self.map_threshold.device)

    def train(self, mode=True):
        super().train(mode)
        self.clip.eval()  # frozen: no patch dropout
        return self

    def tokenize(self, texts):
        """Sentences -> BPE token ids (B, T), T of the longest; 0 pads (Sec. 3.1). Raises DataError for an empty one.

        A sentence longer than CLIP's context (77; tiny's 40) is cut there, with a warning that counts such sentences.
        """
        if any(not text.strip() for text in texts):
            raise DataError("empty sentence: say what to segment")
        tokens = self.tokenizer(texts)
        cut = sum(len(self.tokenizer.encode(texts[i])) + 2 > tokens.size(1) for i in torch.nonzero(tokens[:, -1])[:, 0])
        if cut:
            warnings.warn(f"{cut} sentence(s) longer than {tokens.size(1)} tokens were cut", stacklevel=2)
        return tokens[:, : int((tokens > 0).sum(1).max())]

    def forward(self, images, tokens, image_index=None, lower=None):
        """images (I, 3, S, S) normalised, tokens (B, T), image_index (B,): the image each sentence is about (default:
        one each) -> {"patch_logits": (B, h, w)} and, once there is a decoder, "mask_logits" (B, 2, S, S): the score
        maps of background and foreground. lower: lower_layers of the images, if they have been run. Figure 2.
        """
        with self.autocast(images.device):
            patch_logits, features = self.locate(tokens, image_index, lower or self.lower_layers(images))
        output = {"patch_logits": patch_logits}
        if self.decoder is not None:
            features = [f.float() for f in features]
            output["mask_logits"] = self.decoder(features, patch_logits.sigmoid(), self.config.image_size)
        return output

    def autocast(self, device):
        """A context in the locator's precision. Frozen matrices are kept in it: autocast would cast them every time."""
        bf16 = self.config.precision == "bf16" and computes_bf16(device)
        if not self.config.fine_tuned and self.config.backbone != "tiny":  # whose CLIP is saved with a checkpoint
            with torch.inference_mode(False):  # backward could not use what is made in it
                for p in (*self.visual.transformer.parameters(), *self.clip.transformer.parameters()):
                    if p.ndim == 2:
                        p.data = p.data.to(torch.bfloat16 if bf16 else torch.float32)
        return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16)

    def image_layers(self, v, first, last):
        """Image layers first ... last - 1: v (B, 1 + N, D_v) -> v, and those of v_1 ... v_4 (B, N, D_v) that they give.
        """
        blocks, features = self.visual.transformer.resblocks, []
        for i in range(first, last):
            value_path = self.config.value_path and i == len(blocks) - 1
            v = image_layer(blocks[i], v, self.image_adapters[i], value_path)
            if i < 4:
                features.append(v[:, 1:])
        return v, features

    def lower_layers(self, images):
        """The image layers below the first CFE, which know no sentence and run once for all of an image's.

        images (I, 3, S, S) -> v (I, 1 + N, D_v), and those of v_1 ... v_4 (I, N, D_v) that are among them."""
        v = self.visual._embeds(images)  # [CLS] and the patches
        return self.image_layers(v, 0, len(self.image_adapters) - len(self.cfe))

    def locate(self, tokens, image_index, lower):
        """The patch-level grounding map (Sec. 3.1, Figure 2) of sentences, tokens (B, T), about images, image_index
        (B,) -> logits (B, h, w) fp32, and v_1 ... v_4 (B, D, h, w) for the decoder. lower: of lower_layers."""
        B, T = tokens.size()
        if image_index is None:
            image_index = torch.arange(B, device=tokens.device)
        eos = tokens.argmax(dim=1)  # [EOS] is the largest id
        words = torch.arange(T, device=tokens.device) <= eos[:, None]  # (B, T): keys that may be attended to
        text_blocks = self.clip.transformer.resblocks
        text_below, image_below = (len(layers) - len(self.cfe) for layers in (text_blocks, self.image_adapters))

        # index_select: the gradient of v[image_index] is summed in whatever order threads come
        v, *features = (x.index_select(0, image_index) for x in (lower[0], *lower[1]))  # (B, 1 + N, D_v) from here on
        t = self.clip.token_embedding(tokens) + self.clip.positional_embedding[:T]  # (B, T, D_t)
        for k in range(text_below):
            t = text_layer(text_blocks[k], t, self.text_adapters[k])
        for m, cfe in enumerate(self.cfe):
            k, i = text_below + m, image_below + m
            t, v = cfe(t, v, words)
            t = text_layer(text_blocks[k], t, self.text_adapters[k])
            v, its_features = self.image_layers(v, i, i + 1)
            features += its_features

        t = self.clip.ln_final(t) @ self.clip.text_projection  # (B, T, d)
        v = self.visual.ln_post(v[:, 1:]) @ self.visual.proj  # (B, N, d)
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.ske.parameters())
        for ske in self.ske:
            t, v = checkpoint(ske, t, v, words, use_reentrant=False) if learns and self.recompute else ske(t, v, words)

        # t_eos and V_patch
        sentence = F.normalize(t[torch.arange(B, device=t.device), eos].float(), dim=-1)
        patches = F.normalize(v.float(), dim=-1)
        with torch.autocast(tokens.device.type, enabled=False):
            cosine = torch.einsum("bnd,bd->bn", patches, sentence)
        side = self.config.image_size // self.patch_size
        patch_logits = self.map_scale.exp() * (cosine.view(B, side, side) - self.map_threshold)
        return patch_logits, [f.transpose(1, 2).unflatten(2, (side, side)) for f in features]

    def segment(self, image, text):
        """PIL image and a sentence -> bool array (height, width) of the image's own size."""
        return self.segment_all(image, [text])[0]

    @torch.inference_mode()
    def segment_all(self, image, texts):
        """PIL image and K sentences -> bool array (K, height, width); the image's own layers run once."""
        was_training, device = self.training, self.map_threshold.device
        self.eval()
        pixels = preprocess(image, self.config.image_size)[None].to(device)
        masks = [score_maps(output, image.size[::-1]).argmax(dim=1).bool() for output in self.outputs(pixels, texts)]
        self.train(was_training)
        return torch.cat(masks).cpu().numpy()

    def outputs(self, pixels, texts, at_once=None):
        """Yields forward's output for the first sentences of one image (1, 3, S, S), for the next ones, and so on.

        at_once: by default 8, since at 640 pixels each takes half a gigabyte in the decoder; on a CPU as many as have
        2,000 patches, since what is larger leaves its cache."""
        patches = (self.config.image_size // self.patch_size) ** 2
        at_once = at_once or (8 if pixels.is_cuda else max(1, min(8, 2000 // patches)))
        with self.autocast(pixels.device):
            lower = self.lower_layers(pixels)
        for first in range(0, len(texts), at_once):
            tokens = self.tokenize(texts[first:first + at_once]).to(pixels.device)
            yield self(pixels, tokens, torch.zeros(len(tokens), dtype=torch.long, device=pixels.device), lower)

    def save_pretrained(self, directory):
        """config.json and model.safetensors: what was trained, and tiny's CLIP (B's and L's is downloaded again)."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        state = {k: v.contiguous() for k, v in self.state_dict().items() if is_stored(k, self.config)}
        if self.config.backbone == "tiny" and not self.config.fine_tuned:
            state |= {f"clip.{k}": v for k, v in clip_state(self.clip).items()}
        (directory / "model.safetensors").write_bytes(save(state))  # save_file's cannot be read by other users
        config = dict(asdict(self.config), clip_fingerprint=fingerprint(self.clip))
        (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, source, **changes):
        """A checkpoint, a run's --out or a name on the Hugging Face Hub -> model in eval mode.

        `changes` override the checkpoint's config.
        Raises DataError if a file is missing or broken, a weight is missing or unexpected, or frozen CLIP is not the
        one that it was trained on.
        """
        directory = find_checkpoint(source) if Path(source).is_dir() else download(str(source))
        if directory is None:
            raise DataError(f"{source} holds no checkpoint: config.json, or stage1-* or stage2-* of a run")
        config, expected = read_config(directory / "config.json")
        config = replace(config, **changes)
        state = read_safetensors(directory / "model.safetensors")
        stored = {k.removeprefix("clip."): state.pop(k) for k in list(state) if not is_stored(k, config)}
        model = cls(replace(config, clip="random") if stored or config.fine_tuned else config)
        model.config = config
        if stored:
            load_clip_state(model.clip, stored)
        if expected != fingerprint(model.clip) and not config.fine_tuned:
            raise DataError(f"{directory}: trained on other CLIP weights than {config.clip_name}/{config.clip}; "
                            "give the same with --clip")
        have = {k for k in model.state_dict() if is_stored(k, config)}
        if wrong := sorted(have ^ set(state)):
            raise DataError(f"{directory / 'model.safetensors'}: missing or unexpected weights, {', '.join(wrong[:3])}")
        try:
            model.load_state_dict(state, strict=False)  # CLIP's own are not in it: checked above
        except RuntimeError as error:
            raise DataError(f"{directory / 'model.safetensors'} does not fit: {str(error).splitlines()[-1]}") from error
        return model.eval()


def score_maps(output, size):
    """RISCLIP's output -> background and foreground scores (B, 2, *size), resized bilinearly.

    The binary mask is their argmax (Sec. 3.4). Without a decoder they are the patch map and its negative: the argmax
    then cuts the map at one half.
    """
    scores = output.get("mask_logits")
    if scores is None:
        scores = torch.stack([-output["patch_logits"], output["patch_logits"]], dim=1)
    return F.interpolate(scores, size=size, mode="bilinear", align_corners=False)


def computes_bf16(device):
    """Whether a device has instructions for bf16. A CPU without them takes a hundred times as long as for fp32, and the
    locator then stays in fp32."""
    return torch.device(device).type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, of both sources of weights
STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(pixels):
    """uint8 (..., 3, H, W) -> float32 with CLIP's mean and deviation."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return pixels.float().div_(255).sub_(mean).div_(std)  # one block of memory, not four


def preprocess(image, size):
    """PIL image -> (3, S, S) float32: squashed to the square (bicubic, antialiased) and normalised."""
    squashed = (image if image.mode == "RGB" else _rgb(image)).resize((size, size), Image.BICUBIC)
    return normalise(torch.from_numpy(np.array(squashed)).permute(2, 0, 1))
