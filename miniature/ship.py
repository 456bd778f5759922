"""Makes a run of the miniature small enough to ship: half precision, without the CLIP that ships.

    python -m miniature.ship runs/tiny miniature/tiny

docs/results.md says which run made miniature/tiny.
"""

import argparse
import shutil
import sys
from pathlib import Path

from safetensors.torch import save

from risclip import CONFIGS, RISCLIP
from support.checkpoint import WEIGHTS, find_checkpoint, fingerprint, read_safetensors
from support.files import DataError, run


def main(args):
    source = find_checkpoint(args.run)
    if source is None:
        raise DataError(f"{args.run} holds no checkpoint: give the --out of a run of train.py")
    trained_on = RISCLIP.from_pretrained(source).clip
    if fingerprint(trained_on) != fingerprint(RISCLIP(CONFIGS["tiny"]).clip):
        raise DataError(f"{source} was trained on another CLIP than the one that ships")
    args.out.mkdir(parents=True, exist_ok=True)
    state = read_safetensors(source / WEIGHTS)
    half = {k: v.half() if v.is_floating_point() else v
            for k, v in state.items() if not k.startswith("clip.")}
    (args.out / WEIGHTS).write_bytes(save(half))
    shutil.copy(source / "config.json", args.out)
    RISCLIP.from_pretrained(args.out)  # raises if it does not load as any other
    print(f"wrote {args.out}: {sum(p.stat().st_size for p in args.out.iterdir()) / 1e6:.1f} MB")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="the --out of a run, or a checkpoint in it")
    parser.add_argument("out", type=Path)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run(main, parse_args()))
