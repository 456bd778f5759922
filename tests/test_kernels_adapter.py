"""The Adapter kernels against float64, their memory traffic, what torch.library asks for, and
whether any change shows.

Everything runs in Triton's interpreter. Compiling for GPUs: test_bench_kernels.py.
"""

import importlib
import os
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import triton.language as tl
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from kernel_proof import (
    ROOT,
    assert_all_caught,
    assert_traffic,
    exact_bf16,
    force,
    last_offsets,
    run,
    survivors,
    traffic,
)
from triton.runtime.interpreter import TensorHandle, interpreter_builder

import kernels
from kernels.backend import use_triton

adapter = importlib.import_module("kernels.adapter")  # the module; kernels.adapter is the function
HALF = (torch.bfloat16, torch.float16)


def tiles(module, block_m, block_n, block_k):
    """Small tiles, so that small tensors cross their edges."""
    return mock.patch.multiple(module, BLOCK_M=block_m, BLOCK_N=block_n,
                               BLOCK_K=dict.fromkeys(module.BLOCK_K, block_k))


def make(N, D, H, dtype=torch.float64, x_dtype=None, scale_dtype=None, size=1.0, seed=0):
    """x (N, D), the parameters and dy, of which `size` is the standard deviation of x, biases and
    scale."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape, size=size):
        return torch.randn(shape, generator=g, dtype=torch.float64) * size

    inputs = [
        random(N, D),
        random(H, D, size=D**-0.5),
        random(H),
        random(D, H, size=H**-0.5),
        random(D),
        random(D),
    ]
    inputs = [
        t.to(d or dtype) for t, d in zip(inputs, (x_dtype, dtype, dtype, dtype, dtype, scale_dtype))
    ]
    return [t.requires_grad_() for t in inputs], random(N, D).to(x_dtype or dtype)


def exactly(inputs, dy):
    """Output and gradients of the reference in float64, from the values that the kernels got."""
    return run(
        kernels.adapter_reference,
        [t.detach().double().requires_grad_() for t in inputs],
        dy.double(),
    )


def magnitudes(inputs, dy):
    """What the terms of each sum add up to in absolute value: rounding errors are relative to
    this."""
    return exactly([t.detach().abs() for t in inputs], dy.abs())


def rms(t):
    return t.double().square().mean().sqrt().item()


def assert_close(got, inputs, dy, tolerance):
    for name, a, b, size in zip(
        ("y", "dx", "dw_down", "db_down", "dw_up", "db_up", "dscale"),
        got,
        exactly(inputs, dy),
        magnitudes(inputs, dy),
    ):
        error = ((a - b).abs() / size).max().item()
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def assert_as_good_as_eager(got, inputs, dy):
    """bf16 and fp16: at most 1.5 times eager's error against float64, root mean squares over each
    tensor."""
    names = ("y", "dx", "dw_down", "db_down", "dw_up", "db_up", "dscale")
    for name, a, b, exact in zip(
        names, got, run(kernels.adapter_reference, inputs, dy), exactly(inputs, dy)
    ):
        assert a.dtype == b.dtype and rms(a - exact) <= 1.5 * rms(b - exact), (
            f"{name}: error {rms(a - exact):.1e}, eager {rms(b - exact):.1e}")


# ---- kernel equals reference, by property ------------------------------------------------------

SIZES = [1, 2, 3, 7, 13, 16, 17, 31, 32, 33, 47, 48, 50]


@st.composite
def cases(draw):
    dtype = draw(
        st.sampled_from(
            [torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]
        )
    )
    # A mean over few roundings is a matter of luck: small shapes have the test after this.
    sizes = SIZES[7:] if dtype in HALF else SIZES
    N, D, H = (draw(st.sampled_from(sizes)) for _ in "NDH")
    size = draw(st.sampled_from([0.1, 1.0, 10.0] if dtype in HALF else [1e-3, 1.0, 1e3]))
    blocks = draw(st.sampled_from([(16, 32), (32, 16), (16, 64), (64, 32), (64, 64)]))
    strides = draw(
        st.sampled_from(
            ["rows", "columns", "every second", "batch"] + ["one row"] * (dtype not in HALF)
        )
    )
    x_dtype, scale_dtype = (
        draw(st.sampled_from([dtype, torch.float32])) if dtype in HALF else dtype for _ in "xs"
    )
    made = N, D, H, dtype, x_dtype, scale_dtype, size, draw(st.integers(0, 99))
    return made, (*blocks, draw(st.sampled_from([16, 32]))), strides, draw(st.booleans())


def restride(t, strides):
    """The same shape in another memory layout; "one row" repeats the first row with stride 0."""
    if strides == "columns":
        t = t.t().contiguous().t()
    elif strides == "every second":
        t = torch.stack([t, t], 2).flatten(1)[:, ::2]
    elif strides == "one row":
        t = t[:1].expand_as(t)
    return t


def unpadded(x, *parameters):
    """adapter's Triton path with an odd H left odd."""
    return adapter._adapter_op(x.flatten(0, -2), *adapter._checked(x, *parameters))[0].view(x.shape)


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate, Phase.shrink],
)
@given(cases())
def test_output_and_gradients_equal_float64(case):
    made, block, strides, padded = case
    inputs, dy = make(*made)
    dtype, x_dtype, scale_dtype = made[3:6]
    inputs = [restride(t.detach(), strides).requires_grad_() if t.dim() == 2 else t for t in inputs]
    dy = restride(dy, strides)
    if strides == "batch":
        inputs[0], dy = inputs[0].detach()[None, :, None].requires_grad_(), dy[None, :, None]
    x, w_down, b_down = (t.detach().double() for t in inputs[:3])
    pre, terms = x @ w_down.t() + b_down, x.abs() @ w_down.abs().t() + b_down.abs()
    # Rounding may not decide on which side of relu's corner a unit is.
    assume((pre.abs() > 1e-5 * terms).all())
    autocast = torch.autocast("cpu", dtype, {dtype} != {x_dtype, scale_dtype})
    with exact_bf16(), tiles(adapter, *block), force("triton"), autocast:
        got = run(kernels.adapter if padded else unpadded, inputs, dy)
        assert got[0].dtype == x_dtype and got[0].shape == inputs[0].shape
        if dtype in HALF:
            assert_as_good_as_eager(got, inputs, dy)
        else:
            assert_close(got, inputs, dy, 1e-5 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 33, 16), (3, 2, 5), (17, 3, 1), (16, 33, 31)])
def test_half_precision_in_small_shapes(shape, dtype):
    """As assert_as_good_as_eager; a few roundings are a matter of luck, so the errors of many draws
    are pooled."""
    squares = torch.zeros(7, 2, dtype=torch.float64)  # of ours, of eager's
    for seed in range(40):
        inputs, dy = make(*shape, dtype, seed=seed)
        with exact_bf16(), force("triton"):
            paths = run(unpadded, inputs, dy), run(kernels.adapter_reference, inputs, dy)
        for row, *both, exact in zip(squares, *paths, exactly(inputs, dy)):
            row += torch.stack([(t - exact).square().sum() for t in both])
    assert (squares[:, 0] <= 1.5**2 * squares[:, 1]).all(), (squares[:, 0] / squares[:, 1]).sqrt()


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 3), (17, 20, 18)])
def test_gradcheck_in_float64_with_respect_to_every_input(shape):
    inputs, _ = make(*shape)
    with force("triton"), tiles(adapter, 16, 16, 16):
        assert torch.autograd.gradcheck(kernels.adapter, inputs, fast_mode=True)


def test_the_patched_interpreter_rounds_as_torch_does():
    x = torch.randn(7, 8) * torch.logspace(-42, 38, 8)  # includes subnormal numbers
    with exact_bf16():
        wide = TensorHandle(x.numpy(), tl.float32)
        narrow = interpreter_builder.cast_impl(wide, tl.bfloat16)
        again = interpreter_builder.cast_impl(narrow, tl.float32)
    assert torch.equal(torch.from_numpy(again.data), x.bfloat16().float())


# ---- which path runs ---------------------------------------------------------------------------

FOUR = ["_down_kernel", "_up_kernel", "_dpre_kernel", "_dx_kernel"]


def test_triton_runs_where_it_is_asked_for_and_torch_elsewhere():
    inputs, dy = make(5, 8, 16)
    with traffic() as launches:
        run(kernels.adapter, inputs, dy)  # a CPU tensor
        run(kernels.adapter_reference, inputs, dy)
        with force("torch"):
            run(kernels.adapter, inputs, dy)
        assert launches == []
        with force("triton"):
            run(kernels.adapter, inputs, dy)
    assert [launch.kernel for launch in launches] == FOUR


def test_a_gpu_gets_triton_unless_it_is_too_old_or_float64_or_triton_is_missing(monkeypatch):
    """No GPU here: something that says of itself what a CUDA tensor does."""
    def tensor(is_cuda, dtype):
        return SimpleNamespace(is_cuda=is_cuda, dtype=dtype, device="a device")

    capability = mock.Mock(return_value=(8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    assert use_triton(tensor(True, torch.bfloat16)) and not use_triton(tensor(True, torch.float64))
    assert not use_triton(tensor(False, torch.bfloat16))
    with force("triton"):
        assert use_triton(tensor(False, torch.float64))  # in the interpreter
    with force("torch"):
        assert not use_triton(tensor(True, torch.bfloat16))
    capability.return_value = (7, 5)
    assert not use_triton(tensor(True, torch.float16))
    capability.assert_called_with("a device")
    with force("triton"):
        assert use_triton(tensor(True, torch.float16))  # who asks for it, gets it
    with mock.patch.object(torch.version, "hip", "6.4"):
        assert use_triton(tensor(True, torch.float16))
    capability.return_value = (9, 0)
    monkeypatch.setattr(kernels.backend, "INSTALLED", False)
    assert not use_triton(tensor(True, torch.bfloat16))


def test_a_gpu_gets_torch_where_a_kernel_would_not_pay_unless_triton_is_forced(monkeypatch):
    """Few rows, or products in float32."""
    asked = []
    monkeypatch.setattr(adapter, "use_triton", lambda x, worthwhile: asked.append(worthwhile))
    for N, dtype in ((8192, torch.bfloat16), (8191, torch.bfloat16), (8192, torch.float32)):
        kernels.adapter(*make(N, 3, 2, dtype)[0])
    with torch.autocast("cpu", torch.bfloat16):
        kernels.adapter(*make(8192, 3, 2, torch.float32)[0])
    assert asked == [True, False, False, True]
    card = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device="a device")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert use_triton(card) and not use_triton(card, worthwhile=False)
    with force("triton"):
        assert use_triton(card, worthwhile=False)


def test_an_odd_bottleneck_is_padded_for_speed_without_changing_the_result():
    inputs, dy = make(3, 8, 449)
    with force("triton"), traffic() as launches:
        got = run(kernels.adapter, inputs, dy)
    assert {launch.arguments["H"] for launch in launches[:4]} == {464}
    assert_close(got, inputs, dy, 1e-13)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 1, 3), (0,), (2, 0)])
def test_any_leading_dimensions_even_empty_ones(shape):
    inputs, _ = make(1, 6, 5)
    x = torch.randn(*shape, 6, dtype=torch.float64, requires_grad=True)
    with force("triton"):
        got = run(lambda *t: kernels.adapter(*t).sum(), [x, *inputs[1:]])  # sum: dy has stride 0
    want = run(lambda *t: kernels.adapter_reference(*t).sum(), [x, *inputs[1:]])
    for a, b in zip(got, want):
        assert a.shape == b.shape and torch.allclose(a, b)


def test_the_same_input_gives_the_same_bits():
    """The interpreter runs programs one after another, so what proves it is that traffic() allows
    no atomics."""
    inputs, dy = make(40, 24, 16, torch.float32)
    with traffic(), force("triton"), tiles(adapter, 16, 16, 16):
        for a, b in zip(run(kernels.adapter, inputs, dy), run(kernels.adapter, inputs, dy)):
            assert torch.equal(a, b)


def test_of_all_that_has_a_row_for_every_row_of_x_only_x_and_h_are_kept_for_backward():
    (x, *parameters), _ = make(37, 8, 16)
    kept = []
    with (
        force("triton"),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        kernels.adapter(x, *parameters)
    rows = [t for t in kept if 37 in t.shape]
    assert [tuple(t.shape) for t in rows] == [(37, 8), (37, 16)]
    assert rows[0].data_ptr() == x.data_ptr()


def test_opcheck_of_both_operators():
    inputs, dy = make(9, 6, 5)
    torch.library.opcheck(adapter._adapter_op, inputs)
    x, w_down, _, w_up, b_up, scale = (t.detach() for t in inputs)
    h = adapter._adapter_op(*inputs)[1].detach()
    torch.library.opcheck(adapter._backward_op, (dy, x, h, w_down, w_up, b_up, scale))


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("autocast", [False, True])
def test_compile_keeps_one_graph(backend, autocast):
    torch.compiler.reset()
    inputs, dy = make(9, 6, 5, torch.float32)
    compiled = torch.compile(kernels.adapter, fullgraph=True, backend="aot_eager")
    with force(backend), exact_bf16(), torch.autocast("cpu", torch.bfloat16, autocast):
        for a, b in zip(run(compiled, inputs, dy), run(kernels.adapter, inputs, dy)):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


# ---- autocast, bad input -----------------------------------------------------------------------

@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "scale_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16]
)
def test_under_autocast_x_and_scale_keep_their_dtypes_and_each_gradient_has_its_parameters(
    backend, x_dtype, scale_dtype
):
    inputs, dy = make(24, 20, 18, torch.float32, x_dtype, scale_dtype)
    with force(backend), exact_bf16(), torch.autocast("cpu", torch.bfloat16):
        got = run(kernels.adapter, inputs, dy)
        assert [t.dtype for t in got] == [x_dtype] * 2 + [torch.float32] * 4 + [scale_dtype]
        if backend == "triton":
            assert_as_good_as_eager(got, inputs, dy)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast_does_not_round_the_scaler(backend):
    inputs, dy = make(3, 8, 16, torch.float32)
    with torch.no_grad():
        for t in inputs[:4]:
            t.zero_()
        inputs[4].fill_(1)  # b_up: z = 1, and so y = scale
    with force(backend), exact_bf16(), torch.autocast("cpu", torch.bfloat16):
        got = run(kernels.adapter, inputs, dy)
    assert torch.equal(got[0], inputs[5].detach().expand(3, 8))
    assert torch.allclose(got[-1], dy.sum(0), rtol=1e-6)  # dscale, not rounded to bf16 either


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    "which, bad, message",
    [
        (0, torch.ones(2, 6, dtype=torch.int64), "x must be floating point"),
        (
            0,
            torch.ones(2, 6).to(torch.float8_e4m3fn),
            r"x must be floating point.*float8_e4m3fn of shape \(2, 6\)",
        ),
        (0, torch.ones(2, 0), r"x must be .*D > 0.*shape \(2, 0\)"),
        (0, torch.ones(2, 7), r"w_down .*\(5, 6\).*\(5, 7\).*\(2, 7\)"),
        (0, torch.tensor(1.0), r"x must be .*shape \(\)"),
        (1, torch.ones(5), r"w_down .*\(5,\).*\(5, 6\)"),
        (1, torch.tensor(1.0), r"w_down .*\(\).*\(0, 6\)"),
        (2, torch.ones(6), r"b_down .*\(6,\).*\(5,\)"),
        (3, torch.ones(5, 6), r"w_up .*\(5, 6\).*\(6, 5\)"),
        (4, torch.ones(5), r"b_up .*\(5,\).*\(6,\)"),
        (5, torch.ones(1), r"scale .*\(1,\).*\(6,\)"),
        (
            1,
            torch.ones(5, 6, dtype=torch.float64),
            r"w_down is torch.float64 of shape \(5, 6\).*float32 of shape \(2, 6\)",
        ),
        (5, torch.ones(6, dtype=torch.bfloat16), "scale is torch.bfloat16.*torch.float32"),
        (4, torch.ones(6, device="meta"), "b_up .* on meta.* on cpu"),
    ],
)
def test_bad_input_is_a_value_error_before_any_launch(backend, which, bad, message):
    inputs = [t.detach() for t in make(2, 6, 5, torch.float32)[0]]
    inputs[which] = bad
    with force(backend), traffic() as launches:
        for function in (kernels.adapter, kernels.adapter_reference):
            with pytest.raises(ValueError, match=message):
                function(*inputs)
    assert launches == []


@pytest.mark.parametrize(
    "which, name, dtype",
    [(2, "b_down", torch.int32), (5, "scale", torch.int64), (5, "scale", torch.float8_e4m3fn)],
)
def test_integers_and_float8_are_refused_under_autocast_too(which, name, dtype):
    inputs = [t.detach() for t in make(2, 6, 5, torch.float32)[0]]
    inputs[which] = inputs[which].to(dtype)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=f"{name} is {dtype}"),
    ):
        kernels.adapter(*inputs)


# ---- the switch, and life without Triton -------------------------------------------------------

def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        text=True,
        capture_output=True,
    )


def test_the_environment_switches_and_a_typing_error_in_it_is_told():
    assert (
        python(
            "import kernels.backend as b; assert b.BACKEND == 'torch'", RISCLIP_KERNELS="torch"
        ).returncode
        == 0
    )
    assert (
        "RISCLIP_KERNELS must be triton or torch"
        in python("import kernels", RISCLIP_KERNELS="tritn").stderr
    )


ONES = """
import torch, kernels
x, w = torch.ones(2, 3), torch.ones(3, 3)
y, loss = kernels.adapter(x, w, w[0], w, w[0], w[0]), kernels.dice_focal(x, x > 0)
print(y.sum().item(), loss.item() > 0)
"""
# Import triton raises ImportError.
WITHOUT_TRITON = "import sys; sys.modules['triton'] = None" + ONES


def test_without_triton_plain_torch_runs():
    done = python(WITHOUT_TRITON)
    assert done.stdout == "84.0 True\n", done.stderr


@pytest.mark.parametrize("code, interpret, message", [
    (WITHOUT_TRITON, "1", "ImportError: RISCLIP_KERNELS=triton, but Triton is not installed: "),
    (ONES, "0", "RuntimeError: RISCLIP_KERNELS=triton, but a tensor is on cpu: "),
])
def test_triton_asked_for_where_it_cannot_run_is_said_in_a_sentence(code, interpret, message):
    done = python(code, RISCLIP_KERNELS="triton", TRITON_INTERPRET=interpret)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(message), done.stderr


# ---- traffic, wide offsets, and mutants, which this proof has to catch -------------------------

def cdiv(a, b):
    return -(-a // b)


def loads(size, length, block, times):
    """How often each element of A or W (size, length) is loaded: `times`, but those of the last
    row again for each row of the last tile that is past the end."""
    counts = np.full((size, length), times)
    counts[-1] *= 1 + -size % block
    return counts.ravel()


def assert_planned_traffic(module, launches, N, D, H):
    """Each element is loaded as often as the kernels' docstrings say, and stored once."""
    M, C = module.BLOCK_M, module.BLOCK_N
    m, d, h = cdiv(N, M), cdiv(D, C), cdiv(H, C)
    down, up, dpre, dx = launches
    assert_traffic(down, x_ptr=(loads(N, D, M, h), 0), w_ptr=(loads(H, D, C, m), 0),
                   bias_ptr=(m, 0), h_ptr=(0, 1))
    assert_traffic(up, h_ptr=(loads(N, H, M, d), 0), w_ptr=(loads(D, H, C, m), 0),
                   bias_ptr=(m, 0), scale_ptr=(m, 0), x_ptr=(1, 0), y_ptr=(0, 1))
    assert_traffic(dpre, dy_ptr=(loads(N, D, M, h), 0), w_ptr=(loads(H, D, C, m), 0),
                   scale_ptr=(m * h, 0), h_ptr=(1, 0), dpre_ptr=(0, 1), sum_ptr=(0, 1))
    assert_traffic(dx, dpre_ptr=(loads(N, H, M, d), 0), w_ptr=(loads(D, H, C, m), 0),
                   dy_ptr=(1, 0), dx_ptr=(0, 1), sum_ptr=(0, 1))


def run_kernels(module, inputs, dy):
    """Output and gradients as `run` has them, straight from the launchers: no padding of H, no
    autograd."""
    x, w_down, b_down, w_up, b_up, scale = (t.detach() for t in inputs)
    y, h = module.forward(x, w_down, b_down, w_up, b_up, scale)
    return [y, *module.backward(dy, x, h, w_down, w_up, b_up, scale)]


def prove(module):
    """Values, gradients and traffic on shapes whose every edge is cut, then offsets beyond 32
    bits."""
    # With k cut, with k whole in one of the two products, and with nothing cut but rows.
    for N, D, H, block in ((37, 23, 12, (16, 8, 8)), (5, 40, 49, (8, 16, 8)),
                           (19, 32, 16, (8, 16, 16))):
        inputs, dy = make(N, D, H)
        inputs[2].data[:4] = -5  # some hidden units are dead
        with traffic() as launches, tiles(module, *block):
            got = run_kernels(module, inputs, dy)
            assert_planned_traffic(module, launches, N, D, H)
        assert_close(got, inputs, dy, 1e-12)
    inputs, dy = make(24, 20, 18, torch.bfloat16, torch.float32, torch.float32)  # as under autocast
    with traffic(), tiles(module, 16, 16, 16), exact_bf16() as multiplied:
        got = run_kernels(module, inputs, dy)
    assert multiplied == {tl.bfloat16}  # what tensor cores need
    with torch.autocast("cpu", torch.bfloat16):
        assert_as_good_as_eager(got, inputs, dy)
    inputs, dy = make(3, 8, 8)
    inputs[0].data[1, 2] = torch.nan
    with traffic():
        got = run_kernels(module, inputs, dy)
    for a, b in zip(got, exactly(inputs, dy)):  # NaN where torch has it and nowhere else
        assert torch.allclose(a, b, equal_nan=True)
    assert_wide_offsets(module)


def assert_wide_offsets(module):
    """The last program of each launch at five million rows reaches the last element, beyond 32
    bits."""
    N, D, H, f = 5_000_001, 896, 448, tl.float32

    def reached(kernel, names, cols, EVEN):
        program = cdiv(N, 128) * cdiv(cols, 128) - 1, 0
        options = dict(EVEN=EVEN, DOT=f, ACC=f, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64)
        return last_offsets(kernel, dict.fromkeys(names, f), program, N, D, H, **options)

    m = cdiv(N, 128)
    x, h, w = N * D - 1, N * H - 1, H * D - 1
    for even in (True, False):
        assert reached(module._down_kernel, ["x", "w", "b", "h"], H, even) == dict(
            x=x, w=w, b=H - 1, h=h)
        assert reached(module._up_kernel, ["h", "w", "b", "scale", "x", "y"], D, even) == dict(
            h=h, w=w, b=D - 1, scale=D - 1, x=x, y=x)
        assert reached(module._dpre_kernel, ["dy", "s", "w", "h", "dpre", "sum"], H, even) == dict(
            dy=x, s=D - 1, w=w, h=h, dpre=h, sum=m * H - 1)
        assert reached(module._dx_kernel, ["dpre", "w", "dy", "dx", "sum"], D, even) == dict(
            dpre=h, w=w, dy=x, dx=x, sum=m * D - 1)


def test_values_gradients_traffic_and_wide_offsets():
    prove(adapter)


# Changes that cannot show: where W is padded with 1 instead of 0, A is 0, and relu of 0 is 0 on
# both sides.
EQUIVALENT = [
    "w = tl.load(w_ptrs, mask=k_ok[:, None], other=1.0)",
    "h = tl.where(pre <= 0, 0.0, pre)",
]


@pytest.mark.filterwarnings("ignore")  # mutants divide by zero
def test_a_change_in_the_kernels_is_caught(tmp_path):
    """A tenth of the mutants; test_any_change_in_the_kernels_is_caught runs all."""
    assert_all_caught(survivors("adapter", prove, tmp_path, every=10), 30, EQUIVALENT)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_any_change_in_the_kernels_is_caught(tmp_path):
    assert_all_caught(survivors("adapter", prove, tmp_path), 300, EQUIVALENT)
