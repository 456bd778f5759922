"""The readers, their traps, and batches. Small real files in tmp_path; photographs where there are
some."""

import json
import os
import pickle
import pickletools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

import data
from data import RefCOCO, Samples
from miniature.shapes import write_shapes
from support import files, image_files, unpickle
from support.check import doubts
from support.files import DataError

# pycocotools' own, with numpy 2
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation", "ignore:This DataLoader will create"
)


SIZES = {1: (31, 23), 2: (29, 37), 3: (41, 19)}  # image id -> width, height


def box(x, y, w, h):
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def ref(ref_id, image_id, split="train", sentences=("the {} thing",), **changes):
    return {
        "ref_id": ref_id,
        "ann_id": 100 + ref_id,
        "image_id": image_id,
        "category_id": 1,
        "split": split,
        "file_name": f"COCO_{image_id}_{ref_id}.jpg",
        "sent_ids": [10 * ref_id + k for k in range(len(sentences))],
        "sentences": [
            {
                "sent": s.format(ref_id),
                "raw": s.format(ref_id).upper(),
                "sent_id": 10 * ref_id + k,
                "tokens": s.split(),
            }
            for k, s in enumerate(sentences)
        ],
    } | changes


REFS = [
    ref(0, 1, sentences=("left {}", "leftmost {}")),
    ref(1, 1),
    ref(2, 2, "val"),
    ref(3, 3),
    ref(4, 2, "val"),
]


def write_set(root, name="refcoco", refs=REFS, segmentations=(), images=SIZES, dump=None):
    """A data set in REFER layout. segmentations: {ref_id: segmentation}, otherwise a box."""
    segmentations = dict(segmentations)
    (root / name).mkdir(parents=True)
    folder = root / ("images/shapes" if name == "shapes" else "images/mscoco/images/train2014")
    folder.mkdir(parents=True, exist_ok=True)
    for i, size in images.items():
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), np.uint8)).save(
            folder / f"{i}.png"
        )
    write_instances(root, name, refs, segmentations, images)
    path = root / name / f"refs({data.REFS_BY[name]}).p"
    path.write_bytes((dump or python2)(refs))
    return root


def write_instances(root, name, refs, segmentations, images=SIZES):
    (root / name / "instances.json").write_text(
        json.dumps(
            {
                "images": [
                    {"id": i, "file_name": f"{i}.png", "width": w, "height": h}
                    for i, (w, h) in images.items()
                ],
                "annotations": [
                    {
                        "id": r.get("ann_id"),
                        "image_id": r["image_id"],
                        "iscrowd": 0,
                        "area": 1.0,
                        "category_id": 1,
                        "segmentation": segmentations.get(
                            r["ref_id"], [box(2 + r["ref_id"], 3, 8, 9)]
                        ),
                    }
                    for r in refs
                ],
            }
        )
    )


def python2(value):
    """Pickles as Python 2 did by default: protocol 0, text, byte strings, and every int above 99 as
    a long."""

    def write(value):
        if isinstance(value, dict):
            return b"(d" + b"".join(write(k) + write(v) + b"s" for k, v in value.items())
        if isinstance(value, list):
            return b"(l" + b"".join(write(v) + b"a" for v in value)
        if isinstance(value, str):
            return b"S" + repr(value.encode("latin1"))[1:].encode() + b"\n"
        return b"L%dL\n" % value if value > 99 else b"I%d\n" % value

    return write(value) + b"."


# ---- Refs ----------------------------------------------------------------------------------------


def test_no_world_is_written_that_would_not_be_read(tmp_path, capsys):
    for images in (-5, 0, data.MAX_SHAPES + 1):
        args = data.parse_args(["shapes", "--root", str(tmp_path), "--images", str(images)])
        assert files.run(data.main, args) == 2 and "give 1 to 20000" in capsys.readouterr().err
    write_shapes(tmp_path, 40, seed=0, limits=0)
    path = tmp_path / "shapes" / "refs(shapes).p"
    steps = sum(1 for _ in pickletools.genops(path.read_bytes())) / 40
    assert data.MAX_SHAPES * steps < 0.9 * unpickle.MAX_REFS_STEPS
    assert data.MAX_SHAPES * path.stat().st_size / 40 < 0.9 * unpickle.MAX_REFS_BYTES


def test_a_list_of_too_many_sentences_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_SENTENCES", 3)
    write_own(tmp_path, A, A | {"sentences": ["three"]})
    assert len(RefCOCO(tmp_path, "own.json", "train")) == 3
    with pytest.raises(DataError, match="own.json holds more than 3 sentences"):
        RefCOCO(tmp_path, write_own(tmp_path, A, A), "train")


# GiB of the process alone: getrusage would count what pytest's had taken before.
PEAK = """
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**20
"""


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    which=st.sampled_from(["refs(unc).p", "instances.json"]),
    position=st.floats(0, 1),
    byte=st.integers(0, 255),
)
def test_a_flipped_byte_gives_a_data_set_or_a_data_error(tmp_path_factory, which, position, byte):
    root = write_set(tmp_path_factory.mktemp("flip"))
    path = root / "refcoco" / which
    content = bytearray(path.read_bytes())
    content[int(position * (len(content) - 1))] = byte
    path.write_bytes(content)
    try:
        dataset = RefCOCO(root, "refcoco", "train")
        for item in data.plan_eval(dataset, 3)[0]:
            Samples(dataset, 16)[item]
    except DataError as error:
        assert str(error)


# ---- RefCOCO -------------------------------------------------------------------------------------


def test_sentences_refs_and_images_are_linked_in_file_order(tmp_path):
    dataset = RefCOCO(write_set(tmp_path), "refcoco", "train")
    assert [(s.sent_id, s.text) for s in dataset.sentences] == [
        (0, "left 0"),
        (1, "leftmost 0"),
        (10, "the 1 thing"),
        (30, "the 3 thing"),
    ]
    assert [dataset.refs[s.ref].ref_id for s in dataset.sentences] == [0, 0, 1, 3]
    assert [dataset.images[s.image].id for s in dataset.sentences] == [1, 1, 1, 3]
    assert [r.split for r in dataset.refs] == ["train"] * 3
    assert len(dataset) == 4


def test_the_image_record_names_the_file_not_the_ref(tmp_path):
    dataset = RefCOCO(write_set(tmp_path), "refcoco", "train")
    assert dataset.path(1).name == "3.png"
    assert dataset.image(1).size == SIZES[3]


@pytest.mark.parametrize("place", ["images/mscoco/images/train2014", "train2014"])
def test_images_are_found_in_either_place(tmp_path, place):
    write_set(tmp_path)
    os.renames(tmp_path / "images/mscoco/images/train2014", tmp_path / "aside")
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "aside").rename(tmp_path / place)
    assert RefCOCO(tmp_path, "refcoco", "train").image(0).size == SIZES[1]


def test_a_missing_data_root_names_every_path_tried(tmp_path):
    with pytest.raises(DataError) as error:
        RefCOCO(tmp_path / "nowhere", "refcocog", "val")
    for tried in (
        "refcocog/refs(umd).p",
        "refcocog/instances.json",
        "mscoco/images/train2014",
        "nowhere/train2014",
    ):
        assert tried in str(error.value)


def test_opening_reads_no_image_and_a_missing_one_is_named_when_asked_for(tmp_path):
    write_set(tmp_path)
    for file in (tmp_path / "images/mscoco/images/train2014").iterdir():
        file.unlink()
    dataset = RefCOCO(tmp_path, "refcoco", "train")
    with pytest.raises(DataError, match=r"image 1 is missing, tried .*train2014/1\.png"):
        dataset.image(0)


def without(record, key):
    return {k: v for k, v in record.items() if k != key}


@pytest.mark.parametrize(
    "bad, message",
    [
        (ref(9, 7), "ref 9: its image 7 is not in"),
        (ref(9, 1) | {"ann_id": 101}, "ref 9: its annotation 101 is of another image than 1"),
        (ref(9, 1, sentences=(" ",)), "ref 9: sentence 90 is empty"),
        (without(ref(9, 1), "ann_id"), "ref number 1: ann_id is missing or no int"),
        (ref(9, 1) | {"image_id": "one"}, "ref number 1: image_id is missing or no int"),
        (ref(9, 1) | {"ref_id": 2**70}, "ref number 1: ref_id"),
        (ref(9, 1, sentences=()) | {"sentences": [3]}, "ref number 1: sent_id is missing"),
        (
            ref(9, 1, sentences=()) | {"sentences": "one"},
            "ref number 1: sentences is missing or no list",
        ),
    ],
)
def test_a_bad_ref_is_named(tmp_path, bad, message):
    write_set(tmp_path, refs=[REFS[0], bad], dump=lambda r: pickle.dumps(r, 2))
    if bad.get("ann_id") == 101:
        write_instances(tmp_path, "refcoco", [REFS[0], ref(1, 2)], {})
    with pytest.raises(DataError, match=message):
        RefCOCO(tmp_path, "refcoco", "train")


def test_a_ref_without_its_annotation_is_named(tmp_path):
    write_set(tmp_path)
    write_instances(tmp_path, "refcoco", REFS[1:], {})
    with pytest.raises(DataError, match="ref 0: its annotation 100 is not in .*instances.json"):
        RefCOCO(tmp_path, "refcoco", "train")
    assert len(RefCOCO(tmp_path, "refcoco", "val")) == 2  # not its split


def test_sent_falls_back_to_raw(tmp_path):
    only_raw = ref(0, 1)
    del only_raw["sentences"][0]["sent"]
    assert (
        RefCOCO(write_set(tmp_path, refs=[only_raw]), "refcoco", "train").sentences[0].text
        == "THE 0 THING"
    )


@pytest.mark.parametrize(
    "dataset, split, message",
    [
        ("refcoco", "test", "no split 'test': give train, val, testA, testB"),
        ("refcocog", "testA", "train, val, test$"),
        ("combined", "val", "only train: evaluate on refcoco, refcoco"),
        ("coco", "train", "--dataset coco: give refcoco"),
        ("refcoco", "testA", "no sentence of split 'testA'"),
        ("mine.json", "train", "mine.json: no such file"),
    ],
)
def test_an_unknown_data_set_or_split_says_which_there_are(tmp_path, dataset, split, message):
    with pytest.raises(DataError, match=message):
        RefCOCO(write_set(tmp_path), dataset, split)


@pytest.mark.parametrize("name", ["../1.png", "/etc/passwd", "a/b.png", "..", "", "x\0.png"])
def test_an_image_record_names_a_plain_file(tmp_path, name):
    write_set(tmp_path)
    path = tmp_path / "refcoco/instances.json"
    content = json.loads(path.read_text())
    content["images"][0]["file_name"] = name
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="image 1: file_name .* is no plain file name"):
        RefCOCO(tmp_path, "refcoco", "train")


@pytest.mark.parametrize("target", ["../../../../secret.png", "ABSOLUTE", "1.png"])
def test_a_link_cannot_lead_out_of_the_image_folder_but_the_folder_may_be_one(tmp_path, target):
    root = write_set(tmp_path / "root")
    Image.new("RGB", SIZES[1]).save(tmp_path / "secret.png")
    folder = root / "images/mscoco/images/train2014"
    (folder / "1.png").unlink()
    (folder / "1.png").symlink_to(target.replace("ABSOLUTE", str(tmp_path / "secret.png")))
    with pytest.raises(
        DataError, match="image 1: path '1.png'.*(leaves the folder .*train2014|[Ll]oop)"
    ):
        RefCOCO(root, "refcoco", "train").image(0)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert RefCOCO(root, "refcoco", "train").image(1).size == SIZES[3]


@pytest.mark.parametrize("number", [str, float], ids=["text", "float"])
def test_ids_and_sizes_as_exporters_write_them_are_read(tmp_path, number):
    write_set(tmp_path)
    path = tmp_path / "refcoco/instances.json"
    content = json.loads(path.read_text())
    for record in (*content["images"], *content["annotations"]):
        record |= {
            k: number(record[k]) for k in ("id", "image_id", "width", "height") if k in record
        }
    path.write_text(json.dumps(content))
    dataset = RefCOCO(tmp_path, "refcoco", "train")
    assert [i.id for i in dataset.images] == [1, 3] and dataset.mask(0).shape == SIZES[1][::-1]
    refs = [r | {k: number(r[k]) for k in ("ref_id", "ann_id", "image_id")} for r in REFS]
    (tmp_path / "refcoco/refs(unc).p").write_bytes(pickle.dumps(refs))
    assert RefCOCO(tmp_path, "refcoco", "train").refs[1][:3] == dataset.refs[1][:3]


def test_ids_that_are_no_numbers_are_named(tmp_path):
    write_set(tmp_path)
    path = tmp_path / "refcoco/instances.json"
    content = json.loads(path.read_text())
    for record in content["images"]:
        record["id"] = f"img_{record['id']}"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="its image 1 is not in .*no integers, 'img_1' for one"):
        RefCOCO(tmp_path, "refcoco", "train")


@pytest.mark.parametrize(
    "content",
    [b"", b"[1, 2", b"{}", b'{"annotations": [], "images": 3}', b"[" * 100_000, b"\xff\xfe"],
)
def test_broken_instances_are_a_data_error_naming_the_file(tmp_path, content):
    write_set(tmp_path)
    (tmp_path / "refcoco/instances.json").write_bytes(content)
    with pytest.raises(DataError, match="instances.json"):
        RefCOCO(tmp_path, "refcoco", "train")


def test_shapes_sentences_have_their_kind_and_others_none(tmp_path):
    with_kind = ref(0, 1)
    with_kind["sentences"][0]["kind"] = "relation"
    write_set(tmp_path, "shapes", [with_kind])
    assert RefCOCO(tmp_path, "shapes", "train").sentences[0].kind == "relation"
    assert RefCOCO(write_set(tmp_path / "other"), "refcoco", "train").sentences[0].kind is None


def test_the_union_has_no_image_of_any_val_or_test_split(tmp_path):
    write_set(tmp_path, "refcoco", [ref(0, 1), ref(1, 2, "val"), ref(2, 3)])
    write_set(tmp_path, "refcoco+", [ref(0, 1), ref(1, 2), ref(2, 3)])
    write_set(tmp_path, "refcocog", [ref(0, 1), ref(1, 2), ref(2, 3, "test"), ref(3, 1)])
    union = RefCOCO(tmp_path, "combined", "train")
    assert [i.id for i in union.images] == [1]
    assert [s.sent_id for s in union.sentences] == [
        "refcoco/0",
        "refcoco+/0",
        "refcocog/0",
        "refcocog/30",
    ]
    assert union.image(0).size == SIZES[1]
    assert union.mask(3).sum() == union.mask(0).sum() > 0


OPEN = (
    """
import json, sys, time, data
seconds = []
for _ in range(2):
    start = time.process_time()
    d = data.RefCOCO(sys.argv[1], "refcoco", "train")
    seconds.append(time.process_time() - start)
"""
    + PEAK
    + """
print(json.dumps([len(d.refs), len(d), len(d.images), seconds, peak]))
"""
)


@pytest.mark.slow
def test_a_set_of_refcocos_size_opens_in_10_seconds_and_2_gib(tmp_path):
    """50,000 refs with polygons of 40 points, 142,000 sentences, 20,000 images: processor time, and
    not more the second
    time."""
    rng, refs, annotations = np.random.default_rng(0), [], []
    for n in range(50_000):
        texts = [
            {
                "sent_id": 3 * n + k,
                "sent": f"the {k} thing of {n} on the left",
                "raw": f"The {k} thing of {n} ...",
                "tokens": ["the", "thing", "on", "the", "left"],
            }
            for k in range(3 if n < 42_000 else 2)
        ]
        refs.append(
            {
                "ref_id": n,
                "ann_id": n,
                "image_id": n % 20_000,
                "split": "train",
                "file_name": "no.jpg",
                "category_id": 1,
                "sentences": texts,
                "sent_ids": [t["sent_id"] for t in texts],
            }
        )
        annotations.append(
            {
                "id": n,
                "image_id": n % 20_000,
                "iscrowd": 0,
                "bbox": [0, 0, 9, 9],
                "category_id": 1,
                "segmentation": [rng.uniform(0, 480, 80).round(2).tolist()],
            }
        )
    images = [
        {"id": i, "file_name": f"COCO_train2014_{i:012}.jpg", "width": 640, "height": 480}
        for i in range(20_000)
    ]
    for folder in ("refcoco", "train2014"):
        (tmp_path / folder).mkdir()
    (tmp_path / "refcoco" / "instances.json").write_text(
        json.dumps({"images": images, "annotations": annotations})
    )
    (tmp_path / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=0))
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(tmp_path)],
        cwd=Path(data.__file__).parent,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    *counts, (first, second), peak = json.loads(done.stdout)
    assert counts == [50_000, 142_000, 20_000]
    assert first < 10 and second < 1.5 * first and peak < 2


# ---- Masks ---------------------------------------------------------------------------------------


def test_overlapping_polygons_are_a_union(tmp_path):
    write_set(tmp_path, segmentations={0: [box(2, 2, 10, 10), box(7, 7, 10, 10)]})
    dataset = RefCOCO(tmp_path, "refcoco", "train")
    expected = np.zeros(SIZES[1][::-1], bool)
    expected[2:12, 2:12] = expected[7:17, 7:17] = True
    assert dataset.mask(0).dtype == bool
    assert (dataset.mask(0) == expected).all()  # the doubly covered 5 x 5 pixels too


@pytest.mark.parametrize(
    "segmentation",
    [
        [],
        [[]],
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4], [5, 6]],
        [[1, 2, 3, 4, 5, 6, 7]],
        [[1, 1, 5, float("nan"), 5, 5]],
        [[1, 1, 1e9, 1, 5, 5]],
        [[0, 0, float("inf"), 5, 5, 5]],
        [["a"] * 6],
        [{}],
        [[[1, 2], [3, 4], [5, 6]]],
        None,
        7,
        "x",
        [[0, 0] * 1_000_000],
        [[0, 0, 31, 22] * 40_000],
        [[0, 0, 1, 0, 1, 1]] * 20_000,
        {},
        {"counts": [713]},
        {"size": [23, 31]},
        {"size": [31, 23], "counts": [713]},
        {"size": [23, 31], "counts": [5, 5]},
        {"size": [23, 31], "counts": [0, 10**12]},
        {"size": [23, 31], "counts": [-1, 714]},
        {"size": [23, 31], "counts": [1, 713]},
        {"size": [23, 31], "counts": ["713"]},
        {"size": [23, 31], "counts": "52"},
        {"size": [23, 31], "counts": "o" * 1000},
        {"size": [23, 31], "counts": ""},
        {"size": [23, 31], "counts": "é"},
    ],
)
def test_a_senseless_segmentation_is_a_data_error_naming_the_annotation(tmp_path, segmentation):
    dataset = RefCOCO(write_set(tmp_path, segmentations={0: segmentation}), "refcoco", "train")
    with pytest.raises(DataError, match="ref 0, annotation 100: "):
        dataset.mask(0)
    assert dataset.mask(1).any()


def runs_of(mask):
    """bool (H, W) -> COCO's uncompressed run lengths of it."""
    flat = mask.ravel("F")
    ends = [*np.flatnonzero(flat[1:] != flat[:-1]) + 1, len(flat)]
    runs = np.diff(ends, prepend=0).tolist()
    return {"size": list(mask.shape), "counts": [0, *runs] if flat[0] else runs}


def test_a_list_of_run_lengths_is_their_union(tmp_path):
    one, two = np.zeros((2, 23, 31), bool)
    one[2:9, 3:12] = two[5:20, 10:30] = True
    segmentations = {
        0: [runs_of(one)],
        1: [runs_of(one), runs_of(two)],
        3: [runs_of(one) | {"size": [23.0, 31.0]}],
    }
    dataset = RefCOCO(
        write_set(tmp_path, segmentations=segmentations, images={i: SIZES[1] for i in SIZES}),
        "refcoco",
        "train",
    )
    for ref, mask in enumerate((one, one | two, one)):
        assert (dataset.mask(ref) == mask).all()


def test_a_stray_polygon_beside_good_ones_is_left_out_and_counted(tmp_path, capsys):
    good = box(2, 3, 8, 9)
    segmentations = {0: [good, [5, 5, 9, 9]], 1: [[], good, [4.5, 4.5]], 3: [[1, 2, 3, 4]]}
    dataset = RefCOCO(write_set(tmp_path, segmentations=segmentations), "refcoco", "train")
    assert dataset.mask(0).sum() == dataset.mask(1).sum() == 72
    with pytest.raises(DataError, match="ref 3, annotation 103: a polygon of fewer than 3 points"):
        dataset.mask(2)
    printed = check(capsys, "--root", tmp_path, "--dataset", "refcoco")[1].out
    assert "polygons of fewer than 3 points, left out: 3, the first is of ref 0\n" in printed


# ---- Turned images -----------------------------------------------------------------------------

TURNS = {
    1: None,
    2: Image.FLIP_LEFT_RIGHT,
    3: Image.ROTATE_180,
    4: Image.FLIP_TOP_BOTTOM,
    5: Image.TRANSPOSE,
    6: Image.ROTATE_90,
    7: Image.TRANSVERSE,
    8: Image.ROTATE_270,
}


def save_turned(path, upright, orientation, **options):
    """Saves an image as a camera held so would: turned pixels, and the tag that turns them back."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright if TURNS[orientation] is None else upright.transpose(TURNS[orientation])
    stored.save(path, exif=exif, **options)
    return stored


# ---- One's own data ------------------------------------------------------------------------------


def write_own(folder, *entries):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (17, 23, 3), np.uint8)).save(folder / "a.png")
    Image.fromarray(rng.integers(0, 256, (13, 11, 3), np.uint8)).save(folder / "b.png")
    mask = np.zeros((13, 11), np.uint8)
    mask[2:5, 3:9] = 1
    Image.fromarray(mask).save(folder / "mask.png")
    (folder / "own.json").write_text(json.dumps(list(entries)))
    return folder / "own.json"


A = {"image": "a.png", "polygons": [box(2, 3, 4, 5)], "sentences": ["one", "two"]}
B = {"image": "b.png", "mask": "mask.png", "sentences": ["three"]}


def test_own_json_gives_the_same_records_as_refcoco(tmp_path):
    dataset = RefCOCO(
        tmp_path, write_own(tmp_path / "own", A, B, A | {"sentences": ["four"]}), "val"
    )
    assert [(s.sent_id, s.text, s.ref, s.image) for s in dataset.sentences] == [
        (0, "one", 0, 0),
        (1, "two", 0, 0),
        (2, "three", 1, 1),
        (3, "four", 2, 0),
    ]
    assert dataset.image(0).size == dataset.mask(0).shape[::-1] == (23, 17)
    assert dataset.mask(0).sum() == 20
    assert dataset.mask(1).sum() == 18


def test_a_name_too_long_for_the_disk_is_a_missing_image(tmp_path):
    dataset = RefCOCO(tmp_path, write_own(tmp_path, A | {"image": "a" * 300}), "train")
    with pytest.raises(DataError, match="is missing, tried"):
        dataset.image(0)


def test_a_sentence_can_always_be_printed(tmp_path):
    path = write_own(tmp_path, A | {"sentences": ["a \ud800 b"]})
    assert RefCOCO(tmp_path, path, "train").sentences[0].text == "a ? b"


def test_own_json_splits(tmp_path):
    path = write_own(tmp_path, A | {"split": "train"}, B | {"split": "test"})
    # as in the whole file
    assert [s.sent_id for s in RefCOCO(tmp_path, path, "test").sentences] == [2]
    with pytest.raises(DataError, match="no split 'val': give test, train"):
        RefCOCO(tmp_path, path, "val")
    with pytest.raises(DataError, match="some entries have a split"):
        RefCOCO(tmp_path, write_own(tmp_path, A | {"split": "train"}, B), "train")


def test_own_json_may_name_files_in_the_data_root(tmp_path):
    path = write_own(tmp_path / "own", A)
    (tmp_path / "own/a.png").rename(tmp_path / "a.png")
    assert RefCOCO(tmp_path, path, "train").image(0).size == (23, 17)


@pytest.mark.parametrize("key", ["image", "mask"])
@pytest.mark.parametrize(
    "name",
    ["../secret.png", "x/../../secret.png", "link.png", "folder/secret.png", "a\0b", "ABSOLUTE"],
)
def test_a_path_in_own_json_cannot_leave_its_folder(tmp_path, key, name):
    Image.new("L", (11, 13)).save(tmp_path / "secret.png")
    name = name.replace("ABSOLUTE", str(tmp_path / "secret.png"))
    path = write_own(tmp_path / "own", B | {key: name})
    (tmp_path / "own/link.png").symlink_to("../secret.png")
    (tmp_path / "own/folder").symlink_to("..")
    with pytest.raises(DataError, match="entry 0: path"):
        RefCOCO(tmp_path / "own", path, "train").image(0)


def test_outside_allows_links_into_another_folder(tmp_path, capsys):
    path = write_own(tmp_path / "own", B)
    (tmp_path / "cache").mkdir()
    for name, blob in (("b.png", "3f786850"), ("mask.png", "89e6c98d")):
        (tmp_path / "own" / name).rename(tmp_path / "cache" / blob)
        (tmp_path / "own" / name).symlink_to(f"../cache/{blob}")
    with pytest.raises(DataError, match="leaves the folder .*--outside"):
        RefCOCO(tmp_path / "own", path, "train")
    dataset = RefCOCO(tmp_path / "own", path, "train", outside=True)
    assert dataset.image(0).size == (11, 13) and dataset.mask(0).sum() == 18
    code, printed = check(capsys, "--root", tmp_path / "own", "--dataset", path, "--outside")
    assert code == 0 and "complete" in printed.out


@pytest.mark.parametrize(
    "entry, message",
    [
        (without(A, "sentences"), "sentences is missing"),
        (without(A, "image"), "image is missing"),
        (A | {"sentences": [""]}, "sentence 0 is empty"),
        (A | {"mask": "mask.png"}, "give either"),
        (without(A, "polygons"), "give either"),
    ],
)
def test_a_bad_entry_of_own_json_is_named(tmp_path, entry, message):
    with pytest.raises(DataError, match=rf"own\.json: entry 1: .*{message}"):
        RefCOCO(tmp_path, write_own(tmp_path, A, entry), "train")


def test_a_mask_file_of_the_wrong_size_names_both_sizes(tmp_path):
    dataset = RefCOCO(tmp_path, write_own(tmp_path, A, B | {"image": "a.png"}), "train")
    with pytest.raises(DataError, match=r"mask\.png is 11x13, its image 23x17"):
        dataset.mask(1)


def test_a_mask_file_of_any_mode_is_where_it_is_not_zero(tmp_path):
    dataset = RefCOCO(tmp_path, write_own(tmp_path, B), "train")
    mask = dataset.mask(0)
    assert mask.sum() == 18
    values = np.where(mask, 255, 0).astype(np.uint8)
    palette = Image.fromarray(mask.astype(np.uint8) * 3)
    palette.putpalette([0] * 30)
    for image in (
        Image.fromarray(values),
        Image.fromarray(mask),
        Image.fromarray(values.astype(np.uint16)),
        palette,
        Image.fromarray(values).convert("RGB"),
        Image.fromarray(values).convert("RGBA"),
    ):
        image.save(tmp_path / "mask.png")
        assert (dataset.mask(0) == mask).all(), image.mode


def test_polygons_of_an_exif_turned_photo_are_in_its_upright_frame(tmp_path):
    path = write_own(tmp_path, A)
    save_turned(tmp_path / "a.png", Image.open(tmp_path / "a.png").copy(), 6)
    dataset = RefCOCO(tmp_path, path, "train")
    assert dataset.mask(0).shape == (17, 23)
    assert dataset.image(0).size == (23, 17)


# ---- Plans ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """40 refs of 4 images with 1-3 sentences each."""
    refs = [
        ref(i, 1 + i * i % 9, sentences=["sentence {} " + "abc"[k] for k in range(1 + i % 3)])
        for i in range(40)
    ]
    images = {i: (20 + i, 30 - i) for i in range(1, 10)}
    return RefCOCO(
        write_set(
            tmp_path_factory.mktemp("many"),
            refs=refs,
            images=images,
            segmentations={i: [box(1 + i % 5, 2, 9, 8)] for i in range(40)},
        ),
        "refcoco",
        "train",
    )


def drawn(batches):
    return [s for batch in batches for _, sentences, _ in batch for s in sentences]


@pytest.mark.parametrize("per_image", [1, 3, 100])
def test_an_epoch_sees_every_ref_once_in_batches_of_one_size(many, per_image):
    batches = data.plan_epoch(many, 3, 5, 7, per_image)
    assert sorted(many.sentences[s].ref for s in drawn(batches)) == list(range(40))
    assert [sum(len(sentences) for _, sentences, _ in batch) for batch in batches] == [7] * 5 + [5]
    for batch in batches:
        for image, sentences, _ in batch:
            assert 1 <= len(sentences) <= per_image
            assert {many.sentences[s].image for s in sentences} == {image}


def test_an_epoch_is_a_function_of_its_seed_and_number(many):
    state = torch.get_rng_state()
    first = data.plan_epoch(many, 0, 5, 7, 2)
    np.random.seed(0)
    assert data.plan_epoch(many, 0, 5, 7, 2) == first
    assert data.plan_epoch(many, 1, 5, 7, 2) != first != data.plan_epoch(many, 0, 6, 7, 2)
    assert torch.equal(torch.get_rng_state(), state)
    seeds = [seed for batch in data.plan_epoch(many, 0, 5, 7, 1) for *_, seed in batch]
    assert len(set(seeds)) == 40  # no two items are augmented alike


def test_every_sentence_is_drawn_in_some_epoch_and_order_changes(many):
    epochs = [drawn(data.plan_epoch(many, e, 0, 7, 1)) for e in range(40)]
    assert set().union(*epochs) == set(range(len(many)))
    assert len({tuple(many.sentences[s].ref for s in e) for e in epochs}) == 40


def test_grouping_by_image_saves_decoding(many):
    items = [sum(map(len, data.plan_epoch(many, 0, 0, 40, k))) for k in (1, 4, 100)]
    assert items == [
        40,
        sum(-(-n // 4) for n in np.bincount([r.image for r in many.refs])),
        len(many.images),
    ]


def test_an_evaluation_sees_every_sentence_once_and_images_together(many):
    batches = data.plan_eval(many, 11)
    order = drawn(batches)
    assert sorted(order) == list(range(len(many)))
    images = [many.sentences[s].image for s in order]
    assert images == sorted(images)  # images are numbered in file order
    assert all(sum(len(s) for _, s, _ in b) == 11 for b in batches[:-1])


# ---- Augmentation --------------------------------------------------------------------------------


def scene():
    """A light disc on a dark ground, and its mask (1, H, W)."""
    y, x = np.mgrid[:90, :130]
    mask = (x - 60) ** 2 + 2 * (y - 40) ** 2 < 900
    return Image.fromarray(
        np.where(mask[..., None], (250, 250, 250), (10, 10, 10)).astype(np.uint8)
    ), mask[None]


@pytest.mark.parametrize("seed", range(12))
def test_image_and_mask_are_warped_together(seed):
    image, mask = scene()
    warped, warped_mask = data.augment(image, mask, seed)
    inside = data.AFFINE.fill[Image.Image]
    pixels = np.asarray(warped).astype(int)
    bright = (pixels.min(axis=2) > 60) & (np.abs(pixels - inside).max(axis=2) > 3)
    assert (
        warped.size == image.size and warped_mask.shape == mask.shape and warped_mask.dtype == bool
    )
    assert (bright & warped_mask[0]).sum() / (bright | warped_mask[0]).sum() > 0.95
    assert (warped_mask != mask).any()


def test_augmentation_is_a_function_of_its_seed_and_leaves_torch_alone():
    image, mask = scene()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = data.augment(image, mask, 7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = data.augment(image, mask, 7), data.augment(image, mask, 8)
    assert (np.asarray(first[0]) == np.asarray(again[0])).all() and (first[1] == again[1]).all()
    assert (first[1] != other[1]).any()


def test_saturation_and_intensity_change_within_a_half_and_hue_stays():
    image = Image.new("RGB", (40, 40), (120, 90, 80))  # saturation 85, value 120
    hsv = np.array(
        [
            np.asarray(data.augment(image, np.ones((1, 40, 40), bool), s)[0].convert("HSV"))[
                20, 20
            ].astype(int)
            for s in range(60)
        ]
    )
    assert np.abs(hsv[:, 0] - 11).max() <= 4
    for channel, value in ((1, 85), (2, 120)):
        assert 0.45 * value < hsv[:, channel].min() < 0.65 * value
        assert 1.35 * value < hsv[:, channel].max() < 1.55 * value
    assert abs(np.corrcoef(hsv[:, 1], hsv[:, 2])[0, 1]) < 0.4


def test_the_border_is_filled_with_the_mean_colour():
    black, full = Image.new("RGB", (50, 50)), np.ones((1, 50, 50), bool)
    corners = [np.asarray(data.augment(black, full, seed)[0])[0, 0] for seed in range(9)]
    assert any((corner == np.round(255 * np.array(image_files.MEAN))).all() for corner in corners)
    assert (
        image_files.normalise(torch.tensor(data.FILL, dtype=torch.uint8).view(3, 1, 1)).abs().max()
        < 0.01
    )


def test_no_object_is_lost_and_left_stays_left():
    image = Image.new("RGB", (200, 100))
    masks = np.zeros((2, 100, 200), bool)
    masks[0, 0:6, 0:6] = masks[1, 40:60, 150:190] = True
    for seed in range(40):
        _, warped = data.augment(image, masks, seed)
        assert warped.any((1, 2)).all()
        assert np.nonzero(warped[0])[1].mean() < np.nonzero(warped[1])[1].mean()


# ---- Batches -------------------------------------------------------------------------------------


def test_a_batch_holds_each_image_once_and_a_mask_for_every_sentence(many):
    samples = Samples(many, 24)
    (image, sentences, seed), *_, last = data.plan_eval(many, 99)[0]
    items = [(image, sentences[:2], seed), (last[0], last[1][:1], seed)]
    batch = data.collate([samples[i] for i in items])
    chosen = [many.sentences[s] for _, sentences, _ in items for s in sentences]
    assert batch["images"].shape == (2, 3, 24, 24) and batch["images"].dtype == torch.float32
    assert batch["masks"].shape == (3, 24, 24) and batch["masks"].dtype == torch.bool
    assert batch["image_index"].tolist() == [0, 0, 1]
    assert batch["texts"] == [s.text for s in chosen] and batch["sent_ids"] == [
        s.sent_id for s in chosen
    ]
    assert (batch["broken"], batch["lost"]) == ([], 0)
    for mask, sentence in zip(batch["masks"], chosen, strict=True):
        full = Image.fromarray(many.mask(sentence.ref).astype(np.uint8))
        assert (mask.numpy() == np.asarray(full.resize((24, 24), Image.NEAREST))).all()
    assert torch.equal(batch["images"][0], image_files.preprocess(many.image(image), 24))


def test_two_sentences_of_one_ref_share_the_work(many, monkeypatch):
    calls = []
    monkeypatch.setattr(
        many, "mask", lambda r: calls.append(r) or RefCOCO.mask(many, r), raising=False
    )
    pair = next(
        tuple(i for i, s in enumerate(many.sentences) if s.ref == r)
        for r in range(40)
        if r % 3 == 1
    )
    item = Samples(many, 8)[many.sentences[pair[0]].image, pair, 0]
    assert len(pair) == 2 and len(calls) == 1 and item["masks"].shape == (2, 8, 8)
    assert torch.equal(item["masks"][0], item["masks"][1])


def test_a_broken_image_drops_its_item_and_nothing_else(tmp_path):
    root = write_set(tmp_path)
    (root / "images/mscoco/images/train2014/1.png").write_bytes(b"\x89PNG broken")
    dataset = RefCOCO(root, "refcoco", "train")
    samples = Samples(dataset, 16, augment=True)
    items = data.plan_epoch(dataset, 0, 0, 9, 9)[0]
    batch = data.collate([samples[i] for i in items])
    assert (
        batch["texts"] == ["the 3 thing"]
        and batch["images"].shape[0] == 1
        and batch["image_index"].tolist() == [0]
    )
    assert len(batch["broken"]) == 1 and "1.png" in batch["broken"][0]
    assert batch["lost"] == 2
    nothing = data.collate([samples[i] for i in items if i[0] == 0])
    assert (nothing["texts"], len(nothing["masks"]), len(nothing["images"]), nothing["lost"]) == (
        [],
        0,
        0,
        2,
    )
    assert data.collate([])["texts"] == []


def test_batches_are_the_same_for_any_number_of_workers(many):
    plan = data.plan_epoch(many, 0, 0, 16, 4)

    def batches(workers):
        samples = Samples(many, 12, augment=True)
        return list(
            DataLoader(samples, batch_sampler=plan, collate_fn=data.collate, num_workers=workers)
        )

    torch.manual_seed(0)
    alone = batches(0)
    torch.manual_seed(1)
    for one, other in zip(alone, batches(2), strict=True):
        assert one["sent_ids"] == other["sent_ids"]
        assert torch.equal(one["images"], other["images"]) and torch.equal(
            one["masks"], other["masks"]
        )


# ---- check, commands -----------------------------------------------------------------------------


def check(capsys, *argv):
    code = files.run(data.main, data.parse_args(["check", *map(str, argv)]))
    return code, capsys.readouterr()


def test_check_of_a_complete_set_exits_0(tmp_path, capsys, monkeypatch):
    write_set(tmp_path)
    monkeypatch.setitem(data.PUBLISHED, "refcoco", {"train": (3, 2, 4), "val": (2, 1, 2)})
    code, printed = check(capsys, "--root", tmp_path, "--dataset", "refcoco")
    assert code == 0 and "complete" in printed.out and "3 / 2 / 4" in printed.out


def test_check_names_everything_that_is_wrong(tmp_path, capsys, monkeypatch):
    wrong = [ref(5, 3, "valid"), ref(6, 2), ref(7, 3), ref(8, 3)]
    wrong[2]["sentences"][0]["sent_id"] = 10
    root = write_set(
        tmp_path, refs=[*REFS, *wrong], segmentations={3: [box(-9, -9, 5, 5)], 8: [[1, 2, 3, 4]]}
    )
    write_instances(
        root, "refcoco", [*REFS, *wrong[1:]], {3: [box(-9, -9, 5, 5)], 8: [[1, 2, 3, 4]]}
    )
    folder = root / "images/mscoco/images/train2014"
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:900])
    (folder / "3.png").unlink()
    monkeypatch.setitem(data.PUBLISHED, "refcoco", {"train": (9, 9, 9), "val": (2, 1, 2)})
    code, printed = check(capsys, "--root", root, "--dataset", "refcoco")
    assert code == 1
    for line in (
        "train: 6 / 3 / 7 refs / images / sentences, published 9 / 9 / 9",
        "ref 5: its annotation 105 is not in",
        "sentences with the sent_id of another: 1, the first is 10",
        "image 3 is missing, tried",
        "1.png cannot be read",
        "the mask of ref 3 is empty",
        "ref 8, annotation 108: a polygon of fewer than 3 points",
        "images both in train and in val: 1, the first is 2",
        "refs of unknown splits: 'valid'",
        "masks that cover below 0.01% of their image: 1 of 7 that were looked at, the "
        "first is of ref 3",
        "10 problems",
    ):
        assert line in printed.out, line
    assert "val: 2" not in printed.out
    quick = check(capsys, "--root", root, "--dataset", "refcoco", "--quick")[1].out
    assert "image 3 is missing" in quick and "1.png" not in quick


def test_check_names_an_unknown_split(tmp_path, capsys):
    write_set(tmp_path, "shapes", [ref(0, 1), ref(1, 2, "valid")])
    assert (
        "refs of unknown splits: 'valid'"
        in check(capsys, "--root", tmp_path, "--dataset", "shapes")[1].out
    )


def test_masks_that_are_all_empty_are_one_doubt(tmp_path):
    nothing = [box(-9, -9, 5, 5)]
    write_set(tmp_path, segmentations={r["ref_id"]: nothing for r in REFS})
    assert doubts(RefCOCO(tmp_path, "refcoco", "train")) == [
        "masks that are empty: all 3 that were looked at"
    ]
    write_instances(tmp_path, "refcoco", REFS, {1: nothing})
    assert doubts(RefCOCO(tmp_path, "refcoco", "train")) == [
        "masks that cover below 0.01% of their image: 1 of 3 that were looked at, "
        "the first is of ref 1"
    ]


def test_masks_of_nearly_all_or_nothing_are_counted(tmp_path, capsys):
    sizes = {i: (200, 100) for i in SIZES}
    segmentations = {0: [box(0, 0, 200, 99)], 1: [box(0, 0, 200, 100)], 3: [box(5, 5, 1, 1)]}
    write_set(tmp_path, segmentations=segmentations, images=sizes)
    lines = [
        "masks that cover above 98% of their image: 2 of {} that were looked at, the first is "
        "of ref 0",
        "masks that cover below 0.01% of their image: 1 of {} that were looked at, "
        "the first is of ref 3",
    ]
    assert doubts(RefCOCO(tmp_path, "refcoco", "train")) == [line.format(3) for line in lines]
    printed = check(capsys, "--root", tmp_path, "--dataset", "refcoco")[1].out
    assert all(line.format(5) in printed for line in lines)


def test_look_draws_a_sheet_of_what_is_read(tmp_path, capsys):
    write_set(tmp_path)
    (tmp_path / "images/mscoco/images/train2014/3.png").unlink()
    out = tmp_path / "look.png"
    args = data.parse_args(
        ["look", "--root", str(tmp_path), "--dataset", "refcoco", "--out", str(out)]
    )
    assert files.run(data.main, args) == 0 and "wrote" in capsys.readouterr().out
    assert Image.open(out).width > 900  # three panels in a row, the missing image one of them
    write_own(tmp_path / "long", A)
    Image.new("RGB", (4000, 1)).save(tmp_path / "long" / "a.png")
    args = data.parse_args(
        [
            "look",
            "--root",
            str(tmp_path),
            "--out",
            str(out),
            "--dataset",
            str(tmp_path / "long" / "own.json"),
        ]
    )
    assert files.run(data.main, args) == 0 and Image.open(out).width < 3000


def test_check_reads_own_json(tmp_path, capsys):
    code, printed = check(capsys, "--root", tmp_path, "--dataset", write_own(tmp_path, A, B))
    assert code == 0 and "complete" in printed.out
    code, printed = check(
        capsys, "--root", tmp_path, "--dataset", write_own(tmp_path, A, B | {"image": "a.png"})
    )
    assert code == 1 and "mask.png is 11x13" in printed.out
    for entries in ([], [A | {"sentences": []}]):
        code, printed = check(
            capsys, "--root", tmp_path, "--dataset", write_own(tmp_path, *entries)
        )
        assert code == 1 and "no sentences" in printed.out


def test_a_misspelt_split_of_own_json_is_a_doubt(tmp_path, capsys):
    """Nothing asks for it, and its sentences would be left out without a word."""
    right = [A | {"split": split} for split in ("train", "val", "test", "testA", "testB")]
    assert doubts(RefCOCO(tmp_path, write_own(tmp_path, *right), "train")) == []
    path = write_own(tmp_path, *right, B | {"split": "validation"}, B | {"split": "trian"})
    line = "refs of unknown splits: 'trian', 'validation'"
    assert doubts(RefCOCO(tmp_path, path, "train")) == [line]  # as at training's start
    code, printed = check(capsys, "--root", tmp_path, "--dataset", path)
    assert code == 1 and f"- {line}\n" in printed.out


@pytest.mark.parametrize("dataset", ["refcoco", "combined", "nothing"])
def test_a_users_mistake_is_one_line_on_stderr_and_exit_2(tmp_path, capsys, dataset):
    code, printed = check(capsys, "--root", tmp_path, "--dataset", dataset)
    assert (
        code == 2
        and printed.out == ""
        and printed.err.count("\n") == 1
        and printed.err.startswith("error: ")
    )


# ---- Photographs ---------------------------------------------------------------------------------


def test_photographs_are_read_in_refcocos_own_layout(photos, capsys):
    splits = {s: RefCOCO(photos, "refcoco", s) for s in ("train", "val", "testA", "testB")}
    assert {s: (len(d.refs), len(d)) for s, d in splits.items()} == {
        "train": (4, 9),
        "val": (2, 4),
        "testA": (1, 2),
        "testB": (2, 4),
    }
    for dataset in splits.values():
        for r in range(len(dataset.refs)):
            width, height = dataset.image(dataset.refs[r].image).size
            mask = dataset.mask(r)
            assert mask.shape == (height, width) and 0.005 < mask.mean() < 0.5
        for batch in data.plan_epoch(dataset, 0, 0, 3, 2):
            assert not data.collate([Samples(dataset, 64, True)[item] for item in batch])["broken"]
    code, printed = check(capsys, "--root", photos, "--dataset", "refcoco")
    assert (
        code == 1
        and "train: 4 / 2 / 9 refs / images / sentences, published 42404 / 16994 / 120624"
        in printed.out
    )
