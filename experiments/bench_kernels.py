"""What the fused kernels cost and save: registers, bytes, a roofline; times where there is a GPU.

    python -m experiments.bench_kernels [--json kernels.json]

Every kernel is compiled ahead of time for three generations of GPU: registers, spilled bytes,
shared memory, the tensor-core instruction. The bytes that each path moves are counted, and a
roofline turns them into the least time that a GPU could take. That is an estimate: no GPU is
needed and none was asked. Where there is a GPU the table also has measured times of the kernels,
of eager PyTorch and of torch.compile, after a check that all three compute the same.

How bytes are counted. Eager PyTorch: the tensors that each operator reads and writes, as it is
dispatched. Fused: the tensors that each kernel is handed. That a kernel brings each of them from
memory once is what the tiling is made for (see _tile in kernels/adapter.py); that it accesses
nothing else is tested in the interpreter. Counted on meta tensors, which have shapes and no data.
"""

import argparse
import contextlib
import importlib
import io
import json
import math
import re
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from kernels import backend
from support.files import DataError, check_writable, run, write_text
from support.tables import table

ARCHITECTURES = {80: "A100", 90: "H100", 100: "B200"}  # compute capability and a card that has it
# Bytes and bf16 operations per second, from NVIDIA's data sheets (SXM, 80 GB, without sparsity).
PEAKS = {"H100": (3.35e12, 989e12), "A100": (2.04e12, 312e12)}
# A batch of 32: images of 1 + 40 * 40 tokens, sentences of 77 at most. Widths, bottlenecks and
# image sizes of Table A1.
ADAPTERS = {  # N, D, H
    "Adapter, B image": (51232, 896, 448), "Adapter, B text": (2464, 640, 320),
    "Adapter, L image": (51232, 1024, 512), "Adapter, L text": (2464, 768, 384),
}
LOSSES = {"dice + focal, stage 1": (32, 1600), "dice + focal, stage 2": (32, 2, 640, 640)}


def adapter_inputs(N, D, H, device):
    """x (N, D) and the five parameters in bf16, all with gradients."""
    def random(*shape):
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    inputs = [random(N, D), random(H, D) / D**0.5, random(H), random(D, H) / H**0.5,
              random(D), random(D)]
    return [t.requires_grad_() for t in inputs]


def training_launches():
    """What the Adapters launch in training, under autocast in bf16: scale stays in float32, and so
    does much of x."""
    for shape in ADAPTERS.values():
        x, *weights, scale = adapter_inputs(*shape, device="meta")
        for stream in (torch.bfloat16, torch.float32):
            inputs = [x.to(stream), *weights, scale.float()]
            yield from count_fused("adapter", inputs)[1].launches


def loss_inputs(*shape, device):
    """float32 logits with gradient, bool target."""
    return [torch.randn(shape, device=device).requires_grad_(),
            torch.randn(shape, device=device) > 0]


def gradients(function, inputs, dy):
    """The output, then the gradient of every input that has one."""
    y = function(*inputs)
    return [y, *torch.autograd.grad(y, [t for t in inputs if t.requires_grad], dy)]


# ---- bytes and rooflines -----------------------------------------------------------------------

def operator_flops(op, args, kwargs, out):
    """FLOPs of one dispatched operator, as torch's registry counts them; 0 for what it lacks.

    2 M K N for a product of (M, K) and (K, N), 4 n m d for attention of n queries on m keys of
    width d (backward: 10 n m d, with the scores computed again), for a convolution 2 x outputs x
    weights of a filter. All else (norms, softmax, resizing) counts nothing.
    """
    from torch.utils import flop_counter  # warns where Triton is missing

    name, packet = op.name(), op.overloadpacket
    if name == "aten::_scaled_dot_product_flash_attention_for_cpu":
        return flop_counter.sdpa_flop_count(*(t.shape for t in args[:3]))
    if name == "aten::_scaled_dot_product_flash_attention_for_cpu_backward":
        return flop_counter.sdpa_backward_flop_count(*(t.shape for t in args[:4]))
    if name in ("risclip::adapter", "risclip::adapter_backward"):  # as its products in plain torch
        x, w_down = (args[0], args[1]) if name == "risclip::adapter" else (args[1], args[3])
        return (4 if name == "risclip::adapter" else 8) * x.size(0) * w_down.numel()
    formula = flop_counter.flop_registry.get(packet)
    return formula(*args, **kwargs, out_val=out) if formula else 0


class Operations(TorchDispatchMode):
    """Notes bytes and arithmetic of every torch operator and every Triton launch, which is not
    run."""

    def __init__(self):
        super().__init__()
        self.costs = []  # (bytes, operations)
        self.launches = []  # (kernel, arguments by name, compiler options)

    def __enter__(self):
        # The class of a kernel, compiled or interpreted.
        self.kernel_type = type(importlib.import_module("kernels.adapter")._down_kernel)
        self.run_kernel = self.kernel_type.run
        self.kernel_type.run = lambda kernel, *args, **options: self.launch(kernel, args, **options)
        return super().__enter__()

    def __exit__(self, *error):
        self.kernel_type.run = self.run_kernel
        return super().__exit__(*error)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = op(*args, **kwargs)
        if not op.is_view and "empty" not in op.name():
            self.note((args, kwargs, out), operator_flops(op, args, kwargs, out))
        return out

    def launch(self, kernel, args, grid, warmup, num_warps, num_stages=3, **constants):
        arguments = dict(zip(kernel.arg_names, args))  # the constants come by name
        product = [v for name, v in arguments.items() if name in ("N", "D", "H", "P", "Q")]
        self.note(args, 2 * math.prod(product) if product else 0)
        options = dict(num_warps=num_warps, num_stages=num_stages)
        self.launches.append((kernel, arguments | constants, options))

    def note(self, tensors, arithmetic):
        """Adds one operation. An expanded tensor (stride 0) counts as what it was before."""
        moved = sum(t.element_size() * math.prod(n for n, stride in zip(t.shape, t.stride())
                                                 if stride)
                    for t in tree_leaves(tensors) if isinstance(t, torch.Tensor))
        self.costs.append((moved, arithmetic))

    def megabytes(self):
        return sum(moved for moved, _ in self.costs) / 1e6

    def roofline(self, gpu):
        """Microseconds. Each operation takes the longer of two times: to move its bytes, to do its
        arithmetic."""
        bandwidth, peak = PEAKS[gpu]
        return 1e6 * sum(max(moved / bandwidth, arithmetic / peak)
                         for moved, arithmetic in self.costs)


def count_eager(reference, inputs):
    """Operations of the plain-torch reference: forward alone, forward and backward."""
    with torch.no_grad(), Operations() as forward:
        dy = reference(*inputs)
    with Operations() as both:
        gradients(reference, inputs, dy)
    return forward, both


def count_fused(name, inputs):
    """Operations of what autograd calls on a GPU, forward and backward of kernels/NAME.py: forward
    alone, both."""
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


# ---- compiling without a GPU -------------------------------------------------------------------

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
            specialised = isinstance(value, int) and not kernel.params[i].do_not_specialize
            if isinstance(value, torch.Tensor) or specialised and value % 16 == 0:
                # Allows loads of 16 bytes; torch aligns its tensors.
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def compile_launch(kernel, arguments, options, capability):
    """Compiles a noted launch for an NVIDIA GPU: registers per thread, bytes per block, ..."""
    import triton
    from triton.backends.compiler import GPUTarget

    log, target = io.StringIO(), GPUTarget("cuda", capability, 32)
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope():
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True  # a cached kernel leaves no log
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(source(kernel, arguments), target=target, options=options)
    log, ptx = log.getvalue(), compiled.asm["ptx"]
    registers, stored, loaded = (int(re.search(pattern, log)[1]) for pattern in (
        r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes spill loads"))
    wide = [name.removesuffix("_ptr") for name in ("x_ptr", "dy_ptr", "a_ptr", "b_ptr")
            if name in arguments and arguments[name].dtype == torch.float32]
    tensor_core = re.findall(r"mma\.sync|wgmma(?=\.mma_async)|tcgen05\.mma(?=\.)", ptx)
    return dict(kernel=kernel.__name__, float32=wide, capability=capability, registers=registers,
                spilled=stored + loaded, shared=compiled.metadata.shared,
                tensor_core=sorted(set(tensor_core)))


def compile_all(launches, capabilities):
    """compile_launch of every launch, but once where launches differ in nothing but sizes."""
    different = {(kernel.__name__, source(kernel, arguments).hash()): (kernel, arguments, options)
                 for kernel, arguments, options in launches}
    return [compile_launch(*launch, capability)
            for capability in capabilities for launch in different.values()]


# ---- times, where there is a GPU ---------------------------------------------------------------

def check(name, function, reference, inputs, dy):
    """Stops unless the error against float64 is at most 1.5 times that of eager PyTorch (root mean
    squares)."""
    exact = gradients(reference, [t.detach().double().requires_grad_() if t.requires_grad else t
                                  for t in inputs], dy.double())
    pairs = zip(gradients(function, inputs, dy), gradients(reference, inputs, dy), exact)
    for a, b, truth in pairs:
        ours, eager, size = (t.square().mean().sqrt().item()
                             for t in (a - truth, b - truth, truth))
        if not ours <= max(1.5 * eager, 1e-6 * size):
            raise SystemExit(f"{name} is wrong here: error {ours:.2e}, eager {eager:.2e}, "
                             f"size {size:.2e}")


def measure(fused, reference, inputs):
    """Milliseconds of fused, eager and torch.compile: forward alone, forward and backward."""
    from triton.testing import do_bench

    def forward(function):
        with torch.no_grad():
            return function(*inputs)

    torch.compiler.reset()  # one shape's graph does not count as the next one's failure
    compiled = torch.compile(reference, dynamic=False)
    dy = torch.randn_like(reference(*inputs))
    check("fused", fused, reference, inputs, dy)
    check("torch.compile", compiled, reference, inputs, dy)
    paths = fused, reference, compiled
    return ([do_bench(lambda f=f: forward(f)) for f in paths],
            [do_bench(lambda f=f: gradients(f, inputs, dy)) for f in paths])


# ---- the tables --------------------------------------------------------------------------------

def resource_rows(compiled):
    """A row per kernel and dtype: registers per thread, spilled bytes, KiB per block, tensor core.
    """
    rows = {}
    for c in compiled:
        title = f"`{c['kernel']}`"
        if c["float32"]:
            title += f", {' '.join(c['float32'])} in fp32"
        row = rows.setdefault(title, {"kernel": title})
        row[f"sm_{c['capability']} ({ARCHITECTURES[c['capability']]})"] = (
            f"{c['registers']} / {c['spilled']} / {c['shared'] / 1024:.0f} "
            f"{' '.join(c['tensor_core'])}")
    return list(rows.values())


def traffic_rows(title, name, shape, gpu):
    """-> two rows (forward, forward + backward) and the launches of one shape."""
    make = adapter_inputs if name == "adapter" else loss_inputs
    fused, reference = getattr(kernels, name), getattr(kernels, f"{name}_reference")
    inputs = make(*shape, device="meta")
    ours, eager = count_fused(name, inputs), count_eager(reference, inputs)
    times = measure(fused, reference, make(*shape, device="cuda")) if gpu else [None, None]
    rows = []
    for work, a, b, ms in zip(("forward", "forward + backward"), ours, eager, times):
        row = {"": f"{title} {'x'.join(map(str, shape))}", "pass": work,
               "fused MB": f"{a.megabytes():.1f}", "eager MB": f"{b.megabytes():.1f}"}
        for card in PEAKS:
            row[f"{card} us, fused / eager (estimate)"] = (
                f"{a.roofline(card):.1f} / {b.roofline(card):.1f}")
        if ms:
            row["measured ms, fused / eager / torch.compile"] = " / ".join(f"{t:.3f}" for t in ms)
        rows.append(row)
    return rows, ours[1].launches


def bench():
    """Compiles, counts, and with a GPU times. Returns what --json holds."""
    if not backend.INSTALLED:
        raise DataError("Triton is not installed, so there is nothing to compile: install it "
                        "(Linux only)")
    if backend.INTERPRETED:
        raise DataError("TRITON_INTERPRET=1 has kernels interpreted; to compile them, unset it")
    if backend.BACKEND == "torch":
        raise DataError("RISCLIP_KERNELS=torch has the kernels replaced by plain torch; to compare "
                        "both, unset it")
    gpu = (torch.cuda.is_available()
           and backend.use_triton(torch.empty(0, device="cuda", dtype=torch.bfloat16)))
    launches, rows = [*training_launches()], []
    for title, shape in ADAPTERS.items():
        rows += traffic_rows(title, "adapter", shape, gpu)[0]
    for title, shape in LOSSES.items():
        more, launched = traffic_rows(title, "dice_focal", shape, gpu)
        rows += more
        launches += launched
    compiled = compile_all(launches, ARCHITECTURES)
    print("Registers per thread / spilled bytes / shared KiB per block, tensor-core instruction, "
          "compiled ahead of time:\n")
    print(table(resource_rows(compiled)), end="\n\n")
    times = "no GPU that the kernels run on, no times"
    if gpu:
        times = f"times on {torch.cuda.get_device_name()}"
    print("Bytes moved (counted; Adapters in bf16, logits in fp32) and roofline (estimated from "
          f"data sheets), {times}:\n")
    print(table(rows))
    return dict(compiled=compiled, traffic=rows)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", metavar="F", help="also write the figures to this file")
    return parser.parse_args(argv)


def main(args):
    if args.json:
        check_writable(args.json)
    result = bench()
    if args.json:
        write_text(args.json, json.dumps(result, indent=1, default=str))
        print(f"\nwrote {args.json}")


if __name__ == "__main__":
    sys.exit(run(main, parse_args()))
