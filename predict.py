"""Segments what a sentence means in an image of your own.

    python predict.py runs/B photo.jpg "the giraffe looking up"
    python predict.py runs/B photo.jpg "left vase" "the vase with flowers" --out overlay.png --mask mask.png
    python predict.py runs/B --jsonl in.jsonl --out out.jsonl        many; torchrun shares them among processes

A line of in.jsonl is {"image": "a.jpg", "sentence": "left vase"}, the path relative to in.jsonl. A line of out.jsonl
has its number ("line", from 1), image and sentence, the mask as COCO's run lengths ("segmentation") and as "score" the
mean probability of the foreground in it; or, where a line is bad, its number and the "error". Started again, it goes on
with the lines that are not in out.jsonl yet.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco
from tqdm import tqdm

import data
import risclip
from evaluate import load, model_flags
from risclip import score_maps
from support import processes
from support.files import (
    MAX_BYTES,
    DataError,
    check_writable,
    need,
    one_line,
    parse_json,
    path_inside,
    read_bytes,
    run,
)
from support.image_files import open_image
from support.pictures import PINK, contact_sheet, overlay, panel, save_picture
from support.unpickle import MAX_SENTENCES


def numbered(path, i, count):
    """mask.png for a single sentence; mask-1.png, mask-2.png, ... for several."""
    path = Path(path)
    return path if count == 1 else path.with_name(f"{path.stem}-{i + 1}{path.suffix}")


# ---- Many lines -----------------------------------------------------------------------------------------------------

def parse_line(number, line, folder, outside):
    """A line of in.jsonl -> image as written, its path, sentence. Raises DataError for a bad one."""
    where = f"line {number}"
    record = parse_json(line, where)
    name, sentence = need(record, "image", str, where), need(record, "sentence", str, where)
    path = folder / name if outside else path_inside([folder], name, where)
    return name, path, data.clean_sentence(sentence, f"{where}: sentence")


def read_done(path):
    """-> {line number: record} of an out.jsonl, if there is one; a last line that was cut short is cut off it.

    Raises DataError if the file is something else: it stays as it is.
    """
    if not path.exists():
        return {}
    content = read_bytes(path, 32 * MAX_BYTES)  # masks are longer than sentences
    whole = content.rfind(b"\n") + 1
    torn, start = content[whole:], b'{"line": '
    try:
        records = {r["line"]: r for r in map(json.loads, content[:whole].splitlines())}
        if not start.startswith(torn[:len(start)]):
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"--out {path} exists and is no output of --jsonl: give another place") from error
    if torn:
        with open(path, "r+b") as file:
            file.truncate(whole)
    return records


@torch.inference_mode()
def segment_lines(model, image, sentences):
    """PIL image and sentences -> for each of them the mask's run lengths and its score."""
    pixels = risclip.preprocess(image, model.config.image_size)[None].to(model.map_threshold.device)
    for output in model.outputs(pixels, sentences):
        scores = score_maps(output, image.size[::-1])  # (K, 2, H, W)
        for mask, probability in zip(scores.argmax(dim=1).bool(), scores[:, 1].sigmoid()):
            rle = coco.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))
            score = probability[mask].mean().item() if mask.any() else 0.0
            yield {"segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}, "score": score}


def predict_jsonl(args):
    """in.jsonl -> out.jsonl. -> exit code: 1 if there are bad lines."""
    source, out = Path(args.jsonl), Path(args.out)
    if source.resolve() == out.resolve():
        raise DataError(f"--out {out} is --jsonl as well: give two places")
    content = read_bytes(source)
    if content.count(b"\n") > MAX_SENTENCES:
        raise DataError(f"--jsonl {source} has more than {MAX_SENTENCES} lines: split it")
    lines = {n: line for n, line in enumerate(content.split(b"\n"), 1) if line.strip()}
    del content
    check_writable(out)
    processes.start(args.device)
    done = processes.gather(read_done(out) if processes.MAIN else None)[0]
    images, bad = {}, []  # path -> (number, image as written, sentence) of each of its lines; records of bad lines
    for n, line in lines.items():
        try:
            name, path, sentence = parse_line(n, line, source.parent, args.outside)
        except DataError as error:
            bad += [] if n in done else [{"line": n, "error": one_line(error)}]
            continue
        if n not in done:
            images.setdefault(path, []).append((n, name, sentence))
        elif (done[n].get("image", name), done[n].get("sentence", sentence)) != (name, sentence):
            raise DataError(f"--out {out} has another image or sentence in line {n} than --jsonl: give another place")
    model = load(args)
    with open(out, "ab", buffering=0) as file:
        def write(**record):
            file.write(json.dumps(record).encode() + b"\n")  # at once, so that a line stays whole among processes

        for record in bad if processes.MAIN else ():
            write(**record)
        for path, wanted in tqdm(list(images.items())[processes.RANK::processes.WORLD], "predict", unit="image"):
            try:
                results = segment_lines(model, open_image(path), [sentence for *_, sentence in wanted])
            except DataError as error:
                results = [{"error": one_line(error)}] * len(wanted)
            for (n, name, sentence), result in zip(wanted, results):
                write(line=n, image=name, sentence=sentence, **result)
    processes.gather(None)
    errors = sum("error" in record for record in read_done(out).values())
    print(f"wrote {out}: {len(lines)} lines, {errors} of them with an error")
    return 1 if errors else 0


# ---- Command line ---------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model_flags(parser)
    parser.add_argument("image", nargs="?")
    parser.add_argument("sentences", nargs="*", metavar="sentence")
    parser.add_argument("--out", help="the image with the mask in pink (default: overlay.png), or the file for --jsonl")
    parser.add_argument("--mask", help="also write the mask itself, white on black; -1, -2 ... for several sentences")
    parser.add_argument("--jsonl", metavar="IN", help="a file of images and sentences; give --out")
    parser.add_argument("--outside", action="store_true", help="let --jsonl name images outside its own folder")
    args = parser.parse_intermixed_args(argv)  # flags before the image as well
    if args.jsonl and (args.image or args.mask or not args.out):
        parser.error("--jsonl takes --out, no image, sentence or --mask")
    if not args.jsonl and not args.sentences:
        parser.error("give an image and a sentence, or --jsonl")
    args.out = args.out or "overlay.png"
    return args


def main(args):
    if args.jsonl:
        return predict_jsonl(args)
    if not all(text.strip() for text in args.sentences):
        raise DataError("empty sentence: say what to segment")
    image = open_image(args.image)
    for path in filter(None, (args.out, args.mask)):
        check_writable(path, picture=True)
    if len({Path(path).resolve() for path in (args.image, args.out, args.mask) if path}) < 2 + bool(args.mask):
        raise DataError("the image, --out and --mask are not different files: give each its own")
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
    sys.exit(run(main, parse_args()))
