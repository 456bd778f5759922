"""predict.py --jsonl: many lines, shared among processes, and a stopped run that continues.

A line of in.jsonl is {"image": "a.jpg", "sentence": "left vase"}, the path relative to in.jsonl. A
line of out.jsonl has its number ("line", from 1), image and sentence, the mask as COCO's run
lengths ("segmentation") and as "score" the mean probability of the foreground in it. For a bad
line it has the number and the "error". Started again, a run continues with the lines that are not
in out.jsonl yet.
"""

import json
from pathlib import Path

import numpy as np
from pycocotools import mask as coco
from tqdm import tqdm

from support import processes
from support.files import (
    MAX_BYTES,
    DataError,
    as_utf8,
    check_writable,
    need,
    one_line,
    parse_json,
    path_inside,
    read_bytes,
)
from support.image_files import open_image
from support.unpickle import MAX_SENTENCES


def predict_lines(source, out, outside, clean, masks_of):
    """in.jsonl -> out.jsonl. -> exit code: 1 if there are bad lines.

    outside: whether images may lie outside in.jsonl's folder. clean(text, where) -> the sentence,
    or a DataError. masks_of(image, sentences) yields (bool mask, score) per sentence.
    """
    source, out = Path(source), Path(out)
    if source.resolve() == out.resolve():
        raise DataError(f"--out {out} is --jsonl as well: give two places")
    lines = read_lines(source)
    check_writable(out)
    done = processes.gather(read_done(out) if processes.MAIN else None)[0]
    images, bad = {}, []  # path -> (number, image as written, sentence) per line of it; records
    for n, line in lines.items():
        try:
            name, path, sentence = parse_line(n, line, source.parent, outside, clean)
        except DataError as error:
            bad += [] if n in done else [{"line": n, "error": one_line(error)}]
            continue
        if n not in done:
            images.setdefault(path, []).append((n, name, sentence))
        elif (done[n].get("image", name), done[n].get("sentence", sentence)) != (name, sentence):
            raise DataError(f"--out {out} has another image or sentence in line {n} than --jsonl: "
                            "give another place")
    with open(out, "ab", buffering=0) as file:
        def write(record):
            file.write(json.dumps(record).encode() + b"\n")  # whole lines, among processes as well

        for record in bad if processes.MAIN else ():
            write(record)
        mine = list(images.items())[processes.RANK::processes.WORLD]
        for path, wanted in tqdm(mine, "predict", unit="image"):
            for record in records(path, wanted, masks_of):
                write(record)
    processes.gather(None)
    errors = sum("error" in record for record in read_done(out).values())
    print(f"wrote {out}: {len(lines)} lines, {errors} of them with an error")
    return 1 if errors else 0


def records(path, wanted, masks_of):
    """Yields out.jsonl's records of one image, for its lines (number, image, sentence)."""
    try:
        found = masks_of(open_image(path), [sentence for *_, sentence in wanted])
        results = ({"segmentation": run_lengths(mask), "score": score} for mask, score in found)
    except DataError as error:
        results = [{"error": one_line(error)}] * len(wanted)
    for (n, name, sentence), result in zip(wanted, results):
        yield {"line": n, "image": name, "sentence": sentence, **result}


def run_lengths(mask):
    """bool (H, W) -> COCO's compressed run lengths, as JSON holds them."""
    rle = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def read_lines(source):
    """-> in.jsonl's lines that are not empty, by number. Raises DataError if there are too many."""
    content = as_utf8(read_bytes(source), source)
    if content.count(b"\n") > MAX_SENTENCES:
        raise DataError(f"--jsonl {source} has more than {MAX_SENTENCES} lines: split it")
    return {n: line for n, line in enumerate(content.split(b"\n"), 1) if line.strip()}


def parse_line(number, line, folder, outside, clean):
    """A line of in.jsonl -> image as written, its path, sentence; or a DataError."""
    where = f"line {number}"
    record = parse_json(line, where)
    name = need(record, "image", str, where)
    sentence = need(record, "sentence", str, where)
    path = folder / name if outside else path_inside([folder], name, where)
    return name, path, clean(sentence, f"{where}: sentence")


def read_done(path):
    """-> {line number: record} of an out.jsonl, if there is one. A last line that was cut short is
    cut off it. Raises DataError if the file is something else, which then stays as it is."""
    if not path.exists():
        return {}
    content = read_bytes(path, 32 * MAX_BYTES)  # masks are longer than sentences
    whole = content.rfind(b"\n") + 1
    torn, start = content[whole:], b'{"line": '
    try:
        done = {r["line"]: r for r in map(json.loads, content[:whole].splitlines())}
        if not start.startswith(torn[:len(start)]):
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"--out {path} exists and is no output of --jsonl: give another place"
                        ) from error
    if torn:
        with open(path, "r+b") as file:
            file.truncate(whole)
    return done
