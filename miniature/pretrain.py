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
from torch.utils.data import Dataset

from miniature.clip import TINY_CLIP
from miniature.shapes import (
    LINKS,
    RELATIONS,
    SCENE,
    SIZE_WORDS,
    WALLS,
    along,
    draw_palette,
    draw_scene,
    draw_words,
    matches,
    phrase,
    ranked,
)
from risclip import image_layer, text_layer
from support import processes
from support.checkpoint import clip_state, find_checkpoint, load_clip_state, read_safetensors
from support.image_files import normalise
from support.runs import Run

SOFTNESS = 0.3  # of the choice among patches: 0 is their mean, large numbers the best one


def contrastive_loss(clip, batch):
    """CLIP's contrastive loss between I scenes and C captions, where several may be true of each
    other.

    A scene is as similar to a caption as those of its patches that fit it best (in the manner of
    FILIP): with the class token alone, a map that locates anything takes more than an hour. The
    choice is soft, so that all patches of an object have to know it and not only the best one. Then
    cross-entropy against the true pairs, over a caption's scenes and over a scene's captions (as in
    UniCL).
    """
    tokens = batch["tokens"]  # (C, T)
    truth = batch["truth"].float()  # (I, C)
    clip.seen[tokens] = True  # the words whose rows the weight file keeps
    patches = encode_patches(clip, batch["images"], batch["corners"])  # (I, P, d)
    captions = encode_captions(clip, tokens)  # (C, d)
    similarity = clip.logit_scale.exp() * torch.einsum("ipd,cd->icp", patches, captions)
    logits = (similarity * (SOFTNESS * similarity).softmax(dim=-1)).sum(dim=-1)  # (I, C)
    by_image = F.cross_entropy(logits, truth / truth.sum(1, keepdim=True))
    by_caption = F.cross_entropy(logits.T, (truth / truth.sum(0)).T)
    return (by_image + by_caption) / 2


def encode_patches(clip, images, corners):
    """Images (I, 3, H, W) -> unit vectors (I, P, d) of their patches, by the value path as in
    RISCLIP. corners (I, 2): where each image lies in its scene, top and left, in patches."""
    visual, no_adapters = clip.visual, (torch.nn.Identity(), torch.nn.Identity())
    v = visual.conv1(images)  # (I, D, h, w)
    rows, columns = (corners[:, i, None] + torch.arange(v.size(2 + i), device=v.device)
                     for i in range(2))
    places = (rows[:, :, None] * visual.grid_size[1] + columns[:, None]).flatten(1)
    v = v.flatten(2).transpose(1, 2) + F.embedding(places, visual.positional_embedding[1:])
    class_token = visual.class_embedding + visual.positional_embedding[0]
    v = visual.ln_pre(torch.cat([class_token.expand(len(v), 1, -1), v], dim=1))
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        v = image_layer(block, v, no_adapters)
    v = image_layer(last, v, no_adapters, value_path=True)
    return F.normalize(visual.ln_post(v[:, 1:]) @ visual.proj, dim=-1)


def encode_captions(clip, tokens):
    """(C, T) -> unit vectors (C, d) of the captions' ends."""
    t = clip.token_embedding(tokens) + clip.positional_embedding[:tokens.size(1)]
    for block in clip.transformer.resblocks:
        t = text_layer(block, t, (torch.nn.Identity(), torch.nn.Identity()))
    eos = clip.ln_final(t[torch.arange(len(t)), tokens.argmax(1)])
    return F.normalize(eos @ clip.text_projection, dim=-1)


# ---- A run -------------------------------------------------------------------------------------

def pretrain(args, settings, fit):
    """Stage 0 -> --out/stage0-STEP/clip.safetensors. With --clip PATH it starts from those weights.
    """
    torch.manual_seed(args.seed)
    clip = CLIP(**TINY_CLIP, init_logit_scale=math.log(10))
    visual = clip.visual
    positions = sine_positions(*visual.grid_size, visual.conv1.out_channels)
    visual.positional_embedding.data[1:] = positions
    # 50 random words in 128 dimensions are all but orthogonal: they stay as they are. But they have
    # to be as large as what a layer adds to them, or the first CFE, before the first text layer,
    # would drown them in the image.
    clip.token_embedding.requires_grad_(False).weight.data.mul_(50)
    clip.positional_embedding.data.mul_(20)
    seen = torch.zeros(clip.vocab_size, dtype=torch.bool)
    if args.clip:
        load_clip_state(clip, read_safetensors(args.clip))
        seen = clip.token_embedding.weight.any(dim=1)
    clip.register_buffer("seen", seen)
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
    """Sines and cosines of x and y, (height * width, channels). Neighbours start out alike, and the
    tiny CLIP learns in minutes what random positions would keep it from for long."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    frequency = 100 ** (-torch.arange(channels // 4) / (channels // 4))
    return torch.cat([f(p.reshape(-1, 1) * frequency) for p in (x, y)
                      for f in (torch.sin, torch.cos)], dim=1)


def captioned_batches(tokenizer, settings, args, start):
    """Yields the batches from step `start` on: scenes, captions, which captions are true of which
    scenes, and what the loop counts: `texts`, one per scene, and `lost`."""
    steps = settings["steps"]
    captioned = Captioned(steps, settings["batch_size"], args.seed)
    loader = processes.reader(captioned, args.workers, batch_size=None, sampler=range(start, steps))
    for scenes, texts, truth, corners in loader:
        tokens = tokenizer(texts)
        yield {"images": normalise(torch.as_tensor(scenes).permute(0, 3, 1, 2)),
               "tokens": tokens[:, :int((tokens > 0).sum(1).max())],
               "truth": torch.as_tensor(truth), "corners": torch.as_tensor(corners),
               "texts": texts[:len(scenes)], "lost": 0}


# ---- Statements --------------------------------------------------------------------------------
# A caption is true or false of any scene, so that a batch knows which captions hold for which of
# its scenes. So each comes with a function of Scenes that says so, (S,) bool.

NEAR = 36  # pixels between the centres of what a caption calls neighbours


class Scenes:
    """Attributes of the shapes of S scenes as arrays (S, 6), to evaluate statements on; absent
    shapes match nothing."""

    def __init__(self, scenes):
        def column(name, absent):
            return np.array([[getattr(o, name) for o in shapes] + [absent] * (6 - len(shapes))
                             for shapes in scenes])
        self.words = [column(name, "") for name in ("size", "colour", "kind")]
        self.at = column("x", 0.0), column("y", 0.0)

    def related(self, relation):
        """(S, 6, 6) bool: the first shape has the relation to the second."""
        dx, dy = (c[:, :, None] - c[:, None] for c in self.at)
        if relation == "closest to":
            return (np.hypot(dx, dy) < NEAR) & ~np.eye(6, dtype=bool)
        axis, sign = RELATIONS[relation]
        return sign * (dx, dy)[axis] > 5

    def match(self, description):
        """(S, 6) bool: the shapes that a (size, colour, kind), or a part of one, fits."""
        fit = self.words[0] != ""
        for have, want in zip(self.words, description):
            fit = fit & (have == want) if want else fit
        return fit


def statement(shapes, rng, shares):
    """Something true of the scene -> (text, function of Scenes).

    shares: how many of the statements say an object's place, a relation or a rank; the others, and
    those for which there is nothing to say, say what it is.
    """
    o, whole = rng.choice(shapes), rng.random() < 0.3
    chances = ((o.size, 0.5), (o.colour, 0.3), (o.kind, 0.7))  # colours are learned first
    description = tuple(word if whole or rng.random() < p else None for word, p in chances)
    if not any(description):
        description = (None, o.colour, o.kind)
    article, draw = rng.choice(("a ", "the ", "")), rng.random()
    noun = phrase(description, rng)
    said, kinds = None, (of_place, of_relation, of_rank)
    chosen = int((draw >= np.cumsum(shares)).sum())
    if chosen < len(kinds):
        said = kinds[chosen](shapes, o, description, noun, article, rng)
    return said or (article + noun, lambda scenes: scenes.match(description).any(1))


def of_place(shapes, o, description, noun, article, rng):
    """'the red thing at the top'. The middle of the scene has no word of its own."""
    far = [(wall, axis, sign) for wall, (axis, sign) in WALLS.items()
           if sign * ((o.x, o.y)[axis] - SCENE / 2) < -10]
    if not far:
        return None
    wall, axis, sign = rng.choice(far)
    where = f"{article}{noun} {rng.choice(('at', 'on', 'in'))} the {wall}"
    text = rng.choice((where, *ranked(noun, wall, 0)))

    def holds(scenes):
        near_wall = sign * (scenes.at[axis] - SCENE / 2) < -5
        return (scenes.match(description) & near_wall).any(1)
    return text, holds


def of_relation(shapes, o, description, noun, article, rng):
    """'the red thing under a star'."""
    other = rng.choice(shapes)
    words = (other.size, other.colour, other.kind)
    others = tuple(word if rng.random() < 0.6 else None for word in words)
    true = [r for r, (axis, sign) in RELATIONS.items()
            if along(o, axis, sign) - along(other, axis, sign) > 8]
    if other is not o and math.hypot(o.x - other.x, o.y - other.y) < NEAR:
        true.append("closest to")
    if not true:
        return None
    relation = rng.choice(true)
    text = f"{article}{noun} {rng.choice(LINKS[relation])} {article}{phrase(others, rng)}"

    def holds(scenes):
        both = scenes.match(description)[:, :, None] & scenes.match(others)[:, None]
        return (both & scenes.related(relation)).any((1, 2))
    return text, holds


def of_rank(shapes, o, description, noun, article, rng):
    """'the second star from the left is red': says a word more of one among its like."""
    wall, (axis, sign) = rng.choice(list(WALLS.items()))
    alike = sorted((s for s in shapes if matches(s, description)),
                   key=lambda s: along(s, axis, sign))
    place, unsaid = alike.index(o), [i for i in range(3) if description[i] is None]
    if place > 2 or not unsaid or len(alike) == 1:
        return None
    i = rng.choice(unsaid)
    tell = (rng.choice(SIZE_WORDS[o.size]), o.colour, f"a {o.kind}")[i]

    def holds(scenes):
        key = np.where(scenes.match(description), sign * scenes.at[axis], 1e9)
        nth = np.argsort(key, axis=1)[:, place:place + 1]
        right = np.take_along_axis(scenes.words[i], nth, 1) == (o.size, o.colour, o.kind)[i]
        return (right & (np.take_along_axis(key, nth, 1) < 1e9))[:, 0]
    return f"{rng.choice(ranked(noun, wall, place))} is {tell}", holds


# ---- Lessons -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Lesson:
    """What a share of the batches shows."""

    share: float
    times: int  # pictures, by the batch size
    side: int  # of a picture, pixels
    objects: tuple[int, int]  # in a picture, the fewest and the most
    layouts: int = 1  # pictures in a row of the same objects: only their places tell them apart
    said: tuple[float, float, float] = (0, 0, 0)  # shares of statement()


# Words are learned in small pictures, which cost a fraction of a scene: what a shape is and where
# in the scene its window lies, then how two shapes lie to each other. Which patches all that is
# about is learned in whole scenes.
LESSONS = (Lesson(0.2, 3, 40, (1, 1), said=(0.5, 0, 0)),
           Lesson(0.48, 3, 56, (1, 2), layouts=4, said=(0.2, 0.3, 0.1)),
           Lesson(0.32, 1, SCENE, (3, 6), layouts=2, said=(0.1, 0.15, 0.1)))
ALIKE = 8  # pictures in a row of the same few colours and kinds: only whole descriptions differ


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
        captions = scenes * min(lesson.objects[1], 4)
        said = [statement(shapes, rng, lesson.said) for shapes in captions]
        in_batch = Scenes(scenes)
        truth = np.stack([holds(in_batch) for _, holds in said], axis=1)
        return np.stack(images), [text for text, _ in said], truth, np.array(corners)
