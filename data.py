"""Data sets of sentences, images and masks (Sec. 4.1, A.1, Table 2), and the way to a batch.

    python data.py get --root DATA --dataset refcoco       # annotations and images, then check
    python data.py check --root DATA --dataset refcoco     # counts beside the published, bad files
    python data.py look --root DATA --dataset refcoco --out look.png     # masks as they are read
    python data.py shapes --root DATA --images N --seed S  # writes the shapes world

`RefCOCO` reads RefCOCO, RefCOCO+ and RefCOCOg (umd) in the layout of REFER, the generated `shapes`
world in the same layout, the leak-free union of Table 2 ("combined"), and a JSON list of one's own.
`Samples` and `collate` make batches of what `plan_epoch` and `plan_eval` list.

    <root>/<set>/instances.json               COCO images and annotations
    <root>/<set>/refs(unc).p                  refs, a Python 2 pickle: unc; umd for refcocog
    <root>/images/mscoco/images/train2014/    or <root>/train2014/; for shapes <root>/images/shapes/

Traps of these files: a ref's `file_name` names no file (its image record does); polygons of one
object overlap (their union is the mask); crowds are run lengths.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from miniature.shapes import LIMITS, SPLITS, write_shapes
from support import get
from support.check import check, look
from support.files import DataError, check_writable, need, one_line, path_inside, read_json, run
from support.image_files import MEAN, decode_mask, image_size, mask_file, open_image, preprocess
from support.instances import image_record, read_instances
from support.pictures import save_picture
from support.unpickle import MAX_SENTENCES, load_refs

# (refs, images, sentences) of each split, as published; nothing is for the world of our own.
PUBLISHED = {
    "refcoco": {"train": (42404, 16994, 120624), "val": (3811, 1500, 10834),
                "testA": (1975, 750, 5657), "testB": (1810, 750, 5095)},
    "refcoco+": {"train": (42278, 16992, 120191), "val": (3805, 1500, 10758),
                 "testA": (1975, 750, 5726), "testB": (1798, 750, 4889)},
    "refcocog": {"train": (42226, 21899, 80512), "val": (2573, 1300, 4896),
                 "test": (5023, 2600, 9602)},
    "shapes": dict.fromkeys((*SPLITS, *LIMITS)),
}
UNION = ("refcoco", "refcoco+", "refcocog")  # "combined"
REFS_BY = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd", "shapes": "shapes"}
MAX_SHAPES = 20_000  # scenes of a world: the refs of each take 400 steps of load_refs


# ---- Data sets -----------------------------------------------------------------------------------

class Sentence(NamedTuple):
    sent_id: int | str
    text: str
    ref: int  # index into RefCOCO.refs
    image: int  # index into RefCOCO.images
    kind: str | None  # shapes: attribute, position, relation; characters, absence


class Ref(NamedTuple):
    ref_id: int
    ann_id: int | None
    image: int
    segmentation: object  # polygons, run lengths, or the path of a mask file
    split: str | None


class ImageRecord(NamedTuple):
    id: int | str
    file_name: str
    width: int | None  # None: the file's own
    height: int | None


def clean_sentence(text, where):
    """A sentence without the space around it, and nothing in it that cannot be printed as UTF-8.
    Raises DataError if nothing is left."""
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where} is empty: say what it refers to, or take it out")
    return text.strip().encode("utf-8", "replace").decode()


def _raise(error):
    raise error


class RefCOCO:
    """One split of a data set: `sentences`, `refs` and `images`, lists in file order, linked by
    index.

    dataset: refcoco, refcoco+, refcocog, shapes; combined (Table 2: the three train splits less
    every image of any val or test split of the three; train only); or a JSON file, a list of
    {"image": path, "mask": path or "polygons": [[x, y, ...], ...], "sentences": [...], "split":
    optional} with paths relative to the file's folder or to root. Without any "split" in it, every
    split is the whole file. split "all" is all of them. Opening reads no image.

    report: is called with each DataError of a single ref, which is then left out; by default, the
    first one is raised. outside: images and masks may be links to files outside their folders.
    Raises DataError for a missing file, an unknown data set or split, a ref without its annotation
    or image record, an empty sentence.
    """

    def __init__(self, root, dataset, split, report=_raise, outside=False):
        self.root, self.dataset, self.split = Path(root), str(dataset), split
        self.outside = outside
        self.sentences, self.refs, self.images, self.folders = [], [], [], []
        self.split_names = set()  # all those in the files
        self._numbers = {}  # image id -> index
        if self.dataset.endswith(".json"):
            self._open_json(report)
        else:
            self._open_refer(report)
        if not self.sentences and report is _raise:
            raise DataError(f"{dataset} in {root} has no sentence of split {split!r}" + (
                ": write the world anew, with as many --images, by data.py shapes"
                if dataset == "shapes" else ""))

    def __len__(self):
        return len(self.sentences)

    def usual_splits(self):
        """-> the split names that a flag can ask for; a set of one's own has those of any other."""
        sets = UNION if self.dataset == "combined" else [self.dataset]
        return {split for name in (sets if sets[0] in PUBLISHED else PUBLISHED)
                for split in PUBLISHED[name]}

    def _open_refer(self, report):
        names = ", ".join(PUBLISHED.get(self.dataset, PUBLISHED))
        if self.dataset == "combined" and self.split != "train":
            raise DataError(f"combined has no split {self.split!r}, only train: evaluate on "
                            f"{', '.join(UNION)}")
        if self.dataset not in (*PUBLISHED, "combined"):
            raise DataError(f"--dataset {self.dataset}: give {names}, combined, or a .json file")
        if self.dataset in PUBLISHED and self.split not in (*PUBLISHED[self.dataset], "all"):
            raise DataError(f"{self.dataset} has no split {self.split!r}: give {names}")
        combined = self.dataset == "combined"
        loaded = {name: load_refs(self._files(name)[0])
                  for name in (UNION if combined else [self.dataset])}
        held_out = {r["image_id"] for refs in loaded.values() for r in refs
                    if combined and r["split"] != "train"}
        for name, refs in loaded.items():
            self.split_names |= {r["split"] for r in refs}
            self._add_refs(name, [r for r in refs if self.split in ("all", r["split"])
                                  and r["image_id"] not in held_out], report)

    def _files(self, name):
        """-> refs file, instances file, image folders of a REFER set. Raises DataError if one is
        missing."""
        refs, instances = (self.root / name / f for f in (f"refs({REFS_BY[name]}).p",
                                                          "instances.json"))
        places = ["images/shapes"] if name == "shapes" else ["images/mscoco/images/train2014",
                                                             "train2014"]
        folders = [self.root / place for place in places]
        missing = [str(p) for p in (refs, instances) if not os.path.isfile(p)]
        if not any(os.path.isdir(f) for f in folders):
            missing.append(" or ".join(map(str, folders)))
        if missing:
            raise DataError(f"data root {self.root}: {name} is not complete there, "
                            f"tried {', '.join(missing)}")
        return refs, instances, folders

    def _add_refs(self, name, refs, report):
        """Adds refs of one REFER set, with the annotations and image records that they name."""
        path, instances, self.folders = self._files(name)
        annotations, records, note = read_instances(instances, refs)
        prefix = f"{name}/" if self.dataset == "combined" else None
        for ref in refs:
            where, ann_id, image_id = f"{path}: ref {ref['ref_id']}", ref["ann_id"], ref["image_id"]
            try:
                if ann_id not in annotations:
                    raise DataError(f"{where}: its annotation {ann_id} is not in {instances}{note}")
                if image_id not in records:
                    raise DataError(f"{where}: its image {image_id} is not in {instances}{note}")
                annotation = annotations[ann_id]
                if annotation["image_id"] != image_id:
                    raise DataError(f"{where}: its annotation {ann_id} is of another image than "
                                    f"{image_id}")
                image = ImageRecord(image_id, *image_record(records[image_id],
                                                            f"{instances}: image {image_id}"))
                sentences = [(f"{prefix}{s['sent_id']}" if prefix else s["sent_id"],
                              clean_sentence(s.get("sent") or s.get("raw"),
                                             f"{where}: sentence {s['sent_id']}"),
                              s["kind"] if isinstance(s.get("kind"), str) else None)
                             for s in ref["sentences"]]
                self._add(ref["ref_id"], ann_id, image, annotation["segmentation"], ref["split"],
                          sentences)
            except DataError as error:
                report(error)

    def _open_json(self, report):
        path = Path(self.dataset) if os.path.isfile(self.dataset) else self.root / self.dataset
        if not os.path.isfile(path):
            raise DataError(f"--dataset {self.dataset}: no such file, nor {path}")
        entries = read_json(path)
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise DataError(f"{path} holds no list of entries")
        lists = [e["sentences"] for e in entries if isinstance(e.get("sentences"), list)]
        if sum(map(len, lists)) > MAX_SENTENCES:
            raise DataError(f"{path} holds more than {MAX_SENTENCES} sentences: split it")
        splits = {None if e.get("split") is None else need(e, "split", str, f"{path}: entry {n}")
                  for n, e in enumerate(entries)}
        self.split_names = splits - {None}
        if None in splits and len(splits) > 1:
            raise DataError(f"{path}: some entries have a split and some have none: "
                            "give all one, or none")
        if None not in splits and self.split not in (*splits, "all"):
            raise DataError(f"{path} has no split {self.split!r}: "
                            f"give {', '.join(sorted(splits)) or 'it entries'}")
        first = 0  # sent_ids count through the whole file
        for n, entry in enumerate(entries):
            try:
                texts = need(entry, "sentences", list, f"{path}: entry {n}")
                if entry.get("split") is None or self.split in (entry["split"], "all"):
                    self._add_entry(n, entry, path, first)
                first += len(texts)
            except DataError as error:
                report(error)

    def _add_entry(self, n, entry, path, first):
        """Adds entry n of a JSON file, whose sentences are numbered from `first`."""
        where, folders = f"{path}: entry {n}", [path.parent, self.root]

        def found(key):
            return path_inside(folders, need(entry, key, str, where), where, self.outside)
        image = ImageRecord(entry.get("image"), str(found("image")), None, None)
        if ("mask" in entry) == ("polygons" in entry):
            raise DataError(f'{where}: give either "mask" or "polygons"')
        segmentation = (found("mask") if "mask" in entry else
                        need(entry, "polygons", list, where))
        self._add(n, None, image, segmentation, entry.get("split"), [
            (first + k, clean_sentence(text, f"{where}: sentence {k}"), None)
            for k, text in enumerate(entry["sentences"])])

    def _add(self, ref_id, ann_id, image, segmentation, split, sentences):
        """Appends a ref, its image if it is new, and its sentences, each (sent_id, text, kind)."""
        number = self._numbers.setdefault(image.id, len(self.images))
        if number == len(self.images):
            self.images.append(image)
        self.sentences += [Sentence(sent_id, text, len(self.refs), number, kind)
                           for sent_id, text, kind in sentences]
        self.refs.append(Ref(ref_id, ann_id, number, segmentation, split))

    def path(self, image):
        """Index -> the image's path. Raises DataError naming the paths tried."""
        name = self.images[image].file_name
        if self.folders:  # names in one's own JSON were looked at when it was opened
            path_inside(self.folders, name, f"image {self.images[image].id}", self.outside)
        tried = [folder / name for folder in self.folders] or [Path(name)]
        for path in tried:
            if os.path.isfile(path):
                return path
        raise DataError(f"image {self.images[image].id} is missing, "
                        f"tried {', '.join(map(str, tried))}")

    def size(self, image):
        """Index -> (width, height) in pixels."""
        record = self.images[image]
        return (record.width, record.height) if record.width else image_size(self.path(image))

    def image(self, image):
        """Index -> PIL RGB image of the annotations' frame. Raises DataError as open_image does."""
        record = self.images[image]
        return open_image(self.path(image), (record.width, record.height) if record.width else None)

    def mask(self, ref):
        """Index of a ref -> bool (H, W), the image's own size. Raises DataError naming the ref."""
        r = self.refs[ref]
        if isinstance(r.segmentation, Path):
            return mask_file(r.segmentation, self.size(r.image))
        try:
            return decode_mask(r.segmentation, *self.size(r.image))
        except DataError:
            raise
        except (ValueError, TypeError, OverflowError, MemoryError, RecursionError) as error:
            name = (f"entry {r.ref_id}" if r.ann_id is None else
                    f"ref {r.ref_id}, annotation {r.ann_id}")
            raise DataError(f"{self.dataset}: {name}: {one_line(error)}") from error


# ---- Batches -------------------------------------------------------------------------------------
# An item is one image and some of its sentences: (image index, (sentence index, ...), seed of its
# augmentation).

def pack(items, batch_size):
    """Items in order -> batches of exactly batch_size sentences, the last perhaps fewer. An item
    that does not fit continues in the next batch."""
    batches, room = [], 0
    for image, sentences, seed in items:
        while sentences:
            if not room:
                batches.append([])
                room = batch_size
            batches[-1].append((image, sentences[:room], seed))
            room, sentences = room - len(batches[-1][-1][1]), sentences[room:]
    return batches


def plan_epoch(dataset, epoch, seed, batch_size, per_image=1):
    """-> the batches of a training epoch: every ref once, with one of its sentences drawn at random
    (as LAVT does).

    per_image: an item takes up to so many refs of one image, which then share its features. A pure
    function of its arguments, so that a resumed run continues with what an unbroken one would see.
    """
    rng = np.random.default_rng((seed % 2**63, epoch))
    sentences = [[] for _ in dataset.refs]
    for i, sentence in enumerate(dataset.sentences):
        sentences[sentence.ref].append(i)
    images = {}
    for ref in rng.permutation(len(sentences)):
        if sentences[ref]:
            drawn = sentences[ref][rng.integers(len(sentences[ref]))]
            images.setdefault(dataset.refs[ref].image, []).append(drawn)
    items = [(image, tuple(chosen[k:k + per_image])) for image, chosen in images.items()
             for k in range(0, len(chosen), per_image)]
    order = rng.permutation(len(items))
    return pack([(*items[i], int(rng.integers(2**63))) for i in order], batch_size)


def plan_eval(dataset, batch_size):
    """-> the batches of an evaluation: every sentence once, those of an image together, in file
    order."""
    images = {}
    for i, sentence in enumerate(dataset.sentences):
        images.setdefault(sentence.image, []).append(i)
    return pack([(image, tuple(sentences), 0) for image, sentences in images.items()], batch_size)


FILL = tuple(round(255 * m) for m in MEAN)
AFFINE = v2.RandomAffine(degrees=10, translate=(0.1, 0.1), scale=(0.9, 1.1), shear=(-2, 2, -2, 2),
                         interpolation=InterpolationMode.BILINEAR,
                         fill={Image.Image: FILL, tv_tensors.Mask: 0})


def augment(image, masks, seed):
    """RefTR's augmentation (Sec. A.1): PIL RGB image and bool masks (K, H, W) -> the same, warped
    together.

    HSV saturation and intensity times factors from [0.5, 1.5] (RefTR's code draws the saturation's
    but does not apply it; the paper says both), then rotation by up to 10 degrees, translation by
    10 %, scale 0.9-1.1 and shear by 2 degrees, the border filled with the mean colour. Never a
    flip: it would turn 'left' into a lie. An image whose object would leave it keeps its place. A
    pure function of its arguments: it leaves torch's random state alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs as well
        factors = (1.0, *torch.empty(2).uniform_(0.5, 1.5).tolist())  # hue, saturation, value
        table = [min(255, round(i * factor)) for factor in factors for i in range(256)]
        image = image.convert("HSV").point(table).convert("RGB")
        stack = tv_tensors.Mask(torch.from_numpy(masks.astype(np.uint8)))
        warped, warped_masks = AFFINE(image, stack)
    warped_masks = warped_masks.numpy().astype(bool)
    kept = (warped_masks.any((1, 2)) == masks.any((1, 2))).all()
    return (warped, warped_masks) if kept else (image, masks)


class Samples(Dataset):
    """What a plan's items name. The image is read, and augmented, once for all its sentences."""

    def __init__(self, dataset, image_size, augment=False):
        self.dataset, self.image_size, self.augment = dataset, image_size, augment

    def __getitem__(self, item):
        """Item -> image (3, S, S) float32, masks (K, S, S) bool by nearest neighbour, texts and
        sent_ids; of a missing or broken image or mask the DataError's text as `broken`, and how
        many sentences are `lost` with it."""
        image, indices, seed = item
        sentences = [self.dataset.sentences[i] for i in indices]
        refs = list(dict.fromkeys(s.ref for s in sentences))  # sentences of one ref share its mask
        try:
            pixels = self.dataset.image(image)
            masks = np.stack([self.dataset.mask(r) for r in refs])
        except DataError as error:
            return {"broken": one_line(error), "lost": len(indices)}
        if self.augment:
            pixels, masks = augment(pixels, masks, seed)
        centres = (np.arange(self.image_size) + 0.5) / self.image_size
        rows, columns = ((centres * n).astype(int) for n in masks.shape[1:])
        masks = torch.from_numpy(masks[:, rows[:, None], columns])
        return {"image": preprocess(pixels, self.image_size),
                "masks": masks[[refs.index(s.ref) for s in sentences]],
                "texts": [s.text for s in sentences], "sent_ids": [s.sent_id for s in sentences]}


def collate(items):
    """Items of I images with B sentences in all -> dict of images (I, 3, S, S), image_index (B,)
    long (whose sentence each is), masks (B, S, S) bool, texts, sent_ids; broken: a message for each
    item left out, lost: the sentences in them. With no item left, texts is empty."""
    good = [item for item in items if "broken" not in item]
    broken = [item for item in items if "broken" in item]
    counts = torch.tensor([len(item["texts"]) for item in good], dtype=torch.long)
    return {"images": torch.stack([i["image"] for i in good]) if good else torch.empty(0, 3, 0, 0),
            "image_index": torch.arange(len(good)).repeat_interleave(counts),
            "masks": (torch.cat([item["masks"] for item in good]) if good else
                      torch.empty(0, 0, 0, dtype=torch.bool)),
            "texts": [text for item in good for text in item["texts"]],
            "sent_ids": [sent_id for item in good for sent_id in item["sent_ids"]],
            "broken": [item["broken"] for item in broken],
            "lost": sum(item["lost"] for item in broken)}


# ---- Command line --------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    world = commands.add_parser("shapes", help="write the shapes world in REFER layout")
    world.add_argument("--root", default="data", help="where to write (default: data)")
    world.add_argument("--images", type=int, default=1000, metavar="N",
                       help="scenes of train, val and test in all (default: 1000); characters and "
                       "absence have 100 each")
    world.add_argument("--seed", type=int, default=0, metavar="S")
    get.add_flags(commands)
    checking = commands.add_parser("check", help="counts beside the published, what is broken")
    checking.add_argument("--quick", action="store_true",
                          help="look whether the images are there, open none")
    looking = commands.add_parser("look", help="a sheet of evenly spaced masks as they are read")
    looking.add_argument("--out", default="look.png", help="the picture (default: look.png)")
    looking.add_argument("--split", default="all", help="(default: all)")
    for command in (checking, looking):
        command.add_argument("--root", default="data", help="the data root (default: data)")
        command.add_argument("--dataset", required=True,
                             help=f"{', '.join(PUBLISHED)} or a JSON file")
        command.add_argument("--outside", action="store_true",
                             help="let images and masks be links to files in other folders")
    return parser.parse_args(argv)


def make_shapes(root, images, seed):
    """shapes.write_shapes. Raises DataError if root cannot be written, or load_refs would refuse
    what is."""
    if not 1 <= images <= MAX_SHAPES:
        raise DataError(f"--images {images}: give 1 to {MAX_SHAPES}")
    try:
        write_shapes(root, images, seed)
    except OSError as error:
        raise DataError(f"data root {root} cannot be written ({error.strerror}): "
                        "give another place") from error


def main(args):
    if args.command == "shapes":
        make_shapes(args.root, args.images, args.seed)
        print(f"wrote {Path(args.root) / 'shapes'} and {Path(args.root) / 'images' / 'shapes'}")
        return 0
    if args.command == "look":
        check_writable(args.out, picture=True)
        dataset = RefCOCO(args.root, args.dataset, args.split, outside=args.outside)
        save_picture(look(dataset), args.out)
        print(f"wrote {args.out}")
        return 0
    if args.dataset == "combined":
        raise DataError(f"--dataset combined is made of {', '.join(UNION)}: check them one by one")
    if args.command == "get" and args.dataset == "all":
        return max(main(argparse.Namespace(**{**vars(args), "dataset": name})) for name in UNION)
    problems = []
    if args.command == "get":
        problems = get.get(args.root, args.dataset, REFS_BY[args.dataset], args.source, args.images)
    dataset = RefCOCO(args.root, args.dataset, "all", lambda error: problems.append(str(error)),
                      args.outside)
    problems += check(dataset, PUBLISHED.get(args.dataset, {}), args.quick)
    for line in problems[:50]:
        print(f"- {one_line(line)}")
    if len(problems) > 50:
        print(f"- and {len(problems) - 50} more")
    found = f"{len(problems)} problems" if problems else "complete"
    print(f"{args.dataset} in {args.root}: {found}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(run(main, parse_args()))
