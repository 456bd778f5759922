"""experiments/bench_kernels.py: every kernel compiles for three generations of GPU without
spilling, and its counts are right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_proof import exact_bf16, force

import kernels
from experiments import bench_kernels
from support import files

ROOT = Path(__file__).parent.parent
SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448}  # bytes a block may have on A100, H100, B200
TENSOR_CORE = {80: ["mma.sync"], 90: ["wgmma"], 100: ["tcgen05.mma"]}
PRODUCTS = ["_down_kernel", "_up_kernel", "_dpre_kernel", "_dx_kernel"]
PIXELS = ["_sums_kernel", "_gradient_kernel"]
KERNELS = PRODUCTS + PIXELS
IN_FP32 = [*zip(PRODUCTS, ("x", "x", "dy", "dy")), *zip(PIXELS, "xx")]


def without_interpreter(*command):
    """Runs Python where Triton compiles: a process in which it is imported for the interpreter
    cannot."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_clean(compiled, tensor_core=True, gpus=SHARED_MEMORY):
    for c in compiled:
        assert c["spilled"] == 0 and c["shared"] <= SHARED_MEMORY[c["capability"]], c
        product = tensor_core and c["kernel"] in PRODUCTS
        assert c["tensor_core"] == (TENSOR_CORE[c["capability"]] if product else []), c
    assert {(c["kernel"], c["capability"]) for c in compiled} == {
        (k, gpu) for k in KERNELS for gpu in gpus
    }


def test_every_kernel_compiles_for_three_gpus_at_the_papers_shapes(tmp_path):
    """B and L, image and text, under autocast in bf16. Compiled for D and H that are multiples of
    16, any N."""
    file = tmp_path / "kernels.json"
    printed = without_interpreter("-m", "experiments.bench_kernels", "--json", str(file))
    result = json.loads(file.read_text())
    assert_clean(result["compiled"])
    shared = {
        (c["kernel"], *c["float32"], c["capability"]): c["shared"] for c in result["compiled"]
    }
    products = [(kernel,) for kernel in PRODUCTS]
    assert set(shared) == {(*kernel, gpu) for kernel in products + IN_FP32 for gpu in SHARED_MEMORY}
    pixels = [c["registers"] for c in result["compiled"] if c["kernel"] in PIXELS]
    assert max(pixels) <= 80  # three blocks of 256 threads on a processor of 65,536 registers
    for (kernel, *wide, gpu), taken in shared.items():
        if wide and kernel in PRODUCTS:
            # A step of the sum takes no more where a number takes more.
            assert taken <= shared[kernel, gpu]
    assert all(f"`{kernel}`" in printed for kernel in KERNELS) and "estimate" in printed
    row = result["traffic"][0]
    assert (row["pass"], row["fused MB"], row["eager MB"]) == ("forward", "368.8", "827.9")


@pytest.mark.parametrize("environment, code, reason", [
    (dict(TRITON_INTERPRET="1"), "", "TRITON_INTERPRET=1"),
    (dict(TRITON_INTERPRET="0", RISCLIP_KERNELS="torch"), "", "RISCLIP_KERNELS=torch"),
    ({}, "sys.modules['triton'] = None", "Triton is not installed"),
])
def test_bench_says_in_a_line_why_it_cannot(environment, code, reason):
    code = f"""
import sys
{code}
from experiments.bench_kernels import main, parse_args
from support.files import run
sys.exit(run(main, parse_args([])))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        text=True,
        capture_output=True,
    )
    assert (
        done.returncode == 2
        and done.stderr.startswith(f"error: {reason}")
        and done.stderr.count("\n") == 1
    )


def test_a_place_that_cannot_be_written_is_said_in_a_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    args, measured = bench_kernels.parse_args(["--json", str(tmp_path / "file" / "x.json")]), []
    monkeypatch.setattr(bench_kernels, "bench", lambda: measured.append(1))
    assert files.run(bench_kernels.main, args) == 2 and not measured
    assert "cannot be written" in capsys.readouterr().err


OTHER_DTYPES = """
import json, sys, torch
from experiments.bench_kernels import adapter_inputs, compile_all, count_fused, loss_inputs
x, weight = (getattr(torch, name) for name in sys.argv[1:3])
inputs = adapter_inputs(2463, 640, 464, device="meta")
inputs = [t.to(weight if 0 < i < 5 else x) for i, t in enumerate(inputs)]
launches = count_fused("adapter", inputs)[1].launches
logits, target = loss_inputs(32, 1600, device="meta")
launches += count_fused("dice_focal", [logits.to(x), target])[1].launches
print(json.dumps(compile_all(launches, map(int, sys.argv[3:]))))
"""


def test_products_in_fp32_are_not_rounded_to_tf32():
    """No tensor core. On one GPU here, on all in the next test."""
    compiled = json.loads(without_interpreter("-c", OTHER_DTYPES, "float32", "float32", "80"))
    assert_clean(compiled, tensor_core=False, gpus=[80])


@pytest.mark.slow
@pytest.mark.parametrize(
    "x, weight",
    [
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
        ("float32", "float16"),
        ("float32", "float32"),
    ],
)
def test_every_kernel_compiles_in_other_dtypes(x, weight):
    """Without autocast, in fp16 also with it. H is 464, which is what 449 is padded to, and N
    odd."""
    compiled = json.loads(without_interpreter("-c", OTHER_DTYPES, x, weight, "80", "90", "100"))
    assert_clean(compiled, tensor_core=weight != "float32")


OTHER_GPUS = """
import json, re, triton
from experiments.bench_kernels import (
    compile_all, count_fused, loss_inputs, source, training_launches)
from triton.backends.compiler import GPUTarget
launches = count_fused("dice_focal", loss_inputs(32, 1600, device="meta"))[1].launches
launches += training_launches()
for c in compile_all(launches, (86, 89, 120)):
    print(json.dumps([f"sm_{c['capability']}", c["kernel"], c["spilled"], c["shared"]]))
different = {source(*launch[:2]).hash(): launch for launch in launches}
for kernel, arguments, options in different.values():
    for arch in ("gfx942", "gfx950"):
        target = GPUTarget("hip", arch, 64)
        compiled = triton.compile(source(kernel, arguments), target=target, options=options)
        spilled = sum(map(int, re.findall(r"gpr_spill_count: *(\\d+)", compiled.asm["amdgcn"])))
        print(json.dumps([arch, kernel.__name__, spilled, compiled.metadata.shared]))
"""


@pytest.mark.slow
def test_every_kernel_compiles_for_consumer_cards_and_for_amd():
    """RTX 3090, 4090 and 5090 (99 KiB of shared memory a block), MI300X (64 KiB) and MI350X (160
    KiB)."""
    shared = {"sm_86": 101376, "sm_89": 101376, "sm_120": 101376, "gfx942": 65536, "gfx950": 163840}
    compiled = [json.loads(line) for line in without_interpreter("-c", OTHER_GPUS).splitlines()]
    for arch, kernel, spilled, taken in compiled:
        allowed = 2 if (arch, kernel) == ("gfx942", "_dpre_kernel") else 0  # registers of 256
        # docs/kernels.md says so.
        over = 256 if (arch, kernel) == ("gfx942", "_dpre_kernel") else 0
        assert spilled <= allowed and taken <= shared[arch] + over, (arch, kernel, spilled, taken)
    assert {(arch, kernel) for arch, kernel, *_ in compiled} == {
        (a, k) for a in shared for k in KERNELS
    }


# ---- counting ----------------------------------------------------------------------------------

def test_eager_bytes_are_those_of_its_operators():
    N, D, H = 96, 32, 16
    forward, _ = bench_kernels.count_eager(
        kernels.adapter_reference, bench_kernels.adapter_inputs(N, D, H, device="meta")
    )
    x, h, w = N * D, N * H, D * H
    linear = (x + w + H + h) + (h + w + D + x)  # down and up, each with its bias
    # Relu, times scale, plus x.
    assert forward.megabytes() == 2 * (linear + 2 * h + (D + 2 * x) + 3 * x) / 1e6


def test_fused_bytes_are_those_of_the_docstring():
    N, D, H = 51232, 896, 448
    forward, both = bench_kernels.count_fused(
        "adapter", bench_kernels.adapter_inputs(N, D, H, device="meta")
    )
    x, h, w = N * D, N * H, D * H
    assert forward.megabytes() == 2 * ((x + w + H + h) + (h + w + D + D + x + x)) / 1e6
    m, transposed = -(-N // 128), 2 * 4 * w  # of both weights: read and written
    products = 2 * ((x + D + w + 2 * h) + (h + w + 2 * x) + 2 * (h + x)) + 2 * 4 * w  # mm in fp32
    partial = 4 * (m * H + m * D)  # written by the kernels, read by torch, which adds them up
    sums = 4 * (H + D) + transposed
    last = 6 * w + 12 * w + 4 * w + 4 * D + 6 * D + 12 * D + 12 * D + 6 * D  # dscale
    last += 6 * D + (4 * D + 8 * w) + 12 * D + 6 * (2 * w + H + D)  # dw_up, db_up; four casts
    assert both.megabytes() == pytest.approx(
        forward.megabytes() + (products + 2 * partial + sums + last) / 1e6
    )


def test_the_docstrings_state_what_is_counted():
    """kernels/adapter.py and kernels/dice_focal.py in MB."""
    inputs = bench_kernels.adapter_inputs(51232, 896, 448, device="meta")
    counts = (
        *bench_kernels.count_eager(kernels.adapter_reference, inputs),
        *bench_kernels.count_fused("adapter", inputs),
    )
    assert [round(c.megabytes()) for c in counts] == [828, 2484, 369, 1087]
    inputs = bench_kernels.loss_inputs(32, 2, 640, 640, device="meta")
    eager, fused = (
        bench_kernels.count_eager(kernels.dice_focal_reference, inputs),
        bench_kernels.count_fused("dice_focal", inputs),
    )
    counts = [
        (forward.megabytes(), both.megabytes() - forward.megabytes())
        for forward, both in (eager, fused)
    ]
    assert [[int(n + 0.5) for n in pair] for pair in counts] == [[4955, 5505], [131, 236]]


def test_the_roofline_takes_the_longer_of_bytes_and_arithmetic():
    operations = bench_kernels.Operations()
    operations.costs = [(3.35e12, 0), (0, 2 * 989e12)]
    assert operations.roofline("H100") == pytest.approx(3e6)


def test_the_check_before_timing_passes_the_kernels_and_stops_wrong_ones():
    """What runs first on a GPU, here on a CPU with small tensors."""
    torch.manual_seed(0)
    inputs = bench_kernels.adapter_inputs(64, 32, 48, device="cpu")
    dy = torch.randn(64, 32, dtype=torch.bfloat16)
    with force("triton"), exact_bf16():
        bench_kernels.check("fused", kernels.adapter, kernels.adapter_reference, inputs, dy)

    def wrong(x, *parameters, scale):
        return kernels.adapter(x, *parameters, 0.9 * scale)

    with pytest.raises(SystemExit, match="fused is wrong"):
        bench_kernels.check(
            "fused", lambda *t: wrong(*t[:-1], scale=t[-1]), kernels.adapter_reference, inputs, dy
        )
    inputs = bench_kernels.loss_inputs(2, 2, 9, 9, device="cpu")
    with force("triton"):
        bench_kernels.check(
            "fused", kernels.dice_focal, kernels.dice_focal_reference, inputs, torch.ones(())
        )


def test_three_paths_are_timed_forward_and_with_backward(monkeypatch):
    """The compiled one is checked as well. Compiling and the clock are put aside here."""
    monkeypatch.setattr("triton.testing.do_bench", lambda function: len(function()))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    inputs = bench_kernels.loss_inputs(3, 5, device="cpu")
    # Rows; output and gradient.
    assert bench_kernels.measure(*[lambda x, t: x.sigmoid() * t] * 2, inputs) == ([3] * 3, [2] * 3)
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: lambda *inputs: 2 * function(*inputs)
    )
    with pytest.raises(SystemExit, match="torch.compile is wrong"):
        bench_kernels.measure(*[lambda x, t: x.sigmoid() * t] * 2, inputs)


