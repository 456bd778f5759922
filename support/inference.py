"""How a model is run, not what it computes: precision, and batches that fit a cache."""

import warnings

import torch
from torch.utils.checkpoint import checkpoint

from support.files import DataError


def computes_bf16(device):
    """Whether a device has instructions for bf16. A CPU without them takes a hundred times as long
    as for fp32, and the locator then stays in fp32."""
    return torch.device(device).type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def autocast(model, device):
    """A context in the locator's precision (Table A1): bf16 if the config says so and the device
    has instructions for it."""
    bf16 = model.config.precision == "bf16" and computes_bf16(device)
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16)


def outputs(model, pixels, texts, at_once=None):
    """Yields the model's output for the first sentences of one image, for the next ones, and so on.

    pixels (1, 3, S, S). The image layers below the first CFE run once for all sentences.
    at_once: by default 8, since at 640 pixels each sentence takes half a gigabyte in the decoder;
    on a CPU as many as have 2,000 patches, since what is larger leaves its cache.
    """
    patches = (model.config.image_size // model.patch_size) ** 2
    at_once = at_once or (8 if pixels.is_cuda else max(1, min(8, 2000 // patches)))
    with autocast(model, pixels.device):
        lower = model.lower_layers(pixels)
    for first in range(0, len(texts), at_once):
        tokens = model.tokenize(texts[first:first + at_once]).to(pixels.device)
        image_index = torch.zeros(len(tokens), dtype=torch.long, device=pixels.device)
        yield model(pixels, tokens, image_index, lower)


def autocast_dtype(x):
    """x in autocast's dtype, once for all products that take it: backward would keep a copy each.
    """
    device = x.device.type
    on = torch.is_autocast_enabled(device)
    return x.to(torch.get_autocast_dtype(device)) if on else x


def store_frozen_matrices(model):
    """Keeps frozen CLIP's matrices in the locator's precision, in which autocast would otherwise
    cast them in every pass. Call it once the model is on its device."""
    config, device = model.config, model.map_threshold.device
    if config.fine_tuned or config.ships_clip:  # they are trained, or saved with a checkpoint
        return
    bf16 = config.precision == "bf16" and computes_bf16(device)
    for block in (*model.image_blocks, *model.text_blocks):
        for p in block.parameters():
            if p.ndim == 2:
                p.data = p.data.to(torch.bfloat16 if bf16 else torch.float32)


def recomputed(module, *inputs):
    """module(*inputs). If it learns, backward computes its insides again instead of keeping them.
    """
    learns = torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())
    return checkpoint(module, *inputs, use_reentrant=False) if learns else module(*inputs)


def tokenize(tokenizer, texts):
    """Sentences -> token ids (B, T), T of the longest; 0 pads. What is longer than the tokenizer's
    context is cut there, with a warning that counts such sentences. Raises DataError for an empty
    sentence."""
    if any(not text.strip() for text in texts):
        raise DataError("empty sentence: say what to segment")
    tokens = tokenizer(texts)
    full = torch.nonzero(tokens[:, -1])[:, 0]
    cut = sum(len(tokenizer.encode(texts[i])) + 2 > tokens.size(1) for i in full)
    if cut:
        warnings.warn(f"{cut} sentence(s) longer than {tokens.size(1)} tokens were cut",
                      stacklevel=3)
    return tokens[:, : int((tokens > 0).sum(1).max())]
