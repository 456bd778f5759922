"""What the fused kernels cost and save, what the model costs, what reading a training batch costs.

    python bench.py kernels
    python bench.py model --backbone B [--precision bf16] [--only stage1] [--json model.json]
    python bench.py cost --backbone B --out cost.png
    python bench.py loader

Every kernel is compiled ahead of time for three generations of GPU: registers, spilled bytes, shared memory, the
tensor-core instruction. The bytes that each path moves are counted, and a roofline turns them into the least time that
a GPU could take; that is an estimate, no GPU is needed and none was asked. Where there is a GPU the table also has
measured times of the kernels, of eager PyTorch and of torch.compile, after a check that all three compute the same.

How bytes are counted. Eager PyTorch: the tensors that each operator reads and writes, as it is dispatched. Fused: the
tensors that each kernel is handed. That a kernel brings each of them from memory once is what the tiling is made for
(see _tile in kernels/adapter.py); that it accesses nothing else is tested in the interpreter. Counted on meta tensors,
which have shapes and no data.

How the model's FLOPs are counted: as they are dispatched, 2 M K N for a product of (M, K) and (K, N), 4 n m d for
attention of n queries on m keys of width d (backward 10 n m d, with the scores computed again), for a convolution
2 x outputs x weights of a filter. All else (norms, softmax, resizing) counts nothing. So a layer of width D takes
24 n D^2 + 4 n^2 D for its n tokens, an Adapter of bottleneck H 4 n D H. Adapters count as their plain torch, whatever
runs. The share is these FLOPs a second over those of a product of two square matrices in the same dtype, measured
between the model's runs. A step is a forward and a backward pass, without the optimizer.

How the bytes kept for backward are counted: the memory of every tensor that autograd saves, each once, weights not
counted. 'MB kept' is what two images with a sentence each keep less what one keeps, so that copies of weights in bf16,
which a step makes once, are no sample's.

`cost` takes the time of inference and the bytes that stage 1 keeps at several image sizes, sentences of an image and
batches, and draws them over what FLOPs predict: one rate, one number of bytes a FLOP, the medians of all points.
"""

import argparse
import contextlib
import importlib
import io
import json
import math
import re
import statistics
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

import data
import kernels
import risclip
from data import DataError
from evaluate import BLUE, PINK, axes, check_writable, save_picture
from kernels import backend
from train import locator_loss, refiner_loss

ARCHITECTURES = {80: "A100", 90: "H100", 100: "B200"}  # CUDA compute capability (sm_80 ...) and a card that has it
# Bytes and bf16 operations a second, from NVIDIA's data sheets (SXM, 80 GB, without sparsity).
PEAKS = {"H100": (3.35e12, 989e12), "A100": (2.04e12, 312e12)}
# A batch of 32: images of 1 + 40 * 40 tokens, sentences of 77 at most. Widths, bottlenecks and image sizes of Table A1.
ADAPTERS = {"Adapter, B image": (51232, 896, 448), "Adapter, B text": (2464, 640, 320),
            "Adapter, L image": (51232, 1024, 512), "Adapter, L text": (2464, 768, 384)}  # N, D, H
LOSSES = {"dice + focal, stage 1": (32, 1600), "dice + focal, stage 2": (32, 2, 640, 640)}
SIZES = {"tiny": (48, 80, 120, 160, 192), "B": (240, 336, 448, 544, 640), "L": (252, 350, 448, 532, 630)}  # of `cost`
SENTENCES, IMAGES = (1, 2, 4, 8, 16), (1, 2, 4, 8)  # of `cost`


def adapter_inputs(N, D, H, device):
    """x (N, D) and the five parameters in bf16, all with gradients."""
    def random(*shape):
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    inputs = random(N, D), random(H, D) / D**0.5, random(H), random(D, H) / H**0.5, random(D), random(D)
    return [t.requires_grad_() for t in inputs]


def training_launches():
    """What the Adapters launch in training, under autocast in bf16: scale stays in fp32, and so does much of x."""
    for shape in ADAPTERS.values():
        x, *weights, scale = adapter_inputs(*shape, device="meta")
        for stream in (torch.bfloat16, torch.float32):
            yield from count_fused("adapter", [x.to(stream), *weights, scale.float()])[1].launches


def loss_inputs(*shape, device):
    """float32 logits with gradient, bool target."""
    return [torch.randn(shape, device=device).requires_grad_(), torch.randn(shape, device=device) > 0]


def gradients(function, inputs, dy):
    """The output, then the gradient of every input that has one."""
    y = function(*inputs)
    return [y, *torch.autograd.grad(y, [t for t in inputs if t.requires_grad], dy)]


# ---- bytes and rooflines --------------------------------------------------------------------------------------------

class Operations(TorchDispatchMode):
    """Notes the bytes and the arithmetic of every torch operator and every Triton launch; launches do not run."""

    def __init__(self):
        from torch.utils.flop_counter import flop_registry  # warns where Triton is missing

        super().__init__()
        self.flops = flop_registry
        self.costs, self.launches = [], []  # (bytes, operations), (kernel, arguments by name, compiler options)

    def __enter__(self):
        kernel_type = type(importlib.import_module("kernels.adapter")._down_kernel)  # compiled or interpreted
        self.patch = mock.patch.object(kernel_type, "run", lambda kernel, *args, **kw: self.launch(kernel, args, **kw))
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = op(*args, **kwargs)
        if not op.is_view and "empty" not in op.name():
            count = self.flops.get(op.overloadpacket)
            self.note((args, kwargs, out), count(*args, **kwargs, out_val=out) if count else 0)
        return out

    def launch(self, kernel, args, grid, warmup, num_warps, num_stages=3, **constants):
        arguments = dict(zip(kernel.arg_names, args, strict=False))  # the constants come by name
        product = [v for name, v in arguments.items() if name in ("N", "D", "H", "P", "Q")]
        self.note(args, 2 * math.prod(product) if product else 0)
        self.launches.append((kernel, arguments | constants, dict(num_warps=num_warps, num_stages=num_stages)))

    def note(self, tensors, arithmetic):
        """Adds one operation. An expanded tensor (stride 0) counts as what it was expanded from."""
        moved = sum(t.element_size() * math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride)
                    for t in tree_leaves(tensors) if isinstance(t, torch.Tensor))
        self.costs.append((moved, arithmetic))

    def megabytes(self):
        return sum(moved for moved, _ in self.costs) / 1e6

    def roofline(self, gpu):
        """Microseconds: of each operation's two times, to move its bytes and to do its arithmetic, the longer one."""
        bandwidth, peak = PEAKS[gpu]
        return 1e6 * sum(max(moved / bandwidth, arithmetic / peak) for moved, arithmetic in self.costs)


def count_eager(reference, inputs):
    """Operations of the plain-torch reference: forward alone, forward and backward."""
    with torch.no_grad(), Operations() as forward:
        dy = reference(*inputs)
    with Operations() as both:
        gradients(reference, inputs, dy)
    return forward, both


def count_fused(name, inputs):
    """Operations of what autograd calls on a GPU, kernels.NAME's forward and backward: forward alone, both."""
    module = importlib.import_module(f"kernels.{name}")
    inputs = [t.detach() for t in inputs]
    if name == "dice_focal":  # as the public function hands them on
        logits, target = (t.flatten(0, -3).flatten(1) if t.dim() == 4 else t for t in inputs)
        inputs = [logits, target.view(torch.uint8), 0.65, 2.0]
    with Operations() as forward:
        kept = module.forward(*inputs)
    with Operations() as backward:
        if name == "adapter":
            (y, h), (x, w_down, _, w_up, b_up, scale) = kept, inputs
            module.backward(y, x, h, w_down, w_up, b_up, scale)  # y has dy's shape
        else:
            module.backward(kept, *inputs)
    backward.costs = forward.costs + backward.costs
    backward.launches = forward.launches + backward.launches
    return forward, backward


# ---- compiling without a GPU ----------------------------------------------------------------------------------------

def source(kernel, arguments):
    """A noted launch as Triton's compiler takes it, specialised as at its first run."""
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if kernel.params[i].is_constexpr:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = mangle_type(value)
            specialized = isinstance(value, int) and not kernel.params[i].do_not_specialize
            if isinstance(value, torch.Tensor) or specialized and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]  # allows loads of 16 bytes; torch aligns its tensors
    return ASTSource(kernel, signature, constants, attributes)


def compile_launch(kernel, arguments, options, capability):
    """Compiles a noted launch for an NVIDIA GPU and says what a thread (registers) and a block (bytes) take."""
    import triton
    from triton.backends.compiler import GPUTarget

    log = io.StringIO()
    with (mock.patch.object(triton.knobs.nvidia, "dump_ptxas_log", True), contextlib.redirect_stdout(log),
          mock.patch.object(triton.knobs.compilation, "always_compile", True)):  # a cached kernel leaves no log
        compiled = triton.compile(source(kernel, arguments), target=GPUTarget("cuda", capability, 32), options=options)
    log, ptx = log.getvalue(), compiled.asm["ptx"]
    registers, stored, loaded = (int(re.search(pattern, log)[1]) for pattern in (
        r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes spill loads"))
    wide = [name.removesuffix("_ptr") for name in ("x_ptr", "dy_ptr", "a_ptr", "b_ptr")
            if name in arguments and arguments[name].dtype == torch.float32]
    return dict(kernel=kernel.__name__, float32=wide, capability=capability, registers=registers,
                spilled=stored + loaded, shared=compiled.metadata.shared,
                tensor_core=sorted(set(re.findall(r"mma\.sync|wgmma(?=\.mma_async)|tcgen05\.mma(?=\.)", ptx))))


def compile_all(launches, capabilities):
    """compile_launch of every launch that is not compiled to the same as one before: the same but for sizes."""
    different = {(kernel.__name__, source(kernel, arguments).hash()): (kernel, arguments, options)
                 for kernel, arguments, options in launches}
    return [compile_launch(*launch, capability) for capability in capabilities for launch in different.values()]


# ---- times, where there is a GPU ------------------------------------------------------------------------------------

def check(name, function, reference, inputs, dy):
    """Stops unless the error against float64 is at most 1.5 times that of eager PyTorch (root mean squares)."""
    exact = gradients(reference, [t.detach().double().requires_grad_() if t.requires_grad else t for t in inputs],
                      dy.double())
    for a, b, truth in zip(gradients(function, inputs, dy), gradients(reference, inputs, dy), exact, strict=True):
        ours, eager, size = (t.square().mean().sqrt().item() for t in (a - truth, b - truth, truth))
        if not ours <= max(1.5 * eager, 1e-6 * size):
            raise SystemExit(f"{name} is wrong here: error {ours:.2e}, eager {eager:.2e}, size {size:.2e}")


def measure(fused, reference, inputs):
    """Milliseconds of fused, eager and torch.compile: forward alone, forward and backward."""
    from triton.testing import do_bench

    def forward(function):
        with torch.no_grad():
            return function(*inputs)

    torch.compiler.reset()  # one shape's graph does not count as the next one's failure
    compiled, dy = torch.compile(reference, dynamic=False), torch.randn_like(reference(*inputs))
    check("fused", fused, reference, inputs, dy)
    check("torch.compile", compiled, reference, inputs, dy)
    paths = fused, reference, compiled
    return ([do_bench(lambda f=f: forward(f)) for f in paths],
            [do_bench(lambda f=f: gradients(f, inputs, dy)) for f in paths])


# ---- the tables -----------------------------------------------------------------------------------------------------

def table(rows):
    """Rows of equal keys as a markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(v) for v in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def resource_rows(compiled):
    """A row for each kernel and dtype: registers a thread, spilled bytes, shared KiB a block, tensor cores."""
    rows = {}
    for c in compiled:
        title = f"`{c['kernel']}`" + (f", {' '.join(c['float32'])} in fp32" if c["float32"] else "")
        row = rows.setdefault(title, {"kernel": title})
        row[f"sm_{c['capability']} ({ARCHITECTURES[c['capability']]})"] = (
            f"{c['registers']} / {c['spilled']} / {c['shared'] / 1024:.0f} {' '.join(c['tensor_core'])}")
    return list(rows.values())


def kernels_command(args):
    """Compiles, counts, and with a GPU times. Returns what --json holds."""
    if not backend.INSTALLED:
        raise DataError("Triton is not installed, so there is nothing to compile: install it (Linux only)")
    if backend.INTERPRETED:
        raise DataError("TRITON_INTERPRET=1 has kernels interpreted; to compile them, unset it")
    if backend.BACKEND == "torch":
        raise DataError("RISCLIP_KERNELS=torch has the kernels replaced by plain torch; to compare both, unset it")
    gpu = torch.cuda.is_available() and backend.use_triton(torch.empty(0, device="cuda"))
    names = ["adapter"] * len(ADAPTERS) + ["dice_focal"] * len(LOSSES)
    launches, rows = [], []
    for name, (title, shape) in zip(names, (ADAPTERS | LOSSES).items(), strict=True):
        make = adapter_inputs if name == "adapter" else loss_inputs
        fused, reference = getattr(kernels, name), getattr(kernels, f"{name}_reference")
        inputs = make(*shape, device="meta")
        times = measure(fused, reference, make(*shape, device="cuda")) if gpu else [None, None]
        for work, ours, eager, ms in zip(("forward", "forward + backward"), count_fused(name, inputs),
                                         count_eager(reference, inputs), times, strict=True):
            row = {"": f"{title} {'x'.join(map(str, shape))}", "pass": work, "fused MB": f"{ours.megabytes():.1f}",
                   "eager MB": f"{eager.megabytes():.1f}"}
            for card in PEAKS:
                row[f"{card} us, fused / eager (estimate)"] = f"{ours.roofline(card):.1f} / {eager.roofline(card):.1f}"
            if ms:
                row["measured ms, fused / eager / torch.compile"] = " / ".join(f"{t:.3f}" for t in ms)
            rows.append(row)
        launches += ours.launches if name == "dice_focal" else []
    compiled = compile_all([*training_launches(), *launches], ARCHITECTURES)
    print("Registers a thread / spilled bytes / shared KiB a block, tensor-core instruction, compiled ahead of time:\n")
    print(table(resource_rows(compiled)), end="\n\n")
    print("Bytes moved (counted; Adapters in bf16, logits in fp32) and roofline (estimated from data sheets), "
          + (f"times on {torch.cuda.get_device_name()}:\n" if gpu else "no GPU that the kernels run on, no times:\n"))
    print(table(rows))
    return dict(compiled=compiled, traffic=rows)


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
        def attend(*args, function=risclip.attend, **kwargs):
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
        from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

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
        raise DataError(f"--device {args.device}: {data.one_line(error)[:120]}") from error
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


# ---- batches --------------------------------------------------------------------------------------------------------

def loader_command(args):
    """Samples a second of a training epoch, augmented: one sentence a decode, and --per-image sentences of an image."""
    dataset = data.RefCOCO(args.data_root, args.dataset, args.split)
    samples, rates = data.Samples(dataset, args.image_size, augment=True), {}
    for _ in range(args.runs):
        for per_image in (1, args.per_image):
            plan = [batch for epoch in range(args.epochs)
                    for batch in data.plan_epoch(dataset, epoch, 0, args.batch_size, per_image)]
            loader = DataLoader(samples, batch_sampler=plan, collate_fn=data.collate, num_workers=args.workers)
            start, count = time.perf_counter(), 0
            for batch in loader:
                count += len(batch["texts"])
            rates.setdefault(per_image, []).append(count / (time.perf_counter() - start))
    medians = {per_image: statistics.median(r) for per_image, r in rates.items()}
    for per_image, rate in medians.items():
        print(f"{per_image} of an image at a time: {rate:.1f} samples/s, {rate / medians[1]:.2f} of one by one")
    return dict(samples_per_s=medians, image_size=args.image_size, workers=args.workers)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("kernels", help="resources, bytes and rooflines of the fused kernels")
    command.set_defaults(run=kernels_command)
    command = commands.add_parser("model", help="FLOPs by part, share of the product rate, bytes kept for backward")
    command.add_argument("--image-size", type=int, help="pixels (default: the backbone's)")
    command.add_argument("--sentences", type=int, default=7, help="of one image (default: 7)")
    command.add_argument("--only", choices=("inference", "stage1", "stage2"), help="measure this alone")
    command.set_defaults(run=model_command)
    command = commands.add_parser("cost", help="a plot of time and memory against image size, sentences and batch")
    command.add_argument("--out", default="cost.png", help="the plot (default: cost.png)")
    command.set_defaults(run=cost_command)
    for name in ("model", "cost"):
        command = commands.choices[name]
        command.add_argument("--backbone", choices=tuple(risclip.CONFIGS), default="tiny")
        command.add_argument("--precision", choices=("fp32", "bf16"),
                             help="default: bf16 where there are instructions for it; `model` measures fp32 as well")
        command.add_argument("--runs", type=int, default=3, help="default: 3")
        command.add_argument("--recompute", action=argparse.BooleanOptionalAction, help="as train.py's")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command = commands.add_parser("loader", help="samples a second, decoding an image once for several sentences")
    command.add_argument("--dataset", default="shapes")
    command.add_argument("--data-root", default="data")
    command.add_argument("--split", default="all")
    for flag, default in (("image-size", 640), ("per-image", 4), ("batch-size", 16), ("epochs", 4), ("workers", 0),
                          ("runs", 3)):
        command.add_argument(f"--{flag}", type=int, default=default, help=f"default: {default}")
    command.set_defaults(run=loader_command)
    for command in commands.choices.values():
        command.add_argument("--json", metavar="F", help="also write the figures to this file")
    return parser.parse_args(argv)


def main(args):
    if wrong := data.too_small(args, runs=1, sentences=1, image_size=1, per_image=1, batch_size=1, epochs=1, workers=0):
        raise DataError(wrong)
    if args.json:
        check_writable(args.json)
    result = args.run(args)
    if args.json:
        data.write_text(args.json, json.dumps(result, indent=1, default=str))
        print(f"\nwrote {args.json}")


if __name__ == "__main__":
    sys.exit(data.run(main, parse_args()))
