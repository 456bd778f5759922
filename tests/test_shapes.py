"""The shapes world: every sentence is true of exactly one object, by a reader that shares no code
with the writer."""

import json
import pickle
import random
import re

import numpy as np
import pytest

from data import RefCOCO
from miniature import pretrain, shapes
from miniature.pretrain import Captioned, Scenes, statement
from miniature.shapes import draw_palette, draw_scene, draw_words, expressions, write_shapes
from support.files import DataError

SIZES = {"small": "small", "little": "small", "large": "large", "big": "large"}
LINKS = [
    ("left of", r"(?:that is )?(?:to the )?left of"),
    ("right of", r"(?:that is on the |to the )?right of"),
    ("above", r"(?:that is above|above|higher than)"),
    ("below", r"(?:that is below|below|under)"),
    ("near", r"(?:closest to|nearest to|next to)"),
]
FIRST = {
    "left": lambda o: o.x,
    "right": lambda o: -o.x,
    "top": lambda o: o.y,
    "bottom": lambda o: -o.y,
}
MOST = {"leftmost": "left", "rightmost": "right", "topmost": "top", "lowest": "bottom"}


def described(noun, scene):
    """The objects that 'small red circle' fits."""
    words = noun.split()
    return [
        o
        for o in scene
        if all(
            w in ("shape", "object", "thing") or SIZES.get(w, w) in (o.size, o.colour, o.kind)
            for w in words
        )
    ]


def related(link, o, anchor):
    """By more than 2 pixels: what one sees."""
    right, down = o.x - anchor.x, o.y - anchor.y
    return {"left of": -right, "right of": right, "above": -down, "below": down}[link] > 2


def referents(text, scene):
    """The objects that a sentence can mean."""
    text = text.removeprefix("the ")
    for most, wall in MOST.items():
        if text.startswith(most):
            return [min(described(text.removeprefix(most), scene), key=FIRST[wall])]
    if found := re.fullmatch(r"(second|third) (.*) from the (\w+)", text):
        order = sorted(described(found[2], scene), key=FIRST[found[3]])
        return [order[1 if found[1] == "second" else 2]]
    if found := (
        re.fullmatch(r"(?P<noun>.*) (?:at|on) the (?P<wall>left|right|top|bottom)", text)
        or re.fullmatch(r"(?P<noun>.*) closest to the (?P<wall>\w+) edge", text)
        or re.fullmatch(r"(?P<wall>left|right|top|bottom) (?P<noun>.*)", text)
    ):
        return [min(described(found["noun"], scene), key=FIRST[found["wall"]])]
    links = [
        (found.start(), -found.end(), link, found)
        for link, pattern in LINKS
        for found in re.finditer(rf" {pattern} the ", text)
    ]
    if not links:
        return described(text, scene)
    _, _, link, found = min(links)  # the first link has the rest as its anchor
    anchors = referents(text[found.end() :], scene)
    candidates = described(text[: found.start()], scene)
    if link != "near":
        return [o for o in candidates if any(related(link, o, a) for a in anchors if a is not o)]
    (anchor,) = anchors
    return sorted(
        (o for o in candidates if o is not anchor),
        key=lambda o: np.hypot(o.x - anchor.x, o.y - anchor.y),
    )[:1]


def scene(seed):
    rng = random.Random(seed)
    return draw_scene(rng, draw_words(rng, draw_palette(rng), rng.randint(3, 6))), rng


def test_every_sentence_is_true_of_its_object_alone():
    counts = dict.fromkeys(("attribute", "position", "relation"), 0)
    for seed in range(60):
        (objects, _, _), rng = scene(seed)
        for k, o in enumerate(objects):
            for kind, texts in expressions(objects, k, rng).items():
                counts[kind] += len(texts)
                for text in texts:
                    meant = referents(text, objects)
                    assert len(meant) == 1 and meant[0] is o, (seed, text, meant, o)
    assert min(counts.values()) > 200, counts  # no kind is missing


def test_positions_and_relations_have_a_distractor_of_the_same_description():
    for seed in range(30):
        (objects, _, _), rng = scene(seed)
        for k in range(len(objects)):
            for text in expressions(objects, k, rng)["relation"]:
                head = min(
                    (
                        text.split(f" {w} ")[0]
                        for w in (
                            "left",
                            "right",
                            "that",
                            "to",
                            "above",
                            "higher",
                            "below",
                            "under",
                            "closest",
                            "nearest",
                            "next",
                        )
                    ),
                    key=len,
                )
                assert len(described(head.removeprefix("the "), objects)) > 1, text


def test_an_object_is_where_the_owner_map_says_and_mostly_seen():
    for seed in range(10):
        (objects, image, owner), _ = scene(seed)
        assert image.shape == (96, 96, 3) and owner.max() == len(objects)
        for k, o in enumerate(objects):
            ys, xs = np.nonzero(owner == k + 1)
            assert abs(xs.mean() - o.x) < 7 and abs(ys.mean() - o.y) < 7 and len(xs) > 60
            colour = np.median(image[ys, xs], axis=0)
            assert np.abs(colour - shapes.COLOURS[o.colour]).max() < 40


def test_the_world_on_disk_is_the_same_for_the_same_seed_and_has_three_splits(tmp_path):
    for name in "ab":
        write_shapes(tmp_path / name, 40, seed=3, limits=0)
    for file in ("shapes/instances.json", "shapes/refs(shapes).p", "images/shapes/3_000007.png"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    images = {
        split: {s.image for s in RefCOCO(tmp_path / "a", "shapes", split).sentences}
        for split in ("train", "val", "test")
    }
    assert [len(i) for i in images.values()] == [30, 1, 9]
    records = json.loads((tmp_path / "a/shapes/instances.json").read_text())["images"]
    assert {r["width"] for r in records} == {96}


@pytest.mark.parametrize("split", shapes.LIMITS)
def test_a_mark_or_its_absence_singles_out_one_of_two_that_are_otherwise_alike(split):
    for seed in range(25):
        objects, image, owner, said = shapes.draw_limit(random.Random(seed), split)
        ((k, ((kind, text),)),) = said.items()
        noun, end = re.fullmatch(r"the (\w+(?: \w+)?) with(.*)", text).groups()
        wanted = (
            ""
            if end in (" no dot", "out a dot")
            else re.fullmatch(r" (?:a|the number|the letter) (\w)", end)[1]
        )
        meant = [o for o in described(noun, objects) if o.mark == wanted]
        assert kind == split and len(meant) == 1 and meant[0] is objects[k], (seed, text, objects)
        me = objects[k]
        twins = [o for o in described(f"{me.size} {me.colour} {me.kind}", objects) if o is not me]
        assert twins and all(o.mark and o.mark != me.mark for o in twins)
        # what is drawn: something black or white, where there is a mark
        for i, o in enumerate(objects):
            ys, xs = np.nonzero(owner == i + 1)
            middle = image[ys, xs][
                np.hypot(xs + 0.5 - o.x, ys + 0.5 - o.y) < 0.4 * o.radius
            ].astype(int)
            drawn = (np.abs(middle - shapes.COLOURS[o.colour]).max(axis=1) > 90).sum()
            assert drawn > 5 if o.mark else drawn == 0, (seed, o)


def test_the_scenes_of_a_split_depend_on_the_size_of_no_other(tmp_path):
    worlds = {}
    for images, limits in ((20, 0), (20, 3), (30, 3)):
        root = tmp_path / f"{images}-{limits}"
        write_shapes(root, images, seed=3, limits=limits)
        refs = pickle.loads((root / "shapes/refs(shapes).p").read_bytes())
        worlds[images, limits] = (
            refs,
            {p.name: p.read_bytes() for p in (root / "images/shapes").iterdir()},
        )
    (refs, pictures), (more, more_pictures), (_, other_pictures) = worlds.values()
    assert more[: len(refs)] == refs and {r["split"] for r in more[len(refs) :]} == set(
        shapes.LIMITS
    )
    assert (
        pictures.items() < more_pictures.items() < other_pictures.items()
        and len(more_pictures) == 20 + 2 * 3
    )
    file_names = {ref["file_name"] for ref in refs}
    assert file_names.isdisjoint(ref["file_name"] for ref in more[len(refs) :])
    assert [len(RefCOCO(tmp_path / "20-3", "shapes", split)) for split in shapes.LIMITS] == [3, 3]


def test_a_world_without_the_further_splits_says_how_to_get_them(tmp_path):
    write_shapes(tmp_path, 10, seed=3, limits=0)
    with pytest.raises(DataError, match="'absence': write the world anew.*data.py shapes"):
        RefCOCO(tmp_path, "shapes", "absence")


# ---- For the tiny CLIP -------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0.2, 0.3, 0.1)])
def test_a_statement_is_true_of_its_own_scene_and_false_of_most(shares):
    rng, scenes = random.Random(0), [scene(seed)[0][0] for seed in range(80)]
    truth = np.stack(
        [
            holds(Scenes(scenes))
            for _, holds in (statement(objects, rng, shares) for objects in scenes)
        ],
        1,
    )
    assert truth.shape == (80, 80) and truth.diagonal().all() and truth.mean() < 0.5


@pytest.mark.parametrize("shares, least, most", [((0, 0, 0), 0, 0), ((1, 0, 0), 150, 200)])
def test_as_many_statements_name_a_place_as_asked(shares, least, most):
    rng = random.Random(1)
    texts = [statement(scene(seed)[0][0], rng, shares)[0] for seed in range(200)]
    assert (
        least
        <= sum(bool(re.search("left|right|top|bottom|lowest", text)) for text in texts)
        <= most
    )


def test_lessons_go_from_single_shapes_to_whole_scenes():
    captioned = Captioned(100, 8, seed=0)
    for i, (count, side, captions) in {
        0: (24, 40, 24),
        19: (24, 40, 24),
        20: (24, 56, 48),
        67: (24, 56, 48),
        68: (8, 96, 32),
        99: (8, 96, 32),
    }.items():
        images, texts, truth, corners = captioned[i]
        assert (
            images.shape == (count, side, side, 3)
            and len(texts) == captions
            and truth.shape == (count, captions)
        )
        assert truth[:, :count].diagonal().all()
        assert (
            corners.shape == (count, 2) and corners.min() >= 0 and corners.max() <= (96 - side) // 8
        )
    assert np.array_equal(captioned[68][0], Captioned(100, 8, seed=0)[68][0])


def test_a_window_is_where_its_caption_says():
    """What is said of a place, and what is true, is about the whole scene in which the picture has
    its window."""
    lesson = pretrain.Lesson(1, 3, 40, (1, 1), said=(1, 0, 0))
    _, texts, _, corners = Captioned(1, 32, 0, (lesson,))[0]
    # a shape in a picture of 40 pixels lies 10 or more from its edges
    for text, (top, left) in zip(texts, corners):
        if "leftmost" in text or "the left" in text:
            assert 8 * left + 10 < 38
        if "lowest" in text or "the bottom" in text:
            assert 8 * top + 30 > 58
