import torch

from evaluate import MASK, ByImage, masks_from_output, predictions
from support.files import DataError
from support.pictures import BLUE, PINK, contact_sheet, heat, overlay, panel


def samples(model, dataset, count=12):
    """A sentence of each of evenly spaced images: ground truth in blue, prediction in pink, the sentence under them."""
    panels, every = [], max(1, len({s.image for s in dataset.sentences}) // count)
    for i, (image, sentences, targets, masks) in enumerate(predictions(model, dataset, limit=count, every=every)):
        k = i % len(sentences)
        panels.append(panel([overlay(image, targets[sentences[k].ref], BLUE), overlay(image, masks[MASK][k], PINK)],
                            sentences[k].text))
    return contact_sheet(panels)


@torch.inference_mode()
def evolution(models, dataset, count=4):
    """Figure 1, a row for each of evenly spaced images: ground truth, the maps of {title: model}, the last one's mask.
    """
    panels, *_, last = [], *models.values()
    items = ByImage(dataset, last.config.image_size, "original")
    for i in range(0, len(items), max(1, len(items) // count))[:count]:
        if isinstance(item := items[i], DataError):
            raise item
        image, pixels, (sentence, *_), masks = item
        panels.append(panel([overlay(image, masks[sentence.ref], BLUE)], sentence.text))
        for title, model in models.items():
            (output,) = model.eval().outputs(pixels[None].to(model.map_threshold.device), [sentence.text])
            panels.append(panel([heat(image, output["patch_logits"][0])], title))
        mask = masks_from_output(output, last.config.image_size, *image.size)[0]
        panels.append(panel([overlay(image, mask, PINK)], "its mask"))
    return contact_sheet(panels, columns=len(models) + 2)


def cases(models, dataset, limit=100):
    """(image, sentence, target, [(mask, IoU) of each model]) for the first images' sentences; Figures 3, A1-A4."""
    found = []
    for views in zip(*(predictions(m, dataset, limit=limit) for m in models)):
        image, sentences, targets, _ = views[0]
        for k, sentence in enumerate(sentences):
            target, masks = targets[sentence.ref], [masks[MASK][k] for *_, masks in views]
            ious = [(m & target).sum() / max(1, (m | target).sum()) for m in masks]
            found.append((image, sentence, target, list(zip(masks, ious))))
    return found


def extremes(found, score, models=1, count=12):
    """Of cases, the sentence with the highest score in each image, and of those the highest: ground truth in blue,
    then the first models' masks in pink, their IoU under them."""
    best = {case[1].image: case for case in sorted(found, key=score)}  # the last of an image is its highest
    panels = []
    for image, sentence, target, predicted in sorted(best.values(), key=score)[:-count - 1:-1]:
        predicted = predicted[:models]
        panels.append(panel([overlay(image, target, BLUE), *(overlay(image, mask, PINK) for mask, _ in predicted)],
                            f"{sentence.text} ({' / '.join(f'{iou:.2f}' for _, iou in predicted)})"))
    return contact_sheet(panels)
