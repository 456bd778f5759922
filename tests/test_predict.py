"""predict.py --jsonl: many sentences of many images, whatever is wrong with some of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

import predict
from risclip import RISCLIP
from support import bulk, files, image_files

REPOSITORY = Path(predict.__file__).parent


@pytest.fixture
def checkpoint(tiny, tmp_path):
    tiny.add_decoder()
    tiny.save_pretrained(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def folder(world, tmp_path):
    """Three images a.png, b.png, c.png, and an in.jsonl about two of them by turns."""
    (tmp_path / "in").mkdir()
    for name, file in zip("abc", sorted((world / "images" / "shapes").iterdir())):
        (tmp_path / "in" / f"{name}.png").write_bytes(file.read_bytes())
    write(tmp_path / "in", [line(f"{name}.png", text)
                            for text in ("the red circle", "the star") for name in "ab"])
    return tmp_path / "in"


def line(image, sentence):
    return json.dumps({"image": image, "sentence": sentence})


def write(folder, lines):
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n")


def predicted(checkpoint, folder, *flags):
    """-> exit code, out.jsonl's records by line number (each once)."""
    out = folder / "out.jsonl"
    args = [str(checkpoint), "--jsonl", str(folder / "in.jsonl"), "--out", str(out), *flags]
    code = files.run(predict.main, predict.parse_args(args))
    records = [json.loads(text) for text in out.read_text().splitlines()] if out.exists() else []
    assert len({r["line"] for r in records}) == len(records)
    return code, {r["line"]: r for r in records}


@pytest.fixture
def opened(monkeypatch):
    """The names of the images that are opened."""
    names, open_image = [], image_files.open_image

    def noted(path):
        names.append(path.name)
        return open_image(path)
    monkeypatch.setattr(bulk, "open_image", noted)
    return names


def test_masks_are_those_of_segment_and_images_are_opened_once(checkpoint, folder, opened):
    code, records = predicted(checkpoint, folder)
    assert code == 0 and opened == ["a.png", "b.png"] and sorted(records) == [1, 2, 3, 4]
    model = RISCLIP.from_pretrained(checkpoint)
    asked = [("a", "the red circle"), ("b", "the red circle"), ("a", "the star"), ("b", "the star")]
    for n, (name, text) in enumerate(asked, 1):
        record = records[n]
        assert (record["image"], record["sentence"]) == (f"{name}.png", text)
        mask = coco.decode(record["segmentation"]).astype(bool)
        expected = model.segment(Image.open(folder / f"{name}.png"), text)
        assert mask.shape == expected.shape and (mask != expected).mean() < 1e-3
        assert 0 <= record["score"] <= 1


def test_bad_lines_are_reported_with_their_numbers_and_the_rest_is_done(checkpoint, folder):
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    write(folder, [line("a.png", "the star"), "{not json", '["a list"]', line("a.png", " "), "",
                   line("no.png", "x"), line("broken.png", "x"), '{"image": "a.png"}',
                   "[" * 100_000, line("b.png", "the star")])
    code, records = predicted(checkpoint, folder)
    assert code == 1 and sorted(records) == [1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert [n for n, r in records.items() if "segmentation" in r] == [1, 10]
    for n, words in ((2, "line 2 is not valid JSON"), (3, "image is missing"),
                     (4, "line 4: sentence is empty"), (6, "no.png"), (7, "broken.png"),
                     (8, "sentence is missing"), (9, "line 9")):
        assert words in records[n]["error"], records[n]


@pytest.mark.parametrize("name", ["../outside.png", "link.png", "{absolute}"])
def test_a_path_that_leaves_the_folder_needs_the_flag(checkpoint, folder, name):
    outside = folder.parent / "outside.png"
    outside.write_bytes((folder / "a.png").read_bytes())
    (folder / "link.png").symlink_to(outside)
    write(folder, [line(name.format(absolute=outside), "the star")])
    code, records = predicted(checkpoint, folder)
    assert code == 1 and "leaves the folder" in records[1]["error"]
    (folder / "out.jsonl").unlink()
    code, records = predicted(checkpoint, folder, "--outside")
    assert code == 0 and "segmentation" in records[1]


def test_a_file_that_would_fill_the_memory_is_refused_and_so_is_a_line(checkpoint, folder,
                                                                       monkeypatch, capsys):
    long = '{"image": "a.png", "sentence": "the star", "more": [' + "[]," * 9999 + "[]]}"
    write(folder, [long, line("a.png", "the star")])
    monkeypatch.setattr(files, "MAX_JSON_MEMORY", 10**6)
    code, records = predicted(checkpoint, folder)
    assert code == 1 and "line 1 could take" in records[1]["error"]
    assert "segmentation" in records[2]
    monkeypatch.setattr(bulk, "MAX_SENTENCES", 1)
    assert predicted(checkpoint, folder)[0] == 2
    assert "has more than 1 lines: split it" in capsys.readouterr().err


def test_a_stopped_run_goes_on_where_it_was_and_mends_a_torn_line(checkpoint, folder, opened):
    _, whole = predicted(checkpoint, folder)
    out = folder / "out.jsonl"
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(lines[0] + lines[1] + lines[2][:20])
    opened.clear()
    code, records = predicted(checkpoint, folder)
    assert code == 0 and opened == ["b.png"]
    assert out.read_bytes().startswith(lines[0] + lines[1])  # both of a.png
    assert all(records[n]["segmentation"] == whole[n]["segmentation"] for n in records | whole)
    before = out.read_bytes()
    assert predicted(checkpoint, folder)[0] == 0 and out.read_bytes() == before
    assert opened == ["b.png"]


def test_a_file_of_something_else_is_refused_and_stays(checkpoint, folder, capsys):
    for content in (b"no newline", b"\x89PNG\n\x00", b'{"line": 1}\nmore', b"[1]\n"):
        (folder / "out.jsonl").write_bytes(content)
        assert files.run(predict.main, predict.parse_args(
            [str(checkpoint), "--jsonl", str(folder / "in.jsonl"), "--out",
             str(folder / "out.jsonl")])) == 2
        assert "no output of --jsonl" in capsys.readouterr().err
        assert (folder / "out.jsonl").read_bytes() == content


def test_an_output_of_other_lines_is_refused(checkpoint, folder, capsys):
    predicted(checkpoint, folder)
    write(folder, [line("b.png", "another")])
    assert predicted(checkpoint, folder)[0] == 2 and "line 1" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [
    [], ["a.png"], ["--jsonl", "in.jsonl"], ["a.png", "x", "--jsonl", "i", "--out", "o"],
    ["--jsonl", "i", "--out", "o", "--mask", "m.png"]])
def test_flags_that_do_not_go_together_are_refused(flags):
    with pytest.raises(SystemExit) as stop:
        predict.parse_args(["run", *flags])
    assert stop.value.code == 2


def test_flags_may_come_before_the_image_and_every_file_is_another(checkpoint, folder, capsys):
    image, out = folder / "a.png", folder / "overlay.png"
    args = [str(checkpoint), "--out", str(out), str(image), "the red circle"]
    assert files.run(predict.main, predict.parse_args(args)) == 0 and out.exists()
    before = image.read_bytes()
    for flags in (["--out", str(image)], ["--mask", str(image)], ["--mask", str(out)]):
        assert files.run(predict.main, predict.parse_args([*args, *flags])) == 2
        assert "each its own" in capsys.readouterr().err and image.read_bytes() == before


def test_two_processes_share_the_images(checkpoint, folder):
    _, alone = predicted(checkpoint, folder)
    (folder / "out.jsonl").rename(folder / "alone.jsonl")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", "predict.py", str(checkpoint), "--jsonl", str(folder / "in.jsonl"), "--out",
               str(folder / "out.jsonl")]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    together = [json.loads(text) for text in (folder / "out.jsonl").read_text().splitlines()]
    assert len(together) == 4
    assert all(np.array_equal(coco.decode(r["segmentation"]),
                              coco.decode(alone[r["line"]]["segmentation"])) for r in together)


def test_a_picture_has_a_mask_per_sentence_and_a_large_image_is_drawn_small(checkpoint, folder):
    image = Image.open(folder / "a.png")
    image.resize((600, 1000)).save(folder / "large.png")
    for name, sentences, width, height in (("a.png", ["the star"], 240, 240),
                                           ("a.png", ["the star", "the red circle"], 480, 240),
                                           ("large.png", ["the star"], 288, 480)):
        out, mask = folder / "out.png", folder / "mask.png"
        predict.main(predict.parse_args([str(checkpoint), str(folder / name), *sentences, "--out",
                                         str(out), "--mask", str(mask)]))
        picture = Image.open(out)
        assert width <= picture.width < width + 50 and height < picture.height < height + 120
        masks = [mask] if len(sentences) == 1 else [folder / f"mask-{i}.png" for i in (1, 2)]
        assert all(Image.open(m).size == Image.open(folder / name).size for m in masks)


def test_segment_all_is_in_eval_mode_and_leaves_the_mode_as_it_was(tiny, folder):
    image = Image.open(folder / "a.png").convert("RGB")
    texts = ["the red circle", "the star"]
    tiny.add_decoder()  # its batch norm would count a pass in training mode
    expected = [tiny.eval().segment(image, text) for text in texts]
    for training in (True, False):
        masks = predict.segment_all(tiny.train(training), image, texts)
        assert tiny.training == training and masks.shape == (2, *image.size[::-1])
        assert (masks != np.stack(expected)).mean() < 1e-3


def test_a_jsonl_in_utf_16_is_read_whole(world, checkpoint, tmp_path):
    """PowerShell writes it."""
    image = next((world / "images" / "shapes").iterdir())
    record = json.dumps({"image": str(image), "sentence": "the circle"})
    (tmp_path / "in.jsonl").write_text(f"{record}\n{record}\n", encoding="utf-16")
    flags = ["--jsonl", str(tmp_path / "in.jsonl"),
             "--out", str(tmp_path / "out.jsonl"), "--outside"]
    assert predict.main(predict.parse_args([str(checkpoint), *flags])) == 0
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert len(lines) == 2 and all("segmentation" in json.loads(line) for line in lines)
