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
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import data
import parallel
from data import DataError
from risclip import RISCLIP, find_checkpoint, score_maps

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
BLUE, PINK = (40, 90, 255), (255, 60, 160)  # ground truth and prediction, as in the paper's figures


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
        pixels = data.preprocess(letterbox(image, self.size) if self.protocol == "cris" else image, self.size)
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
    share = (parallel.RANK, parallel.WORLD)
    for _, sentences, targets, masks in predictions(model, dataset, protocol, workers, limit, readouts, share=share):
        images += 1
        for readout, by_kind in metrics.items():
            for sentence, mask in zip(sentences, masks[readout]):
                for kind in {None, sentence.kind}:
                    by_kind.setdefault(kind, RISMetrics(strict)).update(mask, targets[sentence.ref])
    (images, metrics), *others = parallel.gather((images, metrics))
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
    if known and parallel.MAIN:
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


# ---- Pictures -------------------------------------------------------------------------------------------------------

def overlay(image, mask, colour, strength=0.55):
    """PIL image with a bool mask (H, W) tinted and outlined."""
    pixels = np.asarray(image.convert("RGB"), np.float32).copy()
    mask = np.asarray(mask, bool)
    pixels[mask] = (1 - strength) * pixels[mask] + strength * np.array(colour, np.float32)
    inner = mask.copy()
    for axis in (0, 1):
        for shift in (1, -1):
            inner &= np.roll(mask, shift, axis)
    pixels[mask & ~inner] = colour
    return Image.fromarray(pixels.astype(np.uint8))


def wrap(text, width, font):
    """Breaks a text into lines that fit `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if not lines[-1] or font.getlength(longer) <= width else [*lines, word]
    return lines


def panel(pictures, caption, height=240):
    """Pictures side by side, the sentence under them."""
    pictures = [p.resize((max(1, round(p.width * height / p.height)), height), Image.LANCZOS) for p in pictures]
    font = ImageFont.load_default(15)
    width = sum(p.width for p in pictures) + 4 * (len(pictures) - 1)
    lines = wrap(caption, width - 8, font)
    sheet = Image.new("RGB", (width, height + 10 + 19 * max(2, len(lines))), "white")
    x = 0
    for p in pictures:
        sheet.paste(p, (x, 0))
        x += p.width + 4
    ImageDraw.Draw(sheet).text((4, height + 4), "\n".join(lines), fill="black", font=font, spacing=4)
    return sheet


def contact_sheet(panels, columns=3, gap=12):
    """Panels in a grid on white."""
    rows = [panels[i:i + columns] for i in range(0, len(panels), columns)]
    widths = [max(row[c].width for row in rows if c < len(row)) for c in range(min(columns, len(panels)))]
    heights = [max(p.height for p in row) for row in rows]
    sheet = Image.new("RGB", (sum(widths) + gap * (len(widths) + 1), sum(heights) + gap * (len(rows) + 1)), "white")
    y = gap
    for row, height in zip(rows, heights):
        x = gap
        for p, width in zip(row, widths):
            sheet.paste(p, (x, y))
            x += width + gap
        y += height + gap
    return sheet


def axes(draw, box, title, last, top, number):
    """Grid, numbers and title of a plot from (0, 0) to (last, top). box: left, top, width, height in the picture;
    number: y's format. -> a function that says where in the picture (x, y) lies."""
    font = ImageFont.load_default(13)
    left, floor = box[0] + 60, box[1] + box[3] - 40
    right, rise = left + box[2] - 80, box[3] - 70
    for i in range(5):
        y, x = floor - rise * i / 4, left + (right - left) * i / 4
        draw.line([(left, y), (right, y)], fill=(220, 220, 220))
        draw.text((left - 45, y - 8), format(top * i / 4, number), fill="black", font=font)
        draw.text((x - 12, floor + 6), f"{last * i / 4:.0f}", fill="black", font=font)
    draw.text((left, box[1] + 8), title, fill="black", font=font)
    return lambda x, y: (left + (right - left) * x / last, floor - rise * y / top)


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
        data.check_writable(path.parent)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}): give another place") from error


def save_picture(picture, path):
    """Writes a picture whole or not at all. Raises DataError if it cannot be written."""
    check_writable(path, picture=True)
    path = Path(path)
    aside = path.with_name(f".partial-{os.getpid()}{path.suffix}")
    try:
        picture.save(aside)
        aside.replace(path)
    except (OSError, ValueError) as error:  # ValueError: a format without such pixels
        aside.unlink(missing_ok=True)
        raise DataError(f"{path} cannot be written ({error}): give another place") from error


def samples(model, dataset, count=12):
    """A sentence of each of evenly spaced images: ground truth in blue, prediction in pink, the sentence under them."""
    panels, every = [], max(1, len({s.image for s in dataset.sentences}) // count)
    for i, (image, sentences, targets, masks) in enumerate(predictions(model, dataset, limit=count, every=every)):
        k = i % len(sentences)
        panels.append(panel([overlay(image, targets[sentences[k].ref], BLUE), overlay(image, masks[MASK][k], PINK)],
                            sentences[k].text))
    return contact_sheet(panels)


def without(model, modules):
    """The model with these of its modules alone: they were trained with the others, which are switched off."""
    part = RISCLIP(replace(model.config, modules=modules, decoder=False, clip="random")).to(model.map_threshold.device)
    state = model.state_dict()
    part.load_state_dict({k: state[k] for k in part.state_dict()})
    return part


def heat(image, logits):
    """PIL image, dark, with a patch map (h, w) in pink, from its lowest value to its highest."""
    span = logits - logits.min()
    span = Image.fromarray((span / span.max().clamp(min=1e-6)).cpu().numpy()).resize(image.size, Image.BILINEAR)
    weight, pixels = np.asarray(span)[..., None], np.asarray(image.convert("RGB"), np.float32)
    return Image.fromarray(((1 - weight) * 0.3 * pixels + weight * np.array(PINK)).clip(0, 255).astype(np.uint8))


@torch.inference_mode()
def evolution(models, dataset, count=4):
    """Figure 1, a row for each of evenly spaced images: ground truth, the maps of {title: model}, the last one's mask.
    """
    panels, *_, last = [], *models.values()
    items = ByImage(dataset, last.config.image_size, "original")
    for i in range(0, len(items), max(1, len(items) // count))[:count]:
        if isinstance(item := items[i], DataError):
            raise item
        image, pixels, (sentence, *_), masks = item
        panels.append(panel([overlay(image, masks[sentence.ref], BLUE)], sentence.text))
        for title, model in models.items():
            (output,) = model.eval().outputs(pixels[None].to(model.map_threshold.device), [sentence.text])
            panels.append(panel([heat(image, output["patch_logits"][0])], title))
        mask = masks_from_output(output, last.config.image_size, *image.size)[0]
        panels.append(panel([overlay(image, mask, PINK)], "its mask"))
    return contact_sheet(panels, columns=len(models) + 2)


def cases(models, dataset, limit=100):
    """(image, sentence, target, [(mask, IoU) of each model]) for the first images' sentences; Figures 3, A1-A4."""
    found = []
    for views in zip(*(predictions(m, dataset, limit=limit) for m in models)):
        image, sentences, targets, _ = views[0]
        for k, sentence in enumerate(sentences):
            target, masks = targets[sentence.ref], [masks[MASK][k] for *_, masks in views]
            ious = [(m & target).sum() / max(1, (m | target).sum()) for m in masks]
            found.append((image, sentence, target, list(zip(masks, ious))))
    return found


def extremes(found, score, models=1, count=12):
    """Of cases, the sentence with the highest score in each image, and of those the highest: ground truth in blue,
    then the first models' masks in pink, their IoU under them."""
    best = {case[1].image: case for case in sorted(found, key=score)}  # the last of an image is its highest
    panels = []
    for image, sentence, target, predicted in sorted(best.values(), key=score)[:-count - 1:-1]:
        predicted = predicted[:models]
        panels.append(panel([overlay(image, target, BLUE), *(overlay(image, mask, PINK) for mask, _ in predicted)],
                            f"{sentence.text} ({' / '.join(f'{iou:.2f}' for _, iou in predicted)})"))
    return contact_sheet(panels)


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
        raise DataError(f"--device {args.device}: {data.one_line(error)[:120]}") from error


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
    if wrong := data.too_small(args, limit=1, workers=0):
        parser.error(wrong)
    if args.against and not args.figures:
        parser.error("--against draws a figure: say where with --figures DIR")
    return args


def main(args):
    parallel.start(args.device)
    dataset = data.RefCOCO(args.data_root, args.dataset, args.split)
    for path in filter(None, (args.json, args.figures and Path(args.figures) / "samples.png")):
        check_writable(path)
    model = load(args)
    other = load(argparse.Namespace(**vars(args) | {"checkpoint": args.against})) if args.against else None
    if parallel.MAIN:
        warn_of_images_trained_on(trained_on(args.checkpoint, args.data_root), dataset.images[:args.limit])
    result = evaluate(model, dataset, args.protocol, args.workers, args.limit)[MASK]
    result |= {"dataset": args.dataset, "split": args.split}
    print(f"{args.dataset} {args.split}, protocol {args.protocol}: {result['sentences']} sentences of "
          f"{result['images']} images")
    print(table({str(args.checkpoint): result}))
    if args.json and parallel.MAIN:
        data.write_text(args.json, json.dumps(result, indent=1) + "\n")
        print(f"wrote {args.json}")
    if args.figures and parallel.MAIN:
        pictures = figures(model, other, dataset)
        for name, picture in pictures.items():
            save_picture(picture, Path(args.figures) / name)
        print(f"wrote {', '.join(pictures)} in {args.figures}")


if __name__ == "__main__":
    sys.exit(data.run(main, parse_args()))
