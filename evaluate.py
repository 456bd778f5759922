"""Metrics, protocols and pictures of referring image segmentation (paper Sec. 4.1).

    python evaluate.py runs/B --dataset refcoco --data-root DATA --split val
    python evaluate.py runs/B --dataset refcoco --data-root DATA --split testA --protocol lavt --json lavt.json
    python evaluate.py runs/tiny --split test --figures figures --against runs/other
    torchrun --nproc-per-node 8 evaluate.py ...          the same figures: each process takes its share of the images

The protocols differ, and the numbers with them; the paper names none:

    protocol   image to network         IoU is computed on          mask from the two score maps    P@X
    original   squashed to a square     the image's own pixels      argmax                          IoU >= X
    lavt       squashed to a square     the network's square        argmax                          IoU >= X
    cris       letterboxed              the image's own pixels      foreground probability > 0.35   IoU > X
"""

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import data
import risclip
from risclip import RISCLIP, score_maps
from support import processes
from support.checkpoint import find_checkpoint
from support.figures import cases, evolution, extremes, samples
from support.files import DataError, check_writable, one_line, run, too_small, write_text
from support.pictures import save_picture

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


class RISMetrics:
    """oIoU, mIoU and P@X in percent, each sentence counted once. Sec. 4.1.

    IoU of two empty masks is 0, as in all the public protocols. `strict`: P@X counts IoU > X instead of IoU >= X.
    Sums are exact, so that the order of updates does not matter.
    """

    def __init__(self, strict=False):
        self.strict = strict
        self.pairs = []  # (intersection, union) in pixels

    def update(self, prediction, target):
        """prediction, target: masks of one shape, bool or 0/1. Raises ValueError if the shapes differ."""
        prediction, target = np.asarray(prediction, bool), np.asarray(target, bool)
        if prediction.shape != target.shape:
            raise ValueError(f"prediction {prediction.shape} and target {target.shape} must have one shape")
        self.pairs.append((int((prediction & target).sum()), int((prediction | target).sum())))

    def compute(self):
        """-> {"oIoU", "mIoU", "P@0.5" ... "P@0.9", "sentences"}; 0 percent of no sentences."""
        n = max(len(self.pairs), 1)
        ious = [i / u if u else 0.0 for i, u in self.pairs]
        result = {"oIoU": 100 * sum(i for i, _ in self.pairs) / max(sum(u for _, u in self.pairs), 1),
                  "mIoU": 100 * math.fsum(ious) / n}
        for x in THRESHOLDS:
            result[f"P@{x}"] = 100 * sum(iou > x if self.strict else iou >= x for iou in ious) / n
        return result | {"sentences": len(self.pairs)}


# ---- Protocols ------------------------------------------------------------------------------------------------------

def letterbox_box(width, height, size):
    """Where a letterboxed image lies in the network's square: left, top, width, height in pixels (CRIS)."""
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
    """The network's output for one image's K sentences -> bool masks (K, H, W) on the protocol's grid.

    size: the network's square, in pixels. `threshold` on the foreground's probability replaces the protocol's rule.
    """
    if protocol == "cris":
        left, top, w, h = letterbox_box(width, height, size)
        square = score_maps(output, (size, size))[:, :, top:top + h, left:left + w]
        scores = F.interpolate(square, size=(height, width), mode="bilinear", align_corners=False)
        threshold = 0.35 if threshold is None else threshold
    else:
        scores = score_maps(output, (size, size) if protocol == "lavt" else (height, width))
    masks = scores.argmax(dim=1) > 0 if threshold is None else scores[:, 1].sigmoid() > threshold
    return masks.cpu().numpy()


class ByImage(Dataset):
    """One item an image: the image, its pixels for the network, its sentences, their ground truth; or a DataError."""

    def __init__(self, dataset, size, protocol, limit=None, every=1, share=(0, 1)):
        self.dataset, self.size, self.protocol = dataset, size, protocol
        (items,) = data.plan_eval(dataset, len(dataset))
        self.items = items[::every][:limit][share[0]::share[1]]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        number, sentences, _ = self.items[i]
        sentences = [self.dataset.sentences[s] for s in sentences]
        try:
            image, masks = self.dataset.image(number), {s.ref: self.dataset.mask(s.ref) for s in sentences}
        except DataError as error:
            return error  # raised where the batches arrive: a worker would wrap it in its own traceback
        if self.protocol == "lavt":  # ground truth by nearest neighbour on the network's square
            masks = {r: np.asarray(Image.fromarray(m).resize((self.size, self.size), Image.NEAREST))
                     for r, m in masks.items()}
        pixels = risclip.preprocess(letterbox(image, self.size) if self.protocol == "cris" else image, self.size)
        return image, pixels, sentences, masks


MASK = ("mask_logits", None)  # a readout: the model's output and the threshold (None: the protocol's rule)


@torch.inference_mode()
def predictions(model, dataset, protocol="original", workers=0, limit=None, readouts=(MASK,), every=1, share=(0, 1)):
    """Yields (image, sentences, targets by ref, masks by readout, (K, H, W) each) for every image with its K sentences.

    The sentences of an image share its forward pass, nothing else does: results depend on no batch size. The readout
    ("patch_logits", t) is the map upsampled bilinearly and cut at probability t, as if there were no decoder. share
    (r, n): every n-th image from the r-th on.
    """
    model.eval()
    device, size = model.map_threshold.device, model.config.image_size
    loader = DataLoader(ByImage(dataset, size, protocol, limit, every, share), batch_size=None, num_workers=workers,
                        collate_fn=lambda item: item)
    for item in tqdm(loader, "evaluate", unit="image", leave=False):
        if isinstance(item, DataError):
            raise item
        image, pixels, sentences, targets = item
        masks = {readout: [] for readout in readouts}
        for output in model.outputs(pixels[None].to(device), [s.text for s in sentences]):
            for name, threshold in readouts:
                source = output if name in MASK else {name: output[name]}
                masks[name, threshold].append(masks_from_output(source, size, *image.size, protocol, threshold))
        yield image, sentences, targets, {readout: np.concatenate(parts) for readout, parts in masks.items()}


def evaluate(model, dataset, protocol="original", workers=0, limit=None, readouts=(MASK,)):
    """-> for each readout RISMetrics.compute() over all sentences, and under "kinds" by kind of expression, if any."""
    strict, start, images = protocol == "cris", time.time(), 0
    metrics = {readout: {None: RISMetrics(strict)} for readout in readouts}
    share = (processes.RANK, processes.WORLD)
    for _, sentences, targets, masks in predictions(model, dataset, protocol, workers, limit, readouts, share=share):
        images += 1
        for readout, by_kind in metrics.items():
            for sentence, mask in zip(sentences, masks[readout]):
                for kind in {None, sentence.kind}:
                    by_kind.setdefault(kind, RISMetrics(strict)).update(mask, targets[sentence.ref])
    (images, metrics), *others = processes.gather((images, metrics))
    for more, theirs in others:
        images += more
        for readout, by_kind in theirs.items():
            for kind, m in by_kind.items():
                metrics[readout].setdefault(kind, RISMetrics(strict)).pairs += m.pairs
    results = {}
    for readout, by_kind in metrics.items():
        results[readout] = by_kind.pop(None).compute()
        results[readout] |= {"images": images, "protocol": protocol, "seconds": time.time() - start}
        if by_kind:
            results[readout]["kinds"] = {kind: by_kind[kind].compute() for kind in sorted(by_kind)}
    return results


def trained_on(source, root):
    """-> the images that a checkpoint was trained on; none, and a line that says so, unless its training.pt tells the
    data set and that is in root."""
    try:
        state = torch.load(find_checkpoint(source) / "training.pt", map_location="cpu", weights_only=True, mmap=True)
        return data.RefCOCO(root, json.loads(state["run"])["dataset"], "train").images
    except Exception as error:  # no record, a broken one (torch.load fails in many ways), or of data that is elsewhere
        print(f"note: cannot tell which images {source} was trained on ({type(error).__name__})", file=sys.stderr)
        return []


def warn_of_images_trained_on(learned, images):
    """One line on stderr if any of the images evaluated on are among those learned from. -> how many are."""
    known = {image.file_name for image in learned}.intersection(image.file_name for image in images)
    if known and processes.MAIN:
        print(f"warning: {len(known)} of the {len(images)} images evaluated on were trained on", file=sys.stderr)
    return len(known)


def best_map_readout(model, dataset, limit=150):
    """The map's readout whose threshold gives the highest mIoU on validation scenes: a map is then compared for what
    it shows, not for its calibration."""
    readouts = [("patch_logits", 1 / (1 + math.exp(-x / 2))) for x in range(-8, 9)]
    results = evaluate(model, dataset, limit=limit, readouts=readouts)
    return max(readouts, key=lambda readout: results[readout]["mIoU"])


def table(results):
    """{row name: evaluate()'s result} -> a Markdown table, mIoU by kind of expression last."""
    kinds = sorted({k for r in results.values() for k in r.get("kinds", {})})
    columns = ["mIoU", "oIoU", *(f"P@{x}" for x in THRESHOLDS)]
    head = ["", *columns, *(f"mIoU {k} ({next(iter(results.values()))['kinds'][k]['sentences']})" for k in kinds)]
    rows = [[name, *(f"{r[c]:.2f}" for c in columns), *(f"{r['kinds'][k]['mIoU']:.2f}" for k in kinds)]
            for name, r in results.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def check_writable(path, picture=False):
    """Raises DataError unless a file can be made at `path` (its folder is), for a picture in a format with that ending.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path} is a folder: give a file")
    if picture and Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise DataError(f"{path}: no picture format has the ending {path.suffix!r}; give .png or .jpg")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_writable(path.parent)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}): give another place") from error


def without(model, modules):
    """The model with these of its modules alone: they were trained with the others, which are switched off."""
    part = RISCLIP(replace(model.config, modules=modules, decoder=False, clip="random")).to(model.map_threshold.device)
    state = model.state_dict()
    part.load_state_dict({k: state[k] for k in part.state_dict()})
    return part


def figures(model, other, dataset):
    """{file name: picture}: the paper's figures on a split. `other`: a second model (Figure A4), or None."""
    have = [m for m in ("adapter", "cfe", "ske") if m in model.config.modules]
    parts = {" + ".join(["frozen CLIP", *have[:n]]): without(model, tuple(have[:n])) for n in range(len(have))}
    parts[" + ".join(["frozen CLIP", *have])] = model
    found = cases([m for m in (model, other) if m], dataset)
    pictures = {"samples.png": samples(model, dataset), "evolution.png": evolution(parts, dataset),
                "good.png": extremes(found, lambda case: case[3][0][1]),
                "failures.png": extremes(found, lambda case: -case[3][0][1])}
    if other is not None:
        pictures["compared.png"] = extremes(found, lambda case: case[3][1][1] - case[3][0][1], models=2)
    return pictures


def model_flags(parser):
    """The flags that say which model, shared with predict.py; `load` reads them."""
    parser.add_argument("checkpoint", help="a run's --out, one checkpoint in it, or a name on the Hugging Face Hub")
    parser.add_argument("--image-size", type=int, help="other than the checkpoint's")
    parser.add_argument("--clip", help="the frozen weights, if they lie elsewhere than in training")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="the locator's, other than in training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def load(args):
    """The model that the flags name, on its device. Raises DataError as RISCLIP.from_pretrained does."""
    given = {k: getattr(args, k) for k in ("image_size", "clip", "precision") if getattr(args, k) is not None}
    model = RISCLIP.from_pretrained(args.checkpoint, **given)
    try:
        return model.to(args.device)
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"--device {args.device}: {one_line(error)[:120]}") from error


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model_flags(parser)
    parser.add_argument("--dataset", default="shapes", help="shapes, refcoco, refcoco+, refcocog or a JSON file")
    parser.add_argument("--data-root", default="data", help="where the data sets lie (default: data)")
    parser.add_argument("--split", default="val")
    parser.add_argument("--protocol", default="original", choices=("original", "lavt", "cris"))
    parser.add_argument("--json", metavar="F", help="write the figures there")
    parser.add_argument("--figures", metavar="DIR", help="write the paper's figures there, by the protocol 'original': "
                        "samples.png (evenly spaced images), good.png and failures.png (Figures 3, A3; A1, A2: the "
                        "highest and lowest IoU in 100 images), evolution.png (Figure 1, from this one model with its "
                        "modules switched off; ablate.py --table 3 draws it from models trained with and without them)")
    parser.add_argument("--against", metavar="CHECKPOINT", help="with --figures: compared.png (Figure A4), where this "
                        "other checkpoint gains most IoU; its masks are the ones on the right")
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
    dataset = data.RefCOCO(args.data_root, args.dataset, args.split)
    for path in filter(None, (args.json, args.figures and Path(args.figures) / "samples.png")):
        check_writable(path)
    model = load(args)
    other = load(argparse.Namespace(**vars(args) | {"checkpoint": args.against})) if args.against else None
    if processes.MAIN:
        warn_of_images_trained_on(trained_on(args.checkpoint, args.data_root), dataset.images[:args.limit])
    result = evaluate(model, dataset, args.protocol, args.workers, args.limit)[MASK]
    result |= {"dataset": args.dataset, "split": args.split}
    print(f"{args.dataset} {args.split}, protocol {args.protocol}: {result['sentences']} sentences of "
          f"{result['images']} images")
    print(table({str(args.checkpoint): result}))
    if args.json and processes.MAIN:
        write_text(args.json, json.dumps(result, indent=1) + "\n")
        print(f"wrote {args.json}")
    if args.figures and processes.MAIN:
        pictures = figures(model, other, dataset)
        for name, picture in pictures.items():
            save_picture(picture, Path(args.figures) / name)
        print(f"wrote {', '.join(pictures)} in {args.figures}")


if __name__ == "__main__":
    sys.exit(run(main, parse_args()))
