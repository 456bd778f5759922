"""experiments/bench_model.py: FLOPs, bytes kept for backward and rates are counted right."""

import json

import pytest
import torch
import torch.utils.checkpoint
from kernel_proof import force
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from experiments import bench_model
from support import files, inference

ARGS = ["--device", "cpu"]


def bench(*flags):
    """Runs the command."""
    bench_model.main(bench_model.parse_args([*flags, *ARGS]))


def test_flops_of_the_parts_are_those_of_the_docstring(tiny):
    """Of tiny at 96 pixels: 144 patches of 8, width 128, 6 layers, the last without attention; 12
    Adapters of 64."""
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
    """With a graph, with fused kernels, and with attention that writes its scores."""
    monkeypatch.setattr(inference, "computes_bf16", lambda device: True)
    tiny = bench_model.build(bench_model.parse_args(ARGS), precision, 32)
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
    with sdpa_kernel(SDPBackend.MATH):
        assert count(lambda: bench_model.infer(tiny, batch)) == expected


def test_memory_kept_for_backward_counts_each_tensor_once_and_no_weight():
    linear = torch.nn.Linear(5, 7)
    x = torch.randn(3, 5)
    # x for the weight's gradient, in both products; relu's output, which is square's input
    kept = bench_model.kept_bytes(linear, lambda: (linear(x) + linear(x)).relu().square().sum())
    assert kept == 4 * (3 * 5 + 3 * 7)


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
    tiny = bench_model.build(bench_model.parse_args(ARGS), "fp32", 32)
    x = torch.randn(2, 17, 128, requires_grad=True)

    def forward():
        return checkpoint(tiny.image_adapters[0][0], x, use_reentrant=False).sum()

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
    learned = {name.split(".")[0] for name, p in tiny.named_parameters() if p.grad is not None}
    assert learned == {"decoder"}
    # Features and map, then the map alone.
    for learns in (tiny.image_adapters[0], tiny.map_threshold):
        learns.requires_grad_(True)
        with pytest.raises(SystemExit, match="gradient graph below the decoder"):
            bench_model.stage_2_apart(tiny)
        learns.requires_grad_(False)


def test_the_plot_is_drawn_and_its_growth_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench_model.SIZES, "tiny", (16, 32))
    monkeypatch.setattr(bench_model, "SENTENCES", (1, 3))
    monkeypatch.setattr(bench_model, "IMAGES", (1, 3))
    out, file = tmp_path / "cost.png", tmp_path / "cost.json"
    bench("--plot", str(out), "--runs", "1", "--precision", "fp32", "--json", str(file))
    assert Image.open(out).size == (1680, 630)
    result = json.loads(file.read_text())
    one, sentences, images, large = result["points"]
    shapes = [(p["image_size"], p["sentences"], p["images"]) for p in result["points"]]
    assert shapes == [(16, 1, 1), (16, 3, 1), (16, 1, 3), (32, 1, 1)]
    for work in "flops", "attention":
        assert images[work] == 3 * one[work] > sentences[work] and large[work] > one[work]
    assert images["kept"] == pytest.approx(3 * one["kept"], rel=0.01)
    assert sentences["kept"] < images["kept"]
    size, sentence, image = capsys.readouterr().out.splitlines()[4:7]
    assert size.startswith("| image size in pixels | 16 | 32 | 4.00 x |")
    grown = sentences["flops"] / one["flops"]
    assert sentence.startswith(f"| sentences of an image | 1 | 3 | 1.00 x | {grown:.2f} x |")
    assert image.startswith("| images of a batch | 1 | 3 | 1.00 x | 3.00 x |")


@pytest.mark.parametrize("command, reason", [
    ("--runs 0", "--runs 0: give 1 or more"), ("--sentences 0", "--sentences 0: give 1 or more"),
    ("--image-size 0", "--image-size 0: give 1 or more"), ("--json /", "/ is a folder"),
    ("--image-size 50", "multiple of the patch size 8"),
    ("--plot x.png --device nowhere", "--device nowhere"),
    ("--plot cost.doc", "no picture format"),
    ("--precision bf16", "no instructions for it"),
])
def test_what_cannot_be_measured_is_refused_in_a_line(command, reason, monkeypatch, capsys):
    monkeypatch.setattr(bench_model, "computes_bf16", lambda device: False)
    args = bench_model.parse_args([*ARGS, *command.split()])
    assert files.run(bench_model.main, args) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


def test_there_is_a_row_for_each_kind_of_work(tmp_path, capsys):
    file = tmp_path / "m.json"
    bench("--image-size", "48", "--runs", "1", "--sentences", "2", "--json", str(file))
    rows = json.loads(file.read_text())["rows"]
    rows = [row for row in rows if row["precision"] == "fp32"]
    assert len(rows) == 4 and all(float(row["share"]) > 0 for row in rows)
    # Two sentences share their image's lower layers.
    assert float(rows[1]["GFLOP"]) < 2 * float(rows[0]["GFLOP"])
    assert [row["MB kept"] == "-" for row in rows] == [True, True, False, False]
    assert [row["decoder"] == "0%" for row in rows] == [True, True, True, False]
    printed = capsys.readouterr().out
    assert "share" in printed and "fp32: sentences/s, 2 of an image over 1: " in printed
    assert "decoder's own forward and backward: " in printed


def test_a_piece_is_measured_alone(tmp_path):
    file = tmp_path / "m.json"
    bench("--image-size", "32", "--runs", "1", "--json", str(file), "--precision", "fp32",
          "--only", "stage2")
    result = json.loads(file.read_text())
    rows = [(row[""], row["precision"]) for row in result["rows"]]
    assert rows == [("stage 2, a sample", "fp32")]
    assert len(result["ratios"]) == 2 and all(ratio > 0 for ratio in result["ratios"].values())


def test_flops_of_a_forward_pass_are_those_of_torchs_own_counter(tiny):
    """Which does not know the CPU's fused attention: without it."""
    tokens = tiny.tokenize(["the small red circle"])
    images = torch.zeros(1, 3, 96, 96)
    with (torch.no_grad(), sdpa_kernel(SDPBackend.MATH),
          FlopCounterMode(display=False) as counter):
        tiny(images, tokens)
    assert bench_model.count_flops(tiny, images, tokens) == counter.get_total_flops()
