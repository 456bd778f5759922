"""bench.py: every kernel compiles for three generations of GPU without spilling, and its counts are right."""

from kernel_proof import exact_bf16, force  # isort: skip  # sets TRITON_INTERPRET, so it comes first

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import kernels
from experiments import bench_kernels, bench_model

ROOT = Path(__file__).parent.parent
SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448}  # bytes a block may have on A100, H100, B200
TENSOR_CORE = {80: ["mma.sync"], 90: ["wgmma"], 100: ["tcgen05.mma"]}
KERNELS = ["_down_kernel", "_up_kernel", "_dpre_kernel", "_dx_kernel", "_weight_kernel", "_sums_kernel",
           "_gradient_kernel"]
IN_FP32 = [("_down_kernel", "x"), ("_up_kernel", "x"), ("_dpre_kernel", "dy"), ("_dx_kernel", "dy"),
           ("_weight_kernel", "a"), ("_weight_kernel", "b"), ("_sums_kernel", "x"), ("_gradient_kernel", "x")]


def without_interpreter(*command):
    """Runs Python where Triton compiles: a process in which it is imported for the interpreter cannot."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_clean(compiled, tensor_core=True, gpus=SHARED_MEMORY):
    for c in compiled:
        assert c["spilled"] == 0 and c["shared"] <= SHARED_MEMORY[c["capability"]], c
        product = tensor_core and c["kernel"] not in ("_sums_kernel", "_gradient_kernel")
        assert c["tensor_core"] == (TENSOR_CORE[c["capability"]] if product else []), c
    assert {(c["kernel"], c["capability"]) for c in compiled} == {(k, gpu) for k in KERNELS for gpu in gpus}


def test_every_kernel_compiles_for_three_gpus_at_the_papers_shapes(tmp_path):
    """B and L, image and text, under autocast in bf16. Compiled for D and H that are multiples of 16, any N."""
    file = tmp_path / "kernels.json"
    printed = without_interpreter("bench.py", "kernels", "--json", str(file))
    result = json.loads(file.read_text())
    assert_clean(result["compiled"])
    shared = {(c["kernel"], *c["float32"], c["capability"]): c["shared"] for c in result["compiled"]}
    products = [(kernel,) for kernel in KERNELS[:5]]
    assert set(shared) == {(*kernel, gpu) for kernel in products + IN_FP32 for gpu in SHARED_MEMORY}
    pixels = [c["registers"] for c in result["compiled"] if c["kernel"] in KERNELS[5:]]
    assert max(pixels) <= 80  # three blocks of 256 threads on a processor of 65,536 registers
    for (kernel, *wide, gpu), taken in shared.items():
        if wide and kernel in KERNELS[:5]:
            assert taken <= shared[kernel, gpu]  # a step of the sum takes no more where a number takes more
    assert all(f"`{kernel}`" in printed for kernel in KERNELS) and "estimate" in printed
    row = result["traffic"][0]
    assert (row["pass"], row["fused MB"], row["eager MB"]) == ("forward", "368.8", "827.9")


@pytest.mark.parametrize("environment, code, reason", [
    (dict(TRITON_INTERPRET="1"), "", "TRITON_INTERPRET=1"),
    (dict(TRITON_INTERPRET="0", RISCLIP_KERNELS="torch"), "", "RISCLIP_KERNELS=torch"),
    ({}, "sys.modules['triton'] = None", "Triton is not installed"),
])
def test_bench_says_in_a_line_why_it_cannot(environment, code, reason):
    code = f"import sys; {code}\nimport bench, data; sys.exit(files.run(bench_kernels.main, bench_kernels.parse_args(['kernels'])))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, text=True,
                          capture_output=True)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {reason}") and done.stderr.count("\n") == 1


def test_a_place_that_cannot_be_written_is_said_in_a_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    args, measured = bench_kernels.parse_args(["kernels", "--json", str(tmp_path / "file" / "x.json")]), []
    args.run = measured.append
    assert files.run(bench_kernels.main, args) == 2 and not measured
    assert "cannot be written" in capsys.readouterr().err


OTHER_DTYPES = """
import json, sys, torch, bench
x, weight = (getattr(torch, name) for name in sys.argv[1:3])
inputs = [t.to(weight if 0 < i < 5 else x) for i, t in enumerate(bench_kernels.adapter_inputs(2463, 640, 464, device="meta"))]
launches = bench_kernels.count_fused("adapter", inputs)[1].launches
logits, target = bench_kernels.loss_inputs(32, 1600, device="meta")
launches += bench_kernels.count_fused("dice_focal", [logits.to(x), target])[1].launches
print(json.dumps(bench_kernels.compile_all(launches, map(int, sys.argv[3:]))))
"""


def test_products_in_fp32_are_not_rounded_to_tf32():
    """No tensor core. On one GPU here, on all in the next test."""
    compiled = json.loads(without_interpreter("-c", OTHER_DTYPES, "float32", "float32", "80"))
    assert_clean(compiled, tensor_core=False, gpus=[80])


@pytest.mark.slow
@pytest.mark.parametrize("x, weight", [("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "float16"),
                                       ("float32", "float32")])
def test_every_kernel_compiles_in_other_dtypes(x, weight):
    """Without autocast, in fp16 also with it. H is 464, which is what 449 is padded to, and N odd."""
    compiled = json.loads(without_interpreter("-c", OTHER_DTYPES, x, weight, "80", "90", "100"))
    assert_clean(compiled, tensor_core=weight != "float32")


OTHER_GPUS = """
import json, re, triton, bench
from triton.backends.compiler import GPUTarget
from support import files
launches = bench_kernels.count_fused("dice_focal", bench_kernels.loss_inputs(32, 1600, device="meta"))[1].launches
launches += bench_kernels.training_launches()
for c in bench_kernels.compile_all(launches, (86, 89, 120)):
    print(json.dumps([f"sm_{c['capability']}", c["kernel"], c["spilled"], c["shared"]]))
for kernel, arguments, options in {bench_kernels.source(*launch[:2]).hash(): launch for launch in launches}.values():
    for arch in ("gfx942", "gfx950"):
        compiled = triton.compile(bench_kernels.source(kernel, arguments), target=GPUTarget("hip", arch, 64), options=options)
        spilled = sum(map(int, re.findall(r"gpr_spill_count: *(\\d+)", compiled.asm["amdgcn"])))
        print(json.dumps([arch, kernel.__name__, spilled, compiled.metadata.shared]))
"""


@pytest.mark.slow
def test_every_kernel_compiles_for_consumer_cards_and_for_amd():
    """RTX 3090, 4090 and 5090 (99 KiB of shared memory a block), MI300X (64 KiB) and MI350X (160 KiB)."""
    shared = {"sm_86": 101376, "sm_89": 101376, "sm_120": 101376, "gfx942": 65536, "gfx950": 163840}
    compiled = [json.loads(line) for line in without_interpreter("-c", OTHER_GPUS).splitlines()]
    for arch, kernel, spilled, taken in compiled:
        allowed = 2 if (arch, kernel) == ("gfx942", "_dpre_kernel") else 0  # registers of 256
        over = 256 if (arch, kernel) == ("gfx942", "_dpre_kernel") else 0  # kernels/adapter.py says so
        assert spilled <= allowed and taken <= shared[arch] + over, (arch, kernel, spilled, taken)
    assert {(arch, kernel) for arch, kernel, *_ in compiled} == {(a, k) for a in shared for k in KERNELS}


# ---- counting -------------------------------------------------------------------------------------------------------

def test_eager_bytes_are_those_of_its_operators():
    N, D, H = 96, 32, 16
    forward, _ = bench_kernels.count_eager(kernels.adapter_reference, bench_kernels.adapter_inputs(N, D, H, device="meta"))
    x, h, w = N * D, N * H, D * H
    linear = (x + w + H + h) + (h + w + D + x)  # down and up, each with its bias
    assert forward.megabytes() == 2 * (linear + 2 * h + (D + 2 * x) + 3 * x) / 1e6  # relu, times scale, plus x


def test_fused_bytes_are_those_of_the_docstring():
    N, D, H = 51232, 896, 448
    forward, both = bench_kernels.count_fused("adapter", bench_kernels.adapter_inputs(N, D, H, device="meta"))
    x, h, w = N * D, N * H, D * H
    assert forward.megabytes() == 2 * ((x + w + H + h) + (h + w + D + D + x + x)) / 1e6
    m, parts = -(-N // 128), -(-N // 6144)
    products = 2 * ((x + D + w + 2 * h) + (h + w + 2 * x) + (h + x) + (x + h))  # dpre, dx, dw_down, dw_up
    partial = 4 * (m * H + m * D + 2 * parts * w)  # written by the kernels, read by torch, which adds them up
    sums = 4 * (H + D + 2 * w)
    last = 6 * w + 12 * w + 4 * w + 4 * D + 6 * D + 12 * D + 12 * D + 6 * D  # dscale
    last += 6 * D + (4 * D + 8 * w) + 12 * D + 6 * (2 * w + H + D)  # dw_up, db_up; four casts
    assert both.megabytes() == pytest.approx(forward.megabytes() + (products + 2 * partial + sums + last) / 1e6)


def test_the_docstrings_state_what_is_counted():
    """kernels/adapter.py and kernels/dice_focal.py in MB."""
    inputs = bench_kernels.adapter_inputs(51232, 896, 448, device="meta")
    counts = *bench_kernels.count_eager(kernels.adapter_reference, inputs), *bench_kernels.count_fused("adapter", inputs)
    assert [round(c.megabytes()) for c in counts] == [828, 2484, 369, 1141]
    inputs = bench_kernels.loss_inputs(32, 2, 640, 640, device="meta")
    eager, fused = bench_kernels.count_eager(kernels.dice_focal_reference, inputs), bench_kernels.count_fused("dice_focal", inputs)
    counts = [(forward.megabytes(), both.megabytes() - forward.megabytes()) for forward, both in (eager, fused)]
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
        bench_kernels.check("fused", lambda *t: wrong(*t[:-1], scale=t[-1]), kernels.adapter_reference, inputs, dy)
    inputs = bench_kernels.loss_inputs(2, 2, 9, 9, device="cpu")
    with force("triton"):
        bench_kernels.check("fused", kernels.dice_focal, kernels.dice_focal_reference, inputs, torch.ones(()))


def test_three_paths_are_timed_forward_and_with_backward(monkeypatch):
    """The compiled one is checked as well. Compiling and the clock are put aside here."""
    monkeypatch.setattr("triton.testing.do_bench", lambda function: len(function()))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    inputs = bench_kernels.loss_inputs(3, 5, device="cpu")
    assert bench_kernels.measure(*[lambda x, t: x.sigmoid() * t] * 2, inputs) == ([3] * 3, [2] * 3)  # rows; output and gradient
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda *inputs: 2 * function(*inputs))
    with pytest.raises(SystemExit, match="torch.compile is wrong"):
        bench_kernels.measure(*[lambda x, t: x.sigmoid() * t] * 2, inputs)


# ---- the model ------------------------------------------------------------------------------------------------------

def test_flops_of_the_parts_are_those_of_the_docstring(tiny):
    """Of tiny at 96 pixels: 144 patches of 8, width 128, 6 layers, the last without attention; 12 Adapters of 64."""
    tokens = tiny.tokenize(["the small red circle"])
    n, T, D = 145, tokens.size(1), 128
    with torch.no_grad(), bench_model.Flops(tiny) as flops:
        tiny(torch.zeros(1, 3, 96, 96), tokens)
    patches = 2 * 144 * 3 * 8**2 * D
    layers = 5 * (24 * n * D**2 + 4 * n**2 * D) + n * (2 * 2 + 2 * 8) * D**2
    assert flops.parts["image tower"] == patches + layers
    # its projection is dispatched after the last module of the towers, an Adapter's
    projections = 2 * T * D**2 + 2 * 144 * D**2
    assert flops.parts["Adapters"] == 12 * 4 * n * D * 64 + 6 * 4 * T * D * 64 + projections
    assert flops.parts["text tower"] == 3 * (24 * T * D**2 + 4 * T**2 * D)
    assert flops.parts["decoder"] == 0
    towers, cfe = 5 * 4 * n**2 * D + 3 * 4 * T**2 * D, 3 * 2 * 4 * n * T * D
    ske = 2 * (2 * 4 * 144 * T + 4 * 144**2 + 4 * T**2) * D
    assert flops.attention == towers + cfe + ske


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_flops_are_counted_on_every_path(tiny, precision, monkeypatch):
    """With a graph, with fused kernels, with attention that writes its scores, and with layers computed again."""
    monkeypatch.setattr("risclip.computes_bf16", lambda device: True)
    tiny = bench_model.build(bench_kernels.parse_args(["model", "--device", "cpu"]), precision, 32)
    batch = bench_model.made_up(tiny, 1)

    def count(run):
        with bench_model.Flops(tiny) as flops:
            run()
        return flops.parts, flops.attention

    expected = count(lambda: bench_model.infer(tiny, batch))
    assert expected[1] > 0
    assert count(lambda: tiny(batch["images"], batch["tokens"])) == expected
    with force("triton"):
        assert count(lambda: bench_model.infer(tiny, batch)) == expected
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert count(lambda: bench_model.infer(tiny, batch)) == expected


def test_memory_kept_for_backward_counts_each_tensor_once_and_no_weight():
    linear = torch.nn.Linear(5, 7)
    x = torch.randn(3, 5)
    # x for the weight's gradient, in both products; relu's output; square's input, which is that output
    assert bench_model.kept_bytes(linear, lambda: (linear(x) + linear(x)).relu().square().sum()) == 4 * (3 * 5 + 3 * 7)


def test_memory_kept_by_a_sample_is_none_of_the_copies_of_weights():
    linear = torch.nn.Linear(5, 7)

    def forward(x):
        with torch.autocast("cpu", torch.bfloat16):
            return linear(x.requires_grad_()).relu().sum()

    one, two = torch.randn(3, 5), torch.randn(6, 5)
    assert bench_model.kept_bytes(linear, lambda: forward(one)) == 2 * (3 * 5 + 3 * 7 + 7 * 5)
    assert bench_model.kept_by_a_sample(linear, forward, one, two) == 2 * (3 * 5 + 3 * 7)


def test_layers_that_are_computed_again_keep_their_input_and_count_in_the_backward_pass():
    """torch's checkpoint: what is inside keeps nothing."""
    tiny = bench_model.build(bench_kernels.parse_args(["model", "--device", "cpu"]), "fp32", 32)
    x = torch.randn(2, 17, 128, requires_grad=True)

    def forward():
        return torch.utils.checkpoint.checkpoint(tiny.image_adapters[0][0], x, use_reentrant=False).sum()

    assert bench_model.kept_bytes(tiny, forward) == x.nbytes
    with bench_model.Flops(tiny) as flops:
        forward().backward()
    product = 2 * 2 * 17 * 128 * 64
    assert flops.parts == {"Adapters": 2 * product, "backward": 2 * product + 4 * product}


def test_stage_2_stops_at_a_gradient_graph_below_the_decoder(tiny):
    tiny.add_decoder()
    locate, decode = bench_model.stage_2_apart(tiny)
    decoder = tiny.decoder
    locate()
    decode()
    assert tiny.decoder is decoder
    assert {name.split(".")[0] for name, p in tiny.named_parameters() if p.grad is not None} == {"decoder"}
    for learns in (tiny.image_adapters[0], tiny.map_threshold):  # features and map, then the map alone
        learns.requires_grad_(True)
        with pytest.raises(SystemExit, match="gradient graph below the decoder"):
            bench_model.stage_2_apart(tiny)
        learns.requires_grad_(False)


def test_the_cost_command_draws_and_explains(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench_model.SIZES, "tiny", (16, 32))
    monkeypatch.setattr(bench, "SENTENCES", (1, 3))
    monkeypatch.setattr(bench, "IMAGES", (1, 3))
    out, file = tmp_path / "cost.png", tmp_path / "cost.json"
    bench_kernels.main(bench_kernels.parse_args(["cost", "--runs", "1", "--precision", "fp32", "--device", "cpu", "--out", str(out),
                                 "--json", str(file)]))
    assert Image.open(out).size == (1680, 630)
    result = json.loads(file.read_text())
    one, sentences, images, large = result["points"]
    assert [(p["image_size"], p["sentences"], p["images"]) for p in result["points"]] == [
        (16, 1, 1), (16, 3, 1), (16, 1, 3), (32, 1, 1)]
    for work in "flops", "attention":
        assert images[work] == 3 * one[work] > sentences[work] and large[work] > one[work]
    assert images["kept"] == pytest.approx(3 * one["kept"], rel=0.01) and sentences["kept"] < images["kept"]
    printed = capsys.readouterr().out
    shared = 1 - (sentences["flops"] - one["flops"]) / 2 / one["flops"]
    assert "3.00 times the FLOPs of one" in printed and f"{shared:.0%} of what one takes" in printed


@pytest.mark.parametrize("command, reason", [
    ("model --runs 0", "--runs 0: give 1 or more"), ("model --sentences 0", "--sentences 0: give 1 or more"),
    ("loader --batch-size 0", "--batch-size 0: give 1"), ("loader --workers -1", "--workers -1: give 0 or more"),
    ("model --json /", "/ is a folder"), ("model --image-size 50", "multiple of the patch size 8"),
    ("cost --device nowhere", "--device nowhere"),
    ("cost --out cost.doc", "no picture format"), ("model --precision bf16", "no instructions for it"),
])
def test_what_cannot_be_measured_is_refused_in_a_line(command, reason, monkeypatch, capsys):
    monkeypatch.setattr("risclip.computes_bf16", lambda device: False)
    assert files.run(bench_kernels.main, bench_kernels.parse_args(command.split())) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


def test_the_model_command_has_a_row_for_each_kind_of_work(tmp_path, capsys):
    bench_kernels.main(bench_kernels.parse_args(["model", "--image-size", "48", "--runs", "1", "--sentences", "2", "--device", "cpu",
                                 "--json", str(tmp_path / "m.json")]))
    rows = [row for row in json.loads((tmp_path / "m.json").read_text())["rows"] if row["precision"] == "fp32"]
    assert len(rows) == 4 and all(float(row["share"]) > 0 for row in rows)
    assert float(rows[1]["GFLOP"]) < 2 * float(rows[0]["GFLOP"])  # two sentences share their image's lower layers
    assert [row["MB kept"] == "-" for row in rows] == [True, True, False, False]
    assert [row["decoder"] == "0%" for row in rows] == [True, True, True, False]
    printed = capsys.readouterr().out
    assert "share" in printed and "fp32: sentences/s, 2 of an image over 1: " in printed
    assert "decoder's own forward and backward: " in printed


def test_the_model_command_measures_a_piece_alone(tmp_path, capsys):
    file = tmp_path / "m.json"
    bench_kernels.main(bench_kernels.parse_args(["model", "--image-size", "32", "--runs", "1", "--device", "cpu", "--json", str(file),
                                 "--precision", "fp32", "--only", "stage2"]))
    result = json.loads(file.read_text())
    assert [(row[""], row["precision"]) for row in result["rows"]] == [("stage 2, a sample", "fp32")]
    assert len(result["ratios"]) == 2 and all(ratio > 0 for ratio in result["ratios"].values())


def test_the_loader_command_reads_every_sentence_of_the_plan(world, capsys):
    bench_kernels.main(bench_kernels.parse_args(["loader", "--data-root", str(world), "--image-size", "32", "--epochs", "1", "--runs",
                                 "1"]))
    one, four = capsys.readouterr().out.strip().splitlines()
    assert one.startswith("1 of an image") and one.endswith("1.00 of one by one") and four.startswith("4 of an image")
