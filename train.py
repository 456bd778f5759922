"""Trains RISCLIP in the paper's two stages (Sec. 3.5, A.1), and the miniature's CLIP before them (stage 0).

    python train.py                                             the miniature: both stages, evaluation, pictures
    python train.py --backbone B --stage 1 --dataset refcoco --data-root DATA --out runs/B
    python train.py --backbone B --stage 2 --dataset refcoco --data-root DATA --out runs/B
    python train.py --backbone tiny --stage 0 --out runs/tiny_clip      a CLIP like assets/tiny_clip.safetensors
    torchrun --nproc-per-node 8 train.py ...                            stages 1 and 2 on eight GPUs

Stage 1 aligns the patch-level map with the downsampled mask: Adapters, CFE and SKE learn. Stage 2 aligns the
pixel-level map with the mask: the decoder alone learns, all else is frozen.
"""

import argparse
import fcntl
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from safetensors.torch import save as to_bytes
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import kernels
import parallel
from data import DataError
from evaluate import (
    BLUE,
    MASK,
    axes,
    best_map_readout,
    evaluate,
    samples,
    save_picture,
    table,
    warn_of_images_trained_on,
)
from risclip import (
    CONFIGS,
    RISCLIP,
    TINY_CLIP,
    check_image_size,
    checkpoints,
    clip_state,
    find_checkpoint,
    image_layer,
    load_clip_state,
    read_config,
    read_safetensors,
    text_layer,
)
from shapes import Captioned

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


def contrastive_loss(clip, batch):
    """Stage 0: CLIP's contrastive loss between I scenes and C captions, where several may be true of each other.

    A scene is as similar to a caption as those of its patches that fit it best (in the manner of FILIP): with the class
    token alone, a map that locates anything takes more than an hour. The softmax over patches is a soft one, so that
    all patches of an object have to know it and not the best one alone. Then cross-entropy against the true pairs, over
    a caption's scenes and over a scene's captions (as UniCL does).
    """
    tokens, truth, corners = batch["tokens"], batch["truth"].float(), batch["corners"]  # (C, T), (I, C), (I, 2)
    visual, no_adapters, T = clip.visual, (torch.nn.Identity(), torch.nn.Identity()), tokens.size(1)
    clip.seen[tokens] = True

    v = visual.conv1(batch["images"])  # (I, D, h, w), perhaps the window of a scene that has its corner at top, left
    rows, columns = (corners[:, i, None] + torch.arange(v.size(2 + i), device=v.device) for i in range(2))
    places = (rows[:, :, None] * visual.grid_size[1] + columns[:, None]).flatten(1)
    v = v.flatten(2).transpose(1, 2) + F.embedding(places, visual.positional_embedding[1:])
    class_token = visual.class_embedding + visual.positional_embedding[0]
    v = visual.ln_pre(torch.cat([class_token.expand(len(v), 1, -1), v], dim=1))
    for i, block in enumerate(visual.transformer.resblocks):
        v = image_layer(block, v, no_adapters, value_path=i == len(visual.transformer.resblocks) - 1)
    t = clip.token_embedding(tokens) + clip.positional_embedding[:T]
    for block in clip.transformer.resblocks:
        t = text_layer(block, t, no_adapters)

    patches = F.normalize(visual.ln_post(v[:, 1:]) @ visual.proj, dim=-1)  # (I, h * w, d)
    eos = clip.ln_final(t[torch.arange(len(t)), tokens.argmax(1)])
    sentences = F.normalize(eos @ clip.text_projection, dim=-1)  # (C, d)
    similarity = clip.logit_scale.exp() * torch.einsum("ipd,cd->icp", patches, sentences)
    logits = (similarity * (0.3 * similarity).softmax(dim=-1)).sum(dim=-1)  # (I, C)
    by_image = F.cross_entropy(logits, truth / truth.sum(1, keepdim=True))
    return (by_image + F.cross_entropy(logits.T, (truth / truth.sum(0)).T)) / 2


# ---- Batches --------------------------------------------------------------------------------------------------------

def sample_batches(model, dataset, settings, args, start):
    """Batches of stages 1 and 2 from optimizer step `start` on, each in `args.accumulate` parts for every process. What
    step i holds follows from the seed alone, so that a resumed run sees what an unbroken one does, and any number of
    processes what one does."""
    parts = args.accumulate * parallel.WORLD

    def plan():
        epoch, step = 0, 0
        while True:
            for items in data.plan_epoch(dataset, epoch, args.seed, settings["batch_size"], settings["per_image"]):
                if step >= start:
                    yield from (items[k::parts] for k in range(parallel.RANK, parts, parallel.WORLD))
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


def captioned_batches(tokenizer, settings, args, start):
    """Batches of stage 0 from step `start` on: scenes, captions and which captions are true of which scenes."""
    captioned = Captioned(settings["steps"], settings["batch_size"], args.seed)
    loader = DataLoader(captioned, batch_size=None, sampler=range(start, settings["steps"]), num_workers=args.workers)
    for scenes, texts, truth, corners in loader:
        images, tokens = data.normalise(torch.as_tensor(scenes).permute(0, 3, 1, 2)), tokenizer(texts)
        yield {"images": images, "tokens": tokens[:, : int((tokens > 0).sum(1).max())], "lost": 0,
               "truth": torch.as_tensor(truth), "corners": torch.as_tensor(corners),
               "texts": texts[:len(scenes)]}  # the loop counts samples by them


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
          tqdm(total=steps, initial=step, desc=f"stage {stage}", disable=not parallel.MAIN) as bar):
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
            own, shares = count, parallel.gather((total, count, lost, sent_ids, max(asked, default=0)))
            total, count, lost = (sum(share[i] for share in shares) for i in range(3))
            seen, skipped, stopped = seen + count, skipped + lost, max(share[4] for share in shares)
            if parallel.WORLD > 1 and count:
                for p in trained.values():  # None where all of a process's images are broken
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                for b in running:
                    b *= own / count
                parallel.add_up([*(p.grad for p in trained.values()), *running])
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
            if parallel.MAIN and (step % settings["save_every"] == 0 or step == steps or stopped):
                save_checkpoint(args.out, stage, step, save, optimizer, net, run, seen, skipped)
    parallel.gather(None)  # what follows reads the checkpoint
    if stopped:
        if parallel.MAIN:
            print(f"stopped at step {step} of {steps}; go on with --resume", file=sys.stderr)
        raise SystemExit(128 + stopped)
    if step and not seen:
        raise DataError(f"none of {args.dataset}'s samples could be read: see `python data.py check`")
    if parallel.MAIN:
        draw_curve(args.out)
    if skipped and parallel.MAIN:
        print(f"{skipped} samples were skipped: image or mask missing or broken", file=sys.stderr)
    sound = skipped <= 0.01 * (seen + skipped)
    if not sound and parallel.MAIN:
        print(f"more than 1 % of {seen + skipped} samples were skipped: see `python data.py check`", file=sys.stderr)
    return sound


def decays(name, p):
    """Table A1's weight decay is for matrices and filters: not for biases, norms, scalers and temperatures."""
    return p.ndim > 1 and not name.endswith(("temperature", "scales"))


@contextmanager
def stop_signals():
    """SIGTERM and Ctrl-C are noted in the list that this gives, and otherwise wait for the step to end."""
    asked = []
    before = {s: signal.signal(s, lambda number, _: asked.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def memory_gib(device):
    """The most memory taken so far: the GPU's, or this process's resident memory."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


# ---- Checkpoints ----------------------------------------------------------------------------------------------------

def save_checkpoint(out, stage, step, save, optimizer, net, run, seen, skipped):
    """Writes --out/stageN-STEP aside, syncs it and renames it; only then goes the previous one of this stage.

    Raises DataError if the disk is full; the previous one then stays."""
    final = out / f"stage{stage}-{step:06d}"
    aside = out / f".stage{stage}.partial"  # one name, so that what a killed run leaves is taken away by the next
    shutil.rmtree(aside, ignore_errors=True)
    state = {"step": step, "seen": seen, "skipped": skipped, "run": json.dumps(run),
             "optimizer": optimizer.state_dict(), "torch_rng": torch.get_rng_state()}
    if stage == 0:
        state["net"] = net.state_dict()  # the weight file itself is in half precision
    try:
        save(aside)
        torch.save(state, aside / "training.pt")
        for path in (*aside.iterdir(), aside):
            data.sync(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # of ours, torch's and safetensors' writers
        shutil.rmtree(aside, ignore_errors=True)
        raise DataError(f"{final} cannot be written ({data.one_line(error)[:160]}): the checkpoint before it is whole; "
                        "make room and go on with --resume") from error
    previous = [p for p in checkpoints(out, stage) if p != final]
    if final.exists():
        shutil.rmtree(final)
    aside.rename(final)
    data.sync(out)
    for path in previous:
        shutil.rmtree(path)


@contextmanager
def unbroken(checkpoint):
    """Raises DataError for whatever a training.pt that is not what save_checkpoint wrote makes fail inside."""
    try:
        yield
    except Exception as error:  # it fails in many ways; weights_only lets none of them run
        raise DataError(f"{checkpoint / 'training.pt'} is broken ({type(error).__name__}); remove {checkpoint} to "
                        "start anew") from error


def load_training_state(checkpoint, optimizer, net, run):
    """-> step, sentences seen and images skipped so far. Raises DataError if the run was started differently."""
    with unbroken(checkpoint):
        state = torch.load(checkpoint / "training.pt", map_location="cpu", weights_only=True)
        before, counts = json.loads(state["run"]), [int(state[k]) for k in ("step", "seen", "skipped")]
    changed = [f"{k} was {before.get(k)}, now {run.get(k)}" for k in run if before.get(k) != run.get(k)]
    if changed:
        raise DataError(f"--resume: {checkpoint} was trained otherwise: {'; '.join(changed)}")
    with unbroken(checkpoint):
        own = {"param_groups": optimizer.state_dict()["param_groups"]}  # settings come from the flags, not from a file
        optimizer.load_state_dict(state["optimizer"] | own)
        for p, moments in optimizer.state.items():  # load_state_dict takes any, and step() would fail
            if {k: v.shape for k, v in moments.items()} != {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}:
                raise ValueError
        torch.set_rng_state(state["torch_rng"])
        if "net" in state:
            net.load_state_dict(state["net"])
    return counts


# ---- A run ----------------------------------------------------------------------------------------------------------

def pretrain(args, settings):
    """Stage 0: a tiny CLIP, trained on statements about shapes -> --out/stage0-STEP/clip.safetensors.

    With --clip PATH it starts from those weights.
    """
    torch.manual_seed(args.seed)
    clip = CLIP(**TINY_CLIP, init_logit_scale=math.log(10))
    clip.visual.positional_embedding.data[1:] = sine_positions(*clip.visual.grid_size, clip.visual.conv1.out_channels)
    # 50 random words in 128 dimensions are all but orthogonal: they stay as they are. But they have to be as large as
    # what a layer adds to them, or the first CFE, before the first text layer, would drown them in the image.
    clip.token_embedding.requires_grad_(False).weight.data.mul_(50)
    clip.positional_embedding.data.mul_(20)
    if args.clip:
        load_clip_state(clip, read_safetensors(args.clip))
    clip.register_buffer("seen", clip.token_embedding.weight.any(dim=1) if args.clip else
                         torch.zeros(clip.vocab_size, dtype=torch.bool))  # words, in use
    clip.to(args.device)
    tokenizer = open_clip.SimpleTokenizer(context_length=clip.context_length)

    def save(directory):
        directory.mkdir()
        (directory / "clip.safetensors").write_bytes(to_bytes(clip_state(clip)))
    fit(0, clip, contrastive_loss, lambda start: captioned_batches(tokenizer, settings, args, start),
        settings["steps"], settings, args, save)
    print(f"wrote {find_checkpoint(args.out, 0) / 'clip.safetensors'}; train on it with --clip")


def sine_positions(height, width, channels):
    """Sines and cosines of x and y, (height * width, channels): neighbours start out alike, and the tiny CLIP learns
    in minutes what random positions would keep it from for long."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    frequency = 100 ** (-torch.arange(channels // 4) / (channels // 4))
    return torch.cat([f(p.reshape(-1, 1) * frequency) for p in (x, y) for f in (torch.sin, torch.cos)], dim=1)


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
        raise DataError(f"--device {args.device}: {data.one_line(error)[:120]}") from error


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
    if parallel.MAIN:
        data.write_text(args.out / "metrics.json", json.dumps(results, indent=1) + "\n")
        save_picture(samples(model, held_out), args.out / "samples.png")
    first = next(iter(results.values()))
    print(f"\n{args.dataset} {held_out.split}: {first['sentences']} sentences, {first['images']} images\n"
          f"{table(results)}\n")


def open_log(out, stage, step):
    """--out/log.jsonl to write on, without what a killed run wrote of the stage after `step`, its last checkpoint."""
    if not parallel.MAIN:
        return open(os.devnull, "a")
    path, kept = out / "log.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
            if entry["stage"] != stage or entry["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, TypeError, KeyError, RecursionError):
            continue  # cut short, or not ours
    data.write_text(path, "".join(kept))
    return open(path, "a")


def draw_curve(out, width=720, height=300):
    """--out/curve.png: the loss of each stage against its steps, from log.jsonl."""
    lines = [json.loads(line) for line in open(out / "log.jsonl")]
    stages = sorted({line["stage"] for line in lines})
    sheet = Image.new("RGB", (width * len(stages), height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, stage in enumerate(stages):
        points = [(line["step"], line["loss"]) for line in lines
                  if line["stage"] == stage and "skipped_step" not in line]
        place = axes(draw, (column * width, 0, width, height), f"stage {stage}: loss against step",
                     last=max(x for x, _ in points), top=1.05 * max(y for _, y in points), number=".2f")
        draw.line([place(x, y) for x, y in points], fill=BLUE, width=2)
    save_picture(sheet, out / "curve.png")


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
    if args.stage == "0" and parallel.WORLD > 1:
        parser.error("--stage 0 compares all of a batch with all of it: it runs in one process, without torchrun")
    if wrong := data.too_small(args, epochs=1, steps=1, batch_size=1, per_image=1, accumulate=1, workers=0, seed=0):
        parser.error(wrong)
    if args.seed >= 2**63:
        parser.error(f"--seed {args.seed}: give one below 2^63")
    if args.lr is not None and not 0 < args.lr < math.inf:
        parser.error(f"--lr {args.lr}: give a number above 0")
    args.precision = args.precision or CONFIGS[args.backbone].precision
    args.workers = (0 if args.backbone == "tiny" else 4) if args.workers is None else args.workers
    return args


@contextmanager
def alone(out):
    """Keeps a second run out of --out. The kernel drops the lock when the process ends, however it ends, and the
    processes that read images do not inherit it. Raises DataError if another run has it."""
    with open(out / ".lock", "a") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"--out {out}: another run is writing there: wait for it, or give another --out") from error
        yield


def have_data(args):
    """Writes the shapes world if it is asked for and not there."""
    if args.dataset == "shapes":
        print(f"training on the generated shapes world in {args.data_root}/shapes; for RefCOCO give "
              "--dataset refcoco --data-root DATA")
        if parallel.MAIN and not (Path(args.data_root) / "shapes" / "instances.json").exists():
            data.make_shapes(args.data_root, SHAPES_IMAGES, seed=0)
        parallel.gather(None)


def main(args):
    stages = (1, 2) if args.stage == "all" else (int(args.stage),)
    parallel.start(args.device)
    check_run(args, stages)
    parallel.gather(None)  # nobody writes before all have looked
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        data.check_writable(args.out)
    except OSError as error:
        raise DataError(f"--out {args.out} cannot be written ({error.strerror}): give another folder") from error
    with alone(args.out) if parallel.MAIN else nullcontext():
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
    for line in data.doubts(train):
        print(f"warning: {args.dataset} {train.split}: {data.one_line(line)}", file=sys.stderr)
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
    sys.exit(data.run(main, parse_args()))
