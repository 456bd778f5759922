"""Is a data set whole, and are its masks what somebody meant? For what no reader can decide."""

import sys
from collections import Counter
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from support.files import DataError, one_line
from support.image_files import image_size, strays
from support.pictures import HEIGHT, TRUTH, contact_sheet, fit, outlined, panel

FULL, TINY = 0.98, 0.0001  # shares of an image that few objects cover


def doubts(dataset, looks=20):
    """-> what is plainly wrong with a data set as a whole, one line each; of its masks, those
    `looks` that are evenly spaced."""
    shares = {}  # ref id -> how much of its image the mask covers
    for i in range(0, len(dataset.refs), max(1, len(dataset.refs) // looks)):
        try:
            shares[dataset.refs[i].ref_id] = dataset.mask(i).mean()
        except DataError:
            pass  # named, skipped and counted where it is used
    return odd_names(dataset) + odd_masks(shares)


def odd_names(dataset):
    """-> lines about split names that nothing asks for, and sentences with the sent_id of others.
    """
    lines = []
    if unknown := sorted(dataset.split_names - dataset.usual_splits()):
        lines.append(f"refs of unknown splits: {', '.join(map(repr, unknown))}")
    counts = Counter(s.sent_id for s in dataset.sentences)
    if len(counts) < len(dataset):
        first = next(i for i, count in counts.items() if count > 1)
        lines.append("sentences with the sent_id of another: "
                     f"{len(dataset) - len(counts)}, the first is {first}")
    return lines


def odd_masks(shares):
    """{ref id: share of the image that its mask covers} -> lines that count those of nearly all and
    nearly nothing."""
    if shares and not any(shares.values()):
        return [f"masks that are empty: all {len(shares)} that were looked at"]
    lines = []
    for odd, words in ((lambda share: share > FULL, f"above {FULL:.0%}"),
                       (lambda share: share < TINY, f"below {TINY:.2%}")):
        if refs := [ref for ref, share in shares.items() if odd(share)]:
            lines.append(f"masks that cover {words} of their image: {len(refs)} of {len(shares)} "
                         f"that were looked at, the first is of ref {refs[0]}")
    return lines


def check(dataset, published, quick=False):
    """Prints a data set's counts beside the published ones, {split: (refs, images, sentences)};
    -> list of what is wrong with it, one line each.

    dataset: of split "all". quick: looks whether the images are there, but opens none.
    """
    problems, rows = [], [("split", "refs", "images", "sentences", "published")]
    splits, seen = {ref.split for ref in dataset.refs}, {}
    for split in (*published, *sorted(splits - set(published), key=str)):
        refs = {i for i, ref in enumerate(dataset.refs) if ref.split == split}
        images = {dataset.refs[i].image for i in refs}
        counts = (len(refs), len(images), sum(s.ref in refs for s in dataset.sentences))
        expected = published.get(split)
        found, right = (" / ".join(map(str, numbers or ("-",))) for numbers in (counts, expected))
        rows.append((one_line(split), *map(str, counts), right))
        if expected and counts != expected:
            problems.append(f"{split}: {found} refs / images / sentences, published {right}")
        if not refs and not expected:
            problems.append(f"{split}: no refs")
        for other, others in seen.items():
            if both := images & others:
                first = dataset.images[min(both)].id
                problems.append(f"images both in {other} and in {split}: {len(both)}, "
                                f"the first is {first}")
        seen[split] = images
    if not dataset.sentences:
        problems.append("no sentences")
    problems += odd_names(dataset)
    for i in tqdm(range(len(dataset.images)), "images", disable=None):
        try:
            dataset.path(i) if quick else dataset.image(i)
        except DataError as error:
            problems.append(str(error))
    shares, stray = {}, [r.ref_id for r in dataset.refs if strays(r.segmentation)]
    for i in tqdm(range(len(dataset.refs)), "masks", disable=None):
        try:
            share = shares[dataset.refs[i].ref_id] = dataset.mask(i).mean()
            if not share:
                problems.append(f"the mask of ref {dataset.refs[i].ref_id} is empty")
        except DataError as error:
            problems.append(str(error))
    problems += odd_masks(shares)
    if stray:
        count = sum(strays(r.segmentation) for r in dataset.refs)
        problems.append(f"polygons of fewer than 3 points, left out: {count}, "
                        f"the first is of ref {stray[0]}")
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    print("\n".join("  ".join(row[c].rjust(w) for c, w in enumerate(widths)) for row in rows))
    return problems


def look(dataset, count=12):
    """-> a PIL sheet of evenly spaced refs: the image, the mask's outline in it, and a sentence, or
    in its place why the mask cannot be read."""
    texts, panels = {s.ref: s.text for s in reversed(dataset.sentences)}, []
    refs = sorted(texts)
    for ref in (refs[i * len(refs) // count] for i in range(count)) if len(refs) > count else refs:
        image, caption = Image.new("RGB", (HEIGHT, HEIGHT), "gray"), texts[ref]
        masked = image
        try:
            image = masked = dataset.image(dataset.refs[ref].image)
            masked = outlined(image, dataset.mask(ref), TRUTH)
        except DataError as error:
            caption = f"error: {one_line(error)}"
        name = f"ref {dataset.refs[ref].ref_id}"
        panels.append(panel({one_line(f"{name}, {dataset.refs[ref].split}"): fit(image),
                             "the mask": fit(masked)}, caption))
    return contact_sheet(panels)


def leave_out_broken(dataset):
    """Takes the sentences whose image or mask cannot be read out of the data set -> how many, and a
    line on stderr for each such file. Raises DataError if no sentence is left."""
    broken = {}  # by what is read: whether it cannot be

    def readable(sentence):
        needs = (dataset.image, sentence.image), (dataset.mask, sentence.ref)
        for need in needs:
            if need not in broken:
                broken[need] = False
                try:
                    need[0](need[1])
                except DataError as error:
                    broken[need] = True
                    print(f"left out: {one_line(error)}", file=sys.stderr)
        return not any(broken[need] for need in needs)

    kept = [sentence for sentence in dataset.sentences if readable(sentence)]
    if not kept:
        raise DataError(f"none of {dataset.split}'s sentences can be evaluated: see "
                        "`python data.py check`")
    left_out = len(dataset.sentences) - len(kept)
    if left_out:
        print(f"{left_out} sentences of {dataset.split} were left out of the evaluation",
              file=sys.stderr)
    dataset.sentences = kept
    return left_out


def look_ahead(dataset):
    """Raises DataError now for what would end an evaluation after all the training: an image or
    mask that is missing or has another size than it should. Reads the heads of files alone."""
    for i, record in enumerate(dataset.images):
        size = image_size(dataset.path(i))
        if record.width and size not in ((record.width, record.height),
                                         (record.height, record.width)):
            raise DataError(f"{dataset.path(i)} is {size[0]}x{size[1]}, its record says "
                            f"{record.width}x{record.height}: is it the right file?")
    for ref in dataset.refs:
        if isinstance(ref.segmentation, Path) and (
                image_size(ref.segmentation) != dataset.size(ref.image)):
            size = dataset.size(ref.image)
            raise DataError(f"{ref.segmentation} is not {size[0]}x{size[1]} as its image: a mask "
                            "has its image's size")
