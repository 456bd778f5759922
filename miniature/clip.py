import torch
from open_clip.model import resize_pos_embed

from support.files import DataError, one_line

# The miniature's CLIP, open_clip's own class at a size that a CPU core trains in two hours (train.py --stage 0).
TINY_CLIP = dict(
    embed_dim=128,
    vision_cfg=dict(image_size=96, patch_size=8, width=128, layers=6, head_width=32),
    text_cfg=dict(context_length=40, vocab_size=49408, width=128, heads=4, layers=3),
)


def clip_state(clip):
    """tiny CLIP's weights for a file: fp16, and of the 49,408 rows of the token table those of words it was trained on.
    """
    state = {k: v.half().contiguous() for k, v in clip.state_dict().items() if k != "seen"}
    table = state.pop("token_embedding.weight")
    rows = getattr(clip, "seen", table.any(dim=1)).nonzero()[:, 0]
    return state | {"token_embedding.rows": rows.int(), "token_embedding.weight": table[rows].contiguous()}


def load_clip_state(clip, state):
    """Inverse of clip_state; a word that the tiny CLIP never saw has a zero embedding. Any grid of patches."""
    try:
        table = torch.zeros_like(clip.token_embedding.weight)
        table[state.pop("token_embedding.rows").long()] = state["token_embedding.weight"].to(table.dtype)
        state = {k: v.float() for k, v in state.items()} | {"token_embedding.weight": table}
        resize_pos_embed(state, clip)
        clip.load_state_dict(state)
    except (KeyError, IndexError, RuntimeError) as error:
        raise DataError(f"not the weights of a tiny CLIP ({one_line(error)[:160]}); see train.py --stage 0") from error
