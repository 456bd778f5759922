"""What the model costs: FLOPs by part, their rate, the bytes kept for backward, and a plot of them.

    python -m experiments.bench_model --backbone B [--precision bf16] [--only stage1] [--json F]
    python -m experiments.bench_model --backbone B --plot cost.png [--json F]

How FLOPs are counted: as operators are dispatched (bench_kernels.operator_flops). So a layer of
width D takes 24 n D^2 + 4 n^2 D for its n tokens, an Adapter of bottleneck H 4 n D H. The share is
these FLOPs per second over those of a product of two square matrices in the same dtype, measured
between the model's runs. A step is a forward and a backward pass, without the optimizer.

How the bytes kept for backward are counted: the memory of every tensor that autograd saves, each
once, weights not counted. 'MB kept' is what two images with a sentence each keep less what one
keeps: copies of weights in bf16, which a step makes once, belong to no sample.

--plot takes the time of inference and the bytes that stage 1 keeps at several image sizes, numbers
of sentences per image and batch sizes. It draws them over what FLOPs predict: one rate and one
number of bytes per FLOP, the medians of all points.
"""

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial

import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import risclip
from experiments.bench_kernels import operator_flops
from support.files import DataError, check_writable, one_line, run, too_small, write_text
from support.inference import computes_bf16, outputs, store_frozen_matrices
from support.pictures import BLUE, PINK, axes, save_picture
from support.tables import table
from train import locator_loss, refiner_loss

SIZES = {"tiny": (48, 80, 120, 160, 192),  # of --plot
         "B": (240, 336, 448, 544, 640), "L": (252, 350, 448, 532, 630)}
SENTENCES, IMAGES = (1, 2, 4, 8, 16), (1, 2, 4, 8)  # of --plot


# ---- counting ----------------------------------------------------------------------------------

class Flops(TorchDispatchMode):
    """Counts the FLOPs of every torch operator, in `parts`, under the part of the model that it
    belongs to. `attention` has those of a forward pass's scores and weighted sums once more."""

    def __init__(self, model):
        super().__init__()
        self.parts, self.attention = Counter(), 0
        self.part, self.attends, self.hooks = "image tower", False, []
        marked = {risclip.Adapter: "Adapters", risclip.CFE: "CFE", risclip.SKE: "SKE",
                  risclip.Decoder: "decoder"}
        for module in model.modules():
            if part := marked.get(type(module)):
                self.watch(module, part)
        for part, blocks in ("image tower", model.image_blocks), ("text tower", model.text_blocks):
            for block in blocks:
                self.watch(block.ln_1, part)
                self.watch(block.ln_2, part)  # after an Adapter

    def watch(self, module, part):
        """What is dispatched from the module on counts for the part."""
        hook = module.register_forward_pre_hook(lambda *_: setattr(self, "part", part))
        self.hooks.append(hook)

    def __enter__(self):
        self.attend = risclip.attend
        risclip.attend = self.marked_attend
        return super().__enter__()

    def __exit__(self, *error):
        risclip.attend = self.attend
        for hook in self.hooks:
            hook.remove()
        return super().__exit__(*error)

    def marked_attend(self, *args, **kwargs):
        self.attends = True
        out = self.attend(*args, **kwargs)
        self.attends = False
        return out

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = op(*args, **kwargs)
        count = operator_flops(op, args, kwargs, out)
        # What checkpointing computes again is part of the backward pass.
        backward = torch._C._current_graph_task_id() >= 0
        if count:
            self.parts["backward" if backward else self.part] += count
        if self.attends and not backward:
            self.attention += count
        return out


def count_flops(model, images, tokens):
    """FLOPs of a forward pass. images (I, 3, S, S), tokens (B, T)."""
    with torch.no_grad(), Flops(model) as flops:
        model(images, tokens)
    return sum(flops.parts.values())


def kept_bytes(model, forward):
    """Bytes that a forward pass keeps for backward, each memory once, weights not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}  # address -> tensor; detached, or one that its own node holds would never be freed

    def pack(tensor):
        return kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    del loss
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)


def kept_by_a_sample(model, forward, one, two):
    """Bytes that a forward pass of a batch of two keeps more than that of a batch of one."""
    return (kept_bytes(model, partial(forward, two))
            - kept_bytes(model, partial(forward, one)))


def seconds(function):
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(functions, runs):
    """Median seconds of each function. They are called in turn, so that whatever else the machine
    does slows all of them."""
    times = [[seconds(f) for f in functions] for _ in range(runs)]
    return [statistics.median(of_one) for of_one in zip(*times)]


# ---- what is measured --------------------------------------------------------------------------

def check_flags(args):
    """-> the precisions to measure. Raises DataError for a device that cannot be used."""
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"--device {args.device}: {one_line(error)[:120]}") from error
    if computes_bf16(args.device):
        return [args.precision] if args.precision else ["fp32", "bf16"]
    if args.precision == "bf16":
        raise DataError(f"--precision bf16: {args.device} has no instructions for it")
    return ["fp32"]


def build(args, precision, image_size):
    """The model as stage 1 starts, but with random weights. image_size None: the backbone's."""
    config = replace(risclip.CONFIGS[args.backbone], clip="random", precision=precision)
    if image_size is not None:
        config = replace(config, image_size=image_size)
    model = risclip.RISCLIP(config).to(args.device)
    if args.recompute is not None:
        model.recompute = args.recompute
    store_frozen_matrices(model)
    return model


def made_up(model, images, sentences=1):
    """A batch of noise: so many images, so many sentences about each."""
    S, device = model.config.image_size, model.map_threshold.device
    index = torch.arange(images, device=device).repeat_interleave(sentences)
    texts = ["the second giraffe from the left looking up"] * len(index)
    return {"images": torch.randn(images, 3, S, S, device=device), "texts": texts,
            "image_index": index, "tokens": model.tokenize(texts).to(device),
            "masks": torch.rand(len(index), S, S, device=device) > 0.5}


def infer(model, batch):
    """One image and its sentences as evaluate.py and predict.py do it, several images as a batch.
    """
    with torch.no_grad():
        if len(batch["images"]) > 1:
            return model(batch["images"], batch["tokens"], batch["image_index"])
        return [*outputs(model, batch["images"], batch["texts"])]


def stage_2_apart(model):
    """What a step of stage 2 cannot do without, as two functions: the locator's forward pass,
    without gradients, and the decoder's own forward and backward pass.

    Raises SystemExit if a step's gradient graph reaches below the decoder.
    """
    decoder, inputs, batch = model.train().decoder, [], made_up(model, 1)
    hook = decoder.register_forward_pre_hook(lambda _, given: inputs.extend(given))
    output = model(batch["images"], batch["tokens"], batch["image_index"])
    hook.remove()
    leaves = tree_leaves([output["patch_logits"], inputs])
    if any(t.requires_grad for t in leaves if torch.is_tensor(t)):
        raise SystemExit("stage 2 has a gradient graph below the decoder: what the locator hands "
                         "on requires gradients")

    def locate():
        model.decoder = None
        infer(model, batch)
        model.decoder = decoder

    def decode():
        refiner_loss(lambda *_: {"mask_logits": decoder(*inputs)}, batch).backward()

    return locate, decode


def measure_work(args, model, sentences, loss_of, apart=()):
    """A made-up image with so many sentences, inferred (loss_of None) or trained on.

    -> FLOPs by part; bytes that a sample keeps for backward or None; median seconds of a pass, of
    each function in `apart` and of a product of square matrices; FLOPs of that product.
    """
    model.train(loss_of is not None)
    forward, one, two = (partial(loss_of or infer, model), made_up(model, 1, sentences),
                         made_up(model, 2))

    def step():
        output = forward(one)
        if loss_of:
            output.backward()

    with Flops(model) as flops:
        step()
    kept = kept_by_a_sample(model, forward, one, two) if loss_of else None
    dtype, size = torch.bfloat16 if model.config.precision == "bf16" else torch.float32, 2048
    product = partial(torch.mm, *torch.randn(2, size, size, device=args.device, dtype=dtype))
    times = medians([step, *apart, product], args.runs)
    return flops.parts, kept, times, 2 * size**3


def measure_model(args):
    """Inference of one sentence and of several of an image, a sample of stage 1 and of stage 2.
    Returns what --json holds."""
    one = "inference, 1 sentence"
    many = f"inference, {args.sentences} sentences of an image"
    works = {one: ("inference", 1, None), many: ("inference", args.sentences, None),
             "stage 1, a sample": ("stage1", 1, locator_loss),
             "stage 2, a sample": ("stage2", 1, refiner_loss)}
    parts = ("image tower", "text tower", "Adapters", "CFE", "SKE", "decoder", "backward")
    rows, ratios, rates = [], [], {}
    for precision in check_flags(args):
        model = build(args, precision, args.image_size)  # anew: a precision may change weights
        for name, (kind, sentences, loss_of) in works.items():
            if args.only not in (None, kind):
                continue
            apart = ()
            if kind == "stage2":
                model.add_decoder()
                apart = stage_2_apart(model)
            counted, kept, times, work = measure_work(args, model, sentences, loss_of, apart)
            took, *own, product = times
            total, rates[name, precision] = sum(counted.values()), sentences / took
            rate, peak = total / took / 1e9, work / product / 1e9
            rows.append({
                "": name, "precision": precision, "s": f"{took:.3g}", "GFLOP": f"{total / 1e9:.1f}",
                "GFLOP/s": f"{rate:.1f}", "product's": f"{peak:.1f}", "share": f"{rate / peak:.2f}",
                "sentences/s": f"{sentences / took:.3g}",
                "MB kept": "-" if kept is None else f"{kept / 1e6:.0f}",
                **{part: f"{counted[part] / total:.0%}" for part in parts}})
            ratios.append((f"{precision}, {name}: GFLOP/s, over the product's", rate, peak))
            if own:
                ratios.append((f"{precision}, stage 2: seconds of a step, over those of the "
                               "locator's forward pass and of the decoder's own forward and "
                               "backward", took, *own))
        if (many, precision) in rates:
            ratios.append((f"{precision}: sentences/s, {args.sentences} of an image over 1",
                           rates[many, precision], rates[one, precision]))
    steps = [rates["stage 1, a sample", p] for p in ("bf16", "fp32")
             if ("stage 1, a sample", p) in rates]
    if len(steps) == 2:
        ratios.append(("stage 1: samples/s, bf16 over fp32", *steps))
    print(f"{args.backbone} at {model.config.image_size} pixels on {args.device}, threads: "
          f"{torch.get_num_threads()}, medians of {args.runs} runs, each part's share of the "
          f"FLOPs:\n\n{table(rows)}\n")
    for what, above, *below in ratios:
        divisor = " + ".join(f"{b:.3g}" for b in below)
        print(f"{what}: {above:.3g} / {divisor} = {above / sum(below):.2f}")
    ratios = {what: above / sum(below) for what, above, *below in ratios}
    return dict(rows=rows, ratios=ratios, backbone=args.backbone,
                image_size=model.config.image_size, threads=torch.get_num_threads(),
                runs=args.runs)


# ---- cost against work -------------------------------------------------------------------------

AXES = {"image_size": "image size in pixels", "sentences": "sentences of an image",
        "images": "images of a batch"}


def measure_points(args, precision):
    """What inference and stage 1 cost at every image size, then with more sentences and with more
    images of the smallest."""
    points = []
    for size in SIZES[args.backbone]:
        model, work = build(args, precision, size), [(1, 1)]
        if not points:
            work += [*((1, n) for n in SENTENCES[1:]), *((n, 1) for n in IMAGES[1:])]
        for images, sentences in work:
            batch = made_up(model.eval(), images, sentences)
            with Flops(model) as flops:
                infer(model, batch)
            times = medians([partial(infer, model, batch)], args.runs)
            points.append({
                "image_size": size, "sentences": sentences, "images": images,
                "flops": sum(flops.parts.values()), "attention": flops.attention,
                "seconds": times[0],
                "kept": kept_bytes(model.train(), partial(locator_loss, model, batch))})
    return points


def along(points, axis):
    """The points that differ from the first in nothing but the axis."""
    return [p for p in points if all(p[k] == points[0][k] for k in AXES.keys() - {axis})]


def growth_rows(points, copies):
    """A row per axis: what grows how many times from its first to its last point.

    copies: bytes kept whatever the batch. FLOPs outgrow the patches by as much as attention does,
    and sentences of one image share its layers below the first CFE.
    """
    for axis, name in AXES.items():
        a, b = along(points, axis)[0], along(points, axis)[-1]
        yield {"": name, "from": a[axis], "to": b[axis],
               "patches": f"{(b['image_size'] / a['image_size'])**2:.2f} x",
               "FLOPs": f"{b['flops'] / a['flops']:.2f} x",
               "attention's": " -> ".join(f"{p['attention'] / p['flops']:.0%}" for p in (a, b)),
               "seconds": f"{b['seconds'] / a['seconds']:.2f} x",
               "bytes kept": f"{(b['kept'] - copies) / (a['kept'] - copies):.2f} x"}


def draw_cost(out, points, rate, kept_per_flop, copies, title, width=560, height=300):
    """Seconds of inference (above) and bytes kept by stage 1 (below) along each axis. Dots are
    measured, the line is what FLOPs predict."""
    sheet = Image.new("RGB", (3 * width, 30 + 2 * height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((60, 8), title, fill="black", font=ImageFont.load_default(15))
    for column, (axis, name) in enumerate(AXES.items()):
        chosen = along(points, axis)
        time_and_memory = (
            ("inference, seconds", [p["seconds"] for p in chosen],
             [p["flops"] / rate for p in chosen]),
            ("stage 1 keeps for backward, GB", [p["kept"] / 1e9 for p in chosen],
             [(p["flops"] * kept_per_flop + copies) / 1e9 for p in chosen]))
        for row, (what, measured, predicted) in enumerate(time_and_memory):
            box = column * width, 30 + row * height, width, height
            place = axes(draw, box, f"{what}, against {name}", last=chosen[-1][axis],
                         top=1.05 * max(measured + predicted), number=".3g")
            draw.line([place(p[axis], y) for p, y in zip(chosen, predicted)], fill=BLUE, width=2)
            for p, y in zip(chosen, measured):
                x, y = place(p[axis], y)
                draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=PINK)
    save_picture(sheet, out)


def plot_cost(args):
    """Time and memory against image size, sentences of an image and images of a batch. Returns
    what --json holds."""
    precision = check_flags(args)[-1]
    check_writable(args.plot, picture=True)
    points = measure_points(args, precision)
    one, two = along(points, "images")[:2]
    copies = 2 * one["kept"] - two["kept"]
    rate = statistics.median(p["flops"] / p["seconds"] for p in points)
    kept_per_flop = statistics.median((p["kept"] - copies) / p["flops"] for p in points)
    title = (f"{args.backbone} in {precision} on {args.device}, "
             f"threads: {torch.get_num_threads()}. Dots: measured, medians of {args.runs} runs. "
             f"Line: FLOPs, at {rate / 1e9:.3g} GFLOP/s and {1e3 * kept_per_flop:.3g} MB kept "
             f"per GFLOP, {copies / 1e6:.0f} MB once per step")
    draw_cost(args.plot, points, rate, kept_per_flop, copies, title)
    print(f"{title}\n\n{table([*growth_rows(points, copies)])}\n\nwrote {args.plot}")
    return dict(points=points, rate=rate, kept_per_flop=kept_per_flop, kept_once=copies,
                precision=precision, backbone=args.backbone, threads=torch.get_num_threads(),
                runs=args.runs)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backbone", choices=tuple(risclip.CONFIGS), default="tiny")
    parser.add_argument("--precision", choices=("fp32", "bf16"),
                        help="default: fp32, and bf16 where there are instructions for it; --plot "
                             "takes the latter alone")
    parser.add_argument("--image-size", type=int, help="pixels (default: the backbone's)")
    parser.add_argument("--sentences", type=int, default=7, help="of one image (default: 7)")
    parser.add_argument("--only", choices=("inference", "stage1", "stage2"),
                        help="measure this alone")
    parser.add_argument("--runs", type=int, default=3, help="default: 3")
    parser.add_argument("--recompute", action=argparse.BooleanOptionalAction, help="as train.py's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plot", metavar="F", help="instead, plot time and memory against image "
                        "size, sentences and batch to this file")
    parser.add_argument("--json", metavar="F", help="also write the figures to this file")
    return parser.parse_args(argv)


def main(args):
    if wrong := too_small(args, runs=1, sentences=1, image_size=1):
        raise DataError(wrong)
    if args.json:
        check_writable(args.json)
    result = plot_cost(args) if args.plot else measure_model(args)
    if args.json:
        write_text(args.json, json.dumps(result, indent=1, default=str))
        print(f"\nwrote {args.json}")


if __name__ == "__main__":
    sys.exit(run(main, parse_args()))
