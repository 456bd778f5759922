"""The miniature's CLIP: open_clip's own class at a size that a CPU core trains in two hours.

miniature/pretrain.py made the weights that ship beside this file.
"""

from pathlib import Path

from open_clip.model import CLIP

from support.checkpoint import load_clip_state, read_safetensors

WEIGHTS = Path(__file__).parent / "tiny_clip.safetensors"
TINY_CLIP = dict(
    embed_dim=128,
    vision_cfg=dict(image_size=96, patch_size=8, width=128, layers=6, head_width=32),
    text_cfg=dict(context_length=40, vocab_size=49408, width=128, heads=4, layers=3),
)


def build_tiny_clip(image_size, source="pretrained"):
    """source: "pretrained" (the weights that ship), "random", or a file that clip_state wrote.

    Raises DataError if the file is missing or holds anything else.
    """
    clip = CLIP(**dict(TINY_CLIP, vision_cfg=dict(TINY_CLIP["vision_cfg"], image_size=image_size)))
    if source != "random":
        load_clip_state(clip, read_safetensors(WEIGHTS if source == "pretrained" else source))
    return clip.half().float()  # as its file in half precision gives it back
