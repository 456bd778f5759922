"""Trains RISCLIP in the paper's two stages (Sec. 3.5, A.1), and the miniature's CLIP before them (stage 0).

    python train.py                                             the miniature: both stages, evaluation, pictures
    python train.py --backbone B --stage 1 --dataset refcoco --data-root DATA --out runs/B
    python train.py --backbone B --stage 2 --dataset refcoco --data-root DATA --out runs/B
    python train.py --backbone tiny --stage 0 --out runs/tiny_clip      a CLIP like miniature/tiny_clip.safetensors
    torchrun --nproc-per-node 8 train.py ...                            stages 1 and 2 on eight GPUs

Stage 1 aligns the patch-level map with the downsampled mask: Adapters, CFE and SKE learn. Stage 2 aligns the
pixel-level map with the mask: the decoder alone learns, all else is frozen.
"""

import argparse
import json
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import evaluate
import kernels
from evaluate import MASK, best_map_readout, warn_of_images_trained_on
from miniature.pretrain import pretrain
from risclip import CONFIGS, RISCLIP, check_image_size
from support import processes
from support.check import doubts
from support.checkpoint import find_checkpoint, read_config
from support.figures import samples
from support.files import DataError, check_folder, one_line, run, too_small, write_text
from support.pictures import draw_curve, save_picture
from support.runs import (
    alone,
    load_training_state,
    memory_gib,
    open_log,
    save_checkpoint,
    stop_signals,
    unbroken,
)

# Table A1. `per_image`: sentences of one image that share a batch's decode and lower layers.
PAPER = dict(epochs=60, lr=5e-5, batch_size=32, per_image=1, warmup=0, augment=True, save_every=500)
MINI = dict(epochs=None, lr=2e-3, batch_size=16, per_image=4, warmup=30, augment=False, save_every=200)
SETTINGS = {
    ("tiny", 0): MINI | dict(steps=4000, lr=1e-3, batch_size=32, warmup=50),
    ("tiny", 1): MINI | dict(steps=1200, lr=6e-4),
    ("tiny", 2): MINI | dict(steps=450, batch_size=8),
    **{(size, 1): PAPER | dict(steps=None) for size in "BL"},
    **{(size, 2): PAPER | dict(steps=None, epochs=1) for size in "BL"},
}
SHAPES_IMAGES = 5000  # of the shapes world, written under --data-root when it is not there yet


# ---- Losses (Sec. 3.5) ----------------------------------------------------------------------------------------------

def patch_target(masks, patch_size):
    """mask_patch: masks (B, S, S) -> (B, S / p, S / p) bool: the patches that the object fills to one half.

    An object too small to fill any keeps those that it fills most.
    """
    area = F.avg_pool2d(masks.float(), patch_size)
    return ((area >= area.amax((1, 2), keepdim=True).clamp(max=0.5)) & (area > 0))


def locator_loss(model, batch, **focal):
    """Stage 1 (Sec. 3.5): dice + focal between map_patch and mask_patch. focal: alpha and gamma, if not the paper's."""
    logits = model(batch["images"], batch["tokens"], batch["image_index"])["patch_logits"]  # (B, S / p, S / p)
    patch_size = batch["masks"].size(-1) // logits.size(-1)
    return kernels.dice_focal(logits, patch_target(batch["masks"], patch_size), **focal)


def refiner_loss(model, batch, **focal):
    """Stage 2 (Sec. 3.5): dice + focal between map_pixel's two maps and mask_pixel; background is what it is not."""
    output = model(batch["images"], batch["tokens"], batch["image_index"])
    foreground = batch["masks"].bool()
    return kernels.dice_focal(output["mask_logits"], torch.stack([~foreground, foreground], dim=1), **focal)


# ---- Batches --------------------------------------------------------------------------------------------------------

def sample_batches(model, dataset, settings, args, start):
    """Batches of stages 1 and 2 from optimizer step `start` on, each in `args.accumulate` parts for every process. What
    step i holds follows from the seed alone, so that a resumed run sees what an unbroken one does, and any number of
    processes what one does."""
    parts = args.accumulate * processes.WORLD

    def plan():
        epoch, step = 0, 0
        while True:
            for items in data.plan_epoch(dataset, epoch, args.seed, settings["batch_size"], settings["per_image"]):
                if step >= start:
                    yield from (items[k::parts] for k in range(processes.RANK, parts, processes.WORLD))
                step += 1
            epoch += 1

    samples_ = data.Samples(dataset, model.config.image_size, augment=settings["augment"])
    loader = DataLoader(samples_, batch_sampler=plan(), collate_fn=data.collate, num_workers=args.workers)
    for batch in loader:
        for message in batch.pop("broken"):
            tqdm.write(f"skipped: {message}", file=sys.stderr)
        if batch["texts"]:
            batch["tokens"] = model.tokenize(batch["texts"])
        yield batch


# ---- The loop -------------------------------------------------------------------------------------------------------

def fit(stage, net, loss_of, batches, steps, settings, args, save):
    """Trains what requires a gradient in `net` (A.1); resumes where the stage's newest checkpoint in --out stopped.

    `batches(start)` yields batches from that step on; `save(directory)` writes the weights. -> whether no more than 1 %
    of the samples had to be skipped.

    Under torchrun each process takes its part of every batch, and what they add up is the gradients: a step is then
    that of one process with as many --accumulate. So it is for batch norm, which sees a part at a time (SyncBatchNorm
    needs CUDA, and that no part is empty); its running statistics become the processes' mean.
    """
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([  # Table A1; its betas are torch's own
        {"params": [p for name, p in trained.items() if decays(name, p)], "weight_decay": 5e-3},
        {"params": [p for name, p in trained.items() if not decays(name, p)], "weight_decay": 0.0}],
        lr=settings["lr"], fused=True)
    run = {**settings, "stage": stage, "steps": steps, "seed": args.seed, "dataset": args.dataset,
           "accumulate": args.accumulate}
    running = [b for name, b in net.named_buffers() if "running_" in name]
    step, seen, skipped, bad = 0, 0, 0, 0
    if checkpoint := find_checkpoint(args.out, stage):
        step, seen, skipped = load_training_state(checkpoint, optimizer, net, run)
        if step == steps:
            print(f"{checkpoint} is finished: nothing left to train in stage {stage}")
    net.train()
    stream, clock, since, stopped = batches(step), time.time(), seen, 0
    with (stop_signals() as asked, open_log(args.out, stage, step) as log,
          tqdm(total=steps, initial=step, desc=f"stage {stage}", disable=not processes.MAIN) as bar):
        while step < steps and not stopped:
            lr = settings["lr"] * min(1, (step + 1) / max(1, settings["warmup"])) * (1 - step / steps) ** 0.9
            for group in optimizer.param_groups:
                group["lr"] = lr
            total, count, lost, sent_ids = 0.0, 0, 0, []
            statistics = [b.clone() for b in net.buffers()]
            for _ in range(args.accumulate):
                batch = next(stream)
                lost += batch["lost"]
                if n := len(batch["texts"]):
                    batch = {k: v.to(args.device) if torch.is_tensor(v) else v for k, v in batch.items()}
                    loss = loss_of(net, batch) * n
                    loss.backward()
                    total, count = total + loss.item(), count + n
                    sent_ids += batch.get("sent_ids", [])
            own, shares = count, processes.gather((total, count, lost, sent_ids, max(asked, default=0)))
            total, count, lost = (sum(share[i] for share in shares) for i in range(3))
            seen, skipped, stopped = seen + count, skipped + lost, max(share[4] for share in shares)
            if processes.WORLD > 1 and count:
                for p in trained.values():  # None where all of a process's images are broken
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                for b in running:
                    b *= own / count
                processes.add_up([*(p.grad for p in trained.values()), *running])
            gradients = [p.grad for p in trained.values() if p.grad is not None]
            for g in gradients:
                g /= count  # the mean over the step's sentences, however many parts they came in
            finite = math.isfinite(total + torch.nn.utils.get_total_norm(gradients))
            if finite:
                optimizer.step()
            else:  # as if the step had not been: batch norm has seen what is not finite
                for b, before in zip(net.buffers(), statistics):
                    b.copy_(before)
            bad = 0 if finite else bad + 1
            optimizer.zero_grad()
            step += 1
            if count and (step % 10 == 0 or step == steps or not finite):
                now, mean = time.time(), total / count
                line = {"stage": stage, "step": step, "loss": mean, "lr": lr,
                        "samples_per_s": (seen - since) / (now - clock), "memory_gib": memory_gib(args.device)}
                clock, since = now, seen
                if not finite:
                    line |= {"skipped_step": True, "sent_ids": [i for share in shares for i in share[3]]}
                print(json.dumps(line), file=log, flush=True)
                bar.set_postfix(loss=f"{mean:.3f}", lr=f"{lr:.1e}")
            bar.update()
            if bad == 5:
                raise SystemExit(f"stage {stage} stopped at step {step}: the loss was not finite 5 times in a row; "
                                 f"the last good checkpoint is in {args.out}")
            if processes.MAIN and (step % settings["save_every"] == 0 or step == steps or stopped):
                save_checkpoint(args.out, stage, step, save, optimizer, net, run, seen, skipped)
    processes.gather(None)  # what follows reads the checkpoint
    if stopped:
        if processes.MAIN:
            print(f"stopped at step {step} of {steps}; go on with --resume", file=sys.stderr)
        raise SystemExit(128 + stopped)
    if step and not seen:
        raise DataError(f"none of {args.dataset}'s samples could be read: see `python data.py check`")
    if processes.MAIN:
        draw_curve(args.out)
    if skipped and processes.MAIN:
        print(f"{skipped} samples were skipped: image or mask missing or broken", file=sys.stderr)
    sound = skipped <= 0.01 * (seen + skipped)
    if not sound and processes.MAIN:
        print(f"more than 1 % of {seen + skipped} samples were skipped: see `python data.py check`", file=sys.stderr)
    return sound


def decays(name, p):
    """Table A1's weight decay is for matrices and filters: not for biases, norms, scalers and temperatures."""
    return p.ndim > 1 and not name.endswith(("temperature", "scales"))


def check_run(args, stages):
    """What can be told before anything is built, downloaded or written: raises DataError for a run that cannot be."""
    for stage in stages:
        newest = find_checkpoint(args.out, stage)
        if newest and not args.resume:
            raise DataError(f"--out {args.out} holds {newest.name}: go on with --resume, or give another --out")
        if newest and stage and (backbone := read_config(newest / "config.json")[0].backbone) != args.backbone:
            raise DataError(f"{newest} has the backbone {backbone}, not --backbone {args.backbone}")
    if stages[0] == 2:
        first = find_checkpoint(args.out, 1)
        if first is None:
            raise DataError(f"stage 2 needs stage 1, and --out {args.out} has no stage1-*: run --stage 1 first")
        if (first / "training.pt").exists():
            with unbroken(first):
                state = torch.load(first / "training.pt", map_location="cpu", weights_only=True, mmap=True)
                step, steps = int(state["step"]), int(json.loads(state["run"])["steps"])
            if step < steps:
                raise DataError(f"stage 1 in --out {args.out} stopped at step {step} of {steps}: "
                                "finish it with --stage 1 --resume")
    config = CONFIGS[args.backbone]
    check_image_size(config if args.image_size is None else replace(config, image_size=args.image_size))
    if args.clip not in (None, "pretrained", "random") and not Path(args.clip).is_file():
        raise DataError(f"--clip {args.clip}: no such file")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"--device {args.device}: {one_line(error)[:120]}") from error


def build_model(args, stage):
    """The model that a stage starts or goes on from: its own newest checkpoint, stage 1's (for stage 2) or CLIP."""
    asked = {k: v for k, v in (("image_size", args.image_size), ("modules", args.modules)) if v is not None}
    asked |= args.changes
    clip = {} if args.clip is None else {"clip": args.clip}
    source = find_checkpoint(args.out, stage) or (find_checkpoint(args.out, 1) if stage == 2 else None)
    if source is None:
        model = RISCLIP(replace(CONFIGS[args.backbone], precision=args.precision, **asked, **clip))
    else:
        model = RISCLIP.from_pretrained(source, precision=args.precision, **clip)
        for name, value in asked.items():
            if getattr(model.config, name) != value:
                raise DataError(f"--{name.replace('_', '-')}: {source} was trained with {getattr(model.config, name)}, "
                                f"not {value}")
    if args.recompute is not None:
        model.recompute = args.recompute
    if stage == 1:
        model.requires_grad_(True).clip.requires_grad_(model.config.fine_tuned)
    elif model.decoder is None:
        model.add_decoder()
    else:
        model.requires_grad_(False).decoder.requires_grad_(True)
    return model.to(args.device)


def run_stage(args, stage, dataset, prepare=None, loss_of=None):
    """Trains stage 1 or 2 into --out -> the model, and whether fit found it sound.

    For ablate.py: prepare(model) changes the model before it learns, loss_of takes the place of the stage's loss."""
    settings = stage_settings(args, stage)
    torch.manual_seed(args.seed)
    model = build_model(args, stage)
    if prepare:
        prepare(model)
    per_epoch = len(data.plan_epoch(dataset, 0, args.seed, settings["batch_size"], settings["per_image"]))
    steps = settings["steps"] or settings["epochs"] * per_epoch
    settings |= {"modules": list(model.config.modules), "image_size": model.config.image_size,
                 "refs": len(dataset.refs)}
    loss_of = loss_of or (locator_loss if stage == 1 else refiner_loss)
    sound = fit(stage, model, loss_of, lambda start: sample_batches(model, dataset, settings, args, start), steps,
                settings, args, model.save_pretrained)
    return model, sound


def stage_settings(args, stage):
    """SETTINGS of the backbone and stage (Table A1), with the flags that were given in their place."""
    settings = dict(SETTINGS[args.backbone, stage])
    if args.dataset == "combined":
        settings |= {"batch_size": {"B": 96, "L": 56}.get(args.backbone, settings["batch_size"])}  # Sec. A.1
    if args.epochs and (stage == 1 or args.stage == "2"):
        settings |= {"epochs": args.epochs, "steps": None}
    given = {k: getattr(args, k) for k in ("steps", "batch_size", "per_image", "lr")}
    return settings | {k: v for k, v in given.items() if v is not None} | {"precision": args.precision}


def report(args, model, train, val, held_out):
    """Evaluation on scenes never trained on, for the miniature, or the val split -> metrics.json, samples.png.

    The map is cut where it is best on val, but at 0.5 where val is what is measured.
    """
    results, models = {}, {"trained map": model}
    if args.backbone == "tiny":
        frozen = RISCLIP(replace(model.config, modules=(), decoder=False, clip="random")).to(args.device)
        frozen.clip = model.clip
        models = {"frozen CLIP's map": frozen, **models}
    known = warn_of_images_trained_on(train.images, held_out.images)
    for name, m in models.items():
        cut = ("patch_logits", 0.5) if val.split == held_out.split else best_map_readout(m, val)
        readouts = {f"{name}, upsampled": cut}
        if m.decoder is not None:
            readouts["decoder's mask"] = MASK
        measured = evaluate(m, held_out, workers=args.workers, readouts=tuple(readouts.values()))
        results |= {row: measured[readout] | {"threshold": readout[1], "images_trained_on": known}
                    for row, readout in readouts.items()}
    if processes.MAIN:
        write_text(args.out / "metrics.json", json.dumps(results, indent=1) + "\n")
        save_picture(samples(model, held_out), args.out / "samples.png")
    first = next(iter(results.values()))
    print(f"\n{args.dataset} {held_out.split}: {first['sentences']} sentences, {first['images']} images\n"
          f"{table(results)}\n")


def parse_args(argv=None):
    rows = "\n".join(f"  {b:5} {s}  " + ", ".join(f"{k} {v}" for k, v in settings.items() if v is not None)
                     for (b, s), settings in SETTINGS.items())
    parser = argparse.ArgumentParser(description=__doc__, epilog="defaults by backbone and stage:\n" + rows,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=tuple(CONFIGS), default="tiny")
    parser.add_argument("--stage", choices=("0", "1", "2", "all"), default="all", help="all: 1, then 2 (default)")
    parser.add_argument("--dataset", default="shapes",
                        help="shapes (default), refcoco, refcoco+, refcocog, combined (Table 2) or your own .json")
    parser.add_argument("--data-root", default="data", help="where the data sets lie (default: data)")
    parser.add_argument("--out", type=Path, help="checkpoints, logs and pictures (default: runs/BACKBONE)")
    parser.add_argument("--epochs", type=int, help="of stage 1; of stage 2 with --stage 2 alone (default there: 1)")
    parser.add_argument("--steps", type=int, help="optimizer steps of each stage, instead of --epochs")
    parser.add_argument("--batch-size", type=int, help="sentences an optimizer step, of each stage (default with "
                        "combined: 96 with B, 56 with L)")
    parser.add_argument("--per-image", type=int, help="up to so many sentences of an image share its lower layers, "
                        "decode and augmentation")
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="split a batch in N passes")
    parser.add_argument("--recompute", action=argparse.BooleanOptionalAction, help="stage 1: compute SKE's insides "
                        "again in backward, to the same result, rather than keep them (default with B and L)")
    parser.add_argument("--lr", type=float, help="of each stage")
    parser.add_argument("--image-size", type=int, help="pixels, a multiple of the patch (default: the backbone's)")
    parser.add_argument("--modules", help="those of stage 1 (default: adapter,cfe,ske); 'none' leaves frozen CLIP")
    parser.add_argument("--clip", help="CLIP's weights: pretrained (default), random or a file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="the locator's; the refiner's is fp32 (default: "
                        "bf16 with B and L, fp32 with tiny)")
    parser.add_argument("--workers", type=int, default=None, help="processes that read images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    parser.set_defaults(changes={})  # to the backbone's Config: for ablate.py
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs") / args.backbone
    if args.modules is not None:
        args.modules = tuple(m for m in args.modules.split(",") if m and m != "none")
        if unknown := set(args.modules) - {"adapter", "cfe", "ske"}:
            parser.error(f"--modules {','.join(sorted(unknown))}: know adapter, cfe, ske and none")
    if args.stage == "0" and (args.backbone != "tiny" or args.epochs or args.accumulate > 1):
        parser.error("--stage 0 makes the tiny CLIP: --backbone tiny, --steps instead of --epochs, no --accumulate")
    if args.recompute is not None and args.stage in "02":
        parser.error(f"--recompute and --no-recompute are stage 1's: leave them out of --stage {args.stage}")
    if args.stage == "0" and processes.WORLD > 1:
        parser.error("--stage 0 compares all of a batch with all of it: it runs in one process, without torchrun")
    if wrong := too_small(args, epochs=1, steps=1, batch_size=1, per_image=1, accumulate=1, workers=0, seed=0):
        parser.error(wrong)
    if args.seed >= 2**63:
        parser.error(f"--seed {args.seed}: give one below 2^63")
    if args.lr is not None and not 0 < args.lr < math.inf:
        parser.error(f"--lr {args.lr}: give a number above 0")
    args.precision = args.precision or CONFIGS[args.backbone].precision
    args.workers = (0 if args.backbone == "tiny" else 4) if args.workers is None else args.workers
    return args


def have_data(args):
    """Writes the shapes world if it is asked for and not there."""
    if args.dataset == "shapes":
        print(f"training on the generated shapes world in {args.data_root}/shapes; for RefCOCO give "
              "--dataset refcoco --data-root DATA")
        if processes.MAIN and not (Path(args.data_root) / "shapes" / "instances.json").exists():
            data.make_shapes(args.data_root, SHAPES_IMAGES, seed=0)
        processes.gather(None)


def main(args):
    stages = (1, 2) if args.stage == "all" else (int(args.stage),)
    processes.start(args.device)
    check_run(args, stages)
    processes.gather(None)  # nobody writes before all have looked
    check_folder(args.out, f"--out {args.out}")
    with alone(args.out) if processes.MAIN else nullcontext():
        return run_stages(args, stages)


def run_stages(args, stages):
    """The stages into --out, and what is reported of them -> exit code."""
    if stages == (0,):
        return pretrain(args, stage_settings(args, 0))
    have_data(args)
    splits = ["train", "val", "test" if args.dataset == "shapes" else "val"]
    splits = splits[:1] if args.dataset == "combined" else splits  # the union of Table 2 has no val split
    train, *evaluated = (data.RefCOCO(args.data_root, args.dataset, split) for split in splits)
    for i in range(len(evaluated[-1].images) if evaluated else 0):
        evaluated[-1].path(i)  # raises now what would end the evaluation, after all the training
    for line in doubts(train):
        print(f"warning: {args.dataset} {train.split}: {one_line(line)}", file=sys.stderr)
    all_sound, written = True, "checkpoints, log.jsonl, curve.png"
    for stage in stages:
        model, sound = run_stage(args, stage, train)
        all_sound &= sound
    if evaluated:
        report(args, model, train, *evaluated)
        written += ", metrics.json, samples.png"
    print(f"wrote {args.out}: {written}")
    return 0 if all_sound else 1


if __name__ == "__main__":
    sys.exit(run(main, parse_args()))
