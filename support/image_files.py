"""Images and masks from files: one frame for size and pixels, one reading of each kind of mask."""

import os

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from pycocotools import mask as coco

from support.files import DataError, one_line

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # decoded by Pillow itself
MAX_PIXELS = 64_000_000  # of an image: more would take above 2 GiB and 10 s
MAX_POLYGONS = 10_000  # of one mask
MAX_OUTLINE = 1_000_000  # pixels and points of one mask's polygons
TURNED = {5: Image.TRANSPOSE, 6: Image.ROTATE_90, 7: Image.TRANSVERSE, 8: Image.ROTATE_270}


# ---- Images --------------------------------------------------------------------------------------

def _decode(path, convert):
    """convert(PIL image) of an image file. Raises DataError naming the file for all that fails."""
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such image")
    try:
        # Pillow maps a named file into memory, and then misreads a grey TIFF that is turned.
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{path}: {image.width}x{image.height} is more than "
                                f"{MAX_PIXELS // 10**6} megapixels: make it smaller")
            return convert(image)
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything
        raise DataError(f"{path} cannot be read as an image ({one_line(error)[:200]}): "
                        "is it whole?") from error


def rgb(image):
    """PIL image of any mode -> RGB; what is transparent is seen on white, 16 bits become 8."""
    if image.mode == "F":
        raise DataError("image: floating-point pixels: save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        high = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(high.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _sizes(image):
    """An opened file -> (width, height) of its pixels as they are stored, and upright."""
    stored, turned = image.size, image.getexif().get(ExifTags.Base.Orientation) in TURNED
    if image.format == "TIFF":  # some versions of Pillow give its upright size
        stored = image.tag_v2[ExifTags.Base.ImageWidth], image.tag_v2[ExifTags.Base.ImageLength]
    return stored, stored[::-1] if turned else stored


def _in_frame(image, size=None):
    """An opened file -> its pixels, upright as its orientation tag says; as they are stored where
    only that is of `size`; None where neither is."""
    stored, upright = _sizes(image)
    if size not in (None, upright, stored):
        return None
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    image.load()  # turns a TIFF, and takes its tag away
    image = ImageOps.exif_transpose(image)
    return image if size in (None, upright) else image.transpose(TURNED[orientation])


def open_image(path, size=None):
    """-> PIL RGB image, turned upright as its EXIF orientation says.

    size: (width, height) of the annotations' frame, where it is known. COCO's own tools ignore
    EXIF: a record of the stored size, which is not the upright one, describes the stored pixels,
    which are then returned. Raises DataError if the file is missing, broken, truncated, above 64
    megapixels, or of another size.
    """
    def convert(image):
        framed = _in_frame(image, size)
        if framed is None:
            width, height = _sizes(image)[1]
            raise DataError(f"{path} is {width}x{height}, its record says {size[0]}x{size[1]}: "
                            "is it the right file?")
        return rgb(framed)
    return _decode(path, convert)


def image_size(path):
    """-> (width, height) in pixels of what open_image returns, from the file's head."""
    return _decode(path, lambda image: _sizes(image)[1])


# ---- Mask files ----------------------------------------------------------------------------------

def mask_file(path, size):
    """A lossless image file of `size` (width, height) -> bool (H, W).

    The object is what is not black; in a label map, whose index 0 is black, what has another index;
    in a cut-out what is not transparent. Raises DataError, among others, for a palette that can be
    read in two ways.
    """
    def convert(image):
        if _is_lossy(image, path):
            raise DataError(f"{path} is compressed with loss ({image.format}), which changes "
                            "pixels along a mask's edge: save the mask as PNG")
        framed = _in_frame(image, size)
        if framed is None:
            width, height = _sizes(image)[1]
            raise DataError(f"{path} is {width}x{height}, its image {size[0]}x{size[1]}: "
                            "a mask has its image's size")
        return _object(framed, path)
    return _decode(path, convert)


def _is_lossy(image, path):
    """Whether an opened file's pixels are not those that were saved."""
    if image.format != "WEBP":
        compression = image.info.get("compression")  # of a TIFF
        return image.format in ("JPEG", "MPO") or compression in ("jpeg", "tiff_jpeg", "webp")
    with open(path, "rb") as file:
        file.seek(12)  # RIFF's head; then chunks: name, length, content
        while len(head := file.read(8)) == 8:
            name, length = head[:4], int.from_bytes(head[4:], "little")
            if name in (b"VP8 ", b"VP8L"):
                return name == b"VP8 "
            file.seek(16 if name == b"ANMF" else length + length % 2, os.SEEK_CUR)
    return False


def _object(image, path):
    """PIL image of any mode -> bool (H, W): where the object is."""
    if image.mode[0] in "IF":  # 16 bits and more
        values, transparent = np.asarray(image), image.info.get("transparency")
        if not np.isfinite(values).all():
            raise DataError(f"{path} has pixels that are no numbers: save the mask as PNG")
        return (values != 0) & (values != transparent)
    rgba = np.asarray(image.convert("RGBA"))
    filled, visible, labels = rgba[..., :3].any(axis=2), rgba[..., 3] > 0, False
    if image.mode in ("P", "PA"):
        index = np.asarray(image if image.mode == "P" else image.getchannel(0))
        palette = np.array(image.getpalette("RGB")).reshape(-1, 3).any(axis=1)  # False: black
        labels = not palette[:1].any()
        if labels:
            filled = index != 0
        elif visible.all() and filled.all() and (index == 0).any() and palette.tolist() not in (
                [True, False], [False, True]):
            raise DataError(f"{path} has a palette without black in use: which colour is the "
                            "object? Save the mask with black around a white object")
    inside = filled & visible
    if visible.all() or not inside.any() or labels:
        return inside if inside.any() or visible.all() else visible
    colours = rgba[inside]
    plain = (colours[:, :3] == colours[0, :3]).all()  # one colour on black, with a clear margin
    return inside if plain else visible


# ---- COCO's segmentations ------------------------------------------------------------------------

def _run_lengths(counts):
    """COCO's compressed run lengths -> list of ints. 5 bits per character, low ones first, the last
    signed; from the fourth on, each is the difference from the one before the last."""
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


def _checked_runs(record, width, height):
    """A dict of run lengths, compressed or not -> the same, uncompressed. Raises ValueError if they
    do not fill the image exactly."""
    if not isinstance(record, dict) or not isinstance(record.get("counts"), (list, str, bytes)):
        raise ValueError("neither polygons nor run lengths")
    if record.get("size") != [height, width]:
        raise ValueError(f"run lengths of size {str(record.get('size'))[:40]} in an image of "
                         f"[{height}, {width}]")
    counts = record["counts"]
    runs = counts if isinstance(counts, list) else _run_lengths(counts)
    if any(type(n) is not int or n < 0 for n in runs) or sum(runs) != height * width:
        raise ValueError("run lengths that do not add up to the image")
    return {"size": [height, width], "counts": runs}


def _checked_polygons(polygons, width, height):
    """Lists of numbers -> float arrays. Raises ValueError for what is no polygon near the image."""
    polygons = [np.asarray(p, np.float64) for p in polygons]
    outline = 0
    for p in polygons:
        if p.ndim != 1:
            raise ValueError("a polygon that is no list of numbers: give [[x, y, x, y, ...], ...]")
        if len(p) % 2 or len(p) < 6:
            raise ValueError("a polygon of fewer than 3 points, or half a point")
        x, y = p[0::2], p[1::2]
        if not ((x >= -width) & (x <= 2 * width) & (y >= -height) & (y <= 2 * height)).all():
            raise ValueError("a polygon with a point that is no number or far outside the image")
        sides = np.maximum(abs(x - np.roll(x, 1)), abs(y - np.roll(y, 1)))
        outline += len(x) + sides.sum()
    if outline >= MAX_OUTLINE:
        raise ValueError(f"polygons with an outline above {MAX_OUTLINE} pixels")
    return polygons


def strays(segmentation):
    """-> how many polygons of fewer than 3 points stand beside good ones."""
    if not isinstance(segmentation, list):
        return 0
    short = sum(isinstance(p, (list, np.ndarray)) and len(p) < 6 for p in segmentation)
    return short if short < len(segmentation) else 0


def decode_mask(segmentation, width, height):
    """A COCO segmentation -> bool (H, W).

    List of polygons [x, y, x, y, ...] in pixels, or of dicts of run lengths: their union, so that
    an overlap counts once; polygons of fewer than 3 points beside others are left out. Dict: run
    lengths down the columns, compressed or not. Raises ValueError for anything else.
    """
    parts = segmentation if isinstance(segmentation, list) else [segmentation]
    if not 0 < len(parts) <= MAX_POLYGONS:
        raise ValueError(f"{len(parts) or 'no'} polygons: give 1 to {MAX_POLYGONS}")
    if strays(parts):
        parts = [p for p in parts if not isinstance(p, (list, np.ndarray)) or len(p) >= 6]
    polygons = [p for p in parts if isinstance(p, (list, np.ndarray))]
    runs = [coco.frPyObjects(_checked_runs(p, width, height), height, width)
            for p in parts if not isinstance(p, (list, np.ndarray))]
    if polygons:
        runs += coco.frPyObjects(_checked_polygons(polygons, width, height), height, width)
    return coco.decode(coco.merge(runs)).astype(bool)


# ---- For the network -----------------------------------------------------------------------------

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, both sources of weights
STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(pixels):
    """uint8 (..., 3, H, W) -> float32 with CLIP's mean and deviation."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return pixels.float().div_(255).sub_(mean).div_(std)  # in place: one block of memory, not four


def preprocess(image, size):
    """PIL image -> (3, S, S) float32: squashed to the square (bicubic, antialiased), normalised."""
    squashed = (image if image.mode == "RGB" else rgb(image)).resize((size, size), Image.BICUBIC)
    return normalise(torch.from_numpy(np.array(squashed)).permute(2, 0, 1))
