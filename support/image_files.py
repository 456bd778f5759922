import os

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from pycocotools import mask as coco

from support.files import DataError, one_line

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # others, EPS say, would start a program
MAX_PIXELS = 64_000_000  # of an image: more would take above 2 GiB and 10 s
MAX_POLYGONS = 10_000  # of one mask: the time goes with their square
MAX_OUTLINE = 1_000_000  # pixels and points of one mask's polygons; pycocotools takes 120 bytes for each


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


def rgb(image):
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
        return rgb(upright)
    return _decode(path, FORMATS, convert)


def image_size(path):
    """-> (width, height) in pixels of what open_image returns, from the file's head."""
    def upright(image):
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return image.size[::-1] if turned else image.size
    return _decode(path, FORMATS, upright)


def mask_file(path, size):
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


# ---- For the network ---------------------------------------------------------------------------

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
