"""Stage 0: how the miniature's CLIP was made. Not in the paper, which takes CLIP as it is.

`python train.py --stage 0` trains open_clip's class contrastively on pictures of shapes and
statements that are true or false of each of them; miniature/tiny_clip.jsonl is the log of the CLIP
that ships.
"""

import math
import random
from dataclasses import dataclass, replace

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from safetensors.torch import save as to_bytes
from torch.utils.data import DataLoader, Dataset

from miniature.clip import TINY_CLIP
from miniature.shapes import (
    _LINKS,
    NEAR,
    RELATIONS,
    SCENE,
    SIZE_WORDS,
    WALL,
    _matches,
    _phrase,
    _ranked,
    draw_palette,
    draw_scene,
    draw_words,
)
from risclip import image_layer, text_layer
from support import image_files
from support.checkpoint import clip_state, find_checkpoint, load_clip_state, read_safetensors
from support.runs import Run


def contrastive_loss(clip, batch):
    """Stage 0: CLIP's contrastive loss between I scenes and C captions, where several may be true
    of each other.

    A scene is as similar to a caption as those of its patches that fit it best (in the manner of
    FILIP): with the class token alone, a map that locates anything takes more than an hour. The
    softmax over patches is a soft one, so that all patches of an object have to know it and not the
    best one alone. Then cross-entropy against the true pairs, over a caption's scenes and over a
    scene's captions (as UniCL does).
    """
    # (C, T), (I, C), (I, 2)
    tokens, truth, corners = batch["tokens"], batch["truth"].float(), batch["corners"]
    visual, no_adapters, T = clip.visual, (torch.nn.Identity(), torch.nn.Identity()), tokens.size(1)
    clip.seen[tokens] = True

    # (I, D, h, w), perhaps the window of a scene that has its corner at top, left
    v = visual.conv1(batch["images"])
    rows, columns = (
        corners[:, i, None] + torch.arange(v.size(2 + i), device=v.device) for i in range(2)
    )
    places = (rows[:, :, None] * visual.grid_size[1] + columns[:, None]).flatten(1)
    v = v.flatten(2).transpose(1, 2) + F.embedding(places, visual.positional_embedding[1:])
    class_token = visual.class_embedding + visual.positional_embedding[0]
    v = visual.ln_pre(torch.cat([class_token.expand(len(v), 1, -1), v], dim=1))
    for i, block in enumerate(visual.transformer.resblocks):
        v = image_layer(
            block, v, no_adapters, value_path=i == len(visual.transformer.resblocks) - 1
        )
    t = clip.token_embedding(tokens) + clip.positional_embedding[:T]
    for block in clip.transformer.resblocks:
        t = text_layer(block, t, no_adapters)

    patches = F.normalize(visual.ln_post(v[:, 1:]) @ visual.proj, dim=-1)  # (I, h * w, d)
    eos = clip.ln_final(t[torch.arange(len(t)), tokens.argmax(1)])
    sentences = F.normalize(eos @ clip.text_projection, dim=-1)  # (C, d)
    similarity = clip.logit_scale.exp() * torch.einsum("ipd,cd->icp", patches, sentences)
    logits = (similarity * (0.3 * similarity).softmax(dim=-1)).sum(dim=-1)  # (I, C)
    by_image = F.cross_entropy(logits, truth / truth.sum(1, keepdim=True))
    return (by_image + F.cross_entropy(logits.T, (truth / truth.sum(0)).T)) / 2


def captioned_batches(tokenizer, settings, args, start):
    """Batches of stage 0 from step `start` on: scenes, captions and which captions are true of
    which scenes."""
    captioned = Captioned(settings["steps"], settings["batch_size"], args.seed)
    loader = DataLoader(
        captioned,
        batch_size=None,
        sampler=range(start, settings["steps"]),
        num_workers=args.workers,
    )
    for scenes, texts, truth, corners in loader:
        images, tokens = (
            image_files.normalise(torch.as_tensor(scenes).permute(0, 3, 1, 2)),
            tokenizer(texts),
        )
        yield {
            "images": images,
            "tokens": tokens[:, : int((tokens > 0).sum(1).max())],
            "lost": 0,
            "truth": torch.as_tensor(truth),
            "corners": torch.as_tensor(corners),
            "texts": texts[: len(scenes)],
        }  # the loop counts samples by them


# ---- A run -------------------------------------------------------------------------------------


def pretrain(args, settings, fit):
    """Stage 0: a tiny CLIP, trained on statements about shapes ->
    --out/stage0-STEP/clip.safetensors.

    With --clip PATH it starts from those weights.
    """
    torch.manual_seed(args.seed)
    clip = CLIP(**TINY_CLIP, init_logit_scale=math.log(10))
    clip.visual.positional_embedding.data[1:] = sine_positions(
        *clip.visual.grid_size, clip.visual.conv1.out_channels
    )
    # 50 random words in 128 dimensions are all but orthogonal: they stay as they are. But they have
    # to be as large as what a layer adds to them, or the first CFE, before the first text layer,
    # would drown them in the image.
    clip.token_embedding.requires_grad_(False).weight.data.mul_(50)
    clip.positional_embedding.data.mul_(20)
    if args.clip:
        load_clip_state(clip, read_safetensors(args.clip))
    clip.register_buffer(
        "seen",
        clip.token_embedding.weight.any(dim=1)
        if args.clip
        else torch.zeros(clip.vocab_size, dtype=torch.bool),
    )  # words, in use
    clip.to(args.device)
    tokenizer = open_clip.SimpleTokenizer(context_length=clip.context_length)

    def save(directory):
        directory.mkdir()
        (directory / "clip.safetensors").write_bytes(to_bytes(clip_state(clip)))

    def batches(start):
        return captioned_batches(tokenizer, settings, args, start)

    fit(clip, contrastive_loss, batches, settings, Run(args, 0, settings["steps"], settings, save))
    print(f"wrote {find_checkpoint(args.out, 0) / 'clip.safetensors'}; train on it with --clip")


def sine_positions(height, width, channels):
    """Sines and cosines of x and y, (height * width, channels): neighbours start out alike, and the
    tiny CLIP learns in minutes what random positions would keep it from for long."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    frequency = 100 ** (-torch.arange(channels // 4) / (channels // 4))
    return torch.cat(
        [f(p.reshape(-1, 1) * frequency) for p in (x, y) for f in (torch.sin, torch.cos)], dim=1
    )


# ---- For the tiny CLIP -------------------------------------------------------------------------
# A caption is a statement that is true or false of any scene, so that a batch knows which of its
# captions hold for which of its scenes.


class Scenes:
    """Attributes of the shapes of S scenes as arrays (S, 6), to evaluate statements on; absent
    shapes match nothing."""

    def __init__(self, scenes):
        def column(name, absent=0.0):
            return np.array(
                [
                    [getattr(o, name) for o in shapes] + [absent] * (6 - len(shapes))
                    for shapes in scenes
                ]
            )

        self.words = column("size", ""), column("colour", ""), column("kind", "")
        self.at = column("x"), column("y")

    def related(self, relation):
        """(S, 6, 6) bool: the first shape has the relation to the second."""
        dx, dy = (c[:, :, None] - c[:, None] for c in self.at)
        if relation == "closest to":
            return (np.hypot(dx, dy) < NEAR) & ~np.eye(6, dtype=bool)
        axis, sign = RELATIONS[relation]
        return sign * (dx, dy)[axis] > 5

    def match(self, words):
        """(S, 6) bool: the shapes that a partial (size, colour, kind) describes."""
        fit = self.words[0] != ""
        for have, want in zip(self.words, words):
            fit = fit & (have == want) if want else fit
        return fit


def statement(shapes, rng, shares):
    """Something true of the scene -> (text, function of Scenes that gives its truth for each scene,
    (S,) bool).

    shares: how many of the statements say an object's place, a relation or a rank; the others say
    what it is.
    """
    # colours are the first that is learned: they are said least
    o, whole = rng.choice(shapes), rng.random() < 0.3
    words = tuple(
        w if whole or rng.random() < p else None
        for w, p in ((o.size, 0.5), (o.colour, 0.3), (o.kind, 0.7))
    )
    words = words if any(words) else (None, o.colour, o.kind)
    article, draw = rng.choice(("a ", "the ", "")), rng.random()
    name, until = _phrase(words, rng), np.cumsum(shares)
    if draw < until[0]:  # a place; the middle of the scene has no word of its own
        far = [
            (wall, axis, sign)
            for wall, (axis, sign) in WALL.items()
            if sign * ((o.x, o.y)[axis] - SCENE / 2) < -10
        ]
        if far:
            wall, axis, sign = rng.choice(far)
            where = f"{article}{name} {rng.choice(('at', 'on', 'in'))} the {wall}"
            return (
                rng.choice((where, *_ranked(name, wall, 0))),
                lambda batch: (batch.match(words) & (sign * (batch.at[axis] - SCENE / 2) < -5)).any(
                    1
                ),
            )
    elif draw < until[1]:  # a relation
        other = rng.choice(shapes)
        others = tuple(
            w if rng.random() < 0.6 else None for w in (other.size, other.colour, other.kind)
        )
        true = [
            r
            for r, (axis, sign) in RELATIONS.items()
            if sign * ((o.x, o.y)[axis] - (other.x, other.y)[axis]) > 8
        ]
        if other is not o and math.hypot(o.x - other.x, o.y - other.y) < NEAR:
            true.append("closest to")
        if true:
            relation = rng.choice(true)
            return (
                f"{article}{name} {rng.choice(_LINKS[relation])} {article}{_phrase(others, rng)}",
                lambda batch: (
                    batch.match(words)[:, :, None]
                    & batch.match(others)[:, None]
                    & batch.related(relation)
                ).any((1, 2)),
            )
    elif draw < until[2]:  # a rank among those alike
        wall, (axis, sign) = rng.choice(list(WALL.items()))
        alike = sorted(
            (s for s in shapes if _matches(s, words)), key=lambda s: sign * (s.x, s.y)[axis]
        )
        place = alike.index(o)
        unsaid = [i for i in range(3) if words[i] is None]
        if place < 3 and unsaid and len(alike) > 1:
            i = rng.choice(unsaid)
            tell = (rng.choice(SIZE_WORDS[o.size]), o.colour, f"a {o.kind}")[i]

            def holds(batch):
                key = np.where(batch.match(words), sign * batch.at[axis], 1e9)
                nth = np.argsort(key, axis=1)[:, place : place + 1]
                right = np.take_along_axis(batch.words[i], nth, 1) == (o.size, o.colour, o.kind)[i]
                return (right & (np.take_along_axis(key, nth, 1) < 1e9))[:, 0]

            return f"{rng.choice(_ranked(name, wall, place))} is {tell}", holds
    return article + name, lambda batch: batch.match(words).any(1)


@dataclass(frozen=True)
class Lesson:
    """What a share of the tiny CLIP's batches shows."""

    share: float
    times: int  # pictures, by the batch size
    side: int  # of a picture, pixels
    objects: tuple[int, int]  # in a picture, the fewest and the most
    layouts: int = 1  # pictures in a row of the same objects: only their places tell them apart
    said: tuple[float, float, float] = (0, 0, 0)  # shares of statement()


# Words are learned in small pictures, which cost a fraction of a scene: what a shape is and where
# in the scene its window lies, then how two shapes lie to each other; in whole scenes, which
# patches all that is about.
LESSONS = (
    Lesson(0.2, 3, 40, (1, 1), said=(0.5, 0, 0)),
    Lesson(0.48, 3, 56, (1, 2), layouts=4, said=(0.2, 0.3, 0.1)),
    Lesson(0.32, 1, SCENE, (3, 6), layouts=2, said=(0.1, 0.15, 0.1)),
)
# pictures in a row that have the same few colours and kinds: only whole descriptions tell them
# apart
ALIKE = 8


class Captioned(Dataset):
    """Batch i of `batches`, drawn when asked for: images (I, side, side, 3) uint8, C captions,
    truth (I, C) bool, and the corners (I, 2), top and left in patches of 8 pixels, where each
    picture's window lies in a whole scene."""

    def __init__(self, batches, batch_size, seed, lessons=LESSONS):
        self.batches, self.batch_size, self.seed, self.lessons = batches, batch_size, seed, lessons

    def __len__(self):
        return self.batches

    def __getitem__(self, i):
        rng, scenes, images, corners = random.Random(f"captioned {self.seed} {i}"), [], [], []
        ends = np.cumsum([lesson.share for lesson in self.lessons])
        lesson = self.lessons[int((i >= ends[:-1] / ends[-1] * self.batches).sum())]
        free = (SCENE - lesson.side) // 8
        while len(scenes) < lesson.times * self.batch_size:
            if len(scenes) % ALIKE == 0:
                palette, count = draw_palette(rng), rng.randint(*lesson.objects)
            if len(scenes) % lesson.layouts == 0:
                words = draw_words(rng, palette, count)
            shapes, image, _ = draw_scene(rng, words, lesson.side)
            top, left = rng.randint(0, free), rng.randint(0, free)
            scenes.append([replace(o, x=o.x + 8 * left, y=o.y + 8 * top) for o in shapes])
            images.append(image)
            corners.append((top, left))
        said = [
            statement(shapes, rng, lesson.said) for shapes in scenes * min(lesson.objects[1], 4)
        ]
        batch = Scenes(scenes)
        truth = np.stack([holds(batch) for _, holds in said], axis=1)
        return np.stack(images), [text for text, _ in said], truth, np.array(corners)
