"""data.py get: the annotations and images of RefCOCO, RefCOCO+ and RefCOCOg, in REFER's layout.

Annotations come from the Hugging Face Hub (parquet files with a row per ref) or from UNC's zip.
Images come one by one from COCO's server, or from a zip or a folder, and only those that a ref
names. Every file is written whole or not at all. A run that was stopped at any moment goes on when
it is started again, and ends in the same files, byte for byte.
"""

import json
import pickle
import time
import zipfile
from http.client import HTTPException
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen
from zlib import error as ZlibError

from huggingface_hub import HfApi
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights
from tqdm import tqdm

from support.files import (
    MAX_BYTES,
    DataError,
    check_folder,
    need,
    one_line,
    parse_json,
    path_inside,
    read_bytes,
    whole,
    write_text,
)
from support.image_files import open_image
from support.instances import image_record, read_instances
from support.unpickle import MAX_REFS_BYTES, load_refs

HUB = {"refcoco": "jxu124/refcoco", "refcoco+": "jxu124/refcocoplus", "refcocog": "jxu124/refcocog"}
COCO = "http://images.cocodataset.org/train2014/"
IMAGE_FOLDERS = ("images/mscoco/images/train2014", "train2014")  # the first is written to
REF = {"ref_id": int, "ann_id": int, "category_id": int, "image_id": int, "split": str,
       "file_name": str, "sent_ids": list, "sentences": list}
SENTENCE = {"raw": str, "sent": str, "sent_id": int, "tokens": list}
RECORDS = {"images": ("raw_image_info", "image_id"), "annotations": ("raw_anns", "ann_id")}
WAITS = (1, 2, 4, 8, 16)  # seconds before an image is asked for again
TIMEOUT = 30  # seconds without a byte
AT_A_TIME = 16  # images
MAX_IMAGE_BYTES = 64 * 2**20
MAX_FAILURES = 100  # images; as many again would only trouble the server


def add_flags(commands):
    """Adds the subcommand `get` to data.py's."""
    parser = commands.add_parser("get", help="get annotations, and the images they name")
    parser.add_argument("--root", default="data", help="the data root (default: data)")
    parser.add_argument("--dataset", required=True, choices=(*HUB, "all"))
    parser.add_argument("--from", dest="source", metavar="ZIP", help="UNC's archive of the "
                        "annotations, or a folder of <dataset>.zip (default: the Hugging Face Hub)")
    parser.add_argument("--images", default=COCO, metavar="PLACE",
                        help="train2014.zip, a folder, or an address (default: %(default)s)")
    parser.set_defaults(quick=True, outside=False)  # of the check at the end


def get(root, name, split_by, source=None, place=COCO):
    """Gets a data set. -> what is wrong with its images, one line per reason. Raises DataError as
    `annotations` and `images` do."""
    instances, refs = Path(root, name, "instances.json"), Path(root, name, f"refs({split_by}).p")
    annotations(instances, refs, source)
    named = load_refs(refs)
    _, records, note = read_instances(instances, named)
    missing = {ref["image_id"] for ref in named} - records.keys()
    if missing:
        raise DataError(f"{instances}: image {min(missing)} is missing{note}")
    wanted = [image_record(records[i], f"{instances}: image {i}") for i in sorted(records)]
    return images(root, wanted, place)


def remove_leftovers(folder):
    """Removes what a killed run was writing."""
    for pattern in (".*.partial*", ".writable.*"):
        for path in Path(folder).glob(pattern):
            path.unlink(missing_ok=True)


# ---- Annotations ---------------------------------------------------------------------------------

def annotations(instances, refs, source=None):
    """Writes <set>/instances.json and <set>/refs(...).p.

    source: UNC's zip, or a folder with <set>.zip in it; by default the Hub, which is asked only if
    one of the two files is missing. Raises DataError if the source cannot be read or is not what it
    should be, or a file cannot be written.
    """
    name = refs.parent.name
    check_folder(refs.parent)
    remove_leftovers(refs.parent)
    if source:
        source = Path(source)
        archive = open_zip(source / f"{name}.zip" if source.is_dir() else source)
        for path, limit in ((instances, MAX_BYTES), (refs, MAX_REFS_BYTES)):
            with whole(path) as aside:
                aside.write_bytes(read_member(archive, f"{name}/{path.name}", limit))
    elif not (instances.is_file() and refs.is_file()):
        write_refer(hub_rows(HUB[name]), HUB[name], instances, refs)


def hub_rows(repository):
    """Yields the rows of a data set on the Hub, as dicts. Raises DataError if pyarrow is missing,
    or the files cannot be loaded or read."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError("the Hub's annotations are parquet files: pip install pyarrow, "
                        "or give UNC's archive with --from") from error
    api = HfApi()
    try:
        info = api.dataset_info(repository)
        names = sorted(s.rfilename for s in info.siblings if s.rfilename.endswith(".parquet"))
        paths = [api.hf_hub_download(repository, file, repo_type="dataset", revision=info.sha)
                 for file in names]
    except Exception as error:  # those of whichever library makes the Hub's connections
        raise DataError(f"{repository} cannot be loaded from {api.endpoint} "
                        f"({one_line(error)[:200]}): try again, or give UNC's archive with --from"
                        ) from error
    if not paths:
        raise DataError(f"{repository} on {api.endpoint} has no parquet file")
    columns = [*REF, *(column for column, _ in RECORDS.values())]
    for path in paths:
        try:
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(1000, columns=columns):
                    yield from batch.to_pylist()
        except (ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read as parquet ({one_line(error)[:100]}): "
                            "remove it and try again") from error


def write_refer(rows, where, instances, refs):
    """Writes the Hub's rows as REFER's two files, sorted by id, refs last.

    The Hub has the annotations of the refs alone; UNC's archive has all those of their images.
    Raises DataError naming a row that lacks something.
    """
    found, texts = [], {kind: {} for kind in RECORDS}
    for n, row in enumerate(rows):
        at = f"{where}: row {n}"
        ref = {key: need(row, key, kind, at) for key, kind in REF.items()}
        ref["sentences"] = [{key: need(sentence, key, kind, at) for key, kind in SENTENCE.items()}
                            for sentence in ref["sentences"]]
        for kind, (column, key) in RECORDS.items():
            record = parse_json(need(row, column, str, at).encode(), f"{at}: {column}")
            if need(record, "id", int, f"{at}: {column}") != ref[key]:
                raise DataError(f"{at}: {column} has another id than {key}")
            texts[kind].setdefault(ref[key], json.dumps(record))
        found.append(ref)
    names = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # their index is COCO's id
    categories = [{"id": i, "name": name} for i, name in enumerate(names)
                  if name not in ("__background__", "N/A")]
    lists = [f'"{kind}": [{", ".join(texts[kind][i] for i in sorted(texts[kind]))}]'
             for kind in RECORDS]
    lists.append(f'"categories": {json.dumps(categories)}')
    write_text(instances, "{" + ",\n".join(lists) + "}")
    found.sort(key=lambda ref: ref["ref_id"])
    with whole(refs) as aside:
        aside.write_bytes(pickle.dumps(found, protocol=2))


def open_zip(path):
    """-> an open ZipFile. Raises DataError if there is none."""
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as a zip ({one_line(error)}): is it whole?"
                        ) from error


def read_member(archive, name, limit):
    """-> the bytes of a zip's only file whose path is `name` or ends in it. Raises DataError if
    there is no such file, or more than one, or it is broken or has more bytes than `limit`."""
    length = name.count("/") + 1
    members = [m for m in archive.infolist()
               if "/".join(PurePosixPath(m.filename).parts[-length:]) == name]
    if len(members) != 1:
        raise DataError(f"{archive.filename} has {len(members) or 'no'} files {name}")
    return read_info(archive, members[0], limit)


def read_info(archive, member, limit):
    """-> the bytes of a ZipInfo's file. Raises DataError as read_member does."""
    if member.file_size > limit:
        raise DataError(f"{archive.filename}: {member.filename} has more than "
                        f"{limit // 2**20} MiB: is it the right file?")
    try:
        return archive.read(member)
    except (OSError, zipfile.BadZipFile, ZlibError, EOFError, RuntimeError) as error:
        raise DataError(f"{archive.filename}: {member.filename} cannot be read "
                        f"({one_line(error)}): is it whole?") from error


# ---- Images --------------------------------------------------------------------------------------

def images(root, wanted, place=COCO):
    """Gets those images that are in no folder of the root yet.

    wanted: (file name, width, height) of each. place: an address, a zip, or a folder. -> a line for
    each reason why images could not be had. Raises DataError if the place is none, or after
    MAX_FAILURES images that failed.
    """
    folders = [Path(root, folder) for folder in IMAGE_FOLDERS]
    check_folder(folders[0])
    remove_leftovers(folders[0])
    wanted = [w for w in wanted if not any((folder / w[0]).is_file() for folder in folders)]
    if not wanted:
        return []
    read = opened(place)

    def get_one(image):
        """-> (file name, why it failed or None)"""
        name, *size = image
        try:
            content = read(name)
            with whole(folders[0] / name) as aside:
                aside.write_bytes(content)
                try:
                    open_image(aside, tuple(size))
                except DataError as error:
                    raise DataError(str(error).replace(str(aside), "what came")) from error
        except DataError as error:
            return name, one_line(error)
        return name, None

    failures = {}  # reason -> names
    with ThreadPool(AT_A_TIME) as pool:
        results = pool.imap_unordered(get_one, wanted)
        for name, reason in tqdm(results, "get", len(wanted), unit="image", disable=None):
            if reason:
                failures.setdefault(reason, []).append(name)
            if sum(map(len, failures.values())) >= MAX_FAILURES:
                raise DataError(f"{MAX_FAILURES} images could not be had from {place}, the last "
                                f"was {name} ({reason}): is it the right place? Started again, "
                                "it goes on from here")
    return [f"{len(names)} images could not be had, {reason}: {', '.join(sorted(names))}"
            for reason, names in sorted(failures.items())]


def opened(place):
    """An address, a zip, or a folder -> the function from a file's name to its bytes, which raises
    DataError if they cannot be had."""
    if str(place).startswith(("http://", "https://")):
        return lambda name: download(f"{place.rstrip('/')}/{quote(name)}")
    place = Path(place)
    if place.is_dir():  # its files may be links
        return lambda name: read_bytes(path_inside([place, place / "train2014"], name, place, True),
                                       MAX_IMAGE_BYTES)
    archive = open_zip(place)
    members = {PurePosixPath(m.filename).name: m for m in archive.infolist()}

    def read(name):
        if name not in members:
            raise DataError(f"not in {place}")
        return read_info(archive, members[name], MAX_IMAGE_BYTES)
    return read


def download(url):
    """-> the bytes at an address. Asks again after a while if the server is busy, silent, or stops
    in the middle. Raises DataError with the reason if it has no such file, or never sends it."""
    for wait in (*WAITS, None):
        try:
            request = Request(url, headers={"User-Agent": "RISCLIP data.py"})
            with urlopen(request, timeout=TIMEOUT) as response:
                content = response.read(MAX_IMAGE_BYTES)
                length = response.headers.get("Content-Length")
                if length in (None, str(len(content))):
                    return content
                reason = "it was cut short"
        except HTTPError as error:
            reason = f"HTTP {error.code}"
            if error.code not in (408, 429) and error.code < 500:
                break
            asked = error.headers.get("Retry-After", "")
            if wait and asked.isdecimal():
                wait = max(wait, min(int(asked), 60))
        except (OSError, HTTPException) as error:  # no connection, no answer
            reason = one_line(error)
        if wait:
            time.sleep(wait)
    raise DataError(reason)
