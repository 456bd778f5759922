"""The two stages: what moves, what resumes, what is written, and what is refused."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

import evaluate
import predict
import train
from data import RefCOCO
from miniature import pretrain
from miniature.clip import TINY_CLIP
from risclip import RISCLIP
from support import files, processes, runs, unpickle
from support.checkpoint import find_checkpoint
from train import main, parse_args, patch_target

REPOSITORY = Path(train.__file__).parent


def arguments(world, out, *more):
    return parse_args(
        ["--data-root", str(world), "--out", str(out), "--batch-size", "8", *map(str, more)]
    )


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """Both stages, three steps each."""
    out = tmp_path_factory.mktemp("run")
    main(arguments(world, out, "--steps", 3))
    return out


def weights(checkpoint):
    return load_file(checkpoint / "model.safetensors")


def test_patch_targets_are_the_half_full_patches_or_the_fullest():
    masks = torch.zeros(3, 8, 8, dtype=torch.bool)
    masks[0, :4, :4] = True  # one whole patch,
    masks[0, :4, 4:6] = True  # one half full,
    masks[0, 4:6, :1] = True  # one hardly touched
    masks[1, 3:5, 3:6] = True  # fills no patch to one half: 1, 2, 1 and 2 pixels of 16
    assert patch_target(masks, 4).int().tolist() == [
        [[1, 1], [0, 0]],
        [[0, 1], [0, 1]],
        [[0, 0], [0, 0]],
    ]


def test_a_run_leaves_what_the_readme_lists(run):
    assert {p.name for p in run.iterdir()} == {
        ".lock",
        "stage1-000003",
        "stage2-000003",
        "log.jsonl",
        "curve.png",
        "metrics.json",
        "samples.png",
        "data.png",
    }
    assert {p.name for p in (run / "stage2-000003").iterdir()} == {
        "config.json",
        "model.safetensors",
        "training.pt",
    }
    lines = [json.loads(line) for line in open(run / "log.jsonl")]
    assert {line["stage"] for line in lines} == {1, 2}
    assert {"step", "loss", "lr", "samples_per_s", "memory_gib"} <= set(lines[0])
    metrics = json.loads((run / "metrics.json").read_text())
    assert len(metrics) == 3 and all(
        0 <= row["mIoU"] <= 100 and "kinds" in row for row in metrics.values()
    )
    assert (
        Image.open(run / "curve.png").size == (1440, 300)
        and Image.open(run / "samples.png").width > 600
    )


def test_stage_1_moves_all_it_should_and_nothing_else(world, tmp_path):
    torch.manual_seed(0)
    args = arguments(world, tmp_path, "--stage", 1, "--steps", 4, "--lr", 1e-3, "--recompute")
    model = train.build_model(args, 1)
    assert model.recompute
    before = {k: v.clone() for k, v in model.state_dict().items()}
    dataset = RefCOCO(world, "shapes", "train")
    settings = train.stage_settings(args, 1)
    run = runs.Run(args, 1, 4, settings, model.save_pretrained)
    train.fit(
        model,
        train.locator_loss,
        lambda start: train.sample_batches(model, dataset, settings, args, start),
        settings,
        run,
    )
    after = model.state_dict()
    assert model.decoder is None
    still = {k for k in before if torch.equal(before[k], after[k])}
    assert {k for k in before if k.startswith("clip.")} <= still
    # Key biases shift all of a query's scores alike: a softmax does not see them, and their
    # gradient is rounding.
    assert {k for k in still if not k.startswith("clip.") and not k.endswith(".k.bias")} == set()


def test_stage_2_moves_the_decoder_alone(run):
    first, second = weights(run / "stage1-000003"), weights(run / "stage2-000003")
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    added = set(second) - set(first)
    assert added and all(key.startswith("decoder.") for key in added)
    assert any(
        "running_mean" in key and second[key].any() for key in added
    )  # batch norm learned too
    torch.manual_seed(0)
    fresh = RISCLIP.from_pretrained(run / "stage1-000003")
    fresh.add_decoder()
    assert all(
        not torch.equal(v, second[f"decoder.{k}"])
        for k, v in fresh.decoder.named_parameters()
        if "weight" in k
    )


def test_no_optimizer_state_for_frozen_parameters(run):
    for stage, name in ((1, "stage1-000003"), (2, "stage2-000003")):
        state = torch.load(run / name / "training.pt", weights_only=True)
        model = RISCLIP.from_pretrained(run / name)
        part = model.decoder if stage == 2 else model
        trained = [p for k, p in part.named_parameters() if stage == 2 or not k.startswith("clip.")]
        assert len(state["optimizer"]["state"]) == len(trained)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_stopped_run_resumes_bit_for_bit(world, run, tmp_path, monkeypatch, stage):
    for settings in train.SETTINGS.values():
        monkeypatch.setitem(settings, "save_every", 2)
    for out in (tmp_path / "whole", tmp_path / "stopped"):
        if stage == 2:
            out.mkdir()
            (out / "stage1-000003").symlink_to(run / "stage1-000003", target_is_directory=True)
    common = ("--stage", stage, "--steps", 5)
    main(arguments(world, tmp_path / "whole", *common))
    kept = runs.save_checkpoint

    def dies(run):
        kept(run)
        if run.step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs, "save_checkpoint", dies)
    with pytest.raises(KeyboardInterrupt):
        main(arguments(world, tmp_path / "stopped", *common))
    monkeypatch.setattr(runs, "save_checkpoint", kept)
    assert find_checkpoint(tmp_path / "stopped", stage).name == f"stage{stage}-000004"
    main(arguments(world, tmp_path / "stopped", *common, "--resume"))
    whole, resumed = (weights(find_checkpoint(tmp_path / d, stage)) for d in ("whole", "stopped"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_accumulation_gives_the_same_step(world, tmp_path):
    """Gradients, not only the loss, of a batch in one part, in four and in three that are not
    equal."""
    losses, moments = [], []
    for accumulate in (1, 4, 3):
        out = tmp_path / str(accumulate)
        main(arguments(world, out, "--stage", 1, "--steps", 1, "--accumulate", accumulate))
        losses.append([json.loads(line)["loss"] for line in open(out / "log.jsonl")])
        state = torch.load(out / "stage1-000001" / "training.pt", weights_only=True)["optimizer"][
            "state"
        ]
        moments.append(
            torch.cat([m["exp_avg"].flatten() for m in state.values()])
        )  # a tenth of the gradient
    for loss, moment in zip(losses[1:], moments[1:]):
        assert loss == pytest.approx(losses[0], rel=1e-5)
        torch.testing.assert_close(
            moment, moments[0], rtol=0, atol=1e-5 * moments[0].abs().max().item()
        )


def test_a_short_batch_weighs_its_sentences_in_full(world, tmp_path):
    """With fewer refs than a batch asks for, the loss is still the mean over sentences, as in a
    batch of their number."""
    losses = []
    Image.open(next((world / "images" / "shapes").iterdir())).save(tmp_path / "a.png")
    entry = {"image": "a.png", "polygons": [[5, 5, 60, 5, 60, 60]], "sentences": ["the triangle"]}
    (tmp_path / "own.json").write_text(json.dumps([entry, entry, entry]))
    for batch in (3, 12):
        out = tmp_path / str(batch)
        main(
            parse_args(
                [
                    "--dataset",
                    str(tmp_path / "own.json"),
                    "--out",
                    str(out),
                    "--stage",
                    "1",
                    "--steps",
                    "1",
                    "--batch-size",
                    str(batch),
                ]
            )
        )
        losses += [json.loads(line)["loss"] for line in open(out / "log.jsonl")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_only_matrices_and_filters_decay(tiny):
    spared = {name for name, p in tiny.named_parameters() if not train.decays(name, p)}
    assert {n for n, p in tiny.named_parameters() if p.ndim <= 1} <= spared
    assert all(
        n in spared
        for n, _ in tiny.named_parameters()
        if n.endswith(("scale", "scale_mhca", "scale_mhsa", "scale_mlp", "temperature"))
    )
    assert "cfe.0.t2s.weight" not in spared and "image_adapters.0.0.down.weight" not in spared


def test_the_papers_settings_are_the_defaults():
    for backbone in "BL":
        for stage, epochs in ((1, 60), (2, 1)):
            settings = train.stage_settings(parse_args(["--backbone", backbone]), stage)
            assert (settings["epochs"], settings["lr"], settings["batch_size"]) == (
                epochs,
                5e-5,
                32,
            )
            assert settings["precision"] == "bf16" and settings["augment"]
    given = [
        parse_args(["--backbone", "B", "--epochs", "3", *stage]) for stage in ([], ["--stage", "2"])
    ]
    assert [train.stage_settings(given[0], stage)["epochs"] for stage in (1, 2)] == [3, 1]
    assert train.stage_settings(given[1], 2)["epochs"] == 3
    union = [
        train.stage_settings(parse_args(["--backbone", b, "--dataset", "combined"]), 1)
        for b in "BL"
    ]
    assert [s["batch_size"] for s in union] == [96, 56]
    args = parse_args(["--backbone", "B"])
    p = torch.nn.Linear(2, 2)
    group = torch.optim.AdamW(p.parameters()).param_groups[0]
    assert group["betas"] == (0.9, 0.999) and args.dataset == "shapes"


def test_the_loss_falls(world, tmp_path):
    main(arguments(world, tmp_path, "--stage", 1, "--steps", 20, "--lr", 2e-3))
    lines = [json.loads(line)["loss"] for line in open(tmp_path / "log.jsonl")]
    assert lines[-1] < lines[0]


def test_sigterm_saves_first_and_exits_143(world, tmp_path):
    command = [
        sys.executable,
        "train.py",
        "--data-root",
        str(world),
        "--out",
        str(tmp_path),
        "--stage",
        "1",
        "--steps",
        "100000",
    ]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    log = tmp_path / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143 and b"--resume" in error
    step = int(find_checkpoint(tmp_path, 1).name.split("-")[1])
    assert step >= 10 and not list(tmp_path.glob(".*partial"))


def test_stage_0_trains_a_clip_that_stage_1_takes(world, tmp_path, monkeypatch):
    monkeypatch.setitem(train.SETTINGS, ("tiny", 0), train.SETTINGS["tiny", 0] | {"steps": 2})
    main(arguments(world, tmp_path / "clip", "--stage", 0, "--batch-size", 16))
    file = find_checkpoint(tmp_path / "clip", 0) / "clip.safetensors"
    assert file.stat().st_size < 4 * 2**20
    main(arguments(world, tmp_path / "run", "--stage", 1, "--steps", 1, "--clip", file))
    assert RISCLIP.from_pretrained(tmp_path / "run").config.clip == str(file)


def test_the_loss_of_stage_0_keeps_to_the_device_of_its_batch():
    """Of a GPU, as far as one that has no memory can tell: a tensor made on the CPU would not go
    with the others."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            clip = CLIP(**TINY_CLIP)
            clip.register_buffer("seen", torch.zeros(clip.vocab_size, dtype=torch.bool))
            whole, images = torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, 3, 96, 96)
        pretrain.contrastive_loss(
            clip, {"images": images, "tokens": whole, "truth": whole, "corners": whole}
        )


def test_the_shipped_clip_is_small():
    assert (REPOSITORY / "miniature" / "tiny_clip.safetensors").stat().st_size < 4 * 2**20


# ---- Two processes -----------------------------------------------------------------------------


def two_processes(args, script="train.py"):
    """Runs a command as two processes of one thread -> the finished process."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        script,
    ]
    return subprocess.run(
        [*command, *map(str, args)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def one_thread():
    """More threads add up in another order: what is compared bit for bit has to run on as many as
    the two processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_two_processes_give_the_losses_weights_and_metrics_of_one(world, tmp_path, one_thread):
    """The losses of the same global batch within 1e-6; all else bit for bit where one process sees
    the same parts."""
    common = ("--stage", 1, "--steps", 20, "--data-root", world, "--batch-size", 8)
    main(parse_args([*map(str, common), "--out", str(tmp_path / "one")]))
    main(parse_args([*map(str, common), "--out", str(tmp_path / "parts"), "--accumulate", "2"]))
    done = two_processes([*common, "--out", tmp_path / "two"])
    assert done.returncode == 0, done.stderr
    one, parts, two = (
        [json.loads(line)["loss"] for line in open(tmp_path / d / "log.jsonl")]
        for d in ("one", "parts", "two")
    )
    assert len(one) == 2 and two == pytest.approx(one, rel=1e-6) and two == parts
    expected, got = (weights(tmp_path / d / "stage1-000020") for d in ("parts", "two"))
    assert all(torch.equal(v, got[k]) for k, v in expected.items())
    expected, got = (
        (tmp_path / d / "metrics.json").read_text() for d in ("parts", "two")
    )  # evaluated in two shards
    assert [
        {k: v for k, v in row.items() if k != "seconds"} for row in json.loads(got).values()
    ] == [{k: v for k, v in row.items() if k != "seconds"} for row in json.loads(expected).values()]


def test_two_processes_resume_what_one_began_and_share_batch_norms_statistics(
    world, run, tmp_path, monkeypatch, one_thread
):
    for out in (tmp_path / "one", tmp_path / "two"):
        out.mkdir()
        (out / "stage1-000003").symlink_to(run / "stage1-000003", target_is_directory=True)
    common = [
        "--stage",
        "2",
        "--steps",
        "2",
        "--data-root",
        str(world),
        "--batch-size",
        "6",
        "--accumulate",
    ]
    main(parse_args([*common, "2", "--out", str(tmp_path / "one")]))
    loss_of = train.refiner_loss
    monkeypatch.setattr(
        train,
        "refiner_loss",
        lambda *inputs: (os.kill(os.getpid(), signal.SIGTERM), loss_of(*inputs))[1],
    )
    with pytest.raises(SystemExit):
        main(parse_args([*common, "2", "--out", str(tmp_path / "two")]))
    checkpoint = tmp_path / "two" / "stage2-000001"
    statistics = {}
    args = parse_args([*common, "1"])
    for rank in (0, 1):  # what batch norm sees in each process
        model = RISCLIP.from_pretrained(checkpoint).train()
        with monkeypatch.context() as patch:
            patch.setattr(processes, "RANK", rank)
            patch.setattr(processes, "WORLD", 2)
            batch = next(
                train.sample_batches(
                    model, RefCOCO(world, "shapes", "train"), train.stage_settings(args, 2), args, 1
                )
            )
        loss_of(model, batch)
        for k, b in model.state_dict().items():
            if "running_" in k:
                statistics[k] = (
                    statistics.get(k, 0) + b * len(batch["texts"]) / 6
                )  # the mean over sentences
    done = two_processes([*common, 1, "--out", tmp_path / "two", "--resume"])
    assert done.returncode == 0, done.stderr
    one, two = (weights(tmp_path / d / "stage2-000002") for d in ("one", "two"))
    assert all(
        torch.equal(one[k], two[k]) for k in one if k not in statistics and "tracked" not in k
    )
    for k, b in statistics.items():
        torch.testing.assert_close(two[k], b, rtol=1e-5, atol=1e-6)


# ---- Mistakes: one line, exit code 2, nothing half-written -------------------------------------


def refused(capsys, args, *words):
    """Runs a command line that must be refused, and looks for the words in its one line."""
    capsys.readouterr()
    assert files.run(main, args) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error, error
    assert all(word in error for word in words), error


def test_mistakes_are_one_line_that_names_the_mend(world, run, tmp_path, capsys):
    refused(
        capsys,
        arguments(tmp_path / "nowhere", tmp_path / "o", "--dataset", "refcoco"),
        "nowhere",
        "train2014",
    )
    refused(
        capsys, arguments(world, tmp_path / "o", "--stage", 2), "stage 2 needs stage 1", "--stage 1"
    )
    refused(capsys, arguments(world, run, "--stage", 1), "--resume", "--out")
    lr = train.SETTINGS["tiny", 1]["lr"]
    refused(
        capsys, arguments(world, run, "--stage", 1, "--resume", "--lr", 1), f"lr was {lr}, now 1.0"
    )
    refused(
        capsys,
        arguments(world, tmp_path / "o", "--stage", 1, "--image-size", 100),
        "--image-size",
        "multiple",
    )
    refused(
        capsys,
        arguments(world, run, "--stage", 1, "--resume", "--image-size", 48),
        "--image-size",
        "96",
        "48",
    )
    refused(
        capsys,
        arguments(world, run, "--stage", 2, "--resume", "--modules", "ske"),
        "--modules",
        "cfe",
    )
    refused(
        capsys,
        arguments(world, tmp_path / "o", "--stage", 1, "--device", "cuda:9"),
        "--device cuda:9",
    )
    refused(capsys, arguments(world, tmp_path / "o", "--stage", 1, "--clip", "no.pt"), "no.pt")
    refused(
        capsys,
        arguments(world, tmp_path / "o", "--stage", 1, "--backbone", "B"),
        "--clip PATH",
        "--clip random",
    )
    refused(capsys, arguments(world, "/proc/nothing/here", "--stage", 1), "--out", "another place")
    assert not list((tmp_path / "o").glob("stage*"))


def test_images_that_cannot_be_read_are_one_line(world, tmp_path, capsys):
    root = tmp_path / "world"
    shutil.copytree(world, root)
    dataset = RefCOCO(root, "shapes", "test")
    dataset.path(3).unlink()  # before training, and not after it
    refused(
        capsys,
        arguments(root, tmp_path / "o", "--steps", 1),
        f"image {dataset.images[3].id} is missing",
    )
    assert not find_checkpoint(tmp_path / "o")
    (tmp_path / "a.png").write_text("no picture")
    own = tmp_path / "own.json"
    own.write_text(
        json.dumps([{"image": "a.png", "polygons": [[0, 0, 9, 0, 9, 9]], "sentences": ["a cup"]}])
    )
    args = arguments(world, tmp_path / "o", "--dataset", own, "--steps", 1)
    refused(capsys, args, "a.png cannot be read as an image")  # before training as well


@pytest.fixture
def own(tmp_path):
    """A set of one's own, with masks as pictures: an entry to train on and two for val."""
    entries = []
    for name in ("train", "one", "two"):
        noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{name}.png")
        Image.fromarray(np.arange(64)[None].repeat(48, 0) < 20).save(tmp_path / f"{name}-mask.png")
        split = "train" if name == "train" else "val"
        entries.append({"image": f"{name}.png", "mask": f"{name}-mask.png", "split": split,
                        "sentences": ["the left side"]})
    (tmp_path / "own.json").write_text(json.dumps(entries))
    return tmp_path


def trains_on(own):
    return parse_args(["--dataset", str(own / "own.json"), "--out", str(own / "o"), "--steps", "1",
                       "--stage", "1"])


def test_what_evaluation_will_read_is_looked_at_before_training(own, capsys):
    Image.new("1", (63, 48), 1).save(own / "two-mask.png")
    refused(capsys, trains_on(own), "two-mask.png is not 64x48")
    for name in ("two-mask.png", "two.png"):
        content = (own / name).read_bytes()
        (own / name).unlink()
        refused(capsys, trains_on(own), name)
        (own / name).write_bytes(content)
        Image.new("1", (64, 48), 1).save(own / "two-mask.png")
    assert not find_checkpoint(own / "o") and main(trains_on(own)) == 0


def test_what_is_found_broken_after_training_is_left_out_counted_and_named(own, capsys):
    Image.open(own / "two.png").save(own / "two.jpg")
    path = own / "own.json"
    path.write_text(path.read_text().replace("two.png", "two.jpg"))
    content = (own / "two.jpg").read_bytes()
    (own / "two.jpg").write_bytes(content[:len(content) // 2])  # its head, with its size, is whole
    assert main(trains_on(own)) == 1
    error = capsys.readouterr().err
    assert f"left out: {own / 'two.jpg'}" in error and "1 sentences of val were left out" in error
    row = json.loads((own / "o" / "metrics.json").read_text())["trained map, upsampled"]
    assert row["sentences"] == row["left_out"] == 1


def test_the_split_that_is_measured_chooses_no_threshold(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "best_map_readout", None)  # val is all that there is
    main(arguments(photos, tmp_path, "--dataset", "refcoco", "--steps", 1, "--stage", 1))
    assert (
        json.loads((tmp_path / "metrics.json").read_text())["trained map, upsampled"]["threshold"]
        == 0.5
    )


def test_a_checkpoint_may_be_read_by_whom_the_umask_lets(run):
    weights, config = (
        (run / "stage1-000003" / name).stat().st_mode
        for name in ("model.safetensors", "config.json")
    )
    assert weights == config


def test_a_log_with_broken_bytes_does_not_stop_a_run(world, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    with open(tmp_path / "run" / "log.jsonl", "ab") as log:
        log.write(b"\xff\xfe\n")
    main(arguments(world, tmp_path / "run", "--steps", 3, "--resume"))
    assert b"\xff" not in (tmp_path / "run" / "log.jsonl").read_bytes()


def test_a_checkpoint_of_another_backbone_is_refused(world, run, tmp_path, capsys):
    args = arguments(world, run, "--backbone", "B", "--stage", 2, "--resume")
    refused(capsys, args, "backbone tiny", "--backbone B")


@pytest.mark.parametrize(
    "flags",
    [
        ["--modules", "ske,magic"],
        ["--stage", "0", "--backbone", "B"],
        ["--steps", "0"],
        ["--batch-size", "-3"],
        ["--stage", "3"],
        ["--lr", "-1"],
        ["--workers", "-1"],
        ["--stage", "0", "--epochs", "1"],
        ["--stage", "0", "--accumulate", "2"],
        ["--seed", "-1"],
        ["--seed", str(2**64)],
        ["--recompute", "--stage", "0"],
        ["--no-recompute", "--stage", "2"],
    ],
)
def test_flags_that_mean_nothing_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(flags)
    assert stop.value.code == 2 and flags[0] in capsys.readouterr().err


class Touch:
    """Pickles as a call of touch(canary)."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_hostile_training_state_is_refused_and_not_run(world, run, tmp_path, capsys, stage):
    canary, checkpoint = tmp_path / "canary", tmp_path / "o" / "stage1-000003"
    shutil.copytree(run / "stage1-000003", checkpoint)
    args = arguments(world, tmp_path / "o", "--stage", stage, "--steps", 3, "--resume")
    for hostile in (
        {"run": Touch(canary)},
        [Touch(canary)],
        {"step": 3, "seen": 3, "skipped": 0},
        {"run": "{}"},
    ):
        torch.save(hostile, checkpoint / "training.pt")
        refused(capsys, args, "training.pt cannot be used", "another --out")
        (checkpoint / "training.pt").write_bytes(pickle.dumps(hostile))
        refused(capsys, args, "training.pt cannot be used")
        assert not canary.exists()
    torch.save({"run": Touch(canary)}, checkpoint / "training.pt")
    torch.load(checkpoint / "training.pt", weights_only=False)
    assert canary.exists(), "a dud: it would not have run anyway"


@pytest.mark.parametrize(
    "change",
    [
        lambda moments: {**moments, 0: moments[0] | {"exp_avg": torch.zeros(3, 5)}},
        lambda moments: {**moments, 0: moments[0] | {"exp_avg_sq": 0.0}},
        lambda moments: {**moments, 0: {k: v for k, v in moments[0].items() if k != "exp_avg_sq"}},
        lambda moments: {"x" if n == 0 else n: m for n, m in moments.items()},
        lambda moments: list(moments.values()),
    ],
    ids=["shape", "no tensor", "lacks one", "whose", "list"],
)
def test_moments_that_fit_no_parameter_are_refused(world, run, tmp_path, capsys, change):
    """Plain data, and so nothing that torch.load minds: the first step would end in a traceback."""
    checkpoint = tmp_path / "stage1-000003"
    shutil.copytree(run / "stage1-000003", checkpoint)
    state = torch.load(checkpoint / "training.pt", weights_only=True)
    state["run"] = state["run"].replace('"steps": 3', '"steps": 4')
    args = arguments(world, tmp_path, "--stage", 1, "--steps", 4, "--resume")
    state["optimizer"]["state"] = change(state["optimizer"]["state"])
    torch.save(state, checkpoint / "training.pt")
    refused(capsys, args, "training.pt cannot be used", "another --out")


def test_hostile_weights_are_refused_and_not_run(world, run, tmp_path, capsys):
    canary, checkpoint = tmp_path / "canary", tmp_path / "o" / "stage1-000003"
    shutil.copytree(run / "stage1-000003", checkpoint)
    for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        write({"weights": Touch(canary)}, checkpoint / "model.safetensors")
        refused(
            capsys,
            arguments(world, tmp_path / "o", "--stage", 1, "--steps", 3, "--resume"),
            "model.safetensors",
        )
        write({"weights": Touch(canary)}, tmp_path / "clip.pt")
        for backbone in ("tiny", "B"):
            refused(
                capsys,
                arguments(
                    world,
                    tmp_path / backbone,
                    "--stage",
                    1,
                    "--steps",
                    3,
                    "--backbone",
                    backbone,
                    "--clip",
                    tmp_path / "clip.pt",
                    "--image-size",
                    32,
                ),
                "clip.pt",
            )
    assert not canary.exists()


@pytest.mark.parametrize(
    "key, value",
    [
        ("clip_name", "hf-hub:stranger/model"),
        ("clip_tag", "../../clip.safetensors"),
        ("cfe_layers", 10**6),
        ("adapter_bottlenecks", [10**9, 10**9]),
        ("decoder_widths", 7),
        ("image_size", "96"),
        ("image_size", 10**9),
        ("cfe_scale", float("nan")),
        ("modules", [{}]),
        ("decoder", 1),
        ("__class__", "x"),
    ],
)
def test_a_hostile_config_is_refused_before_anything_is_built(
    world, run, tmp_path, capsys, key, value
):
    checkpoint = tmp_path / "stage1-000003"
    shutil.copytree(run / "stage1-000003", checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {key: value}))
    begun = time.monotonic()
    refused(
        capsys,
        arguments(world, tmp_path, "--stage", 1, "--steps", 3, "--resume"),
        "config.json",
        key,
    )
    assert time.monotonic() - begun < 10


def test_a_doubtful_data_set_is_warned_about_at_the_start(world, tmp_path, capsys):
    root = tmp_path / "world"
    shutil.copytree(world, root)
    path = root / "shapes" / "refs(shapes).p"
    refs = unpickle.load_refs(path)
    train_refs = [r for r in refs if r["split"] == "train"]
    train_refs[1]["sentences"][0]["sent_id"] = train_refs[0]["sentences"][0]["sent_id"]
    next(r for r in refs if r["split"] == "test")["split"] = "tset"
    path.write_bytes(pickle.dumps(refs))
    main(arguments(root, tmp_path / "o", "--stage", 1, "--steps", 1))
    printed = capsys.readouterr().err
    assert "warning: shapes train: refs of unknown splits: 'tset'" in printed
    assert "warning: shapes train: sentences with the sent_id of another: 1" in printed
    assert "empty" not in printed


def broken_world(world, root, share):
    """A copy of the world, a share of whose training images are cut short."""
    shutil.copytree(world, root)
    dataset = RefCOCO(root, "shapes", "train")
    for i in range(int(share * len(dataset.images))):
        path = dataset.path(i)
        path.write_bytes(path.read_bytes()[:200])
    return root


def test_broken_images_are_skipped_counted_and_end_the_run_with_1(world, tmp_path, capsys):
    root = broken_world(world, tmp_path / "broken", 0.2)
    command = [
        sys.executable,
        "train.py",
        "--data-root",
        str(root),
        "--out",
        str(tmp_path / "o"),
        "--stage",
        "1",
        "--steps",
        "4",
    ]
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert process.returncode == 1, process.stderr
    assert (
        "skipped: " in process.stderr
        and ".png" in process.stderr
        and "more than 1 %" in process.stderr
    )
    assert "Traceback" not in process.stderr
    assert find_checkpoint(tmp_path / "o", 1).name == "stage1-000004"  # what was trained is kept


def test_ones_own_json_trains_and_says_what_was_trained_on(world, tmp_path, capsys):
    Image.open(next((world / "images" / "shapes").iterdir())).save(tmp_path / "a.png")
    entry = {
        "image": "a.png",
        "polygons": [[5, 5, 60, 5, 60, 60]],
        "sentences": ["the triangle", "a corner"],
    }
    (tmp_path / "own.json").write_text(json.dumps([entry]))
    args = parse_args(
        ["--dataset", str(tmp_path / "own.json"), "--out", str(tmp_path / "o"), "--steps", "2"]
    )
    assert main(args) == 0
    assert "1 of the 1 images evaluated on were trained on" in capsys.readouterr().err
    metrics = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert all(row["images_trained_on"] == 1 for row in metrics.values())
    evaluates = [str(tmp_path / "o"), "--dataset", str(tmp_path / "own.json")]
    evaluate.main(evaluate.parse_args(evaluates))
    assert "warning: 1 of the 1 images evaluated on were trained on" in capsys.readouterr().err
    (tmp_path / "train.json").write_text(json.dumps([entry | {"split": "train"}]))
    refused(
        capsys,
        parse_args(["--dataset", str(tmp_path / "train.json"), "--out", str(tmp_path / "p")]),
        "val",
    )


def test_an_evaluation_on_images_trained_on_is_warned_about(world, run, tmp_path, capsys):
    def warned(out, *flags):
        evaluate.main(
            evaluate.parse_args([str(out), "--data-root", str(world), "--limit", "2", *flags])
        )
        return [
            line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")
        ]

    assert warned(run, "--split", "train") == [
        "warning: 2 of the 2 images evaluated on were trained on"
    ]
    assert warned(run, "--split", "test") == []
    shutil.copytree(run / "stage1-000003", tmp_path / "o")
    (tmp_path / "o" / "training.pt").write_bytes(b"no record")
    assert warned(tmp_path / "o", "--split", "train") == []
    good = zipfile.ZipFile(run / "stage1-000003" / "training.pt")
    with zipfile.ZipFile(tmp_path / "o" / "training.pt", "w") as file:
        for name in good.namelist():  # the pickle in it now takes what lies on top of nothing
            file.writestr(name, b"." if name.endswith("/data.pkl") else good.read(name))
    assert warned(tmp_path / "o", "--split", "train") == []


def test_stage_2_refuses_an_unfinished_stage_1(world, tmp_path, capsys, monkeypatch):
    def stop(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        return {"loss": None}

    args = arguments(world, tmp_path, "--stage", 1, "--steps", 5)
    loss_of = train.locator_loss
    monkeypatch.setattr(train, "locator_loss", lambda *inputs: (stop(), loss_of(*inputs))[1])
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert ended.value.code == 143 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    refused(
        capsys,
        arguments(world, tmp_path, "--stage", 2),
        "stopped at step 1 of 5",
        "--stage 1 --resume",
    )


def test_what_a_user_keeps_beside_the_checkpoints_stays(world, run, tmp_path):
    shutil.copytree(run / "stage1-000003", tmp_path / "stage1-best")
    main(arguments(world, tmp_path, "--stage", 1, "--steps", 2))
    assert (tmp_path / "stage1-best" / "model.safetensors").exists()
    for step in (999_999, 1_000_000):
        (tmp_path / f"stage1-{step}").mkdir()
    assert find_checkpoint(tmp_path, 1).name == "stage1-1000000"


def test_steps_without_a_finite_loss_change_nothing_and_end_the_run(world, tmp_path, monkeypatch):
    args = arguments(world, tmp_path, "--stage", 1, "--steps", 20)
    monkeypatch.setattr(
        train,
        "locator_loss",
        lambda model, batch: (
            train.kernels.dice_focal(
                model(batch["images"], batch["tokens"], batch["image_index"])["patch_logits"],
                patch_target(batch["masks"], 8),
            )
            * float("nan")
        ),
    )
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert "not finite 5 times in a row" in str(stop.value)
    lines = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    assert len(lines) == 5 and all(line["skipped_step"] and line["sent_ids"] for line in lines)


# ---- Photographs -------------------------------------------------------------------------------


def test_b_trains_and_segments_photographs_at_a_small_size(photos, tmp_path):
    """B's architecture with random weights, both stages, every protocol, on RefCOCO's own layout.
    """
    flags = [
        "--backbone",
        "B",
        "--dataset",
        "refcoco",
        "--data-root",
        str(photos),
        "--clip",
        "random",
        "--image-size",
        "64",
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--workers",
        "0",
        "--out",
        str(tmp_path),
    ]
    main(parse_args(flags))
    for protocol in ("original", "lavt", "cris"):
        evaluate.main(
            evaluate.parse_args(
                [
                    str(tmp_path),
                    "--dataset",
                    "refcoco",
                    "--data-root",
                    str(photos),
                    "--split",
                    "testB",
                    "--protocol",
                    protocol,
                    "--json",
                    str(tmp_path / "e.json"),
                ]
            )
        )
        assert json.loads((tmp_path / "e.json").read_text())["sentences"] > 0
    photo = sorted((photos / "images/mscoco/images/train2014").iterdir())[0]
    predict.main(
        predict.parse_args(
            [
                str(tmp_path),
                str(photo),
                "the bowl",
                "the fork",
                "--out",
                str(tmp_path / "o.png"),
                "--mask",
                str(tmp_path / "m.png"),
            ]
        )
    )
    size = Image.open(photo).size
    assert Image.open(tmp_path / "m-1.png").size == Image.open(tmp_path / "m-2.png").size == size
    assert os.path.getsize(tmp_path / "o.png") and set(
        np.unique(Image.open(tmp_path / "m-1.png"))
    ) <= {0, 255}


def test_predict_refuses_a_mistake_and_writes_nothing(run, world, tmp_path, capsys):
    image = next((world / "images" / "shapes").iterdir())
    for flags, words in (
        ([str(run), str(tmp_path / "no.jpg"), "x"], "no such image"),
        ([str(run), str(image), " "], "empty sentence"),
        ([str(run), str(image), "x", "--mask", str(tmp_path / "m.xyz")], ".xyz"),
        ([str(tmp_path / "none"), str(image), "x"], "none"),
    ):
        assert (
            files.run(predict.main, predict.parse_args([*flags, "--out", str(tmp_path / "o.png")]))
            == 2
        )
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and words in error
    assert not list(tmp_path.iterdir())
