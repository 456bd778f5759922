"""Trains RISCLIP in the paper's two stages (Sec. 3.5, A.1).

    python train.py                     the miniature: both stages, evaluation, pictures
    python train.py --backbone B --stage 1 --dataset refcoco --data-root DATA --out runs/B
    python train.py --backbone B --stage 2 --dataset refcoco --data-root DATA --out runs/B
    torchrun --nproc-per-node 8 train.py ...                    the same on eight GPUs
    python train.py --stage 0           makes the miniature's CLIP (miniature/pretrain.py)

Stage 1 aligns the patch-level map with the downsampled mask: Adapters, CFE and SKE learn. Stage 2
aligns the pixel-level map with the mask: the decoder alone learns, all else is frozen.
"""

import argparse
import json
import math
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import kernels
from evaluate import (
    MASK,
    Readout,
    best_map_readout,
    evaluate,
    results_table,
    samples,
    warn_of_images_trained_on,
)
from miniature.pretrain import pretrain
from risclip import CONFIGS, MHCA, RISCLIP, check_image_size
from support import processes
from support.check import doubts, leave_out_broken, look, look_ahead
from support.checkpoint import find_checkpoint, read_config
from support.files import DataError, check_folder, one_line, run, too_small, write_text
from support.inference import store_frozen_matrices
from support.pictures import save_picture
from support.runs import Run, Tally, alone, check_stage_1, next_part

# Table A1. `per_image`: sentences of one image that share a batch's decode and lower layers.
PAPER = dict(epochs=60, steps=None, lr=5e-5, batch_size=32, per_image=1, warmup=0, augment=True,
             save_every=500)
MINI = dict(epochs=None, batch_size=16, per_image=4, warmup=30, augment=False, save_every=200)
SETTINGS = {
    ("tiny", 0): MINI | dict(steps=4000, lr=1e-3, batch_size=32, warmup=50),
    ("tiny", 1): MINI | dict(steps=1200, lr=6e-4),
    ("tiny", 2): MINI | dict(steps=450, lr=2e-3, batch_size=8),
    ("B", 1): PAPER, ("B", 2): PAPER | dict(epochs=1),
    ("L", 1): PAPER, ("L", 2): PAPER | dict(epochs=1),
}
COMBINED_BATCH = {"B": 96, "L": 56}  # Sec. A.1, for Table 2
WEIGHT_DECAY = 5e-3  # Table A1
POWER = 0.9  # of the polynomial decay; the paper gives none
SHAPES_IMAGES = 5000  # of the shapes data set, written under --data-root when it is not there yet


# ---- Losses (Sec. 3.5) -------------------------------------------------------------------------

def patch_target(masks, patch_size):
    """mask_patch: masks (B, S, S) -> (B, S / p, S / p) bool, the patches of which the object covers
    at least half. An object too small for any keeps those that it covers most."""
    area = F.avg_pool2d(masks.float(), patch_size)  # the share of each patch that it fills
    most = area.amax((1, 2), keepdim=True)
    enough = most.clamp(max=0.5)
    return (area >= enough) & (area > 0)


def locator_loss(model, batch, **focal):
    """Stage 1: dice + focal between map_patch and mask_patch. focal: another alpha and gamma."""
    output = model(batch["images"], batch["tokens"], batch["image_index"])
    logits = output["patch_logits"]  # (B, S / p, S / p)
    patch_size = batch["masks"].size(-1) // logits.size(-1)
    return kernels.dice_focal(logits, patch_target(batch["masks"], patch_size), **focal)


def refiner_loss(model, batch, **focal):
    """Stage 2: dice + focal between both maps of map_pixel and mask_pixel. The background's target
    is what the mask is not."""
    output = model(batch["images"], batch["tokens"], batch["image_index"])
    foreground = batch["masks"].bool()
    target = torch.stack([~foreground, foreground], dim=1)  # (B, 2, S, S)
    return kernels.dice_focal(output["mask_logits"], target, **focal)


# ---- The loop (A.1) ----------------------------------------------------------------------------

def fit(net, loss_of, batches, settings, run):
    """Trains what requires a gradient in `net` -> whether hardly any sample had to be skipped.

    loss_of(net, part): the mean over the part's sentences. batches(step): the parts of batches from
    that step on, run.accumulate per step. run: support/runs.py, which resumes, logs, saves, stops.
    """
    optimizer = adamw(net, settings["lr"])
    with run:
        run.resume(net, optimizer)
        stream = batches(run.step)
        net.train()
        while run.goes_on():
            lr = schedule(settings["lr"], run.step, run.steps, settings["warmup"])
            for group in optimizer.param_groups:
                group["lr"] = lr

            tally = Tally(net)
            for _ in range(run.accumulate):
                part, loss = next_part(stream, run.device), None
                if part["texts"]:
                    loss = loss_of(net, part) * len(part["texts"])  # a sum: parts may differ
                    loss.backward()
                tally.add(loss, part)
            tally.share(run.asked)  # all processes' gradients, and their mean over the sentences

            if tally.finite:
                optimizer.step()
            else:
                tally.undo()
            optimizer.zero_grad()
            run.end_step(tally, lr)
    return run.sound()


def schedule(lr, step, steps, warmup):
    """The learning rate of a step: linear warmup, then polynomial decay to zero."""
    return lr * min(1, (step + 1) / max(1, warmup)) * (1 - step / steps) ** POWER


def adamw(net, lr):
    """AdamW with Table A1's weight decay for matrices and filters, and none for biases, norms,
    scalers and temperatures. Its betas are torch's own."""
    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    return torch.optim.AdamW([
        {"params": [p for name, p in trained if decays(name, p)], "weight_decay": WEIGHT_DECAY},
        {"params": [p for name, p in trained if not decays(name, p)], "weight_decay": 0.0}],
        lr=lr, fused=True)


def decays(name, p):
    return p.ndim > 1 and not name.endswith("temperature")


class Plan:
    """The items of each part of each batch, from optimizer step `start` on, for this process.

    What step i holds follows from the seed alone. So a resumed run sees what an unbroken one does,
    and any number of processes together what one does.
    """

    def __init__(self, dataset, settings, args, start):
        self.dataset, self.settings, self.seed, self.start = dataset, settings, args.seed, start
        self.parts = args.accumulate * processes.WORLD

    def __iter__(self):
        step, epoch = 0, 0
        while True:
            for items in data.plan_epoch(self.dataset, epoch, self.seed,
                                         self.settings["batch_size"], self.settings["per_image"]):
                if step >= self.start:
                    for k in range(processes.RANK, self.parts, processes.WORLD):
                        yield items[k::self.parts]
                step += 1
            epoch += 1


def sample_batches(model, dataset, settings, args, start):
    """Yields the parts of stage 1's or 2's batches (data.collate), with tokens, from `start` on."""
    samples = data.Samples(dataset, model.config.image_size, augment=settings["augment"])
    plan = Plan(dataset, settings, args, start)
    for batch in processes.reader(samples, args.workers, data.collate, batch_sampler=plan):
        for message in batch.pop("broken"):
            tqdm.write(f"skipped: {message}", file=sys.stderr)
        if batch["texts"]:
            batch["tokens"] = model.tokenize(batch["texts"])
        yield batch


# ---- The stages --------------------------------------------------------------------------------

def run_stage(args, stage, dataset, prepare=None, loss_of=None):
    """Trains stage 1 or 2 into --out -> the model, and whether hardly any sample was skipped.

    For the ablations: prepare(model) changes the model before it learns, loss_of takes the place
    of the stage's loss.
    """
    settings = stage_settings(args, stage)
    torch.manual_seed(args.seed)
    model = build_model(args, stage)
    if prepare:
        prepare(model)
    per_epoch = len(data.plan_epoch(dataset, 0, args.seed, settings["batch_size"],
                                    settings["per_image"]))
    steps = settings["steps"] or settings["epochs"] * per_epoch
    settings |= {"modules": list(model.config.modules), "image_size": model.config.image_size,
                 "refs": len(dataset.refs)}

    def batches(start):
        return sample_batches(model, dataset, settings, args, start)
    loss_of = loss_of or (locator_loss if stage == 1 else refiner_loss)
    run = Run(args, stage, steps, settings, model.save_pretrained)
    return model, fit(model, loss_of, batches, settings, run)


def stage_settings(args, stage):
    """SETTINGS of the backbone and stage, with the flags that were given in their place."""
    settings = dict(SETTINGS[args.backbone, stage])
    if args.dataset == "combined":
        settings["batch_size"] = COMBINED_BATCH.get(args.backbone, settings["batch_size"])
    if args.epochs and (stage == 1 or args.stage == "2"):
        settings |= {"epochs": args.epochs, "steps": None}
    given = {k: getattr(args, k) for k in ("steps", "batch_size", "per_image", "lr")}
    given = {k: v for k, v in given.items() if v is not None}
    return settings | given | {"precision": args.precision}


def build_model(args, stage):
    """The model that a stage starts from: its own newest checkpoint, stage 1's (for stage 2) or
    frozen CLIP. Raises DataError if the checkpoint was trained with other flags."""
    asked = {k: getattr(args, k) for k in ("image_size", "modules") if getattr(args, k) is not None}
    asked |= args.changes
    clip = {} if args.clip is None else {"clip": args.clip}
    source = find_checkpoint(args.out, stage)
    if source is None and stage == 2:
        source = find_checkpoint(args.out, 1)
    if source is None:
        config = replace(CONFIGS[args.backbone], precision=args.precision, **asked, **clip)
        model = RISCLIP(config, args.fuse)
    else:
        model = RISCLIP.from_pretrained(source, args.fuse, precision=args.precision, **clip)
        for name, value in asked.items():
            if (was := getattr(model.config, name)) != value:
                raise DataError(f"--{name.replace('_', '-')}: {source} was trained with {was}, not "
                                f"{value}")
    if args.recompute is not None:
        model.recompute = args.recompute
    if stage == 1:
        model.requires_grad_(True).clip.requires_grad_(model.config.fine_tuned)
    elif model.decoder is None:
        model.add_decoder()
    else:
        model.requires_grad_(False).decoder.requires_grad_(True)
    model.to(args.device)
    store_frozen_matrices(model)
    return model


def report(args, model, train, val, held_out):
    """Evaluation on scenes never trained on, for the miniature, or else on the val split ->
    metrics.json, samples.png. The map is cut where it is best on val, but at 0.5 where val is what
    is measured. Returns whether no sentence had to be left out."""
    broken = leave_out_broken(held_out)
    if held_out is not val:
        leave_out_broken(val)
    results, models = {}, {"trained map": model}
    if args.backbone == "tiny":
        frozen = RISCLIP(replace(model.config, modules=(), decoder=False, clip="random"))
        frozen.clip = model.clip
        models = {"frozen CLIP's map": frozen.to(args.device), **models}
    known = warn_of_images_trained_on(train.images, held_out.images)
    for name, m in models.items():
        cut = Readout("patch_logits", 0.5) if held_out is val else best_map_readout(m, val)
        readouts = {f"{name}, upsampled": cut}
        if m.decoder is not None:
            readouts["decoder's mask"] = MASK
        measured = evaluate(m, held_out, workers=args.workers, readouts=tuple(readouts.values()))
        for row, readout in readouts.items():
            results[row] = measured[readout] | {"threshold": readout.threshold,
                                                "images_trained_on": known,
                                                "left_out": broken}
    if processes.MAIN:
        write_text(args.out / "metrics.json", json.dumps(results, indent=1) + "\n")
        save_picture(samples(model, held_out), args.out / "samples.png")
    first = next(iter(results.values()))
    print(f"\n{args.dataset} {held_out.split}: {first['sentences']} sentences, "
          f"{first['images']} images\n{results_table(results)}\n")
    return not broken


# ---- Command line ------------------------------------------------------------------------------

def parse_args(argv=None):
    rows = "\n".join(f"  {b:5} {s}  " + ", ".join(f"{k} {v}" for k, v in own.items()
                                                  if v is not None)
                     for (b, s), own in SETTINGS.items())
    parser = argparse.ArgumentParser(description=__doc__,
                                     epilog="defaults by backbone and stage:\n" + rows,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--backbone", choices=tuple(CONFIGS), default="tiny")
    add("--stage", choices=("0", "1", "2", "all"), default="all", help="all: 1, then 2 (default)")
    add("--dataset", default="shapes", help="shapes (default), refcoco, refcoco+, refcocog, "
        "combined (Table 2) or your own .json")
    add("--data-root", default="data", help="where the data sets lie (default: data)")
    add("--outside", action="store_true", help="let your own .json name files outside its folder")
    add("--out", type=Path, help="checkpoints, logs and pictures (default: runs/BACKBONE)")
    add("--epochs", type=int, help="of stage 1; with --stage 2 alone, of stage 2 (default: 1)")
    add("--steps", type=int, help="optimizer steps of each stage, instead of --epochs")
    add("--batch-size", type=int, help="sentences per optimizer step, in each stage (default with "
        "combined: 96 with B, 56 with L)")
    add("--per-image", type=int, help="how many sentences of an image, at most, share its lower "
        "layers, decode and augmentation")
    add("--accumulate", type=int, default=1, metavar="N", help="split a batch into N passes")
    add("--recompute", action=argparse.BooleanOptionalAction, help="stage 1: compute SKE's insides "
        "again in backward, to the same result, instead of keeping them (default with B and L)")
    add("--lr", type=float, help="of each stage")
    add("--image-size", type=int, help="pixels, a multiple of the patch (default: the backbone's)")
    add("--modules", help="of stage 1 (default: adapter,cfe,ske); 'none' leaves frozen CLIP")
    add("--clip", help="CLIP's weights: pretrained (default), random or a file")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--precision", choices=("bf16", "fp32"), help="the locator's; the refiner's is fp32 "
        "(default: bf16 with B and L, fp32 with tiny)")
    add("--workers", type=int, help="processes that read images (default: 4, with tiny 0)")
    add("--seed", type=int, default=0)
    add("--resume", action="store_true", help="continue from the newest checkpoint in --out")
    parser.set_defaults(changes={}, fuse=MHCA)  # of the model: for experiments/ablate.py
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs") / args.backbone
    if args.modules is not None:
        args.modules = tuple(m for m in args.modules.split(",") if m and m != "none")
        if unknown := set(args.modules) - {"adapter", "cfe", "ske"}:
            parser.error(f"--modules {','.join(sorted(unknown))}: know adapter, cfe, ske and none")
    if args.stage == "0" and (args.backbone != "tiny" or args.epochs or args.accumulate > 1):
        parser.error("--stage 0 makes the tiny CLIP: --backbone tiny, --steps instead of --epochs, "
                     "no --accumulate")
    if args.stage == "0" and processes.WORLD > 1:
        parser.error("--stage 0 compares all of a batch with all of it: it runs in one process, "
                     "without torchrun")
    if args.recompute is not None and args.stage in ("0", "2"):
        parser.error("--recompute and --no-recompute are stage 1's: leave them out of --stage "
                     f"{args.stage}")
    if wrong := too_small(args, epochs=1, steps=1, batch_size=1, per_image=1, accumulate=1,
                          workers=0, seed=0):
        parser.error(wrong)
    if args.seed >= 2**63:
        parser.error(f"--seed {args.seed}: give one below 2^63")
    if args.lr is not None and not 0 < args.lr < math.inf:
        parser.error(f"--lr {args.lr}: give a number above 0")
    args.precision = args.precision or CONFIGS[args.backbone].precision
    if args.workers is None:
        args.workers = 0 if args.backbone == "tiny" else 4
    return args


def check_run(args, stages):
    """Raises DataError for what can be told before anything is built, downloaded or written."""
    for stage in stages:
        newest = find_checkpoint(args.out, stage)
        if newest and not args.resume:
            raise DataError(f"--out {args.out} holds {newest.name}: continue with --resume, or "
                            "give another --out")
        if newest and stage:
            was = read_config(newest / "config.json", CONFIGS)[0].backbone
            if was != args.backbone:
                raise DataError(f"{newest} has the backbone {was}, not --backbone {args.backbone}")
    if stages[0] == 2:
        check_stage_1(args.out)
    config = CONFIGS[args.backbone]
    check_image_size(replace(config, image_size=args.image_size or config.image_size))
    if args.clip not in (None, "pretrained", "random") and not Path(args.clip).exists():
        raise DataError(f"--clip {args.clip}: no such file")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"--device {args.device}: {one_line(error)[:120]}") from error


def have_data(args):
    """Writes the shapes data set if it is asked for and not there."""
    if args.dataset == "shapes":
        print(f"training on the generated shapes data set in {args.data_root}/shapes; for RefCOCO "
              "give --dataset refcoco --data-root DATA")
        whole = Path(args.data_root) / "shapes" / "instances.json"
        if processes.MAIN and not whole.exists():
            data.make_shapes(args.data_root, SHAPES_IMAGES, seed=0)
        processes.gather(None)


def main(args):
    stages = (1, 2) if args.stage == "all" else (int(args.stage),)
    processes.start(args.device)
    check_run(args, stages)
    processes.gather(None)  # nobody writes before all have looked
    check_folder(args.out, f"--out {args.out}")
    with alone(args.out) if processes.MAIN else nullcontext():
        if stages == (0,):
            return pretrain(args, stage_settings(args, 0), fit)
        return train(args, stages)


def train(args, stages):
    """The stages into --out, and what is reported of them -> exit code."""
    def split(name):
        return data.RefCOCO(args.data_root, args.dataset, name, outside=args.outside)

    have_data(args)
    learn, val, held_out = split("train"), None, None
    if args.dataset != "combined":  # the union of Table 2 has no val split
        val = held_out = split("val")
    if args.dataset == "shapes":
        held_out = split("test")
    for dataset in filter(None, dict.fromkeys((val, held_out))):
        look_ahead(dataset)
    for line in doubts(learn):
        print(f"warning: {args.dataset} {learn.split}: {one_line(line)}", file=sys.stderr)
    if processes.MAIN:
        save_picture(look(learn), args.out / "data.png")
    sound, written = True, "checkpoints, data.png, log.jsonl, curve.png"
    for stage in stages:
        model, its_sound = run_stage(args, stage, learn)
        sound = sound and its_sound
    if val:
        sound = report(args, model, learn, val, held_out) and sound
        written += ", metrics.json, samples.png"
    print(f"wrote {args.out}: {written}")
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(run(main, parse_args()))
