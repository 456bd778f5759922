"""The paper's figures, made of what is passed in: sentences with their masks, models, scenes."""

from dataclasses import replace
from typing import NamedTuple

import torch
from PIL import Image

from support.image_files import preprocess
from support.inference import outputs
from support.pictures import PREDICTION, TRUTH, contact_sheet, fit, fit_mask, heat, outlined, panel


def spread(items, count):
    """Of [(image, its sentences)] `count` evenly spaced images with a sentence each."""
    chosen = items[::max(1, len(items) // count)][:count]
    return [(image, [sentences[i % len(sentences)]])  # not always the first: kinds take turns
            for i, (image, sentences) in enumerate(chosen)]


class Case(NamedTuple):
    """A sentence as it will be drawn, and how well each model does on it."""

    number: int  # of its image
    text: str
    image: Image.Image  # small
    masks: list  # bool, of the small image's size: ground truth, then each model's
    ious: list  # of each model, from the image's own pixels


def case(number, image, text, target, masks):
    """A Case. image: PIL; target and each of masks: bool (H, W) of its size."""
    small = fit(image)
    shrunk = [fit_mask(mask, small.size) for mask in (target, *masks)]
    ious = [(mask & target).sum() / max(1, (mask | target).sum()) for mask in masks]
    return Case(number, text, small, shrunk, ious)


def draw(case, models=1):
    """Ground truth and the first models' masks side by side, the sentence and IoU under them."""
    names = ["prediction"] if models == 1 else ["prediction", "the other checkpoint's"]
    colours = [TRUTH] + [PREDICTION] * models
    pictures = [outlined(case.image, mask, colour) for mask, colour in zip(case.masks, colours)]
    ious = " / ".join(f"{iou:.2f}" for iou in case.ious[:models])
    return panel(dict(zip(["ground truth", *names], pictures)), f"{case.text} (IoU {ious})")


def samples(cases):
    """The cases in their order."""
    return contact_sheet([draw(case) for case in cases])


def extremes(cases, score, models=1, count=12):
    """Of each image the case with the highest score, and of those the `count` highest.

    Figures 3 and A1-A4.
    """
    best = {case.number: case for case in sorted(cases, key=score)}  # an image's last is its best
    chosen = sorted(best.values(), key=score, reverse=True)[:count]
    return contact_sheet([draw(case, models) for case in chosen])


def best_and_worst(cases):
    """{file name: picture} of the first model, and of where a second one gains most."""
    pictures = {"good.png": extremes(cases, lambda case: case.ious[0]),
                "failures.png": extremes(cases, lambda case: -case.ious[0])}
    if len(cases[0].ious) > 1:
        pictures["compared.png"] = extremes(cases, lambda case: case.ious[1] - case.ious[0], 2)
    return pictures


def without(model, modules):
    """The model with these of its modules alone. They were trained with the others, which are
    switched off."""
    part = type(model)(replace(model.config, modules=modules, decoder=False, clip="random"))
    state = model.state_dict()
    part.load_state_dict({name: state[name] for name in part.state_dict()})
    return part.to(model.map_threshold.device)


def modules_one_by_one(model):
    """{title: model}: frozen CLIP, then with one more module each, up to the model itself."""
    titles = {"adapter": "+ Adapters", "cfe": "+ CFE", "ske": "+ SKE"}
    have = [m for m in titles if m in model.config.modules]
    parts = [without(model, tuple(have[:n])) for n in range(len(have))]
    return dict(zip(["frozen CLIP", *(titles[m] for m in have)], [*parts, model]))


@torch.inference_mode()
def evolution(models, items):
    """Figure 1, a row per (image, text, target) of items: the map_patch of each of {title: model}
    between the ground truth and the last model's mask."""
    rows, *_, last = [], *models.values()
    for image, text, target in items:
        pictures = {"ground truth": outlined(image, target, TRUTH)}
        for title, model in models.items():
            pixels = preprocess(image, model.config.image_size)[None]
            (output,) = outputs(model.eval(), pixels.to(model.map_threshold.device), [text])
            pictures[title] = heat(image, output["patch_logits"][0].sigmoid().cpu())
        pictures["the mask"] = outlined(image, last.segment(image, text), PREDICTION)
        rows.append(panel(pictures, text))
    return contact_sheet(rows, columns=1)
