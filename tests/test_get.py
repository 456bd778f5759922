"""data.py get: what it writes, what it says when something fails, and that a kill loses nothing.

Nothing here leaves the machine: a server on the loopback address stands for the Hub and COCO's. The
default run kills five times; `pytest -m slow tests/test_get.py` 20 times, and gets a set of
RefCOCO's size (-s shows its seconds and memory).
"""

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import sys
import threading
import time
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import HfApi, constants
from PIL import Image

import data
from data import RefCOCO
from support import files, get
from support.files import DataError

SHA = "0123456789" * 4
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["data"])
SPLITS = {"train": "train", "validation": "val", "test": "testA", "testB": "testB"}  # Hub's, ours


# ---- A made-up set, and a server that has it -----------------------------------------------------

def size(image_id):
    return 20 + image_id % 7, 30 + image_id % 5


def name(image_id):
    return f"COCO_train2014_{image_id:012d}.jpg"


def jpeg(image_id, size=size):
    pixels = np.random.default_rng(image_id).integers(0, 256, (*size(image_id)[::-1], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=30)
    return file.getvalue()


def row(ref_id, image_id, split):
    """A row of the Hub's: two refs' annotations may be of one image."""
    sentences = [{"tokens": ["left", "é"], "raw": "Left é", "sent": "left é",
                  "sent_id": 3 * ref_id + k} for k in range(1 + ref_id % 3)]
    w, h = size(image_id)
    polygon = [1.5, 2, 11.25, 2, 11.25, 12, 1.5, 12]
    return {"sent_ids": [s["sent_id"] for s in sentences], "file_name": f"COCO_x_{ref_id}.jpg",
            "ann_id": 1000 + ref_id, "ref_id": ref_id, "image_id": image_id, "split": split,
            "sentences": sentences, "category_id": 90,
            "raw_anns": json.dumps({"segmentation": [polygon], "area": 97.5, "iscrowd": 0,
                                    "image_id": image_id, "bbox": [1.5, 2, 9.75, 10],
                                    "category_id": 90, "id": 1000 + ref_id}),
            "raw_image_info": json.dumps({"license": 3, "file_name": name(image_id), "height": h,
                                          "width": w, "coco_url": "http://mscoco.org/images/1",
                                          "id": image_id}),
            "raw_sentences": json.dumps(sentences),
            "image_path": f"coco/train2014/{name(image_id)}", "bbox": [1.5, 2.0, 11.25, 12.0],
            "captions": [s["sent"] for s in sentences],
            "global_image_id": f"coco.{image_id}", "anns_id": f"{1000 + ref_id}"}


def rows(refs=16, images=8):
    splits = list(SPLITS.values())
    return [row(i, 1 + i % images, splits[i % images % 4]) for i in range(refs)]


def parquet_files(rows):
    """{path in the repository: bytes}, refs in disorder."""
    pyarrow = pytest.importorskip("pyarrow", reason="the Hub's files are parquet")
    parquet = pytest.importorskip("pyarrow.parquet")
    contents = {}
    for hub, split in SPLITS.items():
        file = io.BytesIO()
        table = pyarrow.Table.from_pylist([r for r in rows[::-1] if r["split"] == split])
        parquet.write_table(table, file)
        contents[f"data/{hub}-00000-of-00001-94431d5f4bd5b93f.parquet"] = file.getvalue()
    return contents


class Server(ThreadingHTTPServer):
    """`parquet` and `images` are what it has; `faults` {file name: what goes wrong with each time
    that it is asked for, the last for good}; `asked` the images that were asked for."""
    daemon_threads, request_queue_size = True, 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.parquet, self.images, self.faults, self.asked, self.delay = {}, {}, {}, [], 0

    def handle_error(self, request, client_address):
        """A killed run hangs up."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def answer(self, content, status=200, length=None, **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_GET(self):
        server, path = self.server, self.path
        if path.startswith("/api/datasets/"):
            siblings = [{"rfilename": f} for f in (".gitattributes", "README.md", *server.parquet)]
            self.answer(json.dumps({"id": "jxu124/refcoco", "sha": SHA,
                                    "siblings": siblings}).encode())
        elif path.startswith("/datasets/"):
            file = path.partition(f"/resolve/{SHA}/")[2]
            etag = hashlib.sha256(server.parquet[file]).hexdigest()
            self.answer(server.parquet[file], X_Repo_Commit=SHA, ETag=f'"{etag}"')
        else:
            self.image(path.rpartition("/")[2])

    do_HEAD = do_GET

    def image(self, file):
        server = self.server
        server.asked.append(file)
        time.sleep(server.delay)
        faults = server.faults.get(file, [None])
        fault = faults.pop(0) if len(faults) > 1 else faults[0]
        content = server.images.get(file, b"")
        if fault == "slow":
            time.sleep(0.3)
        if file not in server.images:
            self.answer(b"not found", 404)
        elif isinstance(fault, int):
            self.answer(b"busy", fault, Retry_After="0")
        elif isinstance(fault, bytes):
            self.answer(fault)
        elif fault == "cut":
            self.answer(content[:-2], length=len(content))  # a JPEG that still decodes
            self.close_connection = True
        else:
            self.answer(content)


@pytest.fixture
def server(monkeypatch, tmp_path):
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    server.images = {name(i): jpeg(i) for i in range(1, 9)}
    monkeypatch.setattr(get, "HfApi", partial(HfApi, endpoint=server.address))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(get, "WAITS", (0.01, 0.01))
    yield server
    server.shutdown()
    server.server_close()


def write_annotations(root, rows):
    """REFER's two files, without the Hub."""
    folder = root / "refcoco"
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "instances.json", folder / "refs(unc).p"
    get.write_refer(rows, "rows", *paths)
    return paths


def tree(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def wanted(root, place):
    return get.get(root, "refcoco", "unc", place=place)


# ---- Annotations ---------------------------------------------------------------------------------

def test_the_hubs_rows_become_refers_files(server, tmp_path, monkeypatch, capsys):
    made = rows()
    server.parquet = parquet_files(made)
    monkeypatch.setitem(data.PUBLISHED, "refcoco", {"train": (4, 2, 7), "val": (4, 2, 8),
                                                    "testA": (4, 2, 9), "testB": (4, 2, 7)})
    server.images["COCO_train2014_000000000099.jpg"] = jpeg(99)  # which no ref names
    flags = ["get", "--dataset", "refcoco", "--root", str(tmp_path / "root"), "--images",
             server.address]
    assert files.run(data.main, data.parse_args(flags)) == 0, capsys.readouterr()
    assert "complete" in capsys.readouterr().out
    refs = pickle.loads((tmp_path / "root/refcoco/refs(unc).p").read_bytes())
    assert refs == [{key: r[key] for key in get.REF} for r in made]
    instances = json.loads((tmp_path / "root/refcoco/instances.json").read_text())
    assert instances["annotations"] == [json.loads(r["raw_anns"]) for r in made]
    assert instances["images"] == [json.loads(r["raw_image_info"]) for r in made[:8]]
    assert {"id": 90, "name": "toothbrush"} in instances["categories"]
    assert len(instances["categories"]) == 80
    images = tmp_path / "root/images/mscoco/images/train2014"
    assert tree(images) == {name(i): jpeg(i) for i in range(1, 9)}
    dataset = RefCOCO(tmp_path / "root", "refcoco", "all")
    assert [s.text for s in dataset.sentences][:2] == ["left é", "left é"]
    assert dataset.mask(0)[2:12, 2:11].all()
    assert len(server.asked) == 8
    server.parquet.clear()  # nobody asks the Hub again
    assert files.run(data.main, data.parse_args(flags)) == 0
    assert len(server.asked) == 8


def test_the_order_of_the_rows_changes_nothing(tmp_path):
    write_annotations(tmp_path / "a", rows())
    write_annotations(tmp_path / "b", rows()[::-1])
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


@pytest.mark.parametrize("change, message", [
    ({"ref_id": None}, "row 1: ref_id is missing"),
    ({"sentences": [{"raw": "x", "sent": "x", "sent_id": 1}]}, "row 1: tokens is missing"),
    ({"raw_anns": "{"}, "row 1: raw_anns is not valid JSON"),
    ({"raw_anns": "[]"}, "row 1: raw_anns: id is missing"),
    ({"raw_image_info": '{"id": 77}'}, "raw_image_info has another id than image_id"),
])
def test_a_row_that_lacks_something_is_named(tmp_path, change, message):
    made = rows()
    made[1] = made[1] | change
    with pytest.raises(DataError, match=message):
        write_annotations(tmp_path, made)
    assert tree(tmp_path) == {}


def test_without_pyarrow_one_line_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    flags = ["get", "--dataset", "refcoco", "--root", str(tmp_path)]
    assert files.run(data.main, data.parse_args(flags)) == 2
    error = capsys.readouterr().err
    assert "pip install pyarrow" in error and error.count("\n") == 1


def test_no_hub_no_parquet_and_broken_parquet_are_one_line(server, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow", reason="the Hub's files are parquet")
    with pytest.raises(DataError, match="has no parquet file"):
        wanted(tmp_path, server.address)
    server.parquet = {"data/train.parquet": b"PAR1, or something else"}
    with pytest.raises(DataError, match="cannot be read as parquet"):
        wanted(tmp_path, server.address)
    server.parquet = {"data/train.parquet": parquet_files(rows())[
        "data/train-00000-of-00001-94431d5f4bd5b93f.parquet"][:-900]}
    with pytest.raises(DataError, match="cannot be read as parquet"):
        wanted(tmp_path / "cut", server.address)
    monkeypatch.setattr(get, "HfApi", partial(HfApi, endpoint="http://127.0.0.1:9"))
    with pytest.raises(DataError, match="cannot be loaded from http://127.0.0.1:9.*--from"):
        wanted(tmp_path, server.address)


def unc_zip(path, root, prefix="refcoco/", **more):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{prefix}refs(google).p", b"not asked for")
        archive.writestr("../../outside.txt", b"not asked for")
        for file in ("instances.json", "refs(unc).p"):
            archive.write(root / "refcoco" / file, prefix + file)
        for file, content in more.items():
            archive.writestr(file, content)
    return path


@pytest.mark.parametrize("prefix", ["refcoco/", "referit/data/refcoco/"])
def test_from_uncs_archive_come_two_files(tmp_path, prefix):
    write_annotations(tmp_path / "made", rows())
    place = unc_zip(tmp_path / "refcoco.zip", tmp_path / "made", prefix)
    for i, source in enumerate((place, tmp_path)):
        root = tmp_path / f"inner/{i}"
        get.annotations(root / "refcoco/instances.json", root / "refcoco/refs(unc).p", source)
        assert tree(root) == tree(tmp_path / "made")
    assert not list(tmp_path.rglob("outside.txt"))


def test_an_archive_that_is_none_is_one_line(tmp_path, monkeypatch):
    paths = write_annotations(tmp_path / "made", rows())
    good = unc_zip(tmp_path / "refcoco.zip", tmp_path / "made")
    outs = tmp_path / "refcoco/instances.json", tmp_path / "refcoco/refs(unc).p"

    def says(message, source):
        with pytest.raises(DataError, match=message):
            get.annotations(*outs, source)
        assert not outs[1].exists()

    says("cannot be read as a zip", paths[0])
    says("no files refcoco/instances.json", unc_zip(tmp_path / "b.zip", tmp_path / "made", "x/"))
    twice = {"again/refcoco/instances.json": b"{}"}
    says("has 2 files", unc_zip(tmp_path / "c.zip", tmp_path / "made", **twice))
    content = good.read_bytes()
    at = content.index(b"refcoco/refs(unc).p") + 60
    (tmp_path / "d.zip").write_bytes(content[:at] + bytes([content[at] ^ 255]) + content[at + 1:])
    says(r"refs\(unc\).p cannot be read", tmp_path / "d.zip")
    monkeypatch.setattr(get, "MAX_BYTES", 1000)
    says("has more than 0 MiB", good)


# ---- Images --------------------------------------------------------------------------------------

def test_images_come_from_a_folder_a_zip_or_an_address(server, tmp_path):
    folder = tmp_path / "mine/train2014"
    folder.mkdir(parents=True)
    server.images["COCO_train2014_000000000099.jpg"] = jpeg(99)
    for file, content in server.images.items():
        (folder / file).write_bytes(content)
    with zipfile.ZipFile(tmp_path / "train2014.zip", "w") as archive:
        for file, content in server.images.items():
            archive.writestr(f"train2014/{file}", content)
    trees = []
    for i, place in enumerate((folder, folder.parent, tmp_path / "train2014.zip", server.address)):
        write_annotations(tmp_path / f"{i}", rows())
        assert wanted(tmp_path / f"{i}", str(place)) == []
        trees.append(tree(tmp_path / f"{i}"))
    assert trees[0] == trees[1] == trees[2] == trees[3]
    assert len(trees[0]) == 2 + 8


def test_images_in_either_folder_are_not_asked_for_again(server, tmp_path):
    write_annotations(tmp_path, rows())
    (tmp_path / "train2014").mkdir()
    (tmp_path / "train2014" / name(1)).write_bytes(b"the user's own")
    assert wanted(tmp_path, server.address) == []
    assert name(1) not in server.asked and len(server.asked) == 7


def test_what_fails_is_named_and_what_may_pass_is_asked_for_again(server, tmp_path):
    write_annotations(tmp_path, rows())
    server.faults = {name(1): ["cut", None], name(2): [503, 429, None], name(3): ["slow"],
                     name(4): [503], name(5): [jpeg(5, lambda _: (9, 9))],
                     name(6): [b"<html>sorry</html>"], name(7): ["cut"]}
    missing = server.images.pop(name(8))
    problems = wanted(tmp_path, server.address)
    lines = "\n".join(problems)
    for reason, i in (("HTTP 404", 8), ("HTTP 503", 4), ("it was cut short", 7),
                      ("what came is 9x9, its record says", 5),
                      ("what came cannot be read as an image", 6)):
        assert re.search(f"1 images could not be had, {reason}.*{name(i)}", lines), (reason, lines)
    assert len(problems) == 5
    asked = [server.asked.count(name(i)) for i in range(1, 9)]
    assert asked == [2, 3, 1, 3, 1, 1, 3, 1]
    folder = tmp_path / get.IMAGE_FOLDERS[0]
    assert sorted(tree(folder)) == [name(i) for i in (1, 2, 3)]
    server.faults, server.images[name(8)] = {}, missing  # it is well again, and so is a second run
    assert wanted(tmp_path, server.address) == []
    assert tree(folder) == {name(i): jpeg(i) for i in range(1, 9)}


def test_a_missing_image_makes_the_exit_code_1(server, tmp_path, capsys):
    write_annotations(tmp_path, rows())
    del server.images[name(8)]
    flags = ["get", "--dataset", "refcoco", "--root", str(tmp_path), "--images", server.address]
    assert files.run(data.main, data.parse_args(flags)) == 1
    assert f"1 images could not be had, HTTP 404: {name(8)}" in capsys.readouterr().out


def test_a_server_that_stopped_is_not_asked_for_ever(server, tmp_path, monkeypatch):
    monkeypatch.setattr(get, "MAX_FAILURES", 5)
    write_annotations(tmp_path, rows())
    with pytest.raises(DataError, match="5 images could not be had from http://127.0.0.1:9"):
        wanted(tmp_path, "http://127.0.0.1:9")
    with pytest.raises(DataError, match="cannot be read as a zip"):
        wanted(tmp_path, str(tmp_path / "nowhere.zip"))


# ---- Kills ---------------------------------------------------------------------------------------

def gets(root, address, cache):
    """What a child process does."""
    get.HfApi, constants.HF_HUB_OFFLINE = partial(HfApi, endpoint=address), False
    constants.HF_HUB_CACHE = cache
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    flags = ["get", "--dataset", "refcoco", "--root", root, "--images", address]
    code = files.run(data.main, data.parse_args(flags))
    Path(cache, "KiB").write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
    os._exit(code)


def start(root, address, cache):
    process = CONTEXT.Process(target=gets, args=(str(root), address, str(cache)))
    process.start()
    return process


def kill_often(server, tmp_path, times):
    """Kills at random moments of a run, then runs it to its end. -> what stood when it died."""
    made = rows(120, 60)
    server.parquet, server.delay = parquet_files(made), 0.03
    server.images = {name(i): jpeg(i) for i in range(1, 61)}
    rng, left = random.Random(0), []
    for folder in ("warm", "whole"):
        begun = time.monotonic()
        process = start(tmp_path / folder, server.address, tmp_path / f"{folder}.cache")
        process.join(60)
        seconds = time.monotonic() - begun
        assert process.exitcode == 1  # these are not the published counts
    expected = tree(tmp_path / "whole")
    assert len(expected) == 62
    for i in range(times):
        root, cache = tmp_path / f"{i}", tmp_path / f"{i}.cache"
        process, asked = start(root, server.address, cache), len(server.asked)
        if i % 2:  # among the images
            asked += rng.randrange(60)
            while len(server.asked) < asked and process.is_alive():
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.03))
        else:
            time.sleep(rng.uniform(0.02, 1) * seconds)
        process.kill()
        process.join(60)
        left.append(len(tree(root)) if root.exists() else 0)
        process = start(root, server.address, cache)
        process.join(60)
        assert process.exitcode == 1
        assert tree(root) == expected, f"kill {i}, with {left[-1]} files there"
    return left


def test_a_killed_run_ends_in_the_same_files(server, tmp_path):
    kill_often(server, tmp_path, 5)


def test_what_a_killed_run_was_writing_is_removed(server, tmp_path):
    write_annotations(tmp_path, rows())
    folder = tmp_path / get.IMAGE_FOLDERS[0]
    folder.mkdir(parents=True)
    (folder / f".{name(1)[:-4]}.77.partial.jpg").write_bytes(b"half")
    (tmp_path / "refcoco/.writable.77").touch()
    assert wanted(tmp_path, server.address) == []
    assert not [p for p in tree(tmp_path) if "/." in p]


@pytest.mark.slow
def test_20_kills_end_in_the_same_files(server, tmp_path):
    left = kill_often(server, tmp_path, 20)
    print("files there when it was killed:", sorted(left))


@pytest.mark.slow
def test_a_set_of_refcocos_size_in_3_minutes_and_less_than_1_5_gib(server, tmp_path):
    made = rows(50_000, 20_000)
    polygon = [round(1 + 9 * random.Random(0).random(), 2) for _ in range(120)]
    for r in made:  # of the real ones' length
        annotation = json.loads(r["raw_anns"]) | {"segmentation": [polygon]}
        r["raw_anns"] = json.dumps(annotation)
    server.parquet = parquet_files(made)
    content = jpeg(1)
    server.images = {name(i): content if size(i) == size(1) else jpeg(i) for i in range(1, 20_001)}
    del made
    begun = time.monotonic()
    process = start(tmp_path / "root", server.address, tmp_path / "cache")
    process.join(600)
    seconds = time.monotonic() - begun
    memory = int((tmp_path / "cache/KiB").read_text()) / 2**20
    print(f"{seconds:.0f} s, {memory:.2f} GiB")
    assert process.exitcode == 1 and len(tree(tmp_path / "root")) == 20_002
    assert seconds < 180 and memory < 1.5
