"""Every row of Tables 3, 4 and 5 and of the errata trains, and a killed ablation goes on."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

import train
from experiments import ablate, fusions
from risclip import CONFIGS, MHCA, RISCLIP
from support import files
from support.checkpoint import find_checkpoint


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("ablation")


def arguments(world, out, table, *more):
    return ablate.parse_args(
        [
            "--table",
            str(table),
            "--data-root",
            str(world),
            "--out",
            str(out),
            "--steps",
            "2",
            "--batch-size",
            "4",
            "--image-size",
            "48",
            "--limit",
            "2",
            "--device",
            "cpu",
            *map(str, more),
        ]
    )


@pytest.mark.parametrize(
    "table, rows, models", [(3, 5, 5), (4, 7, 7), (5, 10, 8), ("errata", 9, 3)]
)
def test_every_row_trains_and_is_counted(world, out, table, rows, models, capsys):
    """models: those that differ in what they cost. Table 5 has the full one three times, an erratum
    how it learns."""
    ablate.main(arguments(world, out, table, "--json", out / "t.json", "--markdown"))
    result = json.loads((out / "t.json").read_text())["rows"]
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(result) == rows and len(printed) == rows + 2
    for name, row in result.items():
        (cell,) = row["seeds"]
        assert (
            f"| {name} |" in "\n".join(printed)
            and 0 <= cell["mIoU"] <= 100
            and cell["sentences"] > 0
        )
        assert cell["flops"] > 1e8 and cell["trained_parameters"] > 0
    costs = {
        tuple(r["seeds"][0][k] for k in ("trained_parameters", "flops")) for r in result.values()
    }
    assert len(costs) == models
    if table == 3:
        assert Image.open(out / "figure1.png").width > 6 * 240


@pytest.mark.parametrize(
    "change, fuse",
    [({"fine_tuned": True}, MHCA), ({}, fusions.FUSIONS["pwam-2"]), ({}, fusions.FUSIONS["mhsa"])],
)
def test_a_changed_model_comes_back_as_it_was_saved(tiny, tmp_path, change, fuse):
    model = RISCLIP(replace(tiny.config, **change), fuse)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn_like(p))
    if not change.get("fine_tuned"):
        model.clip = tiny.clip
    model.eval().save_pretrained(tmp_path)
    images, tokens = torch.randn(1, 3, 96, 96), model.tokenize(["the small red circle"])
    with torch.no_grad():
        maps = [
            m(images, tokens)["patch_logits"]
            for m in (model, RISCLIP.from_pretrained(tmp_path, fuse))
        ]
    assert torch.equal(*maps)


def test_fine_tuning_moves_clip_and_nothing_else_does(world, out):
    ablate.main(arguments(world, out, 3))
    moved = {}
    for cell in ("full", "fine_tuned-True"):
        clip = RISCLIP.from_pretrained(find_checkpoint(out / f"{cell}-0", 1)).clip
        start = RISCLIP(replace(CONFIGS["tiny"], image_size=48)).clip
        moved[cell] = [not torch.equal(p, q) for p, q in zip(clip.parameters(), start.parameters())]
    assert not any(moved["full"]) and sum(moved["fine_tuned-True"]) > 0.9 * len(moved["full"])


def test_an_erratum_changes_what_it_says(world, out):
    ablate.main(arguments(world, out, "errata"))
    cells = {name: out / f"{ablate.cell_name(change)}-0" for name, change, _ in ablate.ERRATA}
    start = RISCLIP(replace(CONFIGS["tiny"], image_size=48)).state_dict()
    ours, _, _, raw, scalers, nonzero, end_to_end, *_ = [
        RISCLIP.from_pretrained(find_checkpoint(cell)).state_dict() for cell in cells.values()
    ]
    losses = [
        [json.loads(line)["loss"] for line in open(cell / "log.jsonl")] for cell in cells.values()
    ]
    fixed = [name for name in start if name.endswith(ablate.FIXED["scalers"])]
    assert len(fixed) == 2 * (6 + 3) + 3 * 4 + 2 * 10  # Adapters, CFE, SKE
    for name in fixed:
        assert torch.equal(scalers[name], start[name]) and not torch.equal(
            ours[name], start[name]
        ), name
    for name in ablate.FIXED["map"]:
        assert raw[name] == 0 and not torch.equal(ours[name], start[name])
    for name in ("image_adapters.5.1.up.weight", "cfe.0.s2v.weight", "ske.1.fuse.text.v.weight"):
        assert (
            0 < ours[name].abs().max() < 0.01 < nonzero[name].abs().mean()
        )  # two steps do not go so far
        assert end_to_end[name].any()
    assert (
        not find_checkpoint(cells["end to end: both losses, no stages (3.5)"], 1)
        and len(losses[6]) == 1
    )
    for alone in (losses[0], *losses[-2:]):
        assert len(alone) == 2 and all(x != y for x, y in zip(alone, losses[0])) == (
            alone is not losses[0]
        )


def test_end_to_end_sees_as_many_sentences_as_stage_1(monkeypatch):
    run = ablate.parse_args(["--table", "errata"]).run
    monkeypatch.setattr(
        train, "run_stage", lambda run, stage, *_: [train.stage_settings(run, stage)]
    )
    assert ablate.train_cell(run, {"end_to_end": True}, None) == train.stage_settings(run, 1)


@pytest.mark.parametrize("name", fusions.FUSIONS)
def test_a_new_fusion_changes_nothing_and_padding_never_does(tiny, name):
    """Before training the map is frozen CLIP's; after it, a sentence's map does not depend on what
    it is batched with."""
    torch.manual_seed(0)
    frozen = RISCLIP(replace(tiny.config, modules=())).eval()
    model = RISCLIP(tiny.config, fuse=fusions.FUSIONS[name]).eval()
    images, short = torch.randn(1, 3, 96, 96), model.tokenize(["the red circle"])
    both = model.tokenize(["the red circle", ablate.SENTENCE])
    assert both.size(1) > short.size(1)
    with torch.no_grad():
        torch.testing.assert_close(model(images, short), frozen(images, short), rtol=0, atol=1e-5)
        for module in (model.cfe, model.ske, model.image_adapters):
            for p in module.parameters():
                p.add_(0.05 * torch.randn_like(p))
        alone = model(images, short)["patch_logits"]
        together = model(images, both, torch.zeros(2, dtype=torch.long))["patch_logits"][:1]
    assert (alone - frozen(images, short)["patch_logits"]).abs().max() > 1e-2
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


def test_a_killed_ablation_goes_on_and_a_finished_cell_is_not_run_again(
    world, tmp_path, monkeypatch
):
    evaluated, kept = [], ablate.evaluate

    def dies_at_the_second(model, *more, **options):
        evaluated.append(model.config.modules)
        if len(evaluated) == 2:
            raise KeyboardInterrupt
        return kept(model, *more, **options)

    monkeypatch.setattr(ablate, "evaluate", dies_at_the_second)
    monkeypatch.setattr(ablate, "TABLE_3", ablate.TABLE_3[:2])
    monkeypatch.setattr(ablate, "figure_1", lambda *_: None)
    args = arguments(world, tmp_path, 3)
    with pytest.raises(KeyboardInterrupt):
        ablate.main(args)
    steps = []
    monkeypatch.setattr(train, "locator_loss", lambda *_: steps.append(1))
    ablate.main(args)  # both stages of the second cell were trained: none is again
    assert evaluated == [(), ("adapter",), ("adapter",)] and not steps


def test_another_run_in_the_same_place_is_refused(world, out, capsys):
    ablate.main(arguments(world, out, 3))
    capsys.readouterr()
    assert files.run(ablate.main, arguments(world, out, 3, "--lr", 1)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "cell.json" in error and "--out" in error


def test_mean_and_sample_standard_deviation():
    assert (
        ablate.mean_and_spread([1.0]) == "1.00"
        and ablate.mean_and_spread([1.0, 2.0, 3.0]) == "2.00 +- 1.00"
    )


def test_the_papers_settings_are_the_ablations():
    args = ablate.parse_args(["--table", "5", "--backbone", "B", "--dataset", "refcocog"])
    assert (args.run.image_size, args.run.epochs, args.split) == (240, 50, "test")
    assert [tuple(change.values()) for _, change, _ in ablate.table_rows("5", "B")] == [
        (3,),
        (6,),
        (9,),
        (),
        (2,),
        (4,),
        (),
        (2,),
        (4,),
        (),
    ]
    with pytest.raises(SystemExit):
        ablate.parse_args(["--table", "3", "--seed", "1"])
