from collections import Counter

from tqdm import tqdm

from data import PUBLISHED, UNION, RefCOCO
from support.files import DataError, one_line

# ---- Is a data set whole? -------------------------------------------------------------------------------------------

def doubts(data, looks=20):
    """-> what is plainly wrong with a data set as a whole, one line each: split names that nothing asks for, sentences
    with the sent_id of others, and masks that are all empty, of those `looks` that are evenly spaced."""
    sets = UNION if data.dataset == "combined" else [data.dataset] if data.dataset in PUBLISHED else PUBLISHED
    lines, known = [], {split for name in sets for split in PUBLISHED[name]}  # one's own are named as any published one
    if unknown := sorted(data.split_names - known):
        lines.append(f"refs of unknown splits: {', '.join(map(repr, unknown))}")
    counts = Counter(s.sent_id for s in data.sentences)
    if len(counts) < len(data):
        first = next(i for i, count in counts.items() if count > 1)
        lines.append(f"sentences with the sent_id of another: {len(data) - len(counts)}, the first is {first}")
    areas = []
    for i in range(0, len(data.refs), max(1, len(data.refs) // looks)):
        try:
            areas.append(data.mask(i).any())
        except DataError:
            pass  # named, skipped and counted where it is used
    if areas and not any(areas):
        lines.append(f"masks that are empty: all {len(areas)} that were looked at")
    return lines


def check(root, dataset, quick=False):
    """Prints a data set's counts beside the published ones; -> list of what is wrong with it, one line each.

    quick: looks whether the images are there, but opens none. Raises DataError if there is nothing to look at.
    """
    if dataset == "combined":
        raise DataError(f"--dataset combined is made of {', '.join(UNION)}: check them one by one")
    problems = []
    data = RefCOCO(root, dataset, "all", report=lambda error: problems.append(str(error)))
    published = PUBLISHED.get(dataset, {})
    splits = {ref.split for ref in data.refs}
    rows, seen = [("split", "refs", "images", "sentences", "published")], {}
    for split in (*published, *sorted(splits - set(published), key=str)):
        refs = {i for i, ref in enumerate(data.refs) if ref.split == split}
        images = {data.refs[i].image for i in refs}
        counts = (len(refs), len(images), sum(s.ref in refs for s in data.sentences))
        expected = published.get(split)
        rows.append((one_line(split), *map(str, counts), " / ".join(map(str, expected)) if expected else "-"))
        if expected and counts != expected:
            problems.append(f"{split}: {' / '.join(map(str, counts))} refs / images / sentences, published "
                            f"{' / '.join(map(str, expected))}")
        if not refs and not expected:
            problems.append(f"{split}: no refs")
        for other, others in seen.items():
            if both := images & others:
                first = data.images[min(both)].id
                problems.append(f"images both in {other} and in {split}: {len(both)}, the first is {first}")
        seen[split] = images
    if not data.sentences:
        problems.append("no sentences")
    problems += doubts(data)
    for i in tqdm(range(len(data.images)), "images", disable=None):
        try:
            data.path(i) if quick else data.image(i)
        except DataError as error:
            problems.append(str(error))
    for i in tqdm(range(len(data.refs)), "masks", disable=None):
        try:
            if not data.mask(i).any():
                problems.append(f"the mask of ref {data.refs[i].ref_id} is empty")
        except DataError as error:
            problems.append(str(error))
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    print("\n".join("  ".join(row[c].rjust(w) for c, w in enumerate(widths)) for row in rows))
    return problems
