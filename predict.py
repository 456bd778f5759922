"""Segments what a sentence means in an image of your own.

    python predict.py runs/B photo.jpg "the giraffe looking up"
    python predict.py runs/B photo.jpg "left vase" "the vase with flowers" --out overlay.png --mask mask.png
"""

import argparse
import sys
from pathlib import Path

from PIL import Image

import data
from evaluate import PINK, check_writable, contact_sheet, load, model_flags, overlay, panel, save_picture


def numbered(path, i, count):
    """mask.png for a single sentence; mask-1.png, mask-2.png, ... for several."""
    path = Path(path)
    return path if count == 1 else path.with_name(f"{path.stem}-{i + 1}{path.suffix}")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model_flags(parser)
    parser.add_argument("image")
    parser.add_argument("sentences", nargs="+", metavar="sentence")
    parser.add_argument("--out", default="overlay.png", help="the image with the mask in pink (default: overlay.png)")
    parser.add_argument("--mask", help="also write the mask itself, white on black; -1, -2 ... for several sentences")
    return parser.parse_args(argv)


def main(args):
    if not all(text.strip() for text in args.sentences):
        raise data.DataError("empty sentence: say what to segment")
    image = data.open_image(args.image)
    for path in filter(None, (args.out, args.mask)):
        check_writable(path, picture=True)
    if args.mask and Path(args.mask).resolve() == Path(args.out).resolve():
        raise data.DataError(f"--mask {args.mask} is --out as well: give two places")
    model = load(args)
    masks = model.segment_all(image, args.sentences)  # (K, H, W)
    panels = [panel([overlay(image, mask, PINK)], text, height=min(480, image.height))
              for mask, text in zip(masks, args.sentences)]
    # One sentence: the image's own pixels. Several: a sheet with the sentences written under them.
    picture = overlay(image, masks[0], PINK) if len(panels) == 1 else contact_sheet(panels)
    written = [args.out]
    save_picture(picture, args.out)
    if args.mask:
        for i, mask in enumerate(masks):
            written.append(numbered(args.mask, i, len(masks)))
            save_picture(Image.fromarray(mask).convert("L"), written[-1])
    for mask, text in zip(masks, args.sentences):
        print(f"{100 * mask.mean():5.1f} % of the image: {text}")
    print(f"wrote {', '.join(map(str, written))}")


if __name__ == "__main__":
    sys.exit(data.run(main, parse_args()))
