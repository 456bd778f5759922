"""Files and their guards: pickles, JSON, images and masks; what cannot be read is one clear line.
"""

import errno
import gc
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco
from test_data import PEAK, REFS, TURNS, python2, ref, save_turned

from support import files, image_files, unpickle
from support.files import DataError

# ---- Refs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dump",
    [
        python2,
        lambda r: pickle.dumps(r, 0),
        lambda r: pickle.dumps(r, 2),
        lambda r: pickle.dumps(r, 5),
    ],
)
def test_refs_of_every_protocol_are_read_alike(tmp_path, dump):
    (tmp_path / "r.p").write_bytes(dump(REFS))
    assert unpickle.load_refs(tmp_path / "r.p") == REFS


def test_python_2_byte_strings_are_latin_1():
    content = b"(lS'caf\\xe9'\naVcaf\\u00e9\naU\x04caf\xe9aI01\naF0.5\naL7L\naNa."
    read = unpickle.PlainUnpickler(io.BytesIO(content), encoding="latin1").load()
    assert read == ["café", "café", "café", True, 0.5, 7, None]


class Call:
    """Pickles as a call of touch(canary)."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def hostile(canary):
    """Name -> a pickle that touches the canary if it is loaded by pickle.loads."""
    command = f"touch '{canary}'".encode()
    call = b"(" + b"X" + struct.pack("<I", len(command)) + command
    return {
        "reduce in protocol 0": pickle.dumps([Call(canary)], 0),
        "reduce in protocol 2": pickle.dumps([Call(canary)], 2),
        "stack_global in protocol 4": pickle.dumps([Call(canary)], 4),
        "after good refs": pickle.dumps([*REFS, Call(canary)], 2),
        "as a key": pickle.dumps({Path: [Call(canary)]}, 2),
        "inst": call + b"ios\nsystem\n.",
        "obj": b"(cos\nsystem\n" + call[1:] + b"o.",
        "newobj": b"\x80\x02cos\nsystem\n" + call + b"tR.",
        "build": b"\x80\x02ccanary\nTarget\n)\x81}U\x05stateK\x01sb.",
        "a harmless class": b"ccollections\nOrderedDict\n(tR.",
        "ext1": b"\x80\x02\x82\x01.",
        "ext2": b"\x80\x02\x83\x01\x00.",
        "ext4": b"\x80\x02\x84\x01\x00\x00\x00.",
        "persid": b"Pcanary\n.",
        "binpersid": b"U\x06canaryQ.",
        "buffer": b"\x80\x05\x97.",
        "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**10) + b".",
    }


@pytest.mark.parametrize("name", hostile(Path("x")))
def test_a_pickle_that_asks_for_more_than_plain_data_is_refused_and_nothing_runs(tmp_path, name):
    canary, path = tmp_path / "canary", tmp_path / "r.p"
    content = hostile(canary)[name]
    if b"canary" in content and name not in ("build", "persid", "binpersid"):
        pickle.loads(content)
        assert canary.exists(), "a dud: it would not have run anyway"
        canary.unlink()
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"r\.p asks for more than plain data \(\w+\)"):
        unpickle.load_refs(path)
    assert not canary.exists()


def test_every_truncation_of_a_pickle_is_a_data_error(tmp_path):
    for dump in (python2, lambda r: pickle.dumps(r, 2)):
        content = dump(REFS[:2])
        for end in range(len(content)):
            (tmp_path / "r.p").write_bytes(content[:end])
            with pytest.raises(DataError, match="r.p"):
                unpickle.load_refs(tmp_path / "r.p")


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02]r" + struct.pack("<I", 10**6) + b".",
        b"(lp1000000\n.",
        b"\x80\x02X" + struct.pack("<I", 10**7) + b".",
        b"\x80\x04\x95" + struct.pack("<Q", 10**7) + b"].",
    ],
)
def test_a_made_up_length_or_memo_index_takes_no_memory(tmp_path, content):
    (tmp_path / "r.p").write_bytes(content)
    tracemalloc.start()
    try:
        assert unpickle.load_refs(tmp_path / "r.p") == []
    except DataError:
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize(
    "content", [{}, REFS[0], "refs", 7, [7], [REFS], [REFS[0] | {"sentences": None}]]
)
def test_a_pickle_of_something_else_is_a_data_error(tmp_path, content):
    (tmp_path / "r.p").write_bytes(pickle.dumps(content, 2))
    with pytest.raises(DataError, match="r.p"):
        unpickle.load_refs(tmp_path / "r.p")


def test_one_sentence_list_in_every_ref_cannot_multiply(tmp_path):
    for sentences, refs in ((["a"] * 1001, 1001), (["a" * 10**6], 99)):
        shared = ref(0, 1, sentences=sentences)
        (tmp_path / "r.p").write_bytes(
            pickle.dumps([shared | {"ref_id": i} for i in range(refs)], 2)
        )
        with pytest.raises(DataError, match="more than 1000000 sentences, or one very often"):
            unpickle.load_refs(tmp_path / "r.p")


def test_a_key_that_is_no_text_is_refused(tmp_path):
    for content in (
        pickle.dumps([{1: None}], 0),
        pickle.dumps([{1: None}], 2),
        pickle.dumps([{1: None, 2: None}], 2),
        b"(I1\nNd.",
    ):
        (tmp_path / "r.p").write_bytes(content)
        with pytest.raises(DataError, match="a key that is no text"):
            unpickle.load_refs(tmp_path / "r.p")


def test_an_unpickler_stops_after_so_many_steps(tmp_path, monkeypatch):
    """50 refs of three sentences of five words, a thousandth of a published set, take less than a
    thousandth."""
    monkeypatch.setattr(unpickle, "MAX_REFS_STEPS", unpickle.MAX_REFS_STEPS // 1000)
    refs = [ref(n, n, sentences=["a {} on the left"] * 3) for n in range(50)]
    for protocol in (0, 2, 5):
        (tmp_path / "r.p").write_bytes(pickle.dumps(refs, protocol))
        assert unpickle.load_refs(tmp_path / "r.p") == refs
    for marks, message in ((10_000 - 2, "no list of refs"), (10_000 - 1, "more than 10000 steps")):
        (tmp_path / "r.p").write_bytes(b"(" * marks + b"}.")  # marks need not be closed
        with pytest.raises(DataError, match=message):
            unpickle.load_refs(tmp_path / "r.p")


READ = (
    """
import os, sys, time
from support import files, unpickle
start = time.process_time()
try:
    getattr({"read_json": files, "load_refs": unpickle}[sys.argv[1]], sys.argv[1])(sys.argv[2])
    outcome = "read"
except files.DataError as error:
    outcome = str(error)
seconds = time.process_time() - start
"""
    + PEAK
    + """
print(f"{seconds:.2f} {peak:.3f} {outcome[-80:]}", flush=True)
os._exit(0)
"""
)


def read_alone(reader, path):
    """Reads a file in a process of its own, within 2 GiB and 10 s of processor time."""
    done = subprocess.run(
        [sys.executable, "-c", READ, reader, str(path)],
        cwd=Path(files.__file__).parents[1],
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    seconds, peak, outcome = done.stdout.strip().split(" ", 2)
    print(f"{path.name}: {path.stat().st_size / 1e6:.0f} MB, {seconds} s, {peak} GiB, {outcome}")
    path.unlink()
    assert float(peak) < 2 and float(seconds) < 10
    return outcome


def keyed(before, after):
    """A pickle of one dict with as many keys as there is room for."""
    keys = range(unpickle.MAX_REFS_BYTES // 8)
    blocks = (
        b"".join(b"U\x04" + struct.pack("<I", i) + b"N" for i in keys[n : n + 2**16])
        for n in keys[:: 2**16]
    )
    return before + b"".join(blocks) + after


PICKLES = {
    "lists": b"]",
    "dicts": b"}",
    "marks": b"(",
    "names for one thing": b"\x94",
    "names for dicts": b"}\x94",
    "strings": b"U\x02ab",
    "long characters": b"\x8c\x02\xc4\x80",
    "numbers": b"M\xff\xff",
    "dicts of one": b"}U\x01aNs",
    "lists of one": b"]Na",
    "nested lists": b"]a",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*PICKLES, "keys", "one ref again and again", "one long string, then dicts"]
)
def test_a_hostile_refs_file_is_refused_within_2_gib_and_10_s(tmp_path, name):
    path, room = tmp_path / "x.p", unpickle.MAX_REFS_BYTES - 1
    if name in PICKLES:
        content = b"]" + PICKLES[name] * (room // len(PICKLES[name]))
    elif name == "keys":
        content = keyed(b"}(", b"u.")[: unpickle.MAX_REFS_BYTES]
    elif name == "one ref again and again":
        one = pickle.dumps(ref(0, 0, sentences=["a"]), 2)[2:-1]
        content = b"](" + one + b"h\x00" * (unpickle.MAX_REFS_STEPS - 1000) + b"e."
    else:
        long = "\U0001f600".encode() + b"a" * (room - 10_000_009)
        content = b"X" + struct.pack("<I", len(long)) + long + b"}\x94" * 5_000_000
    path.write_bytes(content)
    assert read_alone("load_refs", path) != "read"


# ---- JSON ----------------------------------------------------------------------------------------

# Each: what stands before, again and again, and after in a hostile JSON file.
SHAPES = {
    "lists": (b"[", b"[],", b"0]"),
    "lists of one": (b"[", b"[1],", b"0]"),
    "dicts": (b"[", b"{},", b"0]"),
    "dicts of one": (b"[", b'{"a":1},', b"0]"),
    "dicts of seven": (b"[", b'{"a":1,"b":2,"c":3,"d":4,"e":5,"f":6,"g":7},', b"0]"),
    "strings": (b"[", b'"ab",', b"0]"),
    "long characters": (b"[", '"\u0100",'.encode(), b"0]"),
    "escapes": (b"[", b'"\\u0100",', b"0]"),
    "floats": (b"[", b"1.5,", b"0]"),
    "ints": (b"[", b"999,", b"0]"),
    "nested lists": (b"[", b"[" * 400 + b"]" * 400 + b",", b"0]"),
    "nested dicts": (b"[", b'{"a":' * 400 + b"1" + b"}" * 400 + b",", b"0]"),
    "one string": (b'"', b"a", b'"'),
    "one long string": ('"\U0001f600'.encode(), b"a", b'"'),
    "one escaped string": (b'"\\ud83d\\ude00', b"a", b'"'),
    "spaces": (b"[", b" ", b"0]"),
    "digits": (b"[1.", b"1", b"]"),
    "lines": (b'"', b"\\n", b'"'),
    "keys": None,
    "dicts of a new key": None,
}


def hostile_json(name, size):
    """-> about so many bytes of JSON."""
    if SHAPES[name]:
        before, again, after = SHAPES[name]
        return before + again * ((size - len(before + after)) // len(again)) + after
    between, (before, after) = (
        (b"1},{", (b"[{", b"1}]")) if name == "dicts of a new key" else (b"1,", (b"{", b"1}"))
    )
    keys = range(size // len(b'"%x":' % (size // 10) + between))
    # else 7 GB
    blocks = (between.join(b'"%x":' % i for i in keys[n : n + 2**16]) for n in keys[:: 2**16])
    return before + between.join(blocks) + after


@pytest.mark.parametrize("name", SHAPES)
def test_a_json_text_takes_no_more_memory_than_its_signs_say(monkeypatch, name):
    content = hostile_json(name, 200_000)
    gc.collect()
    tracemalloc.start()
    files.parse_json(content, "x.json")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < files.json_memory(content) + 4096  # the parser itself
    monkeypatch.setattr(files, "MAX_JSON_MEMORY", files.json_memory(content) - 1)
    with pytest.raises(DataError, match="x.json could take .* GiB of memory"):
        files.parse_json(content, "x.json")


def test_a_file_like_the_published_ones_is_within_the_limit(tmp_path, monkeypatch):
    """26,000 images and 209,000 annotations of 49 coordinates, the most of the three sets: a
    hundredth of them."""
    image = {
        "license": 5,
        "file_name": "COCO_train2014_000000098304.jpg",
        "coco_url": f"http://mscoco.org/{'x' * 36}",
        "height": 424,
        "width": 640,
        "date_captured": "2013-11-21 23:06:41",
        "id": 98304,
        "flickr_url": f"http://farm6.staticflickr.com/{'x' * 32}_z.jpg",
    }
    outline = [round(100.11 + 7.77 * n, 2) for n in range(49)]
    annotation = {
        "segmentation": [outline[:40], outline[40:]],
        "area": 197.29665,
        "iscrowd": 0,
        "image_id": 98304,
        "bbox": [263.87, 216.88, 21.13, 15.17],
        "category_id": 18,
        "id": 3007,
    }
    content = {"images": [image] * 260, "annotations": [annotation] * 2090}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    assert 1.1e6 < (tmp_path / "instances.json").stat().st_size < 1.4e6
    monkeypatch.setattr(files, "MAX_JSON_MEMORY", files.MAX_JSON_MEMORY // 100)
    assert files.read_json(tmp_path / "instances.json") == content


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_a_hostile_json_file_is_read_or_refused_within_2_gib_and_10_s(tmp_path, monkeypatch, name):
    """The longest that is parsed, and 512 MiB."""
    path, most = (
        tmp_path / "x.json",
        min(
            files.MAX_BYTES,
            2**23
            * files.MAX_JSON_MEMORY
            // files.json_memory(hostile_json(name, 2**23))
            * 99
            // 100,
        ),
    )
    path.write_bytes(hostile_json(name, most))
    outcome = read_alone("read_json", path)
    assert "GiB of memory" not in outcome
    path.write_bytes(hostile_json(name, files.MAX_BYTES))
    outcome = read_alone("read_json", path)
    assert "GiB of memory" in outcome or most == files.MAX_BYTES


# ---- Images and masks ----------------------------------------------------------------------------


def test_run_lengths_of_both_kinds_are_the_same_mask():
    mask = np.random.default_rng(0).random((23, 31)) < 0.3
    mask[0, 0] = True  # the first run is empty
    runs = [
        0,
        *np.diff(
            np.flatnonzero(np.diff(mask.ravel("F"), prepend=~mask[0, 0], append=~mask[-1, -1]))
        ).tolist(),
    ]
    compressed = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    for counts in (runs, compressed, compressed.encode()):
        assert (image_files.decode_mask({"size": [23, 31], "counts": counts}, 31, 23) == mask).all()


def test_a_long_run_is_read_as_pycocotools_wrote_it():
    mask = np.zeros((700, 900), np.uint8, order="F")
    mask[650:, 800:] = mask[3, 4] = 1
    counts = coco.encode(mask)["counts"].decode()
    assert (image_files.decode_mask({"size": [700, 900], "counts": counts}, 900, 700) == mask).all()


def pictures():
    """Name -> (PIL image with the left half dark and the right half light, the format to save it
    in)."""
    grey = np.full((17, 22), 51, np.uint8)
    grey[:, 11:] = 204
    rgb = Image.fromarray(grey).convert("RGB")
    clear = rgb.convert("RGBA")
    # the right half shows white
    clear.putalpha(Image.fromarray(np.where(grey == 51, 255, 0).astype(np.uint8)))
    return {
        "grey": (rgb.convert("L"), "PNG"),
        "grey jpeg": (rgb.convert("L"), "JPEG"),
        "cmyk": (rgb.convert("CMYK"), "JPEG"),
        "palette": (rgb.convert("P"), "PNG"),
        "gif": (rgb, "GIF"),
        "rgba": (clear, "PNG"),
        "la": (clear.convert("LA"), "PNG"),
        "1 bit": (Image.fromarray(grey > 100), "PNG"),
        "16 bits": (Image.fromarray(grey.astype(np.uint16) * 257), "PNG"),
        "16-bit tiff": (Image.fromarray(grey.astype(np.uint16) * 257), "TIFF"),
        "32-bit tiff": (Image.fromarray(grey.astype(np.int32) * 257), "TIFF"),
    }


@pytest.mark.parametrize("name", pictures())
def test_every_kind_of_pixel_becomes_rgb_of_the_same_brightness(tmp_path, name):
    image, form = pictures()[name]
    image.save(tmp_path / "picture", form)
    read = image_files.open_image(tmp_path / "picture")
    dark, light = {"1 bit": (0, 255), "rgba": (51, 255), "la": (51, 255)}.get(name, (51, 204))
    assert (read.mode, read.size) == ("RGB", (22, 17))
    assert np.abs(np.asarray(read)[:, :9].astype(int) - dark).max() <= 4
    assert np.abs(np.asarray(read)[:, 13:].astype(int) - light).max() <= 4


@pytest.mark.parametrize("orientation", TURNS)
def test_an_exif_turned_image_is_read_upright(tmp_path, orientation):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (17, 23, 3), np.uint8))
    save_turned(tmp_path / "x.png", upright, orientation)
    assert (np.asarray(image_files.open_image(tmp_path / "x.png")) == np.asarray(upright)).all()
    assert image_files.image_size(tmp_path / "x.png") == upright.size


def test_a_record_of_the_stored_size_means_the_stored_pixels(tmp_path):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (17, 23, 3), np.uint8))
    stored = save_turned(tmp_path / "x.png", upright, 6)
    assert (
        np.asarray(image_files.open_image(tmp_path / "x.png", (17, 23))) == np.asarray(stored)
    ).all()
    assert image_files.open_image(tmp_path / "x.png", (23, 17)).size == (23, 17)
    with pytest.raises(DataError, match="x.png is 23x17, its record says 24x17"):
        image_files.open_image(tmp_path / "x.png", (24, 17))


def png_head(width, height):
    """A PNG that claims a size and holds nothing."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def jpeg():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 70, 3), np.uint8)).save(
        buffer, "JPEG"
    )
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such image"),
        (b"", "cannot be read"),
        (b"GIF89a", "cannot be read"),
        (jpeg()[:1500], "truncated"),
        (png_head(10_001, 10_000), "more than 64 megapixels"),
        (png_head(50_000, 50_000), "cannot be read"),
        (png_head(30, 30), "cannot be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be read"),
    ],
)
def test_a_broken_huge_or_missing_image_is_a_data_error_naming_it(tmp_path, content, message):
    path = tmp_path / "picture.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        image_files.open_image(path)
    assert str(path) in str(error.value)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(position=st.integers(0, len(jpeg()) - 1), byte=st.integers(0, 255))
def test_a_flipped_byte_in_an_image_gives_pixels_or_a_data_error(tmp_path_factory, position, byte):
    path = tmp_path_factory.mktemp("flip") / "x.jpg"
    path.write_bytes(jpeg()[:position] + bytes([byte]) + jpeg()[position + 1 :])
    try:
        assert image_files.open_image(path).mode == "RGB"
    except DataError as error:
        assert "x.jpg" in str(error)


def test_preprocess_squashes_the_whole_image_and_normalises():
    image = Image.new("RGB", (60, 20), tuple(round(255 * m) for m in image_files.MEAN))
    image.paste((255, 255, 255), (30, 0, 60, 20))
    pixels = image_files.preprocess(image, 16)
    assert pixels.shape == (3, 16, 16) and pixels[:, :, :6].abs().max() < 0.02
    white = (1 - torch.tensor(image_files.MEAN)) / torch.tensor(image_files.STD)
    assert torch.allclose(pixels[:, :, 10:], white.view(3, 1, 1).expand(3, 16, 6), atol=0.01)


BOX = np.zeros((48, 64), bool)
BOX[10:26, 20:36] = True


def indexed(index, *palette):
    """uint8 (H, W) -> PIL image of mode P with these colours."""
    image = Image.fromarray(index.astype(np.uint8))
    image.putpalette([value for colour in palette for value in colour])
    return image


def cut_out(mode, seed=0):
    """An image whose ground is transparent and whose object has many colours."""
    pixels = np.random.default_rng(seed).integers(1, 256, (*BOX.shape, 3), np.uint8)
    image = Image.fromarray(pixels).convert("RGB" if mode == "RGBA" else "L").convert(mode)
    image.putalpha(Image.fromarray(BOX))
    return image


WHITE, BLACK, RED = (255, 255, 255), (0, 0, 0), (128, 0, 0)
GREY = Image.fromarray(np.where(BOX, 255, 0).astype(np.uint8))
RIGHT_MASKS = {
    "white first": (indexed(~BOX, WHITE, BLACK), {}),
    "white first, all of it": (indexed(np.zeros(BOX.shape), WHITE, BLACK), {}),
    "a label map": (indexed(BOX * 15, *[BLACK] * 15, RED), {}),
    "a label map with black labels": (indexed(BOX * 3, *[BLACK] * 10), {}),
    "a label map, its void transparent": (
        indexed(
            np.where(BOX, 1 + np.indices(BOX.shape)[1] % 2, np.eye(48, 64) * 3),
            BLACK,
            RED,
            WHITE,
            (9, 9, 9),
        ),
        {"transparency": 3},
    ),
    "an indexed cut-out": (indexed(BOX, WHITE, RED), {"transparency": 0}),
    "a black cut-out": (indexed(~BOX, BLACK, WHITE), {"transparency": 1}),
    "RGBA cut-out": (cut_out("RGBA"), {}),
    "LA cut-out": (cut_out("LA"), {}),
    "grey, transparent ground": (
        Image.fromarray(np.where(BOX, 7, 200).astype(np.uint8)),
        {"transparency": 200},
    ),
    "opaque": (GREY.convert("RGBA"), {}),
    "opaque LA": (GREY.convert("LA"), {}),
    "1 bit": (Image.fromarray(BOX), {}),
    "grey": (GREY, {}),
    "RGB": (GREY.convert("RGB"), {}),
    "16 bits": (Image.fromarray(BOX.astype(np.uint16)), {}),
}


@pytest.mark.parametrize("name", RIGHT_MASKS)
def test_a_png_mask_of_every_kind_is_read_as_it_looks(tmp_path, name):
    image, options = RIGHT_MASKS[name]
    image.save(tmp_path / "m.png", **options)
    expected = np.ones_like(BOX) if "all of it" in name else BOX
    assert (image_files.mask_file(tmp_path / "m.png", (64, 48)) == expected).all()


def test_a_white_mask_with_a_transparent_margin_keeps_its_black_ground(tmp_path):
    image = GREY.convert("RGBA")
    image.putalpha(Image.fromarray(np.indices(BOX.shape)[1] > 4))
    image.save(tmp_path / "m.png")
    assert (image_files.mask_file(tmp_path / "m.png", (64, 48)) == BOX).all()


@pytest.mark.parametrize(
    "form, image, options",
    [
        ("webp", GREY, {"lossless": True}),
        ("webp", cut_out("RGBA"), {"lossless": True}),
        ("tiff", GREY, {}),
        ("tiff", Image.fromarray(BOX), {"compression": "group4"}),
        ("tiff", GREY, {"compression": "tiff_lzw"}),
        ("tiff", cut_out("LA"), {}),
        ("tiff", Image.fromarray(BOX.astype(np.float32)), {}),
        ("tiff", indexed(~BOX, WHITE, BLACK), {}),
        ("tiff", Image.fromarray(BOX.astype(np.int32)), {}),
        ("bmp", GREY, {}),
        ("bmp", Image.fromarray(BOX), {}),
        ("bmp", indexed(~BOX, WHITE, BLACK), {}),
        ("gif", GREY, {}),
        ("pgm", GREY, {}),
    ],
)
def test_a_mask_may_have_any_lossless_format(tmp_path, form, image, options):
    image.save(tmp_path / f"m.{form}", **options)
    assert (image_files.mask_file(tmp_path / f"m.{form}", (64, 48)) == BOX).all()


@pytest.mark.parametrize(
    "form, options",
    [
        ("jpg", {}),
        ("webp", {"quality": 80}),
        ("webp", {"quality": 80, "exif": Image.Exif()}),
        ("tiff", {"compression": "jpeg"}),
    ],
)
def test_a_lossy_mask_gets_a_line_that_says_why_not(tmp_path, form, options):
    GREY.convert("RGB").save(tmp_path / f"m.{form}", **options)
    with pytest.raises(DataError, match="compressed with loss .*: save the mask as PNG"):
        image_files.mask_file(tmp_path / f"m.{form}", (64, 48))


@pytest.mark.parametrize("palette", [(WHITE, RED), (RED, WHITE), (WHITE, RED, BLACK)])
def test_a_palette_that_can_be_read_in_two_ways_asks(tmp_path, palette):
    indexed(BOX, *palette).save(tmp_path / "m.png")
    with pytest.raises(DataError, match=r"m\.png has a palette without black in use.*\?"):
        image_files.mask_file(tmp_path / "m.png", (64, 48))


@pytest.mark.parametrize("form", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", TURNS)
def test_size_and_pixels_of_a_turned_image_agree_in_every_format(tmp_path, form, orientation):
    upright = Image.new("RGB", (60, 90), "gray")
    upright.paste("red", (34, 5, 54, 30))
    path = tmp_path / f"scan.{form}"
    stored = save_turned(path, upright, orientation)
    assert image_files.image_size(path) == image_files.open_image(path).size == (60, 90)
    for frame, size in ((upright, (60, 90)), (stored, (90, 60))):
        if frame.size == size:
            read = np.asarray(image_files.open_image(path, size)).astype(int)
            assert np.abs(read - np.asarray(frame)).mean() < 4
    if form != "jpg":
        options = {"lossless": True} if form == "webp" else {}
        mask = Image.fromarray(np.asarray(upright)[..., 1] < 60)
        save_turned(path, mask.convert("L"), orientation, **options)
        assert (image_files.mask_file(path, (60, 90)) == np.asarray(mask)).all()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32-be"])
def test_text_of_windows_tools_becomes_utf_8(encoding):
    text = '{"sentence": "\u5de6\u306e\u732b"}\n{"sentence": "caf\xe9"}\n'
    assert files.as_utf8(text.encode(encoding), "in.jsonl") == text.encode()
    assert files.parse_json(text.split("\n")[0].encode(encoding), "x")["sentence"][0] == "\u5de6"


def test_text_cut_short_in_utf_16_is_a_data_error():
    with pytest.raises(DataError, match="in.jsonl is no text in utf-16"):
        files.as_utf8('{"a": 1}'.encode("utf-16")[:-1], "in.jsonl")


@pytest.mark.parametrize("value, number", [(7, 7), (7.0, 7), ("7", 7), ("-7", -7), ("007", 7)])
def test_a_number_is_read_where_it_is_plain(value, number):
    assert files.need({"id": value}, "id", int, "x") == number


@pytest.mark.parametrize(
    "value", [7.5, "7.5", "seven", "", " 7", float("nan"), float("inf"), 1e300, "9" * 50, None, [7]]
)
def test_what_is_no_plain_number_is_refused(value):
    with pytest.raises(DataError, match="x: id is missing or no int"):
        files.need({"id": value}, "id", int, "x")


# ---- Errors, writing -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied", "locked/config.json"),
        OSError(errno.ENOSPC, "No space left on device", "locked/config.json"),
    ],
)
def test_a_file_that_may_not_be_used_is_one_line(error, capsys):
    def main(args):
        raise error

    assert files.run(main, None) == 2
    printed = capsys.readouterr().err
    assert (
        printed.startswith("error: ")
        and printed.count("\n") == 1
        and "locked/config.json" in printed
    )


def test_an_error_cannot_write_to_the_terminal(capsys):
    def fail(args):
        raise DataError("two\nlines \x1b[31m")

    assert files.run(fail, None) == 2
    assert capsys.readouterr().err == "error: two lines ?[31m\n"


def test_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    files.write_text(tmp_path / "x", "old")
    monkeypatch.setattr(
        files, "sync", lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(DataError, match="x cannot be written .No space left"):
        files.write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old" and list(tmp_path.iterdir()) == [tmp_path / "x"]
    with pytest.raises(DataError, match="cannot be written"):
        files.write_text(tmp_path / "nowhere" / "x", "new")


def test_a_sentence_can_be_printed_where_the_terminal_lacks_its_letters():
    code = "from support import files\nfiles.run(lambda args: print('caf\\xe9 \\u5de6') or 0, None)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(files.__file__).parents[1],
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        capture_output=True,
    )
    assert done.stdout == b"caf\xe9 \\u5de6\n", done.stderr


def test_a_writable_place_is_made_and_an_unusable_one_named(tmp_path):
    files.check_writable(tmp_path / "new" / "x.png", picture=True)
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").touch()
    for path, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "x.doc", "no picture format"),
        (tmp_path / "file" / "x.png", "x.png cannot be written"),
    ):
        with pytest.raises(DataError, match=message):
            files.check_writable(path, picture=True)
