"""CLIP's weights from open_clip, and randomness that does not depend on what ran before."""

import logging
from contextlib import contextmanager
from pathlib import Path

import open_clip
import torch

from support.files import DataError, one_line


@contextmanager
def seeded(seed):
    """torch's random numbers on the CPU start at the seed inside, and go on as before outside."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs as well
        yield


def load_open_clip(name, tag, source, **options):
    """open_clip's model `name` with the weights of `source`: "pretrained" (open_clip's `tag`),
    "random", or a file. Raises DataError if the weights cannot be had."""
    if source not in ("pretrained", "random") and not Path(source).is_file():
        raise DataError(f"--clip {source}: no such file")
    weights = {"random": None, "pretrained": tag}.get(source, source)
    logging.disable(logging.CRITICAL)  # open_clip warns of random weights; its failures are raised
    try:
        return open_clip.create_model(name, pretrained=weights, device=torch.get_default_device(),
                                      require_pretrained=weights is not None, **options)
    except Exception as error:  # hubs fail in many ways: name the mend, keep the cause
        raise DataError(
            f"CLIP weights {name}/{weights} cannot be loaded ({one_line(error)[:99]}); give a "
            "state dict's file with --clip PATH, or try the code with --clip random") from error
    finally:
        logging.disable(logging.NOTSET)


def patch_size(name):
    """Pixels per side of a patch in open_clip's model `name`; None if it knows no such model."""
    known = open_clip.get_model_config(name)
    return known and known["vision_cfg"]["patch_size"]
