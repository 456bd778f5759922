"""Data sets of sentences, images and masks (paper Sec. 4.1, A.1, Table 2), and everything between a file and a batch.

    python data.py check --root DATA --dataset refcoco     # counts against the published ones, missing and broken files
    python data.py shapes --root DATA --images N --seed S  # writes the shapes world

`RefCOCO` reads RefCOCO, RefCOCO+ and RefCOCOg (umd) in the layout of REFER, the generated `shapes` world in the same
layout, the leak-free union of Table 2 ("combined"), and a JSON list of one's own. `Samples` and `collate` make batches
of what `plan_epoch` and `plan_eval` list.

    <root>/<set>/instances.json               COCO images and annotations
    <root>/<set>/refs(unc).p                  refs, a Python 2 pickle: unc, for refcocog umd, for shapes shapes
    <root>/images/mscoco/images/train2014/    or <root>/train2014/; for shapes <root>/images/shapes/

Traps of these files: a ref's `file_name` names no file (its image record does); polygons of one object overlap (their
union is the mask); crowds are run lengths; the pickle could hold code (nothing in it runs, see `load_refs`).
"""

import argparse
import errno
import io
import json
import os
import pickle
import pickletools
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from pycocotools import mask as coco
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

import shapes

# (refs, images, sentences) of each split, as published; nothing is published of the world that we make ourselves.
PUBLISHED = {
    "refcoco": {"train": (42404, 16994, 120624), "val": (3811, 1500, 10834),
                "testA": (1975, 750, 5657), "testB": (1810, 750, 5095)},
    "refcoco+": {"train": (42278, 16992, 120191), "val": (3805, 1500, 10758),
                 "testA": (1975, 750, 5726), "testB": (1798, 750, 4889)},
    "refcocog": {"train": (42226, 21899, 80512), "val": (2573, 1300, 4896), "test": (5023, 2600, 9602)},
    "shapes": dict.fromkeys((*shapes.SPLITS, *shapes.LIMITS)),
}
UNION = ("refcoco", "refcoco+", "refcocog")  # "combined"
REFS_BY = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd", "shapes": "shapes"}

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, of both sources of weights
STD = (0.26862954, 0.26130258, 0.27577711)

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # others, EPS say, would start a program
MAX_PIXELS = 64_000_000  # of an image: more would take above 2 GiB and 10 s
MAX_POLYGONS = 10_000  # of one mask: the time goes with their square
MAX_OUTLINE = 1_000_000  # pixels and points of one mask's polygons; pycocotools takes 120 bytes for each
# An OSError that tells of the machine and not of the code: a full disk, a file or folder that may not be used.
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOLCK)
MAX_BYTES = 512 * 2**20  # of a file: instances.json of the published sets is a fraction of COCO's 330 MB
MAX_JSON_MEMORY = 1280 * 2**20  # of what a JSON text becomes, see json_memory; torch takes 700 MB as well
JSON_COSTS = {b"[": 128, b"{": 176, b":": 96, b'"': 32, b",": 42}  # bytes: list, dict, its entry, half a string, number
MAX_REFS_BYTES = 64 * 2**20  # the published files take 30-50 MB,
MAX_REFS_STEPS = 10_000_000  # 6.5 million steps of an unpickler,
MAX_SENTENCES = 1_000_000  # and 50,000 refs with 142,000 sentences
MAX_SHAPES = 20_000  # scenes of a world: the refs of each take 400 steps
MAX_CONFIG_BYTES = 2**20  # one takes 1 KB


class DataError(ValueError):
    """A user's mistake, or a file that is not what it should be: one line that names the file or flag and the mend."""


def run(main, args):
    """main(args) -> exit code: main's own or 0; 130 after Ctrl-C; 2 for a DataError, or a disk that is full
    or may not be written or read, printed as one line on stderr."""
    try:
        return main(args) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (DataError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in OF_THE_DISK:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2


def too_small(args, **least):
    """Flags and the least that each may be -> a line about the first whose number is less, or None."""
    for flag, lowest in least.items():
        number = getattr(args, flag, None)
        if number is not None and number < lowest:
            return f"--{flag.replace('_', '-')} {number}: give {lowest} or more"


def one_line(error):
    """An exception's text as one printable line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text)


# ---- Files ----------------------------------------------------------------------------------------------------------

def sync(path):
    """Flushes a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path, text):
    """Writes a text file whole or not at all. Raises DataError if it cannot be written."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        aside.write_text(text, encoding="utf-8")
        sync(aside)
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise DataError(f"{path} cannot be written ({error.strerror}): give another place") from error


def check_writable(folder):
    """Raises OSError if no file can be made in the folder."""
    probe = Path(folder) / f".writable.{os.getpid()}"
    probe.touch()
    probe.unlink()


def read_bytes(path, limit=MAX_BYTES):
    """-> a file's bytes. Raises DataError if it is missing, cannot be read, or has more bytes than the limit."""
    try:
        if Path(path).stat().st_size > limit:
            raise DataError(f"{path} has more than {limit // 2**20} MiB: is it the right file?")
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error


def json_memory(content):
    """-> bytes of memory that a JSON text can take while it is parsed and after, from above, by a count of its signs:
    an empty list is 3 bytes of a file and 64 of memory."""
    wide = 1 if content.isascii() and b"\\u" not in content else 4  # one long character makes all of its string so
    return 2 * wide * len(content) + sum(n * content.count(sign) for sign, n in JSON_COSTS.items())  # 2: text, strings


def parse_json(content, where, hook=None):
    """A JSON text's bytes -> its content; `hook` sees every object of it. Raises DataError if they are no JSON, nested
    too deeply, or could fill the memory."""
    memory = json_memory(content)
    if memory > MAX_JSON_MEMORY:
        raise DataError(f"{where} could take {memory / 2**30:.1f} GiB of memory: is it the right file? Then split it")
    try:
        content = content.decode(json.detect_encoding(content), "surrogatepass")  # so that the bytes go before
        return json.loads(content, object_hook=hook)
    except DataError:
        raise
    except (ValueError, RecursionError, MemoryError) as error:
        raise DataError(f"{where} is not valid JSON ({one_line(error)[:100]}): is it whole?") from error


def read_json(path, hook=None, limit=MAX_BYTES):
    """-> a JSON file's content, as parse_json gives it. Raises DataError also if the file is missing or of more bytes
    than the limit."""
    return parse_json(read_bytes(path, limit), path, hook)


def need(record, key, kind, where):
    """record[key], which must be of the kind. Raises DataError naming the record."""
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kind) or (kind is int and not -2**63 <= value < 2**63):
        raise DataError(f"{where}: {key} is missing or no {kind.__name__}")
    return value


class PlainDispatch(dict):
    """Opcode -> method. An opcode that is not listed is refused, before anything of it is done."""

    def __missing__(self, code):
        name = {ord(op.code): op.name for op in pickletools.opcodes}.get(code, f"byte {code}")
        raise DataError(f"asks for more than plain data ({name})")


class PlainUnpickler(pickle._Unpickler):
    """Python's own unpickler with those opcodes alone that make dicts, lists, strings, numbers, None and bools, of
    which it does a limited number.

    GLOBAL, REDUCE, INST, BUILD, EXT, persistent ids and the rest have no entry; nor have tuples: one nested a million
    times would, as the key of a dict, end the process. The C unpickler would need a `find_class`, and would take any
    amount of memory for a memo index that the file makes up; this one's memo is a dict, and 50,000 refs take 2 s.
    """
    dispatch = PlainDispatch({ord(op.code): pickle._Unpickler.dispatch[ord(op.code)] for op in pickletools.opcodes
                              if op.name in """PROTO FRAME STOP MARK POP POP_MARK PUT BINPUT LONG_BINPUT MEMOIZE
                              GET BINGET LONG_BINGET NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4
                              FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE
                              LIST EMPTY_LIST APPEND APPENDS EMPTY_DICT""".split()})

    def load(self):
        """pickle's own loop, with an end: a byte of the file can make an object of 64."""
        unframer = pickle._Unframer(self._file_read, self._file_readline)
        self.read, self.readinto, self.readline = unframer.read, unframer.readinto, unframer.readline
        self._unframer, self.metastack, self.stack = unframer, [], []
        self.append = self.stack.append
        read, dispatch = self.read, self.dispatch
        try:
            for _ in range(MAX_REFS_STEPS):
                dispatch[read(1)[0]](self)
        except pickle._Stop as stop:
            return stop.value
        raise DataError(f"takes more than {MAX_REFS_STEPS} steps")

    def fill(self, record, items):
        """record[key] = value, for keys and values in turn. Numbers as keys could be chosen to collide."""
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                raise DataError("has a key that is no text")
            record[key] = value

    def load_dict(self):
        items = self.pop_mark()
        self.append({})
        self.fill(self.stack[-1], items)

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self.fill(self.stack[-1], [key, value])

    def load_setitems(self):
        items = self.pop_mark()
        self.fill(self.stack[-1], items)

    dispatch |= {pickle.DICT[0]: load_dict, pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems}


def load_refs(path):
    """-> the list in a refs(*).p file, written by Python 2 (byte strings are read as Latin-1) or later.

    Raises DataError if the file is missing, too long, broken, no list of refs, or asks for anything but plain data;
    nothing in it runs.
    """
    content = read_bytes(path, MAX_REFS_BYTES)
    try:
        refs = PlainUnpickler(io.BytesIO(content), encoding="latin1").load()
    except DataError as error:
        raise DataError(f"{path} {error} and was not run: get the file from another source") from error
    except Exception as error:  # the unpickler raises nearly anything on a broken file
        raise DataError(f"{path} is broken ({type(error).__name__}: {one_line(error)[:100]}): is it whole?") from error
    if not isinstance(refs, list):
        raise DataError(f"{path} holds no list of refs")
    if len(refs) > MAX_SENTENCES:
        raise DataError(f"{path} holds more than {MAX_SENTENCES} refs")
    sentences = characters = 0
    for n, ref in enumerate(refs):
        where = f"{path}: ref number {n}"
        for key in ("ref_id", "ann_id", "image_id"):
            need(ref, key, int, where)
        need(ref, "split", str, where)
        sentences += len(need(ref, "sentences", list, where))
        if sentences > MAX_SENTENCES or characters > MAX_REFS_BYTES:  # one list can stand in every ref
            raise DataError(f"{path} holds more than {MAX_SENTENCES} sentences, or one very often")
        for sentence in ref["sentences"]:
            need(sentence, "sent_id", int, where)
            text = sentence.get("sent") or sentence.get("raw")
            characters += len(text) if isinstance(text, str) else 0
    return refs


# ---- Images and masks -----------------------------------------------------------------------------------------------

def _decode(path, formats, convert):
    """convert(PIL image) of an image file, with everything that can go wrong as a DataError naming the file."""
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such image")
    try:
        with Image.open(path, formats=formats) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{path}: {image.width}x{image.height} is more than {MAX_PIXELS // 10**6} megapixels: "
                                "make it smaller")
            return convert(image)
    except DataError:
        raise
    except Exception as error:  # so do PIL's decoders
        raise DataError(f"{path} cannot be read as an image ({one_line(error)[:200]}): is it whole?") from error


def _rgb(image):
    """PIL image of any mode -> RGB; what is transparent is seen on white, 16 bits are scaled to 8."""
    if image.mode == "F":
        raise DataError(f"{getattr(image, 'filename', 'image')}: floating-point pixels: save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def open_image(path, size=None):
    """-> PIL RGB image, turned upright as its EXIF orientation says.

    size: (width, height) of the annotations' frame, where it is known. COCO's own tools ignore EXIF, so a record whose
    size is that of the stored pixels and not of the upright ones means the stored ones, which are then returned.
    Raises DataError if the file is missing, broken, truncated, above 64 megapixels, or of another size.
    """
    def convert(image):
        image.load()
        upright = ImageOps.exif_transpose(image)
        if size is not None and upright.size != size:
            if image.size != size:
                raise DataError(f"{path} is {upright.width}x{upright.height}, its record says {size[0]}x{size[1]}: "
                                "is it the right file?")
            upright = image
        return _rgb(upright)
    return _decode(path, FORMATS, convert)


def image_size(path):
    """-> (width, height) in pixels of what open_image returns, from the file's head."""
    def upright(image):
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return image.size[::-1] if turned else image.size
    return _decode(path, FORMATS, upright)


def _mask_file(path, size):
    """A PNG file of `size` (width, height) -> bool (H, W): where a pixel (a palette's index) is not zero."""
    def convert(image):
        if image.size != size:
            raise DataError(f"{path} is {image.width}x{image.height}, its image {size[0]}x{size[1]}: "
                            "a mask has its image's size")
        pixels = np.asarray(image.convert(image.mode[:-1]) if image.mode in ("LA", "RGBA") else image)
        return pixels.reshape(*pixels.shape[:2], -1).any(axis=2)
    return _decode(path, ("PNG",), convert)


def _run_lengths(counts):
    """COCO's compressed run lengths -> list of ints. 5 bits a character, low ones first, the last signed; from the
    fourth on, each is the difference to the one before the last."""
    runs, value, shift = [], 0, 0
    for c in counts.encode() if isinstance(counts, str) else counts:
        c -= 48
        value |= (c & 31) << shift
        shift += 5
        if shift > 60:
            raise ValueError("broken run lengths")
        if not c & 32:
            value -= (1 << shift) if c & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def decode_mask(segmentation, width, height):
    """A COCO segmentation -> bool (H, W).

    List of polygons [x, y, x, y, ...] in pixels: their union, so that an overlap counts once. Dict: run lengths down
    the columns, compressed or not. Raises ValueError for what pycocotools would draw wrongly, or without end.
    """
    if isinstance(segmentation, list):
        polygons = [np.asarray(p, np.float64) for p in segmentation]
        if not 0 < len(polygons) <= MAX_POLYGONS:
            raise ValueError(f"{len(polygons) or 'no'} polygons: give 1 to {MAX_POLYGONS}")
        outline = 0
        for p in polygons:
            if p.ndim != 1:
                raise ValueError("a polygon that is no list of numbers: give [[x, y, x, y, ...], ...]")
            if len(p) % 2 or len(p) < 6:
                raise ValueError("a polygon of fewer than 3 points")  # pycocotools takes 2 points for a box
            x, y = p[0::2], p[1::2]
            if not ((x >= -width) & (x <= 2 * width) & (y >= -height) & (y <= 2 * height)).all():
                raise ValueError("a polygon with a point that is no number or far outside the image")
            outline += len(x) + np.maximum(abs(x - np.roll(x, 1)), abs(y - np.roll(y, 1))).sum()
        if outline >= MAX_OUTLINE:
            raise ValueError(f"polygons with an outline above {MAX_OUTLINE} pixels")
        return coco.decode(coco.merge(coco.frPyObjects(polygons, height, width))).astype(bool)
    if not isinstance(segmentation, dict) or not isinstance(segmentation.get("counts"), (list, str, bytes)):
        raise ValueError("neither polygons nor run lengths")
    if segmentation.get("size") != [height, width]:
        raise ValueError(f"run lengths of size {str(segmentation.get('size'))[:40]} in an image of [{height}, {width}]")
    counts = segmentation["counts"]
    runs = counts if isinstance(counts, list) else _run_lengths(counts)
    # Too short, and pycocotools returns memory that nobody wrote.
    if any(type(n) is not int or n < 0 for n in runs) or sum(runs) != height * width:
        raise ValueError("run lengths that do not add up to the image")
    return coco.decode(coco.frPyObjects({"size": [height, width], "counts": runs}, height, width)).astype(bool)


# ---- Data sets ------------------------------------------------------------------------------------------------------

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
    width: int | None  # None: the file's own, whatever it is
    height: int | None


def clean_sentence(text, where):
    """A sentence without the space around it, and nothing in it that cannot be printed as UTF-8 (JSON's lone
    surrogates). Raises DataError if nothing is left."""
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where} is empty: say what it refers to, or take it out")
    return text.strip().encode("utf-8", "replace").decode()


def path_inside(folders, name, where):
    """The first of the folders' files of that name that exists. Raises DataError if the name leaves a folder, be it by
    a symbolic link. The folder itself may be one: to keep files elsewhere, link the folder."""
    candidates = []
    for folder in folders:
        try:
            path = (folder / name).resolve()
        except (ValueError, OSError, RuntimeError) as error:  # a null byte, a loop of links
            raise DataError(f"{where}: path {name[:200]!r}: {one_line(error)}") from error
        if Path(name).is_absolute() or not path.is_relative_to(folder.resolve()):
            raise DataError(f"{where}: path {name[:200]!r} leaves the folder {folder}: keep the files in it, or make "
                            "the folder itself a link")
        candidates.append(path)
    return next((p for p in candidates if os.path.isfile(p)), candidates[0])


def _raise(error):
    raise error


class RefCOCO:
    """One split of a data set: `sentences`, `refs` and `images`, each a list in file order, linked by index.

    dataset: refcoco, refcoco+, refcocog, shapes; combined (Table 2: the three train splits less every image of any val
    or test split of the three; train only); or a JSON file of one's own, a list of
    {"image": path, "mask": PNG path or "polygons": [[x, y, ...], ...], "sentences": [...], "split": optional}
    with paths relative to the file's folder or to root. Without any "split" in it, every split is the whole file.
    split "all" is all of them. Opening reads no image.

    report: is called with each DataError of a single ref, which is then left out; by default, the first one is raised.
    Raises DataError for a missing file (naming the paths tried), an unknown data set or split, a ref without its
    annotation or image record, an empty sentence.
    """

    def __init__(self, root, dataset, split, report=_raise):
        self.root, self.dataset, self.split = Path(root), str(dataset), split
        self.sentences, self.refs, self.images, self.folders = [], [], [], []
        self.split_names = set()  # all those in the files
        self._numbers = {}  # image id -> index
        if self.dataset.endswith(".json"):
            self._open_json(report)
        else:
            self._open_refer(report)
        if not self.sentences and report is _raise:
            raise DataError(f"{dataset} in {root} has no sentence of split {split!r}" + (
                ": write the world anew, with as many --images, by data.py shapes" if dataset == "shapes" else ""))

    def __len__(self):
        return len(self.sentences)

    def _open_refer(self, report):
        if self.dataset not in (*PUBLISHED, "combined"):
            raise DataError(f"--dataset {self.dataset}: give {', '.join(PUBLISHED)}, combined, or a .json file")
        combined = self.dataset == "combined"
        splits = ["train"] if combined else [*PUBLISHED[self.dataset], "all"]
        if self.split not in splits:
            raise DataError(f"{self.dataset} has no split {self.split!r}: give {', '.join(PUBLISHED[self.dataset])}"
                            if not combined else
                            f"combined has no split {self.split!r}, only train: evaluate on {', '.join(UNION)}")
        loaded = {name: load_refs(self._files(name)[0]) for name in (UNION if combined else [self.dataset])}
        held_out = {r["image_id"] for refs in loaded.values() for r in refs if combined and r["split"] != "train"}
        for name, refs in loaded.items():
            self.split_names |= {r["split"] for r in refs}
            refs = [r for r in refs if self.split in ("all", r["split"]) and r["image_id"] not in held_out]
            self._add_refs(name, refs, report)

    def _files(self, name):
        """-> refs file, instances file, image folders of a REFER set. Raises DataError if one is missing."""
        refs, instances = (self.root / name / file for file in (f"refs({REFS_BY[name]}).p", "instances.json"))
        folders = [self.root / f for f in (("images/shapes",) if name == "shapes" else
                                           ("images/mscoco/images/train2014", "train2014"))]
        missing = [str(p) for p in (refs, instances) if not os.path.isfile(p)]
        if not any(os.path.isdir(f) for f in folders):
            missing.append(" or ".join(map(str, folders)))
        if missing:
            raise DataError(f"data root {self.root}: {name} is not complete there, tried {', '.join(missing)}")
        return refs, instances, folders

    def _add_refs(self, name, refs, report):
        """Adds refs of one REFER set, with the annotations and image records that they name."""
        path, instances, self.folders = self._files(name)
        wanted = {r["ann_id"] for r in refs}

        def slim(record):  # as the file is parsed, so that what no ref names never piles up
            if "segmentation" not in record:
                return record
            if not isinstance(record.get("id"), int) or record["id"] not in wanted:
                return None
            polygons = record["segmentation"]
            if isinstance(polygons, list):
                try:
                    polygons = [np.array(p, np.float64) if isinstance(p, list) and len(p) > 5 else p for p in polygons]
                except (ValueError, TypeError):
                    polygons = []  # mask() refuses it when it is asked for
            return {"id": record["id"], "image_id": record.get("image_id"), "segmentation": polygons}

        content = read_json(instances, slim)
        annotations = {a["id"]: a for a in need(content, "annotations", list, instances)
                       if isinstance(a, dict) and "segmentation" in a}
        pictured = {r["image_id"] for r in refs}  # no other id is a key: a file's could be chosen to collide
        records = {i["id"]: i for i in need(content, "images", list, instances)
                   if isinstance(i, dict) and isinstance(i.get("id"), int) and i["id"] in pictured}
        for ref in refs:
            where, ann_id, image_id = f"{path}: ref {ref['ref_id']}", ref["ann_id"], ref["image_id"]
            try:
                if ann_id not in annotations:
                    raise DataError(f"{where}: its annotation {ann_id} is not in {instances}")
                if image_id not in records:
                    raise DataError(f"{where}: its image {image_id} is not in {instances}")
                if annotations[ann_id]["image_id"] != image_id:
                    raise DataError(f"{where}: its annotation {ann_id} is of another image than {image_id}")
                image = self._image_record(image_id, records[image_id], instances)
                sentences = [(f"{name}/{s['sent_id']}" if self.dataset == "combined" else s["sent_id"],
                              clean_sentence(s.get("sent") or s.get("raw"), f"{where}: sentence {s['sent_id']}"),
                              s["kind"] if isinstance(s.get("kind"), str) else None) for s in ref["sentences"]]
                self._add(ref["ref_id"], ann_id, image, annotations[ann_id]["segmentation"], ref["split"], sentences)
            except DataError as error:
                report(error)

    @staticmethod
    def _image_record(image_id, record, instances):
        where = f"{instances}: image {image_id}"
        name, width, height = (need(record, *f, where) for f in (("file_name", str), ("width", int), ("height", int)))
        if name != os.path.basename(name) or "\\" in name or "\0" in name or name in ("", ".", ".."):
            raise DataError(f"{where}: file_name {name[:100]!r} is no plain file name")
        if not (0 < width and 0 < height and width * height <= MAX_PIXELS):
            raise DataError(f"{where}: {width}x{height} pixels: give 1 to {MAX_PIXELS // 10**6} megapixels")
        return ImageRecord(image_id, name, width, height)

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
            raise DataError(f"{path}: some entries have a split and some have none: give all one, or none")
        if None not in splits and self.split not in (*splits, "all"):
            raise DataError(f"{path} has no split {self.split!r}: give {', '.join(sorted(splits)) or 'it entries'}")
        sent_id, folders = 0, [path.parent, self.root]
        for n, entry in enumerate(entries):
            where, split = f"{path}: entry {n}", entry.get("split")
            try:
                texts = need(entry, "sentences", list, where)
                first, sent_id = sent_id, sent_id + len(texts)
                if split is not None and self.split not in (split, "all"):
                    continue
                name = need(entry, "image", str, where)
                image = ImageRecord(name, str(path_inside(folders, name, where)), None, None)
                if ("mask" in entry) == ("polygons" in entry):
                    raise DataError(f'{where}: give either "mask" or "polygons"')
                segmentation = (need(entry, "polygons", list, where) if "polygons" in entry else
                                path_inside(folders, need(entry, "mask", str, where), where))
                self._add(n, None, image, segmentation, split,
                          [(first + k, clean_sentence(text, f"{where}: sentence {k}"), None)
                           for k, text in enumerate(texts)])
            except DataError as error:
                report(error)

    def _add(self, ref_id, ann_id, image, segmentation, split, sentences):
        """Appends a ref, its image if it is new, and its sentences, each (sent_id, text, kind)."""
        number = self._numbers.setdefault(image.id, len(self.images))
        if number == len(self.images):
            self.images.append(image)
        self.sentences += [Sentence(sent_id, text, len(self.refs), number, kind) for sent_id, text, kind in sentences]
        self.refs.append(Ref(ref_id, ann_id, number, segmentation, split))

    def path(self, image):
        """Index -> the image's path. Raises DataError naming the paths tried."""
        name = self.images[image].file_name
        if self.folders:  # names in one's own JSON were looked at when it was opened
            path_inside(self.folders, name, f"image {self.images[image].id}")
        tried = [folder / name for folder in self.folders] or [Path(name)]
        for path in tried:
            if os.path.isfile(path):
                return path
        raise DataError(f"image {self.images[image].id} is missing, tried {', '.join(map(str, tried))}")

    def size(self, image):
        """Index -> (width, height) in pixels."""
        record = self.images[image]
        return (record.width, record.height) if record.width else image_size(self.path(image))

    def image(self, image):
        """Index -> PIL RGB image of the annotations' frame (see open_image). Raises DataError as that does."""
        record = self.images[image]
        return open_image(self.path(image), (record.width, record.height) if record.width else None)

    def mask(self, ref):
        """Index of a ref -> bool (H, W), the image's own size. Raises DataError naming the ref."""
        r = self.refs[ref]
        if isinstance(r.segmentation, Path):
            return _mask_file(r.segmentation, self.size(r.image))
        try:
            return decode_mask(r.segmentation, *self.size(r.image))
        except DataError:
            raise
        except (ValueError, TypeError, OverflowError, MemoryError, RecursionError) as error:
            name = f"entry {r.ref_id}" if r.ann_id is None else f"ref {r.ref_id}, annotation {r.ann_id}"
            raise DataError(f"{self.dataset}: {name}: {one_line(error)}") from error


# ---- Batches --------------------------------------------------------------------------------------------------------
# An item is one image and some of its sentences: (image index, (sentence index, ...), seed of its augmentation).

def pack(items, batch_size):
    """Items in order -> batches of exactly batch_size sentences, the last perhaps fewer. An item that does not fit goes
    on in the next batch."""
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
    """-> the batches of a training epoch: every ref once, with one of its sentences drawn at random (as LAVT does).

    per_image: an item takes up to so many refs of one image, which then share its features. A pure function of its
    arguments, so that a resumed run goes on with what an unbroken one would see.
    """
    rng = np.random.default_rng((seed % 2**63, epoch))
    sentences = [[] for _ in dataset.refs]
    for i, sentence in enumerate(dataset.sentences):
        sentences[sentence.ref].append(i)
    images = {}
    for ref in rng.permutation(len(sentences)):
        if sentences[ref]:
            images.setdefault(dataset.refs[ref].image, []).append(sentences[ref][rng.integers(len(sentences[ref]))])
    items = [(image, tuple(chosen[k:k + per_image])) for image, chosen in images.items()
             for k in range(0, len(chosen), per_image)]
    return pack([(*items[i], int(rng.integers(2**63))) for i in rng.permutation(len(items))], batch_size)


def plan_eval(dataset, batch_size):
    """-> the batches of an evaluation: every sentence once, those of an image together, in file order."""
    images = {}
    for i, sentence in enumerate(dataset.sentences):
        images.setdefault(sentence.image, []).append(i)
    return pack([(image, tuple(sentences), 0) for image, sentences in images.items()], batch_size)


def normalise(pixels):
    """uint8 (..., 3, H, W) -> float32 with CLIP's mean and deviation."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return pixels.float().div_(255).sub_(mean).div_(std)  # one block of memory, not four


def preprocess(image, size):
    """PIL image -> (3, S, S) float32: squashed to the square (bicubic, antialiased) and normalised."""
    squashed = (image if image.mode == "RGB" else _rgb(image)).resize((size, size), Image.BICUBIC)
    return normalise(torch.from_numpy(np.array(squashed)).permute(2, 0, 1))


FILL = tuple(round(255 * m) for m in MEAN)
AFFINE = v2.RandomAffine(degrees=10, translate=(0.1, 0.1), scale=(0.9, 1.1), shear=(-2, 2, -2, 2),
                         interpolation=InterpolationMode.BILINEAR, fill={Image.Image: FILL, tv_tensors.Mask: 0})


def augment(image, masks, seed):
    """RefTR's augmentation (Sec. A.1): PIL RGB image and bool masks (K, H, W) -> the same, warped together.

    HSV saturation and intensity times factors from [0.5, 1.5] (RefTR's code draws the saturation's and forgets to apply
    it; the paper says both), then rotation by up to 10 degrees, translation by 10 %, scale 0.9-1.1 and shear by 2
    degrees, the border filled with the mean colour. Never a flip: it would turn 'left' into a lie. An image whose
    object would leave it keeps its place. A pure function of its arguments: it leaves torch's random state alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs as well
        factors = (1.0, *torch.empty(2).uniform_(0.5, 1.5).tolist())  # hue, saturation, value
        image = image.convert("HSV").point([min(255, round(i * f)) for f in factors for i in range(256)]).convert("RGB")
        warped, warped_masks = AFFINE(image, tv_tensors.Mask(torch.from_numpy(masks.astype(np.uint8))))
    warped_masks = warped_masks.numpy().astype(bool)
    return (warped, warped_masks) if (warped_masks.any((1, 2)) == masks.any((1, 2))).all() else (image, masks)


class Samples(Dataset):
    """What a plan's items name. The image is read, and augmented, once for all sentences of an item."""

    def __init__(self, dataset, image_size, augment=False):
        self.dataset, self.image_size, self.augment = dataset, image_size, augment

    def __getitem__(self, item):
        """Item -> image (3, S, S) float32, masks (K, S, S) bool by nearest neighbour, texts and sent_ids; of a missing
        or broken image or mask the DataError's text as `broken`, and how many sentences are `lost` with it."""
        image, indices, seed = item
        sentences = [self.dataset.sentences[i] for i in indices]
        refs = list(dict.fromkeys(s.ref for s in sentences))  # two sentences of one ref share its mask
        try:
            pixels, masks = self.dataset.image(image), np.stack([self.dataset.mask(r) for r in refs])
        except DataError as error:
            return {"broken": one_line(error), "lost": len(indices)}
        if self.augment:
            pixels, masks = augment(pixels, masks, seed)
        centres = (np.arange(self.image_size) + 0.5) / self.image_size
        rows, columns = ((centres * n).astype(int) for n in masks.shape[1:])
        masks = torch.from_numpy(masks[:, rows[:, None], columns])
        return {"image": preprocess(pixels, self.image_size), "masks": masks[[refs.index(s.ref) for s in sentences]],
                "texts": [s.text for s in sentences], "sent_ids": [s.sent_id for s in sentences]}


def collate(items):
    """Items of I images with B sentences in all -> dict of
    images (I, 3, S, S), image_index (B,) long (whose sentence each is), masks (B, S, S) bool, texts, sent_ids;
    broken: a message for each item left out, lost: the sentences in them. With no item left, texts is empty.
    """
    good = [item for item in items if "broken" not in item]
    broken = [item for item in items if "broken" in item]
    counts = torch.tensor([len(item["texts"]) for item in good], dtype=torch.long)
    return {"images": torch.stack([item["image"] for item in good]) if good else torch.empty(0, 3, 0, 0),
            "image_index": torch.arange(len(good)).repeat_interleave(counts),
            "masks": torch.cat([item["masks"] for item in good]) if good else torch.empty(0, 0, 0, dtype=torch.bool),
            "texts": [text for item in good for text in item["texts"]],
            "sent_ids": [sent_id for item in good for sent_id in item["sent_ids"]],
            "broken": [item["broken"] for item in broken], "lost": sum(item["lost"] for item in broken)}


# ---- Is a data set whole? -------------------------------------------------------------------------------------------

def doubts(data, looks=20):
    """-> what is plainly wrong with a data set as a whole, one line each: split names that nothing asks for, sentences
    with the sent_id of others, and masks that are all empty, of those `looks` that are evenly spaced."""
    sets = UNION if data.dataset == "combined" else [data.dataset] if data.dataset in PUBLISHED else PUBLISHED
    lines, known = [], {split for name in sets for split in PUBLISHED[name]}  # one's own are named as any published one
    if unknown := sorted(data.split_names - known):
        lines.append(f"refs of unknown splits: {', '.join(map(repr, unknown))}")
    counts = Counter(s.sent_id for s in data.sentences)
    if len(counts) < len(data):
        first = next(i for i, count in counts.items() if count > 1)
        lines.append(f"sentences with the sent_id of another: {len(data) - len(counts)}, the first is {first}")
    areas = []
    for i in range(0, len(data.refs), max(1, len(data.refs) // looks)):
        try:
            areas.append(data.mask(i).any())
        except DataError:
            pass  # named, skipped and counted where it is used
    if areas and not any(areas):
        lines.append(f"masks that are empty: all {len(areas)} that were looked at")
    return lines


def check(root, dataset, quick=False):
    """Prints a data set's counts beside the published ones; -> list of what is wrong with it, one line each.

    quick: looks whether the images are there, but opens none. Raises DataError if there is nothing to look at.
    """
    if dataset == "combined":
        raise DataError(f"--dataset combined is made of {', '.join(UNION)}: check them one by one")
    problems = []
    data = RefCOCO(root, dataset, "all", report=lambda error: problems.append(str(error)))
    published = PUBLISHED.get(dataset, {})
    splits = {ref.split for ref in data.refs}
    rows, seen = [("split", "refs", "images", "sentences", "published")], {}
    for split in (*published, *sorted(splits - set(published), key=str)):
        refs = {i for i, ref in enumerate(data.refs) if ref.split == split}
        images = {data.refs[i].image for i in refs}
        counts = (len(refs), len(images), sum(s.ref in refs for s in data.sentences))
        expected = published.get(split)
        rows.append((one_line(split), *map(str, counts), " / ".join(map(str, expected)) if expected else "-"))
        if expected and counts != expected:
            problems.append(f"{split}: {' / '.join(map(str, counts))} refs / images / sentences, published "
                            f"{' / '.join(map(str, expected))}")
        if not refs and not expected:
            problems.append(f"{split}: no refs")
        for other, others in seen.items():
            if both := images & others:
                first = data.images[min(both)].id
                problems.append(f"images both in {other} and in {split}: {len(both)}, the first is {first}")
        seen[split] = images
    if not data.sentences:
        problems.append("no sentences")
    problems += doubts(data)
    for i in tqdm(range(len(data.images)), "images", disable=None):
        try:
            data.path(i) if quick else data.image(i)
        except DataError as error:
            problems.append(str(error))
    for i in tqdm(range(len(data.refs)), "masks", disable=None):
        try:
            if not data.mask(i).any():
                problems.append(f"the mask of ref {data.refs[i].ref_id} is empty")
        except DataError as error:
            problems.append(str(error))
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    print("\n".join("  ".join(row[c].rjust(w) for c, w in enumerate(widths)) for row in rows))
    return problems


# ---- Command line ---------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    world = commands.add_parser("shapes", help="write the shapes world in REFER layout")
    world.add_argument("--root", default="data", help="the data root to write to (default: data)")
    world.add_argument("--images", type=int, default=1000, metavar="N", help="scenes of train, val and test in all "
                       "(default: 1000); characters and absence have 100 each")
    world.add_argument("--seed", type=int, default=0, metavar="S")
    checking = commands.add_parser("check", help="compare a data set with the published counts, name what is broken")
    checking.add_argument("--root", default="data", help="the data root (default: data)")
    checking.add_argument("--dataset", required=True, help=f"{', '.join(PUBLISHED)} or a JSON file")
    checking.add_argument("--quick", action="store_true", help="look whether the images are there, open none")
    return parser.parse_args(argv)


def make_shapes(root, images, seed):
    """shapes.write_shapes. Raises DataError if root cannot be written, or load_refs would refuse what is."""
    if not 1 <= images <= MAX_SHAPES:
        raise DataError(f"--images {images}: give 1 to {MAX_SHAPES}")
    try:
        shapes.write_shapes(root, images, seed)
    except OSError as error:
        raise DataError(f"data root {root} cannot be written ({error.strerror}): give another place") from error


def main(args):
    if args.command == "shapes":
        make_shapes(args.root, args.images, args.seed)
        print(f"wrote {Path(args.root) / 'shapes'} and {Path(args.root) / 'images' / 'shapes'}")
        return 0
    problems = check(args.root, args.dataset, args.quick)
    for line in problems[:50]:
        print(f"- {one_line(line)}")
    if len(problems) > 50:
        print(f"- and {len(problems) - 50} more")
    print(f"{args.dataset} in {args.root}: {f'{len(problems)} problems' if problems else 'complete'}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(run(main, parse_args()))
