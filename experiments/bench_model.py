import statistics
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import risclip
from kernels import attention, backend
from support.files import DataError, check_writable, one_line
from support.pictures import BLUE, PINK, axes, save_picture
from train import locator_loss, refiner_loss

SIZES = {"tiny": (48, 80, 120, 160, 192), "B": (240, 336, 448, 544, 640), "L": (252, 350, 448, 532, 630)}  # of `cost`
SENTENCES, IMAGES = (1, 2, 4, 8, 16), (1, 2, 4, 8)  # of `cost`


# ---- the model ------------------------------------------------------------------------------------------------------

class Flops(TorchDispatchMode):
    """Counts the FLOPs of every torch operator under the part of the model that it is dispatched in, and those of a
    forward pass's attention, scores and sums alone, once more in `attention`."""

    def __init__(self, model):
        super().__init__()
        self.parts, self.attention, self.part, self.hooks, self.attends = Counter(), 0, "image tower", [], False
        marked = {risclip.Adapter: "Adapters", risclip.CFE: "CFE", risclip.SKE: "SKE", risclip.Decoder: "decoder"}
        for module in model.modules():
            if part := marked.get(type(module)):
                self.watch(module, part)
        for part, tower in ("image tower", model.visual), ("text tower", model.clip):
            for block in tower.transformer.resblocks:
                self.watch(block.ln_1, part)
                self.watch(block.ln_2, part)  # after an Adapter

    def watch(self, module, part):
        """What is dispatched from the module on counts for the part."""
        self.hooks.append(module.register_forward_pre_hook(lambda *_: setattr(self, "part", part)))

    def __enter__(self):
        def attend(*args, function=attention.attend, **kwargs):
            self.attends = True
            out = function(*args, **kwargs)
            self.attends = False
            return out

        self.patches = [mock.patch.object(risclip, "attend", attend),
                        mock.patch.object(backend, "BACKEND", "torch")]  # a fused kernel dispatches no products
        for patch in self.patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        for patch in self.patches:
            patch.stop()
        for hook in self.hooks:
            hook.remove()
        return super().__exit__(*error)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        from torch.utils.flop_counter import (
            flop_registry,
            sdpa_backward_flop_count,
            sdpa_flop_count,
        )

        out, name = op(*args, **(kwargs or {})), op.overloadpacket.__name__
        if name == "_scaled_dot_product_flash_attention_for_cpu":
            count = sdpa_flop_count(*(t.shape for t in args[:3]))
        elif name == "_scaled_dot_product_flash_attention_for_cpu_backward":
            count = sdpa_backward_flop_count(*(t.shape for t in args[:4]))
        else:
            formula = flop_registry.get(op.overloadpacket)
            count = formula(*args, **(kwargs or {}), out_val=out) if formula else 0
        backward = torch._C._current_graph_task_id() >= 0  # what checkpointing computes again is part of it
        if count:
            self.parts["backward" if backward else self.part] += count
        self.attention += count * (self.attends and not backward)
        return out


def kept_bytes(model, forward):
    """Bytes that a forward pass keeps for backward, each memory once, weights not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}  # address -> tensor; detached, since one that its own gradient's node holds would never be freed

    def pack(tensor):
        return kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    del loss
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)


def kept_by_a_sample(model, forward, one, two):
    """Bytes that a forward pass of a batch of two keeps more than that of a batch of one."""
    return kept_bytes(model, partial(forward, two)) - kept_bytes(model, partial(forward, one))


def seconds(function):
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(functions, runs):
    """Median seconds of each function, called in turn, so that whatever else the machine does slows all of them."""
    return [statistics.median(times) for times in zip(*[[seconds(f) for f in functions] for _ in range(runs)])]


def check_flags(args):
    """-> the precisions to measure. Raises DataError for a device that cannot be."""
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"--device {args.device}: {one_line(error)[:120]}") from error
    if risclip.computes_bf16(args.device):
        return [args.precision] if args.precision else ["fp32", "bf16"]
    if args.precision == "bf16":
        raise DataError(f"--precision bf16: {args.device} has no instructions for it")
    return ["fp32"]


def build(args, precision, image_size):
    """The model as stage 1 starts, but with random weights. image_size None: the backbone's."""
    config = replace(risclip.CONFIGS[args.backbone], clip="random", precision=precision)
    config = config if image_size is None else replace(config, image_size=image_size)
    model = risclip.RISCLIP(config).to(args.device)
    if args.recompute is not None:
        model.recompute = args.recompute
    return model


def made_up(model, images, sentences=1):
    """A batch of noise: so many images, so many sentences about each."""
    S, device = model.config.image_size, model.map_threshold.device
    index = torch.arange(images, device=device).repeat_interleave(sentences)
    texts = ["the second giraffe from the left looking up"] * len(index)
    return {"images": torch.randn(images, 3, S, S, device=device), "texts": texts, "image_index": index,
            "tokens": model.tokenize(texts).to(device), "masks": torch.rand(len(index), S, S, device=device) > 0.5}


def infer(model, batch):
    """One image and its sentences as evaluate.py and predict.py do it, several images as a batch."""
    with torch.no_grad():
        if len(batch["images"]) > 1:
            return model(batch["images"], batch["tokens"], batch["image_index"])
        return [*model.outputs(batch["images"], batch["texts"])]


def stage_2_apart(model):
    """What a step of stage 2 cannot do without, as two functions: the locator's forward pass, without gradients; the
    decoder's own forward and backward. Raises SystemExit if a step's gradient graph reaches below the decoder."""
    decoder, inputs, batch = model.train().decoder, [], made_up(model, 1)
    hook = decoder.register_forward_pre_hook(lambda _, given: inputs.extend(given))
    output = model(batch["images"], batch["tokens"], batch["image_index"])
    hook.remove()
    if any(t.requires_grad for t in tree_leaves([output["patch_logits"], inputs]) if torch.is_tensor(t)):
        raise SystemExit("stage 2 has a gradient graph below the decoder: what the locator hands on requires gradients")

    def locate():
        model.decoder = None
        infer(model, batch)
        model.decoder = decoder

    def decode():
        refiner_loss(lambda *_: {"mask_logits": decoder(*inputs)}, batch).backward()

    return locate, decode


def measure_work(args, model, sentences, loss_of, apart=()):
    """A made-up image with so many sentences, inferred (loss_of None) or trained on -> FLOPs by part; bytes that a
    sample keeps for backward or None; median seconds of a pass, of each function in `apart` and of a product of square
    matrices; FLOPs of that product."""
    model.train(loss_of is not None)
    forward, one, two = partial(loss_of or infer, model), made_up(model, 1, sentences), made_up(model, 2)

    def step():
        output = forward(one)
        if loss_of:
            output.backward()

    with Flops(model) as flops:
        step()
    dtype, size = torch.bfloat16 if model.config.precision == "bf16" else torch.float32, 2048
    product = partial(torch.mm, *torch.randn(2, size, size, device=args.device, dtype=dtype))
    times = medians([step, *apart, product], args.runs)
    return flops.parts, kept_by_a_sample(model, forward, one, two) if loss_of else None, times, 2 * size**3


def model_command(args):
    """Inference of one sentence and of several of an image, a sample of stage 1 and of stage 2. Returns what --json
    holds."""
    one, many = "inference, 1 sentence", f"inference, {args.sentences} sentences of an image"
    works = {one: ("inference", 1, None), many: ("inference", args.sentences, None),
             "stage 1, a sample": ("stage1", 1, locator_loss), "stage 2, a sample": ("stage2", 1, refiner_loss)}
    parts = ("image tower", "text tower", "Adapters", "CFE", "SKE", "decoder", "backward")
    precisions, rows, ratios, rates = check_flags(args), [], [], {}
    for precision in precisions:
        model = build(args, precision, args.image_size)  # anew: a precision may change the weights that it works with
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
            share = total / took / 1e9, work / product / 1e9
            rows.append({"": name, "precision": precision, "s": f"{took:.3g}", "GFLOP": f"{total / 1e9:.1f}",
                         "GFLOP/s": f"{share[0]:.1f}", "product's": f"{share[1]:.1f}",
                         "share": f"{share[0] / share[1]:.2f}", "sentences/s": f"{sentences / took:.3g}",
                         "MB kept": "-" if kept is None else f"{kept / 1e6:.0f}",
                         **{part: f"{counted[part] / total:.0%}" for part in parts}})
            ratios.append((f"{precision}, {name}: GFLOP/s, over the product's", *share))
            if own:
                ratios.append((f"{precision}, stage 2: seconds of a step, over those of the locator's forward pass and "
                               "of the decoder's own forward and backward", took, *own))
        if (many, precision) in rates:
            ratios.append((f"{precision}: sentences/s, {args.sentences} of an image over 1", rates[many, precision],
                           rates[one, precision]))
    steps = [rates["stage 1, a sample", p] for p in ("bf16", "fp32") if ("stage 1, a sample", p) in rates]
    if len(steps) == 2:
        ratios.append(("stage 1: samples/s, bf16 over fp32", *steps))
    print(f"{args.backbone} at {model.config.image_size} pixels on {args.device}, threads: {torch.get_num_threads()}, "
          f"medians of {args.runs} runs, each part's share of the FLOPs:\n\n{table(rows)}\n")
    for what, above, *below in ratios:
        print(f"{what}: {above:.3g} / {' + '.join(f'{b:.3g}' for b in below)} = {above / sum(below):.2f}")
    ratios = {what: above / sum(below) for what, above, *below in ratios}
    return dict(rows=rows, ratios=ratios, backbone=args.backbone, image_size=model.config.image_size,
                threads=torch.get_num_threads(), runs=args.runs)


# ---- cost against work ----------------------------------------------------------------------------------------------

def measure_points(args, precision):
    """What inference and stage 1 cost at every image size, then with more sentences and with more images of the
    smallest."""
    points = []
    for size in SIZES[args.backbone]:
        model = build(args, precision, size)
        more = [] if points else [*((1, n) for n in SENTENCES[1:]), *((n, 1) for n in IMAGES[1:])]
        for images, sentences in [(1, 1), *more]:
            batch = made_up(model.eval(), images, sentences)
            with Flops(model) as flops:
                infer(model, batch)
            times = medians([partial(infer, model, batch)], args.runs)
            points.append({"image_size": size, "sentences": sentences, "images": images,
                           "flops": sum(flops.parts.values()), "attention": flops.attention, "seconds": times[0],
                           "kept": kept_bytes(model.train(), partial(locator_loss, model, batch))})
    return points


def along(points, axis):
    """The points that differ from the first in nothing but the axis."""
    others = {"image_size", "sentences", "images"} - {axis}
    return [p for p in points if all(p[k] == points[0][k] for k in others)]


def explain(points, copies):
    """A sentence for each column of the plot: what grows with it, and why. copies: bytes kept whatever the batch."""
    def growth(axis):
        first, last = along(points, axis)[0], along(points, axis)[-1]
        return (first, last, last["flops"] / first["flops"], last["seconds"] / first["seconds"],
                (last["kept"] - copies) / (first["kept"] - copies))

    a, b, flops, took, kept = growth("image_size")
    patches = (b["image_size"] / a["image_size"])**2
    yield (f"From {a['image_size']} to {b['image_size']} pixels, {patches:.2f} times the patches: {flops:.2f} times "
           f"the FLOPs, as attention's are quadratic in the patches ({a['attention'] / a['flops']:.0%} of all, then "
           f"{b['attention'] / b['flops']:.0%}); {took:.2f} times the seconds; {kept:.2f} times the bytes kept, "
           + ("no more than the patches, as attention keeps no scores." if kept <= patches else
              "more than the patches, as attention keeps its scores."))
    a, b, flops, took, kept = growth("sentences")
    shared = 1 - (b["flops"] - a["flops"]) / (b["sentences"] - 1) / a["flops"]
    yield (f"{b['sentences']} sentences of an image: {flops:.2f} times the FLOPs of one, as all share its layers below "
           f"the first CFE, {shared:.0%} of what one takes; {took:.2f} times the seconds; {kept:.2f} times the bytes.")
    a, b, flops, took, kept = growth("images")
    yield (f"{b['images']} images with a sentence each: {flops:.2f} times the FLOPs of one, as they share nothing; "
           f"{took:.2f} times the seconds; {kept:.2f} times the bytes.")


def draw_cost(out, points, rate, kept_per_flop, copies, title, width=560, height=300):
    """Seconds of inference (above) and bytes kept by stage 1 (below) along each axis: dots are measured, the line is
    what FLOPs predict."""
    sheet = Image.new("RGB", (3 * width, 30 + 2 * height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((60, 8), title, fill="black", font=ImageFont.load_default(15))
    axis_names = {"image_size": "image size in pixels", "sentences": "sentences of an image",
                  "images": "images of a batch"}
    for column, (axis, name) in enumerate(axis_names.items()):
        chosen = along(points, axis)
        for row, (what, measured, predicted) in enumerate((
                ("inference, seconds", [p["seconds"] for p in chosen], [p["flops"] / rate for p in chosen]),
                ("stage 1 keeps for backward, GB", [p["kept"] / 1e9 for p in chosen],
                 [(p["flops"] * kept_per_flop + copies) / 1e9 for p in chosen]))):
            place = axes(draw, (column * width, 30 + row * height, width, height), f"{what}, against {name}",
                         last=chosen[-1][axis], top=1.05 * max(measured + predicted), number=".3g")
            draw.line([place(p[axis], y) for p, y in zip(chosen, predicted)], fill=BLUE, width=2)
            for p, y in zip(chosen, measured):
                x, y = place(p[axis], y)
                draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=PINK)
    save_picture(sheet, out)


def cost_command(args):
    """Time and memory against image size, sentences of an image and images of a batch. Returns what --json holds."""
    precision = check_flags(args)[-1]
    check_writable(args.out, picture=True)
    points = measure_points(args, precision)
    one, two = along(points, "images")[:2]
    copies = 2 * one["kept"] - two["kept"]
    rate = statistics.median(p["flops"] / p["seconds"] for p in points)
    kept_per_flop = statistics.median((p["kept"] - copies) / p["flops"] for p in points)
    title = (f"{args.backbone} in {precision} on {args.device}, threads: {torch.get_num_threads()}. Dots: measured, "
             f"medians of {args.runs} runs. Line: FLOPs, at {rate / 1e9:.3g} GFLOP/s and {1e3 * kept_per_flop:.3g} MB "
             f"kept per GFLOP, {copies / 1e6:.0f} MB once a step")
    draw_cost(args.out, points, rate, kept_per_flop, copies, title)
    print("\n".join([title, *explain(points, copies), f"wrote {args.out}"]))
    return dict(points=points, rate=rate, kept_per_flop=kept_per_flop, kept_once=copies, precision=precision,
                backbone=args.backbone, threads=torch.get_num_threads(), runs=args.runs)
