"""instances.json of a REFER set: the annotations and image records that its refs name."""

import os

import numpy as np

from support.files import DataError, need, read_json, whole_number
from support.image_files import MAX_PIXELS


def read_instances(path, refs):
    """-> {id: annotation}, {id: image record} of those that the refs name, and a line that says
    which ids of the file are no integers, if there are any. Raises DataError for a broken file."""
    wanted, odd = {r["ann_id"] for r in refs}, []

    def slim(record):  # as the file is parsed, so that what no ref names never piles up
        number = whole_number(record.get("id"))
        if not isinstance(number, int):
            odd.extend([record["id"]] if "id" in record and not odd else [])
            return None if "segmentation" in record else record
        if "segmentation" not in record:
            record["id"] = number
            return record
        if number not in wanted:
            return None
        parts = record["segmentation"]
        if isinstance(parts, list):
            try:
                parts = [np.array(p, np.float64) if isinstance(p, list) and len(p) > 5 else p
                         for p in parts]
            except (ValueError, TypeError):
                parts = []  # RefCOCO.mask refuses it when it is asked for
        return {"id": number, "image_id": whole_number(record.get("image_id")),
                "segmentation": parts}

    content = read_json(path, slim)
    annotations = {a["id"]: a for a in need(content, "annotations", list, path)
                   if isinstance(a, dict) and "segmentation" in a}
    pictured = {r["image_id"] for r in refs}  # no other id becomes a key
    records = {i["id"]: i for i in need(content, "images", list, path)
               if isinstance(i, dict) and isinstance(i.get("id"), int) and i["id"] in pictured}
    note = f": its ids are no integers, {str(odd[0])[:40]!r} for one" if odd else ""
    return annotations, records, note


def image_record(record, where):
    """-> file name, width, height of an image record. Raises DataError if it is no plain name or
    no size of an image."""
    name = need(record, "file_name", str, where)
    width, height = need(record, "width", int, where), need(record, "height", int, where)
    if name != os.path.basename(name) or set(name) & {"\\", "\0"} or name in ("", ".", ".."):
        raise DataError(f"{where}: file_name {name[:100]!r} is no plain file name")
    if not (0 < width and 0 < height and width * height <= MAX_PIXELS):
        raise DataError(f"{where}: {width}x{height} pixels: "
                        f"give 1 to {MAX_PIXELS // 10**6} megapixels")
    return name, width, height
