"""Metrics and protocols on examples worked out by hand."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from data import RefCOCO
from evaluate import (
    Readout,
    RISMetrics,
    best_map_readout,
    letterbox,
    letterbox_box,
    masks_from_output,
)
from risclip import RISCLIP
from support import figures, files, inference
from support.files import DataError


def mask(n, total=10):
    """The first n of `total` pixels."""
    return np.arange(total) < n


def compute(*pairs, **options):
    metrics = RISMetrics(**options)
    for prediction, target in pairs:
        metrics.update(prediction, target)
    return metrics.compute()


def test_a_perfect_prediction_is_100_everywhere():
    result = compute((mask(4), mask(4)))
    precision = {f"P@{x}": 100 for x in (0.5, 0.6, 0.7, 0.8, 0.9)}
    assert result == {"oIoU": 100, "mIoU": 100, "sentences": 1} | precision


def test_an_empty_prediction_and_two_empty_masks_count_0():
    assert compute((mask(0), mask(4)))["mIoU"] == 0
    both = compute((mask(0), mask(0)), (mask(4), mask(4)))
    assert both["mIoU"] == 50 and both["oIoU"] == 100 and both["P@0.5"] == 50


def test_oiou_weighs_by_pixels_and_miou_by_sentences():
    # IoU 9/10 on a large object, 1/10 on a small one: union 100 + 10, intersection 90 + 1
    result = compute((mask(90, 200), mask(100, 200)), (mask(1), mask(10)))
    assert result["mIoU"] == pytest.approx(50) and result["oIoU"] == pytest.approx(100 * 91 / 110)


def test_precision_at_the_threshold_itself():
    at_half, at_07 = (mask(5), mask(10)), (mask(7), mask(10))  # IoU 0.5 and 0.7 exactly
    loose, strict = compute(at_half, at_07), compute(at_half, at_07, strict=True)
    assert (loose["P@0.5"], loose["P@0.7"], loose["P@0.8"]) == (100, 50, 0)
    assert (strict["P@0.5"], strict["P@0.7"], strict["P@0.6"]) == (50, 0, 50)


def test_results_do_not_depend_on_the_order():
    rng = np.random.default_rng(0)
    pairs = [(rng.random(50) < 0.5, rng.random(50) < 0.5) for _ in range(40)]
    assert compute(*pairs) == compute(*pairs[::-1])


def test_metrics_of_parts_add_up_to_those_of_all():
    pairs = [(mask(n), mask(5)) for n in range(9)]
    parts = [RISMetrics(), RISMetrics()]
    for i, pair in enumerate(pairs):
        parts[i % 2].update(*pair)
    parts[0] += parts[1]
    assert parts[0].compute() == compute(*pairs)


def test_masks_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"prediction \(3,\) and target \(4,\)"):
        RISMetrics().update(np.ones(3, bool), np.ones(4, bool))


def scores(foreground, background=0.0):
    """A network's output of 4 x 4 pixels."""
    f = torch.tensor(foreground).view(1, 4, 4)
    return {"mask_logits": torch.stack([torch.full_like(f, background), f], dim=1)}


def test_each_protocol_has_its_grid():
    # An image 8 wide and 4 high. Network's square: the left half is foreground.
    output = scores([1.0, 1.0, -1.0, -1.0] * 4)
    square = masks_from_output(output, 4, 8, 4, "lavt")[0]
    assert square.tolist() == [[True, True, False, False]] * 4
    original = masks_from_output(output, 4, 8, 4, "original")[0]
    assert original.shape == (4, 8) and original.sum() == 4 * 4 and original[:, :4].all()
    # cris: 4 x 2 pixels letterboxed in rows 1 and 2; what lies in the border's rows is cut away
    assert letterbox_box(8, 4, 4) == (0, 1, 4, 2)
    output = scores([9.0] * 4 + [-9.0] * 8 + [9.0] * 4)
    assert not masks_from_output(output, 4, 8, 4, "cris").any()
    output = scores([-9.0] * 4 + [9.0] * 8 + [-9.0] * 4)
    assert masks_from_output(output, 4, 8, 4, "cris").all()


def test_each_protocol_has_its_threshold():
    # foreground probability 0.4, background 0.5: argmax says no, cris (above 0.35) says yes;
    # at 0.3 both say no
    output = scores([np.log(0.4 / 0.6)] * 16)
    assert not masks_from_output(output, 4, 4, 4, "original").any()
    assert not masks_from_output(output, 4, 4, 4, "lavt").any()
    assert masks_from_output(output, 4, 4, 4, "cris").all()
    output = scores([np.log(0.3 / 0.7)] * 16)
    assert not masks_from_output(output, 4, 4, 4, "cris").any()
    assert masks_from_output(output, 4, 4, 4, "original", threshold=0.25).all()


def test_without_a_decoder_the_map_is_cut_at_one_half():
    output = {"patch_logits": torch.tensor([[[2.0, -2.0], [2.0, -2.0]]])}
    assert masks_from_output(output, 4, 4, 2)[0].tolist() == [[True, True, False, False]] * 2


def test_letterbox_keeps_the_aspect_and_centres():
    square = letterbox(Image.new("RGB", (40, 20), "white"), 16)
    pixels = np.asarray(square)
    assert square.size == (16, 16) and (pixels[4:12] == 255).all() and (pixels[:4] < 200).all()


class LeftHalf:
    """A model whose mask is the left half of its 4 x 4 square; keeps what it was shown."""

    config = SimpleNamespace(image_size=4, precision="fp32")
    patch_size, map_threshold = 1, torch.zeros(())

    def eval(self):
        return self

    def tokenize(self, texts):
        return torch.zeros(len(texts), 1)

    def lower_layers(self, pixels):
        self.seen = pixels

    def __call__(self, *_):
        return scores([9.0, 9.0, -9.0, -9.0] * 4) | {"patch_logits": torch.zeros(1, 4, 4)}


@pytest.mark.parametrize("protocol, miou, p_at_half",
                         [("original", 50, 100), ("lavt", 50, 100), ("cris", 50, 0)])
def test_a_protocol_from_file_to_figure(tmp_path, protocol, miou, p_at_half):
    """A white image of 8 x 4 whose left two columns are meant; the mask has four: IoU 1/2 in the
    image's pixels. On lavt's square, ground truth by nearest neighbour is column 1 of 0-7, so one
    of four; the mask has two."""
    Image.new("RGB", (8, 4), "white").save(tmp_path / "a.png")
    Image.fromarray(np.arange(8)[None].repeat(4, 0) < 2).save(tmp_path / "m.png")
    entry = {"image": "a.png", "mask": "m.png", "sentences": ["left"]}
    (tmp_path / "own.json").write_text(json.dumps([entry]))
    model = LeftHalf()
    dataset = RefCOCO(tmp_path, str(tmp_path / "own.json"), "val")
    result = evaluate.evaluate(model, dataset, protocol)[evaluate.MASK]
    assert (result["mIoU"], result["P@0.5"], result["P@0.6"]) == (miou, p_at_half, 0)
    white = (model.seen[0, 0] > 1.5)  # cris: two rows of the image between two of border
    rows = [False, True, True, False] if protocol == "cris" else [True] * 4
    assert white.all(dim=1).tolist() == rows


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_ends_an_evaluation_with_one_line(world, tiny, tmp_path, workers):
    shutil.copytree(world, tmp_path / "world")
    dataset = RefCOCO(tmp_path / "world", "shapes", "test")
    dataset.path(2).write_bytes(b"no image")
    with pytest.raises(DataError) as broken:
        evaluate.evaluate(tiny, dataset, workers=workers)
    assert dataset.path(2).name in str(broken.value) and "Traceback" not in str(broken.value)


@pytest.fixture
def checkpoint(tiny, tmp_path):
    tiny.add_decoder()
    tiny.save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def test_the_command_measures_every_sentence_once_under_every_protocol(world, checkpoint, capsys,
                                                                       tmp_path):
    dataset = RefCOCO(world, "shapes", "test")
    for protocol in ("original", "lavt", "cris"):
        out = tmp_path / f"{protocol}.json"
        evaluate.main(evaluate.parse_args([str(checkpoint), "--data-root", str(world), "--split",
                                           "test", "--protocol", protocol, "--json", str(out)]))
        result = json.loads(out.read_text())
        assert result["sentences"] == len(dataset.sentences)
        assert result["images"] == len(dataset.images)
        assert [result[k] for k in ("protocol", "dataset", "split")] == [protocol, "shapes", "test"]
        assert sum(k["sentences"] for k in result["kinds"].values()) == result["sentences"]
        assert {"oIoU", "mIoU", "P@0.5", "P@0.9", "seconds"} <= set(result)
    assert "mIoU attribute" in capsys.readouterr().out


@pytest.mark.parametrize("split", ["val", "characters"])
def test_the_command_draws_the_papers_figures(world, checkpoint, tmp_path, split):
    evaluate.main(evaluate.parse_args([str(checkpoint), "--data-root", str(world), "--split", split,
                                       "--limit", "2", "--figures", str(tmp_path / "figures"),
                                       "--against", str(checkpoint)]))
    widths = {path.name: Image.open(path).width for path in (tmp_path / "figures").iterdir()}
    assert set(widths) == {"samples.png", "good.png", "failures.png", "evolution.png",
                           "compared.png"}
    assert widths["evolution.png"] > 6 * 240
    assert widths["compared.png"] > widths["good.png"] > 480
    with pytest.raises(SystemExit):
        evaluate.parse_args([str(checkpoint), "--against", str(checkpoint)])


def test_switching_all_modules_off_leaves_frozen_clips_map(tiny):
    images, tokens = torch.randn(1, 3, 96, 96), tiny.tokenize(["the small red circle"])
    frozen = RISCLIP(replace(tiny.config, modules=()))
    frozen.map_log_temperature = tiny.map_log_temperature
    frozen.map_threshold = tiny.map_threshold
    with torch.no_grad():
        parts = [figures.without(tiny, modules).eval()(images, tokens)["patch_logits"]
                 for modules in ((), tiny.config.modules)]
        wanted = [m.eval()(images, tokens)["patch_logits"] for m in (frozen, tiny)]
    assert torch.equal(parts[0], wanted[0]) and torch.equal(parts[1], wanted[1])
    assert not torch.equal(*parts)


def test_extremes_take_the_best_sentence_of_each_image(monkeypatch):
    image, target = Image.new("RGB", (8, 8)), np.eye(8, dtype=bool)
    cases = [figures.Case(number, text, image, [target, target], [iou]) for number, text, iou in
             ((0, "poor", 0.1), (0, "best", 0.9), (1, "only", 0.5), (2, "left out", 0.2))]
    drawn = []
    monkeypatch.setattr(figures, "panel", lambda _, caption: drawn.append(caption) or image)
    figures.extremes(cases, lambda case: case.ious[0], count=2)
    assert drawn == ["best (IoU 0.90)", "only (IoU 0.50)"]


def test_spread_takes_evenly_spaced_images_and_their_sentences_by_turns():
    items = [(image, (10 * image, 10 * image + 1)) for image in range(9)]
    assert figures.spread(items, 3) == [(0, [0]), (3, [31]), (6, [60])]
    assert figures.spread(items[:2], 3) == [(0, [0]), (1, [11])]


def test_workers_do_not_change_the_figures(world, checkpoint):
    model, dataset = RISCLIP.from_pretrained(checkpoint), RefCOCO(world, "shapes", "val")
    a, b = (evaluate.evaluate(model, dataset, workers=w)[evaluate.MASK] for w in (0, 2))
    assert {**a, "seconds": 0} == {**b, "seconds": 0}


@pytest.mark.parametrize("at_once", [1, 3])
def test_neither_does_the_number_of_sentences_at_once(world, checkpoint, monkeypatch, at_once):
    model, dataset = RISCLIP.from_pretrained(checkpoint), RefCOCO(world, "shapes", "val")
    results = []
    for n in (8, at_once):
        monkeypatch.setattr(evaluate, "outputs", lambda *of, n=n: inference.outputs(*of, n))
        results.append(evaluate.evaluate(model, dataset)[evaluate.MASK])
    assert {**results[0], "seconds": 0} == {**results[1], "seconds": 0}


def test_the_maps_threshold_is_the_best_of_those_tried(world, tiny):
    dataset = RefCOCO(world, "shapes", "test")
    best = best_map_readout(tiny, dataset)
    some = tuple(Readout("patch_logits", 1 / (1 + np.exp(-x))) for x in (-2, 0, 2))  # of the grid
    tried = evaluate.evaluate(tiny, dataset, readouts=some + (best,))
    assert all(tried[best]["mIoU"] >= result["mIoU"] for result in tried.values())


@pytest.mark.parametrize("flag, value", [("--limit", "0"), ("--workers", "-1")])
def test_numbers_that_mean_nothing_are_refused(flag, value, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.parse_args(["run", flag, value])
    assert stop.value.code == 2 and f"{flag} {value}: give" in capsys.readouterr().err


def test_unknown_split_and_checkpoint_are_one_line_and_exit_code_2(world, checkpoint, capsys):
    args = evaluate.parse_args([str(checkpoint), "--data-root", str(world), "--split", "testA"])
    assert files.run(evaluate.main, args) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "testA" in error and "\n" not in error
    args = evaluate.parse_args(["no/such/run", "--data-root", str(world)])
    assert files.run(evaluate.main, args) == 2
