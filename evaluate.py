"""Metrics and protocols of referring image segmentation. Sec. 4.1.

    python evaluate.py runs/B --dataset refcoco --data-root DATA --split val
    python evaluate.py runs/B --dataset refcoco --data-root DATA --split testA --protocol lavt
    python evaluate.py runs/tiny --split test --figures figures --against runs/other
    torchrun --nproc-per-node 8 evaluate.py ...   the same result: processes share the images

The protocols differ, and the numbers with them. The paper names none.

    protocol   image to network       IoU is computed on       mask from the score maps   P@X
    original   squashed to a square   the image's own pixels   argmax                     IoU >= X
    lavt       squashed to a square   the network's square     argmax                     IoU >= X
    cris       letterboxed            the image's own pixels   foreground p > 0.35        IoU > X
"""

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

import data
from risclip import RISCLIP, score_maps
from support import figures, processes
from support.checkpoint import find_checkpoint
from support.files import DataError, check_writable, one_line, run, too_small, write_text
from support.image_files import preprocess
from support.inference import outputs, store_frozen_matrices
from support.pictures import save_picture
from support.tables import table

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


class RISMetrics:
    """oIoU, mIoU and P@X in percent, each sentence counted once. Sec. 4.1.

    The IoU of two empty masks is 0, as in LAVT and CRIS. `strict`: P@X counts IoU > X
    instead of IoU >= X. Sums are exact, so the order of updates does not matter.
    """

    def __init__(self, strict=False):
        self.strict = strict
        self.pairs = []  # (intersection, union) in pixels

    def update(self, prediction, target):
        """prediction, target: masks of one shape, bool or 0/1. Raises ValueError if they differ
        in shape."""
        prediction, target = np.asarray(prediction, bool), np.asarray(target, bool)
        if prediction.shape != target.shape:
            raise ValueError(f"prediction {prediction.shape} and target {target.shape} must have "
                             "one shape")
        self.pairs.append((int((prediction & target).sum()), int((prediction | target).sum())))

    def __iadd__(self, other):
        self.pairs += other.pairs
        return self

    def compute(self):
        """-> {"oIoU", "mIoU", "P@0.5" ... "P@0.9", "sentences"}; 0 percent of no sentences."""
        n = max(len(self.pairs), 1)
        ious = [i / u if u else 0.0 for i, u in self.pairs]
        intersections, unions = (sum(pair[k] for pair in self.pairs) for k in (0, 1))
        result = {"oIoU": 100 * intersections / max(unions, 1), "mIoU": 100 * math.fsum(ious) / n}
        for x in THRESHOLDS:
            result[f"P@{x}"] = 100 * sum(iou > x if self.strict else iou >= x for iou in ious) / n
        return result | {"sentences": len(self.pairs)}


# ---- Protocols ---------------------------------------------------------------------------------

def letterbox_box(width, height, size):
    """Where a letterboxed image lies in the network's square: left, top, width, height (CRIS)."""
    scale = size / max(width, height)
    w, h = max(1, round(width * scale)), max(1, round(height * scale))
    return (size - w) // 2, (size - h) // 2, w, h


def letterbox(image, size):
    """PIL image -> square PIL image, aspect kept, the border filled with CLIP's mean colour."""
    left, top, w, h = letterbox_box(*image.size, size)
    square = Image.new("RGB", (size, size), data.FILL)
    square.paste(image.resize((w, h), Image.BICUBIC), (left, top))
    return square


def masks_from_output(output, size, width, height, protocol="original", threshold=None):
    """RISCLIP's output for K sentences of an image -> bool masks (K, H, W) on the protocol's grid.

    size: the network's square, in pixels. `threshold` on the foreground's probability replaces the
    protocol's rule.
    """
    if protocol == "cris":
        left, top, w, h = letterbox_box(width, height, size)
        square = score_maps(output, (size, size))[:, :, top:top + h, left:left + w]
        scores = F.interpolate(square, (height, width), mode="bilinear", align_corners=False)
        threshold = 0.35 if threshold is None else threshold
    else:
        scores = score_maps(output, (size, size) if protocol == "lavt" else (height, width))
    masks = foreground(scores) if threshold is None else scores[:, 1].sigmoid() > threshold
    return masks.cpu().numpy()


def foreground(scores):
    """Score maps (K, 2, H, W) -> bool masks (K, H, W). Sec. 3.4."""
    return scores.argmax(dim=1).bool()


# ---- Evaluation --------------------------------------------------------------------------------

class Readout(NamedTuple):
    """Where a mask is read from the model's output, and at which probability it is cut.

    "patch_logits" is the map, upsampled bilinearly, as if there were no decoder.
    """

    output: str
    threshold: float | None  # None: the protocol's rule


MASK = Readout("mask_logits", None)  # the model's own mask, whether or not it has a decoder


class Prediction(NamedTuple):
    """A sentence, its image (PIL), and bool masks (H, W) on the protocol's grid."""

    sentence: data.Sentence
    image: Image.Image
    target: np.ndarray
    masks: dict  # by Readout


def by_image(dataset):
    """-> [(image index, its sentences' indices)]."""
    (items,) = data.plan_eval(dataset, len(dataset))
    return [(number, sentences) for number, sentences, _ in items]


class Inputs(Dataset):
    """Per item of by_image: the image, its pixels for the network, its sentences, and the ground
    truth by ref; or a DataError."""

    def __init__(self, dataset, items, size, protocol):
        self.dataset, self.items, self.size, self.protocol = dataset, items, size, protocol

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        number, sentences = self.items[i]
        sentences = [self.dataset.sentences[s] for s in sentences]
        try:
            image = self.dataset.image(number)
            masks = {ref: self.dataset.mask(ref) for ref in {s.ref for s in sentences}}
        except DataError as error:
            return error  # raised by `predictions`: a worker would wrap it in its own traceback
        if self.protocol == "lavt":  # ground truth by nearest neighbour on the network's square
            square = self.size, self.size
            masks = {ref: np.asarray(Image.fromarray(mask).resize(square, Image.NEAREST))
                     for ref, mask in masks.items()}
        shown = letterbox(image, self.size) if self.protocol == "cris" else image
        return image, preprocess(shown, self.size), sentences, masks


def each_output(model, pixels, texts):
    """Yields the model's output per sentence of one image, pixels (3, S, S), so that the masks of
    a large image are upsampled one at a time."""
    for output in outputs(model, pixels[None].to(model.map_threshold.device), texts):
        for k in range(len(output["patch_logits"])):
            yield {name: maps[k:k + 1] for name, maps in output.items()}


@torch.inference_mode()
def predictions(model, dataset, protocol="original", workers=0, items=None, readouts=(MASK,)):
    """Yields a Prediction for every sentence of items, by default the data set's.

    The sentences of an image share its forward pass, nothing else does: results depend on no batch
    size. Raises DataError for an image or a mask that cannot be read.
    """
    model.eval()
    size = model.config.image_size
    inputs = Inputs(dataset, by_image(dataset) if items is None else items, size, protocol)
    loader = processes.reader(inputs, workers, batch_size=None)
    for item in tqdm(loader, "evaluate", unit="image", leave=False):
        if isinstance(item, DataError):
            raise item
        image, pixels, sentences, targets = item
        found = each_output(model, pixels, [s.text for s in sentences])
        for sentence, output in zip(sentences, found):
            masks = {}
            for readout in readouts:
                read = output if readout == MASK else {readout.output: output[readout.output]}
                (masks[readout],) = masks_from_output(read, size, *image.size, protocol,
                                                      readout.threshold)
            yield Prediction(sentence, image, targets[sentence.ref], masks)


def evaluate(model, dataset, protocol="original", workers=0, limit=None, readouts=(MASK,)):
    """-> per readout RISMetrics.compute() over all sentences, and under "kinds" per kind of
    expression, if there are any. limit: only the first images."""
    start, images = time.time(), set()
    metrics = defaultdict(lambda: RISMetrics(strict=protocol == "cris"))  # by readout and kind
    items = by_image(dataset)[:limit][processes.RANK::processes.WORLD]
    for p in predictions(model, dataset, protocol, workers, items, readouts):
        images.add(p.sentence.image)
        for readout, mask in p.masks.items():
            for kind in {None, p.sentence.kind}:
                metrics[readout, kind].update(mask, p.target)
    (images, mine), *others = processes.gather((len(images), dict(metrics)))
    metrics.update(mine)
    for more, theirs in others:
        images += more
        for key, m in theirs.items():
            metrics[key] += m
    results = {}
    for readout in readouts:
        kinds = sorted(kind for r, kind in metrics if r == readout and kind is not None)
        results[readout] = metrics[readout, None].compute()
        results[readout] |= {"images": images, "protocol": protocol, "seconds": time.time() - start}
        if kinds:
            results[readout]["kinds"] = {kind: metrics[readout, kind].compute() for kind in kinds}
    return results


def best_map_readout(model, dataset, limit=150):
    """The map's Readout with the highest mIoU on validation scenes, so that maps are compared for
    what they show, not for their calibration."""
    readouts = [Readout("patch_logits", 1 / (1 + math.exp(-x / 2))) for x in range(-8, 9)]
    results = evaluate(model, dataset, limit=limit, readouts=readouts)
    return max(readouts, key=lambda readout: results[readout]["mIoU"])


def results_table(results):
    """{row name: evaluate()'s result} -> a Markdown table, mIoU per kind of expression last."""
    kinds = sorted({kind for result in results.values() for kind in result.get("kinds", ())})
    rows = []
    for name, result in results.items():
        row = {"": name}
        for column in ("mIoU", "oIoU", *(f"P@{x}" for x in THRESHOLDS)):
            row[column] = f"{result[column]:.2f}"
        for kind in kinds:
            of_kind = result["kinds"][kind]
            row[f"mIoU {kind} ({of_kind['sentences']})"] = f"{of_kind['mIoU']:.2f}"
        rows.append(row)
    return table(rows)


def trained_on(source, root):
    """-> the images that a checkpoint was trained on. None, and a note on stderr, unless its
    training.pt names the data set and that is in root."""
    try:
        state = torch.load(find_checkpoint(source) / "training.pt", map_location="cpu",
                           weights_only=True, mmap=True)
        return data.RefCOCO(root, json.loads(state["run"])["dataset"], "train").images
    except Exception as error:  # no record, a broken one (torch.load fails in many ways), no data
        print(f"note: cannot tell which images {source} was trained on ({type(error).__name__})",
              file=sys.stderr)
        return []


def warn_of_images_trained_on(learned, images):
    """One line on stderr if the model has learned from any of the images. -> how many."""
    known = {image.file_name for image in learned} & {image.file_name for image in images}
    if known and processes.MAIN:
        print(f"warning: {len(known)} of the {len(images)} images evaluated on were trained on",
              file=sys.stderr)
    return len(known)


# ---- Figures -----------------------------------------------------------------------------------

def cases(models, dataset, items):
    """Yields a figures.Case for every sentence of items, with each model's mask."""
    for views in zip(*(predictions(model, dataset, items=items) for model in models)):
        sentence, image, target, _ = views[0]
        masks = [view.masks[MASK] for view in views]
        yield figures.case(sentence.image, image, sentence.text, target, masks)


def samples(model, dataset, count=6):
    """A picture of evenly spaced images with a sentence each: ground truth and prediction."""
    return figures.samples(cases([model], dataset, figures.spread(by_image(dataset), count)))


def evolution(models, dataset, count=4):
    """Figure 1 of evenly spaced images: the maps of {title: model}, and the last one's mask."""
    chosen = [dataset.sentences[s] for _, (s,) in figures.spread(by_image(dataset), count)]
    return figures.evolution(models, ((dataset.image(s.image), s.text, dataset.mask(s.ref))
                                      for s in chosen))


def draw_figures(model, other, dataset):
    """{file name: picture}: the paper's figures. other: a second model (Figure A4), or None."""
    found = list(cases([m for m in (model, other) if m], dataset, by_image(dataset)[:100]))
    return {"samples.png": samples(model, dataset),
            "evolution.png": evolution(figures.modules_one_by_one(model), dataset),
            **figures.best_and_worst(found)}


# ---- Command line ------------------------------------------------------------------------------

def model_flags(parser):
    """The flags that say which model, shared with predict.py; `load` reads them."""
    parser.add_argument("checkpoint", help="a run's --out, one checkpoint in it, or a name on the "
                        "Hugging Face Hub")
    parser.add_argument("--image-size", type=int, help="other than the checkpoint's")
    parser.add_argument("--clip", help="the frozen weights, if they lie elsewhere than in training")
    parser.add_argument("--precision", choices=("bf16", "fp32"),
                        help="the locator's, other than in training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def load(args):
    """The model that the flags name, on its device. Raises DataError as RISCLIP.from_pretrained
    does."""
    given = {flag: getattr(args, flag) for flag in ("image_size", "clip", "precision")}
    given = {flag: value for flag, value in given.items() if value is not None}
    model = RISCLIP.from_pretrained(args.checkpoint, **given)
    try:
        model.to(args.device)
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"--device {args.device}: {one_line(error)[:120]}") from error
    store_frozen_matrices(model)
    return model


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    model_flags(parser)
    parser.add_argument("--dataset", default="shapes",
                        help="shapes, refcoco, refcoco+, refcocog or a JSON file")
    parser.add_argument("--data-root", default="data",
                        help="where the data sets lie (default: data)")
    parser.add_argument("--split", default="val")
    parser.add_argument("--outside", action="store_true",
                        help="let your own JSON name files outside its folder")
    parser.add_argument("--protocol", default="original", choices=("original", "lavt", "cris"))
    parser.add_argument("--json", metavar="F", help="write the figures there")
    parser.add_argument("--figures", metavar="DIR", help="write samples.png, good.png and "
                        "failures.png (Figures 3 and A1-A3, the highest and lowest IoU in 100 "
                        "images) and evolution.png (Figure 1, by switching modules off) there")
    parser.add_argument("--against", metavar="CHECKPOINT", help="with --figures: compared.png "
                        "(Figure A4), where this checkpoint gains most IoU over the first")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images")
    args = parser.parse_args(argv)
    if wrong := too_small(args, limit=1, workers=0):
        parser.error(wrong)
    if args.against and not args.figures:
        parser.error("--against draws a figure: say where with --figures DIR")
    return args


def main(args):
    processes.start(args.device)
    dataset = data.RefCOCO(args.data_root, args.dataset, args.split, outside=args.outside)
    for path in filter(None, (args.json, args.figures and Path(args.figures) / "samples.png")):
        check_writable(path)
    model, other = load(args), None
    if args.against:
        other = load(argparse.Namespace(**vars(args) | {"checkpoint": args.against}))
    if processes.MAIN:
        warn_of_images_trained_on(trained_on(args.checkpoint, args.data_root),
                                  dataset.images[:args.limit])
    result = evaluate(model, dataset, args.protocol, args.workers, args.limit)[MASK]
    result |= {"dataset": args.dataset, "split": args.split}
    print(f"{args.dataset} {args.split}, protocol {args.protocol}: {result['sentences']} sentences "
          f"of {result['images']} images")
    print(results_table({str(args.checkpoint): result}))
    if args.json and processes.MAIN:
        write_text(args.json, json.dumps(result, indent=1) + "\n")
        print(f"wrote {args.json}")
    if args.figures and processes.MAIN:
        pictures = draw_figures(model, other, dataset)
        for name, picture in pictures.items():
            save_picture(picture, Path(args.figures) / name)
        print(f"wrote {', '.join(pictures)} in {args.figures}")


if __name__ == "__main__":
    sys.exit(run(main, parse_args()))
