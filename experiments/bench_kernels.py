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
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

import data
import kernels
import risclip
from experiments.bench_model import cost_command, model_command
from kernels import backend
from support.files import DataError, check_writable, run, too_small, write_text

ARCHITECTURES = {80: "A100", 90: "H100", 100: "B200"}  # CUDA compute capability (sm_80 ...) and a card that has it
# Bytes and bf16 operations a second, from NVIDIA's data sheets (SXM, 80 GB, without sparsity).
PEAKS = {"H100": (3.35e12, 989e12), "A100": (2.04e12, 312e12)}
# A batch of 32: images of 1 + 40 * 40 tokens, sentences of 77 at most. Widths, bottlenecks and image sizes of Table A1.
ADAPTERS = {"Adapter, B image": (51232, 896, 448), "Adapter, B text": (2464, 640, 320),
            "Adapter, L image": (51232, 1024, 512), "Adapter, L text": (2464, 768, 384)}  # N, D, H
LOSSES = {"dice + focal, stage 1": (32, 1600), "dice + focal, stage 2": (32, 2, 640, 640)}


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
    if wrong := too_small(args, runs=1, sentences=1, image_size=1, per_image=1, batch_size=1, epochs=1, workers=0):
        raise DataError(wrong)
    if args.json:
        check_writable(args.json)
    result = args.run(args)
    if args.json:
        write_text(args.json, json.dumps(result, indent=1, default=str))
        print(f"\nwrote {args.json}")


if __name__ == "__main__":
    sys.exit(run(main, parse_args()))
