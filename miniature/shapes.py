"""The shapes data set: scenes of coloured shapes, and sentences that are true of exactly one.

`write_shapes` puts scenes on disk in RefCOCO's layout, so that data.py reads them like any other
set. miniature/pretrain.py draws scenes for the miniature's CLIP.
"""

import json
import math
import os
import pickle
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco
from tqdm import tqdm

COLOURS = {"red": (206, 44, 44), "green": (44, 150, 62), "blue": (44, 92, 214),
           "yellow": (238, 200, 40), "purple": (150, 62, 186), "white": (238, 238, 238)}
KINDS = ("circle", "square", "triangle", "star", "cross")
RADII = {"small": (9.5, 12.0), "large": (15.5, 19.0)}  # pixels, far enough apart to tell the words
FILL = {"circle": 2.65, "square": 2.55, "triangle": 1.87, "star": 1.91, "cross": 2.51}  # area / r^2
SCENE = 96  # pixels, both sides


# ---- Pictures ----------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Shape:
    """One object of a scene: its words, centre and radius in pixels, rotation in radians, and what
    is drawn on it."""

    size: str
    colour: str
    kind: str
    x: float
    y: float
    radius: float
    turn: float
    mark: str = ""  # a character or "dot"

    def outline(self):
        """Its corners, (n, 2) in pixels."""
        r, up = self.radius, -np.pi / 2 + self.turn
        if self.kind == "circle":
            corners = ring(40, r * 0.92, 0)
        elif self.kind == "square":
            corners = ring(4, r * 1.13, up + np.pi / 4)
        elif self.kind == "triangle":
            corners = ring(3, r * 1.2, up) + [0, r * 0.15]
        elif self.kind == "star":
            corners = ring(10, np.tile([r * 1.18, r * 0.55], 5), up)
        else:  # a cross: a plus with arms as wide as a third of it
            a, b = r * 0.36, r * 1.05
            plus = np.array([[-a, -b], [a, -b], [a, -a], [b, -a], [b, a], [a, a],
                             [a, b], [-a, b], [-a, a], [-b, a], [-b, -a], [-a, -a]])
            c, s = np.cos(self.turn), np.sin(self.turn)
            corners = plus @ np.array([[c, s], [-s, c]])
        return corners + [self.x, self.y]


def ring(n, radius, start):
    """n points around the origin, (n, 2), the first at the angle `start`."""
    angle = start + np.arange(n) * 2 * np.pi / n
    return np.stack([np.cos(angle), np.sin(angle)], 1) * np.broadcast_to(radius, n)[:, None]


def draw_palette(rng):
    """Two or three colours and two or three kinds: the neighbours in a scene share attributes."""
    colours = rng.sample(list(COLOURS), rng.choice((2, 2, 3)))
    return colours, rng.sample(KINDS, rng.choice((2, 2, 3)))


def draw_words(rng, palette, count):
    """`count` objects of a palette, as (size, colour, kind)."""
    colours, kinds = palette
    return [(rng.choice(list(RADII)), rng.choice(colours), rng.choice(kinds))
            for _ in range(count)]


def draw_scene(rng, words, side=SCENE):
    """A layout of the objects -> (shapes, image (side, side, 3) uint8, owner (side, side) uint8).

    words: (size, colour, kind) of each object, and perhaps its mark. `owner` is 0 on the ground and
    k + 1 where shape k is what one sees; later shapes may cover a part of earlier ones.
    """
    while True:  # a crowded draw may not fit: draw again
        shapes = []
        for size, colour, kind, *mark in words:
            radius = rng.uniform(*RADII[size])
            for _ in range(40):
                x, y = rng.uniform(radius, side - radius), rng.uniform(radius, side - radius)
                if all(math.hypot(x - o.x, y - o.y) > 0.8 * (radius + o.radius) for o in shapes):
                    turn = rng.uniform(-0.3, 0.3)
                    shapes.append(Shape(size, colour, kind, x, y, radius, turn, *mark))
                    break
        if len(shapes) == len(words):
            image, owner = paint(shapes, rng, side)
            visible = np.bincount(owner.ravel(), minlength=len(shapes) + 1)[1:]
            if all(seen > 0.6 * FILL[s.kind] * s.radius**2 for seen, s in zip(visible, shapes)):
                return shapes, image, owner


def paint(shapes, rng, side):
    """-> image (side, side, 3) and owner (side, side), both uint8, on a ground of noise."""
    noise = np.random.default_rng(rng.getrandbits(32))
    brightness, grid = rng.uniform(70, 130), (rng.randint(4, 9), rng.randint(4, 9), 1)
    coarse = noise.normal(brightness, 16, grid) + noise.normal(0, 6, 3)
    ground = as_image(coarse).resize((side, side), Image.BICUBIC)
    ground = np.asarray(ground, np.float32) + noise.normal(0, 5, (side, side, 1))
    zoom = 4  # drawn large and averaged down: soft edges in the picture
    canvas = as_image(ground).resize((side * zoom, side * zoom), Image.NEAREST)
    owner = Image.new("L", (side, side))
    brush, claim = ImageDraw.Draw(canvas), ImageDraw.Draw(owner)
    for k, shape in enumerate(shapes):
        colour = tuple(int(c + noise.normal(0, 5)) for c in COLOURS[shape.colour])
        edge = tuple(int(c * 0.6) for c in colour)
        corners = shape.outline()
        brush.polygon([tuple(p) for p in corners * zoom], fill=colour, outline=edge, width=zoom)
        claim.polygon([tuple(p) for p in corners - 0.5], fill=k + 1)  # pixel centres lie at + 0.5
    for shape in (s for s in shapes if s.mark):  # above all shapes, so that none is half covered
        x, y = shape.x * zoom, shape.y * zoom
        ink = "black" if shape.colour in ("yellow", "white") else "white"
        if shape.mark == "dot":
            brush.circle((x, y), 0.3 * shape.radius * zoom, fill=ink)
        else:
            font = ImageFont.load_default(1.3 * shape.radius * zoom)
            brush.text((x, y), shape.mark, fill=ink, font=font, anchor="mm")
    return np.asarray(canvas.reduce(zoom)), np.asarray(owner)


def as_image(pixels):
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


# ---- English -----------------------------------------------------------------------------------
# A description is (size, colour, kind), with None for what it does not say.

SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
# Axis and sign: of two shapes, the one with the lower along() is nearer the wall.
WALLS = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}
MOST = {"left": "leftmost", "right": "rightmost", "top": "topmost", "bottom": "lowest"}
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
LINKS = {"left of": ("left of", "to the left of", "that is left of"),
         "right of": ("right of", "to the right of", "that is on the right of"),
         "above": ("above", "that is above", "higher than"),
         "below": ("below", "under", "that is below"),
         "closest to": ("closest to", "nearest to", "next to")}


def matches(shape, description):
    size, colour, kind = description
    return (size in (None, shape.size) and colour in (None, shape.colour)
            and kind in (None, shape.kind))


def phrase(description, rng):
    """-> "little red thing"."""
    size, colour, kind = description
    if size:
        size = rng.choice(SIZE_WORDS[size])
    kind = kind or rng.choice(("shape", "object", "thing"))
    return " ".join(word for word in (size, colour, kind) if word)


def ranked(noun, wall, place, the="the "):
    """-> phrases for the first, second or third (`place` 0, 1, 2) of its like from a wall."""
    if place:
        return [f"{the}{('second', 'third')[place - 1]} {noun} from the {wall}"]
    return [f"{the}{MOST[wall]} {noun}", f"{the}{noun} closest to the {wall} edge",
            f"{the}{wall} {noun}"]


def along(shape, axis, sign):
    return sign * (shape.x, shape.y)[axis]


def expressions(shapes, target, rng):
    """Sentences true of shape `target` alone -> {"attribute": [...], "position": [...],
    "relation": [...]}.

    What two people could see differently is left out. A place needs 6 pixels to the next candidate.
    A relation needs 8, and has to be clearly false (2) of every other candidate. The head noun of a
    position or relation fits two objects or more.
    """
    me = shapes[target]
    descriptions = [(size, colour, kind) for size in (None, me.size)
                    for colour in (None, me.colour) for kind in (None, me.kind)]
    fits = {d: [i for i, o in enumerate(shapes) if matches(o, d)] for d in descriptions}
    heads = [d for d in descriptions if len(fits[d]) > 1]
    attributes, positions, relations = [], [], []
    the = rng.choice(("the ", "the ", ""))

    # attribute: its words together single it out, and none of them alone
    alone = [len(fits[d]) == 1
             for d in ((me.size, None, None), (None, me.colour, None), (None, None, me.kind))]
    for d in descriptions:
        if len(fits[d]) == 1 and not any(word and one for word, one in zip(d, alone)):
            attributes.append(the + phrase(d, rng))

    # position: first, second or third of those it could be confused with
    for d in heads:
        for wall, (axis, sign) in WALLS.items():
            order = sorted(fits[d], key=lambda i: along(shapes[i], axis, sign))
            at = [along(shapes[i], axis, sign) for i in order]
            place = order.index(target)
            before = at[place] - at[place - 1] if place else 99
            after = at[place + 1] - at[place] if place + 1 < len(at) else 99
            if min(before, after) < 6:
                continue
            noun = phrase(d, rng)
            if place == 0:
                most, closest, of_two = ranked(noun, wall, 0, the)
                positions += [most, f"{noun} {'at' if axis else 'on'} the {wall}", closest]
                positions += [of_two] if len(order) == 2 else []
            elif place < 3 and len(order) > 2:
                positions += ranked(noun, wall, place, the)

    # relation: to an anchor that its words single out, or (a chain) a second relation
    for a, anchor in enumerate(shapes):
        name = None
        if a != target:
            name = unique_name(shapes, a, rng) or chain_name(shapes, a, target, rng)
        for d in heads if name else ():
            for relation in LINKS:
                if holds_for_one(shapes, fits[d], target, relation, anchor):
                    link = rng.choice(LINKS[relation])
                    relations.append(f"{the}{phrase(d, rng)} {link} the {name}")
    return {"attribute": attributes, "position": positions, "relation": relations}


def holds_for_one(shapes, candidates, target, relation, anchor):
    """Whether the relation to the anchor is clearly true of the target and clearly false of the
    other candidates."""
    others = [shapes[i] for i in candidates if i != target and shapes[i] is not anchor]
    me = shapes[target]
    if relation == "closest to":
        mine = math.hypot(me.x - anchor.x, me.y - anchor.y)
        return bool(others) and all(math.hypot(o.x - anchor.x, o.y - anchor.y) > 1.4 * mine
                                    for o in others)
    ahead = [along(o, *RELATIONS[relation]) - along(anchor, *RELATIONS[relation])
             for o in (me, *others)]
    return ahead[0] >= 8 and all(pixels <= 2 for pixels in ahead[1:])


def unique_name(shapes, i, rng):
    """A few words that single out shape i, or None."""
    size, colour, kind = shapes[i].size, shapes[i].colour, shapes[i].kind
    options = [(None, None, kind), (None, colour, None), (None, colour, kind), (size, None, kind),
               (size, colour, kind)]
    unique = [d for d in options if sum(matches(s, d) for s in shapes) == 1]
    return phrase(rng.choice(unique[:3]), rng) if unique else None


def chain_name(shapes, i, exclude, rng):
    """'blue circle above the star': names a shape that its own words do not single out, or None."""
    d = (None, shapes[i].colour, shapes[i].kind)
    candidates = [k for k, s in enumerate(shapes) if matches(s, d)]
    for a in rng.sample(range(len(shapes)), len(shapes)):
        name = unique_name(shapes, a, rng) if a not in (i, exclude) else None
        for relation in rng.sample(list(RELATIONS), len(RELATIONS)) if name else ():
            if holds_for_one(shapes, candidates, i, relation, shapes[a]):
                return f"{phrase(d, rng)} {rng.choice(LINKS[relation])} the {name}"
    return None


# ---- On disk -----------------------------------------------------------------------------------

SPLITS = {"train": 0.76, "val": 0.03, "test": 0.21}  # of the images
LIMITS = ("characters", "absence")  # further splits, never trained on: Sec. A.2.1's two failures
CHARACTERS = "2345679ABCEFHKLPRTUX"  # those that are not easily taken for one another


def draw_limit(rng, split):
    """A scene of a LIMITS split -> (shapes, image, owner, {target: [(split, sentence)]}): among
    others, two large shapes of one colour and kind, which only the character or the dot on them
    tells apart."""
    colours, kinds = palette = draw_palette(rng)
    twin = ("large", rng.choice(colours), rng.choice(kinds))
    words = [twin, twin, *draw_words(rng, palette, rng.randint(1, 2))]
    target = rng.randrange(2)
    if split == "characters":
        drawn = rng.sample(CHARACTERS, len(words))
        marks = [c if w[0] == "large" else "" for c, w in zip(drawn, words)]
        c = marks[target]
        ends = ("with a {}", "with the number {}") if c.isdigit() else ("with the letter {}",)
        end = rng.choice(ends).format(c)
    else:  # all others of its kind have a dot
        marks = ["" if k == target or w[2] != twin[2] and rng.random() < 0.5 else "dot"
                 for k, w in enumerate(words)]
        end = rng.choice(("with no dot", "without a dot"))
    noun = phrase((None, rng.choice((None, twin[1])), twin[2]), rng)
    shapes, image, owner = draw_scene(rng, [(*w, mark) for w, mark in zip(words, marks)])
    return shapes, image, owner, {target: [(split, f"the {noun} {end}")]}


def write_scene(path, seed, i, split):
    """Draws scene i of a seed and writes its picture -> [(kind number, run lengths, box, area,
    said), ...], a referent each: said is a list of (kind of expression, text)."""
    rng = random.Random(f"{split if split in LIMITS else 'scene'} {seed} {i}")
    if split in LIMITS:
        shapes, image, owner, said = draw_limit(rng, split)
    else:
        words = draw_words(rng, draw_palette(rng), rng.randint(3, 6))
        shapes, image, owner = draw_scene(rng, words)
        said = {}
        for k in rng.sample(range(len(shapes)), len(shapes)):
            said[k] = []
            for kind, found in expressions(shapes, k, rng).items():
                most = 2 if split == "train" and kind == "attribute" else 1
                said[k] += [(kind, text) for text in rng.sample(found, min(len(found), most))]
    Image.fromarray(image).save(path, compress_level=1)
    referents = []
    for k in [k for k in said if said[k]][:None if split == "train" else 1]:
        run_lengths = coco.encode(np.asfortranarray(owner == k + 1))
        referents.append((KINDS.index(shapes[k].kind) + 1, run_lengths["counts"].decode(),
                          coco.toBbox(run_lengths).tolist(), int(coco.area(run_lengths)), said[k]))
    return referents


def write_shapes(root, images, seed, limits=100):
    """Writes `images` scenes of 3 to 6 shapes under root in REFER layout, split as SPLITS says, and
    `limits` more for each split of LIMITS.

    A ref is a shape, with one sentence of each kind (attribute, position, relation) that singles it
    out. For train it has two attributes where there are: fewer shapes have one, and all kinds of
    sentences learn their words from them. For val and test a scene has one ref, so that many
    scenes are seen. instances.json comes last: with it the data set is whole.
    """
    root = Path(root)
    (root / "shapes").mkdir(parents=True, exist_ok=True)
    (root / "images" / "shapes").mkdir(parents=True, exist_ok=True)
    whole = root / "shapes" / "instances.json"
    whole.unlink(missing_ok=True)
    ends = np.cumsum([round(images * share) for share in SPLITS.values()])
    splits = [list(SPLITS)[min(int((i >= ends).sum()), len(SPLITS) - 1)] for i in range(images)]
    names = [f"{seed}_{i:06d}.png" for i in range(images)]
    splits += [split for split in LIMITS for _ in range(limits)]
    names += [f"{seed}_{split}_{i:06d}.png" for split in LIMITS for i in range(limits)]
    numbers = [*range(images), *range(limits), *range(limits)]
    paths = [root / "images" / "shapes" / name for name in names]
    annotations, refs, sentences = [], [], 0
    with ProcessPoolExecutor(min(os.cpu_count(), 8)) as pool:
        scenes = pool.map(write_scene, paths, [seed] * len(names), numbers, splits, chunksize=32)
        scenes = tqdm(scenes, "shapes", len(names), unit="scene", disable=None)
        for i, referents in enumerate(scenes):
            for category, counts, box, area, said in referents:
                ref, numbered = len(refs), range(sentences, sentences + len(said))
                annotations.append({
                    "id": ref, "image_id": i, "category_id": category, "iscrowd": 0, "area": area,
                    "bbox": box, "segmentation": {"size": [SCENE, SCENE], "counts": counts}})
                refs.append({
                    "ref_id": ref, "ann_id": ref, "image_id": i, "split": splits[i],
                    "category_id": category, "file_name": names[i], "sent_ids": list(numbered),
                    "sentences": [{"sent_id": n, "sent": text, "raw": text, "tokens": text.split(),
                                   "kind": kind} for n, (kind, text) in zip(numbered, said)]})
                sentences += len(said)
    (root / "shapes" / "refs(shapes).p").write_bytes(pickle.dumps(refs, protocol=2))
    records = [{"id": i, "file_name": name, "width": SCENE, "height": SCENE}
               for i, name in enumerate(names)]
    categories = [{"id": i + 1, "name": kind} for i, kind in enumerate(KINDS)]
    aside = whole.with_suffix(".partial")
    aside.write_text(json.dumps({"images": records, "annotations": annotations,
                                 "categories": categories}))
    aside.replace(whole)
