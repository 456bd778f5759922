"""Segments what a sentence refers to in an image of your own.

    python predict.py runs/B photo.jpg "the giraffe looking up"
    python predict.py runs/B photo.jpg "left vase" "the vase with flowers" --mask mask.png
    python predict.py runs/B --jsonl in.jsonl --out out.jsonl       many lines: support/bulk.py
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
from evaluate import each_output, foreground, load, model_flags
from risclip import score_maps
from support import processes
from support.bulk import predict_lines
from support.files import DataError, check_writable, run
from support.image_files import open_image, preprocess
from support.pictures import HEIGHT, PREDICTION, contact_sheet, outlined, panel, save_picture


@torch.inference_mode()
def scored_masks(model, image, texts):
    """Yields for each sentence about a PIL image the bool mask (H, W), of the image's own size,
    and the foreground's mean probability in it."""
    for output in each_output(model, preprocess(image, model.config.image_size), texts):
        scores = score_maps(output, image.size[::-1])  # (1, 2, H, W)
        mask, probability = foreground(scores)[0], scores[0, 1].sigmoid()
        yield mask.cpu().numpy(), probability[mask].mean().item() if mask.any() else 0.0


def segment_all(model, image, texts):
    """PIL image and K sentences -> bool array (K, H, W). The image's own layers run once."""
    was_training = model.training
    masks = [mask for mask, _ in scored_masks(model.eval(), image, texts)]
    model.train(was_training)
    return np.stack(masks)


def numbered(path, i, count):
    """mask.png for a single sentence; mask-1.png, mask-2.png, ... for several."""
    path = Path(path)
    return path if count == 1 else path.with_name(f"{path.stem}-{i + 1}{path.suffix}")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    model_flags(parser)
    parser.add_argument("image", nargs="?", help="a picture file")
    parser.add_argument("sentences", nargs="*", metavar="sentence")
    parser.add_argument("--out", help="a picture with the masks outlined (default: overlay.png), "
                        "or the file for --jsonl")
    parser.add_argument("--mask", help="also write the mask itself, white on black and of the "
                        "image's size; -1, -2 ... for several sentences")
    parser.add_argument("--jsonl", metavar="IN", help="a file of images and sentences; give --out")
    parser.add_argument("--outside", action="store_true",
                        help="let --jsonl name images outside its own folder")
    args = parser.parse_intermixed_args(argv)  # flags before the image as well
    if args.jsonl and (args.image or args.mask or not args.out):
        parser.error("--jsonl takes --out, no image, sentence or --mask")
    if not args.jsonl and not args.sentences:
        parser.error("give an image and a sentence, or --jsonl")
    args.out = args.out or "overlay.png"
    return args


def main(args):
    if args.jsonl:
        processes.start(args.device)
        masks_of = partial(scored_masks, load(args))
        return predict_lines(args.jsonl, args.out, args.outside, data.clean_sentence, masks_of)
    if not all(text.strip() for text in args.sentences):
        raise DataError("empty sentence: say what to segment")
    image = open_image(args.image)
    for path in filter(None, (args.out, args.mask)):
        check_writable(path, picture=True)
    places = [Path(path).resolve() for path in (args.image, args.out, args.mask) if path]
    if len(set(places)) < len(places):
        raise DataError("the image, --out and --mask are not different files: give each its own")
    model, panels, written = load(args), [], [args.out]
    for i, (mask, _) in enumerate(scored_masks(model, image, args.sentences)):
        text, height = args.sentences[i], min(480, max(HEIGHT, image.height))
        panels.append(panel({"": outlined(image, mask, PREDICTION, height)}, text))
        print(f"{100 * mask.mean():5.1f} % of the image: {text}")
        if args.mask:
            written.append(numbered(args.mask, i, len(args.sentences)))
            save_picture(Image.fromarray(mask).convert("L"), written[-1])
    save_picture(contact_sheet(panels), args.out)
    print(f"wrote {', '.join(map(str, written))}")


if __name__ == "__main__":
    sys.exit(run(main, parse_args()))
