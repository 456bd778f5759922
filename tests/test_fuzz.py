"""Whatever stands in a file, reading it gives something valid or the project's own error, and never
anything else.

Bytes of good files are flipped, cut and doubled, and values of their records replaced: 1,020 files
in the default run, always the same ones; `pytest -m slow tests/test_fuzz.py` tries 10,200.
"""

import copy
import io
import json
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import data
from data import RefCOCO, Samples
from risclip import CONFIGS
from support import files, image_files
from support.check import doubts
from support.checkpoint import read_config, read_safetensors
from support.files import DataError

EXAMPLES = 170  # of each reader

ODD = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        1,
        2**31,
        2**63,
        10**400,
        0.5,
        float("nan"),
        float("inf"),
        1e300,
        "",
        "x",
        "../x",
        "/etc/passwd",
        "a\0b",
        "\ud800",
        "c.png",
        "testA",
        [],
        {},
        [[]],
        [[1, 2]],
        [0] * 99,
        [[9e9] * 6],
        {"counts": [1], "size": [1, 1]},
        {"counts": "1" * 99, "size": [19, 23]},
    ]
)
JSON = st.recursive(
    ODD | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)


@st.composite
def bytes_changed(draw, good):
    """A good file with bytes replaced, its end cut off, or a piece of it written over another."""
    content, position = bytearray(good), st.integers(0, len(good) - 1)
    for _ in range(draw(st.sampled_from([1, 1, 4]))):
        a, b, n = draw(position), draw(position), draw(st.integers(1, 40))
        kind = draw(st.sampled_from(["byte", "byte", "bit", "cut", "copy"]))
        if kind == "byte":
            content[a % len(content)] = draw(st.integers(0, 255))
        elif kind == "bit":
            content[a % len(content)] ^= 1 << n % 8
        elif kind == "copy":
            content[a : a + n] = content[b : b + n]
        content = content[:a] if kind == "cut" else content
        if not content:
            break
    return bytes(content)


@st.composite
def value_changed(draw, record, dump):
    """A good record with one to three of its values, at any depth, replaced or taken out, and
    dumped again."""
    record = json.loads(json.dumps(record))
    for _ in range(draw(st.sampled_from([1, 1, 3]))):
        place = record
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and draw(st.integers(0, 4)):
                place = place[key]
                continue
            if isinstance(place, dict) and not draw(st.integers(0, 4)):
                del place[key]
            else:
                # a later change must not reach into the strategy
                place[key] = copy.deepcopy(draw(JSON))
            break
    return dump(record)


def as_json(record):
    return json.dumps(record).encode()


def read_all(root, dataset):
    """Opens every split's sentences and makes every sample."""
    opened = RefCOCO(root, dataset, "train")
    doubts(opened)
    samples = Samples(opened, 8)
    for item in data.plan_eval(opened, 3)[0]:
        sample = samples[item]
        if "broken" not in sample:
            assert (
                sample["masks"].shape == (len(item[1]), 8, 8)
                and sample["masks"].dtype == torch.bool
            )
            assert sample["image"].shape == (3, 8, 8) and sample["image"].isfinite().all()
            assert all(text.strip() for text in sample["texts"])


def world(folder):
    """A RefCOCO of two images -> its refs and instances, as records."""
    images = folder / "train2014"
    images.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (23, 19), "red").save(images / name)
    refs = [
        {
            "ref_id": i,
            "ann_id": 10 + i,
            "image_id": 1 + i % 2,
            "split": "train",
            "file_name": "x",
            "sentences": [
                {"sent": f"thing {i}", "raw": "Thing", "sent_id": 2 * i + k} for k in range(2)
            ],
        }
        for i in range(3)
    ]
    shapes = [
        [[2, 3, 9, 3, 9, 12]],
        {"size": [19, 23], "counts": [40, 6, 391]},
        [[1, 1, 5, 1, 5, 5], [2, 2, 8, 2, 8, 9]],
    ]
    instances = {
        "images": [
            {"id": 1, "file_name": "a.png", "width": 23, "height": 19},
            {"id": 2, "file_name": "b.png", "width": 23, "height": 19},
        ],
        "annotations": [
            {"id": 10 + i, "image_id": 1 + i % 2, "iscrowd": 0, "segmentation": s}
            for i, s in enumerate(shapes)
        ],
    }
    (folder / "refcoco").mkdir()
    (folder / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs, 2))
    (folder / "refcoco" / "instances.json").write_bytes(as_json(instances))
    return refs, instances


def a_picture(form):
    picture = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (19, 23, 3), np.uint8)).save(
        picture, form
    )
    return picture.getvalue()


# Each: a folder -> the file to be changed, files to put in its place, and what reads it.


def refs(folder):
    good, _ = world(folder)
    path = folder / "refcoco" / "refs(unc).p"
    changed = value_changed(good, lambda r: pickle.dumps(r, 2))
    return path, bytes_changed(path.read_bytes()) | changed, lambda: read_all(folder, "refcoco")


def instances(folder):
    _, good = world(folder)
    path = folder / "refcoco" / "instances.json"
    return (
        path,
        bytes_changed(as_json(good)) | value_changed(good, as_json),
        lambda: read_all(folder, "refcoco"),
    )


def own_list(folder):
    Image.new("RGB", (23, 19), "red").save(folder / "a.png")
    Image.fromarray(np.eye(19, 23) > 0).save(folder / "m.png")
    good = [
        {"image": "a.png", "mask": "m.png", "sentences": ["one", "two"], "split": "train"},
        {
            "image": "a.png",
            "polygons": [[2, 3, 9, 3, 9, 12]],
            "sentences": ["three"],
            "split": "train",
        },
    ]
    path = folder / "own.json"
    return (
        path,
        bytes_changed(as_json(good)) | value_changed(good, as_json),
        lambda: read_all(folder, str(path)),
    )


def picture(folder):
    path = folder / "picture"
    return (
        path,
        st.one_of(*(bytes_changed(a_picture(form)) for form in image_files.FORMATS)),
        lambda: (image_files.image_size(path), image_files.open_image(path).getpixel((0, 0))),
    )


def config(folder):
    path = folder / "config.json"
    good = json.loads(json.dumps(dict(vars(CONFIGS["tiny"]), clip_fingerprint="0" * 16)))
    return (
        path,
        bytes_changed(as_json(good)) | value_changed(good, as_json),
        lambda: read_config(path, CONFIGS),
    )


def weights(folder):
    path = folder / "model.safetensors"
    save_file({"a": torch.ones(3, 2), "b": torch.ones(4, dtype=torch.float16)}, path)
    return path, bytes_changed(path.read_bytes()), lambda: read_safetensors(path)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("reader", [refs, instances, own_list, picture, config, weights])
def test_a_changed_file_is_read_or_refused(tmp_path, reader, times):
    path, files, read = reader(tmp_path)
    outcomes = {"read": 0, "refused": 0}

    @settings(
        max_examples=EXAMPLES * times,
        derandomize=True,
        deadline=10_000,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(files)
    def attempt(content):
        path.write_bytes(content)
        try:
            read()
            outcomes["read"] += 1
        except DataError as error:
            assert str(error)
            outcomes["refused"] += 1

    attempt()
    print(reader.__name__, outcomes)
    # some are near enough to good files, some are not
    assert min(outcomes.values()) > 0.02 * EXAMPLES


@pytest.mark.parametrize("reader", [refs, instances, own_list, config])
def test_an_absurd_size_or_nesting_is_refused(tmp_path, reader):
    path, _, read = reader(tmp_path)
    path.touch()
    os.truncate(path, files.MAX_BYTES + 1)  # a hole: it takes no disk
    with pytest.raises(DataError, match="MiB: is it the right file"):
        read()
    depth = 1_000_000
    for content in (b"[" * depth, b'{"a":' * depth):
        path.write_bytes(content)
        with pytest.raises(DataError):
            read()


def test_a_nesting_that_can_be_read_but_not_printed_is_refused(tmp_path):
    refs, instances = world(tmp_path)
    instances["annotations"][0]["segmentation"] = {"size": "here", "counts": ""}
    content = as_json(instances).replace(b'"here"', b"[" * 850 + b"]" * 850)
    (tmp_path / "refcoco" / "instances.json").write_bytes(content)
    opened = RefCOCO(tmp_path, "refcoco", "train")

    def deeper(frames):  # as far down as a loader's worker and more
        return deeper(frames - 1) if frames else opened.mask(0)

    with pytest.raises(DataError, match="recursion"):
        deeper(150)
