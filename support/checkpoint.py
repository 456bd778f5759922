import hashlib
import re
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from risclip import CONFIGS
from support.files import MAX_CONFIG_BYTES, DataError, one_line, read_json

# ---- Weight files ---------------------------------------------------------------------------------------------------

def is_stored(key, config):
    """Whether a weight of the model is in a checkpoint as it is: what learns. Frozen CLIP is not, or only in brief."""
    return config.fine_tuned or not key.startswith("clip.")


def fingerprint(clip):
    """Tells one set of frozen weights from another: a hash of the tensors that every image size shares."""
    tensors = (clip.visual.conv1.weight, clip.visual.proj, clip.text_projection, clip.positional_embedding)
    if tensors[0].is_meta:
        return None
    return hashlib.sha256(b"".join(t.detach().float().cpu().numpy().tobytes() for t in tensors)).hexdigest()[:16]


def read_config(path):
    """-> the Config in a checkpoint's config.json, and its clip_fingerprint. Raises DataError for any other file.

    A stranger's file names no architecture and weights but the backbone's own, and no size that would fill a machine.
    """
    def fits(value, like, most):
        if isinstance(like, tuple):
            whole = isinstance(value, list) and (len(value) == len(like) or isinstance(like[0], str))
            return whole and all(fits(v, like[0], most) for v in value)
        if isinstance(like, int | float) and not isinstance(like, bool):
            return type(value) in (type(like), int) and 0 <= value <= most
        return type(value) is type(like)

    saved = read_json(path, limit=MAX_CONFIG_BYTES)
    try:
        expected, preset = saved.pop("clip_fingerprint", None), CONFIGS[saved["backbone"]]
        for key, value in saved.items():
            like, most = getattr(preset, key), 24 if key.endswith("layers") else 4096 if key == "image_size" else 1024
            own = key in ("clip_name", "clip_tag")
            if value != like and (own or not fits(value, 1 if like is None else like, most)):
                raise ValueError(f"{key} cannot be {str(value)[:60]}")
        return replace(preset, **{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}), expected
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is not a RISCLIP config ({one_line(error)[:160]})") from error


def read_safetensors(path):
    """-> dict of tensors; DataError for a missing or broken file. Nothing in such a file can run."""
    try:
        open(path, "rb").close()  # load_file calls a file that may not be read missing
        return load_file(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is broken ({one_line(error)[:160]})") from error


def checkpoints(directory, stage=None):
    """The checkpoints stageN-STEP in a run's --out (of stages 1 and 2, or of one), the oldest first."""
    names = re.compile(rf"stage({'[12]' if stage is None else stage})-(\d+)")
    found = [(names.fullmatch(path.name), path) for path in Path(directory).glob("stage*-*")]
    return [path for _, path in sorted(((int(m[1]), int(m[2])), path) for m, path in found if m)]


def find_checkpoint(directory, stage=None):
    """A checkpoint itself, or the newest one (of a stage) in a run's --out -> its directory, or None."""
    if stage is None and (Path(directory) / "config.json").exists():
        return Path(directory)
    return next(reversed(checkpoints(directory, stage)), None)


def download(name):
    """A checkpoint's two files from the Hugging Face Hub -> their directory."""
    import huggingface_hub
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=["config.json", "model.safetensors"]))
    except Exception as error:  # the hub fails in many ways
        raise DataError(f"{name}: no such folder, and not on the Hugging Face Hub ({one_line(error)[:99]})") from error
