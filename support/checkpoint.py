"""A checkpoint on disk: config.json and model.safetensors, and where to find one."""

import hashlib
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import torch
from open_clip.model import resize_pos_embed
from safetensors import SafetensorError
from safetensors.torch import load, save

from support.files import MAX_CONFIG_BYTES, DataError, one_line, read_json

WEIGHTS = "model.safetensors"
LAYERS, PIXELS, WIDTH = 24, 4096, 1024  # the most that a stranger's config may ask for


def save_checkpoint(model, directory):
    """Writes what was trained and, where no one else has it, the frozen CLIP it was trained on."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {k: v.contiguous() for k, v in model.state_dict().items() if is_stored(k, model.config)}
    if model.config.ships_clip and not model.config.fine_tuned:
        state |= {f"clip.{k}": v for k, v in clip_state(model.clip).items()}
    (directory / WEIGHTS).write_bytes(save(state))  # save_file's cannot be read by other users
    config = dict(asdict(model.config), clip_fingerprint=fingerprint(model.clip))
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def load_checkpoint(build, presets, source, changes):
    """-> the model in eval mode. build(config) makes a new one, presets are the known configs.

    source: a checkpoint, a run's --out or a name on the Hugging Face Hub. Raises DataError if a
    file is missing or broken, the weights do not fit, or frozen CLIP is another one.
    """
    directory = find_checkpoint(source) if Path(source).is_dir() else download(str(source))
    if directory is None:
        raise DataError(f"{source} holds no checkpoint: config.json, or stage1-* or stage2-* of a "
                        "run")
    config, expected = read_config(directory / "config.json", presets)
    config = replace(config, **changes)
    state = read_safetensors(directory / WEIGHTS)
    clip = {k: state.pop(k) for k in list(state) if not is_stored(k, config)}
    model = build(replace(config, clip="random") if clip or config.fine_tuned else config)
    model.config = config
    if clip:
        load_clip_state(model.clip, {k.removeprefix("clip."): v for k, v in clip.items()})
    if expected != fingerprint(model.clip) and not config.fine_tuned:
        raise DataError(f"{directory}: trained on other CLIP weights than {config.clip_name}/"
                        f"{config.clip}; give the same with --clip")
    have = {k for k in model.state_dict() if is_stored(k, config)}
    if wrong := sorted(have ^ set(state)):
        raise DataError(f"{directory / WEIGHTS}: missing or unexpected weights, "
                        f"{', '.join(wrong[:3])}")
    try:
        model.load_state_dict(state, strict=False)  # frozen CLIP is not in it: looked at above
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        raise DataError(f"{directory / WEIGHTS} does not fit: {reason}") from error
    return model.eval()


def is_stored(key, config):
    """Whether a weight is in a checkpoint as it is. Frozen CLIP is not, or only as clip_state."""
    return config.fine_tuned or not key.startswith("clip.")


# ---- Frozen CLIP -------------------------------------------------------------------------------

def clip_state(clip):
    """tiny CLIP's weights for a file: fp16, and of the 49,408 rows of its token table only those
    of the words that it was trained on."""
    state = {k: v.half().contiguous() for k, v in clip.state_dict().items() if k != "seen"}
    table = state.pop("token_embedding.weight")
    rows = getattr(clip, "seen", table.any(dim=1)).nonzero()[:, 0]
    return state | {"token_embedding.rows": rows.int(),
                    "token_embedding.weight": table[rows].contiguous()}


def load_clip_state(clip, state):
    """The inverse of clip_state, at any grid of patches. Words never seen are embedded as zero.

    Raises DataError if the weights are of something else.
    """
    try:
        table = torch.zeros_like(clip.token_embedding.weight)
        rows = state.pop("token_embedding.rows").long()
        table[rows] = state["token_embedding.weight"].to(table.dtype)
        state = {k: v.float() for k, v in state.items()} | {"token_embedding.weight": table}
        resize_pos_embed(state, clip)
        clip.load_state_dict(state)
    except (KeyError, IndexError, RuntimeError) as error:
        raise DataError(f"not the weights of a tiny CLIP ({one_line(error)[:160]}); see train.py "
                        "--stage 0") from error


def fingerprint(clip):
    """Tells one frozen CLIP from another: a hash of the tensors that no image size changes."""
    tensors = (clip.visual.conv1.weight, clip.visual.proj, clip.text_projection,
               clip.positional_embedding)
    if tensors[0].is_meta:
        return None
    content = b"".join(t.detach().float().cpu().numpy().tobytes() for t in tensors)
    return hashlib.sha256(content).hexdigest()[:16]


# ---- Files -------------------------------------------------------------------------------------

def read_config(path, presets):
    """-> the Config in a checkpoint's config.json, and its clip_fingerprint.

    A stranger's file may change a preset, but neither name other weights than the preset's nor ask
    for a size that would fill a machine. Raises DataError for any other file.
    """
    saved = read_json(path, limit=MAX_CONFIG_BYTES)
    try:
        expected, preset = saved.pop("clip_fingerprint", None), presets[saved["backbone"]]
        for key, value in saved.items():
            like = getattr(preset, key)
            own = key in ("clip_name", "clip_tag")
            if value != like and (own or not may_replace(key, value, like)):
                raise ValueError(f"{key} cannot be {str(value)[:60]}")
        changes = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
        return replace(preset, **changes), expected
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is not a RISCLIP config ({one_line(error)[:160]})") from error


def may_replace(key, value, like):
    """Whether a value from a file has the kind, length and size of the preset's, `like`."""
    if isinstance(like, tuple):
        right = isinstance(value, list) and (len(value) == len(like) or isinstance(like[0], str))
        return right and all(may_replace(key, v, like[0]) for v in value)
    if isinstance(like, str | bool):
        return type(value) is type(like)
    most = LAYERS if key.endswith("layers") else PIXELS if key == "image_size" else WIDTH
    whole = like is None or isinstance(like, int)  # None: adapter_layers, of all layers
    return type(value) in ((int,) if whole else (int, float)) and 0 <= value <= most


def read_safetensors(path):
    """-> dict of tensors. Nothing in such a file can run. Raises DataError if it is missing or
    broken."""
    try:
        return load(Path(path).read_bytes())  # mapped memory fails on some network file systems
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is broken ({one_line(error)[:160]})") from error


def checkpoints(directory, stage=None):
    """The checkpoints stageN-STEP in a run's --out (of stages 1 and 2, or of one), oldest first."""
    names = re.compile(rf"stage({'[12]' if stage is None else stage})-(\d+)")
    found = [(names.fullmatch(path.name), path) for path in Path(directory).glob("stage*-*")]
    return [path for _, path in sorted(((int(m[1]), int(m[2])), path) for m, path in found if m)]


def find_checkpoint(directory, stage=None):
    """A checkpoint itself, or the newest one (of a stage) in a run's --out; None if there is none.
    """
    if stage is None and (Path(directory) / "config.json").exists():
        return Path(directory)
    return next(reversed(checkpoints(directory, stage)), None)


def download(name):
    """A checkpoint's two files from the Hugging Face Hub -> their directory."""
    import huggingface_hub
    try:
        return Path(huggingface_hub.snapshot_download(name,
                                                      allow_patterns=["config.json", WEIGHTS]))
    except Exception as error:  # the hub fails in many ways
        raise DataError(f"{name}: no such folder, and not on the Hugging Face Hub "
                        f"({one_line(error)[:99]})") from error
