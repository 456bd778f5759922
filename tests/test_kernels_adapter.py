"""The Adapter kernels against float64, their memory traffic, what torch.library asks for, and whether any change shows.

Everything runs in Triton's interpreter. Ahead-of-time compilation for GPUs is in test_kernels_dice_focal.py's neighbour,
test_both_kernels below, through bench.py.
"""

from kernel_proof import assert_traffic, exact_bf16, force, last_offsets, run, survivors, traffic  # isort: skip

import importlib
from unittest import mock

import numpy as np
import pytest
import torch
import triton.language as tl
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import kernels

adapter = importlib.import_module("kernels.adapter")  # the module; kernels.adapter is the function
HALF = (torch.bfloat16, torch.float16)


def tiles(module, block_m, block_n, block_k_bytes, rows_per_part):
    """Small tiles, so that small tensors cross their edges."""
    return mock.patch.multiple(module, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K_BYTES=block_k_bytes,
                               ROWS_PER_PART=rows_per_part)


def make(N, D, H, dtype=torch.float64, x_dtype=None, scale=1.0, seed=0):
    """x (N, D), the parameters and dy, of which `scale` is the standard deviation of x, biases and scale."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape, size=scale):
        return torch.randn(shape, generator=g, dtype=torch.float64) * size

    inputs = [random(N, D), random(H, D, size=D**-0.5), random(H), random(D, H, size=H**-0.5), random(D), random(D)]
    inputs = [t.to(dtype) for t in inputs]
    inputs[0] = inputs[0].to(x_dtype or dtype)
    return [t.requires_grad_() for t in inputs], random(N, D).to(x_dtype or dtype)


def exactly(inputs, dy):
    """Output and gradients of the reference in float64, from the values that the kernels got."""
    return run(kernels.adapter_reference, [t.detach().double().requires_grad_() for t in inputs], dy.double())


def magnitudes(inputs, dy):
    """What the terms of each sum add up to in absolute value: rounding errors are relative to this."""
    return exactly([t.detach().abs() for t in inputs], dy.abs())


def rms(t):
    return t.double().square().mean().sqrt().item()


def assert_close(got, inputs, dy, tolerance):
    for name, a, b, size in zip(("y", "dx", "dw_down", "db_down", "dw_up", "db_up", "dscale"), got, exactly(inputs, dy),
                                magnitudes(inputs, dy)):
        error = ((a - b).abs() / size).max().item()
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def assert_as_good_as_eager(got, inputs, dy):
    """bf16 and fp16: at most 1.5 times eager's error against float64, root mean squares over each tensor."""
    names = ("y", "dx", "dw_down", "db_down", "dw_up", "db_up", "dscale")
    for name, a, b, exact in zip(names, got, run(kernels.adapter_reference, inputs, dy), exactly(inputs, dy)):
        assert a.dtype == b.dtype and rms(a - exact) <= 1.5 * rms(b - exact), (
            f"{name}: error {rms(a - exact):.1e}, eager {rms(b - exact):.1e}")


# ---- the proof, which the mutants have to fail ----------------------------------------------------------------------

def cdiv(a, b):
    return -(-a // b)


def assert_planned_traffic(module, launches, N, D, H):
    """Each element is loaded as often as the kernels' docstrings say, and stored once."""
    m, d, h = cdiv(N, module.BLOCK_M), cdiv(D, module.BLOCK_N), cdiv(H, module.BLOCK_N)
    down, up, dpre, dx, w_down, w_up = launches
    assert_traffic(down, x_ptr=(h, 0), w_ptr=(m, 0), bias_ptr=(m, 0), h_ptr=(0, 1))
    assert_traffic(up, h_ptr=(d, 0), w_ptr=(m, 0), bias_ptr=(m, 0), scale_ptr=(m, 0), x_ptr=(1, 0), y_ptr=(0, 1))
    assert_traffic(dpre, dy_ptr=(h, 0), w_ptr=(m, 0), h_ptr=(1, 0), dpre_ptr=(0, 1), sum_ptr=(0, 1))
    assert_traffic(dx, dpre_ptr=(d, 0), w_ptr=(m, 0), dy_ptr=(1, 0), dx_ptr=(0, 1), sum_ptr=(0, 1))
    assert_traffic(w_down, a_ptr=(d, 0), b_ptr=(cdiv(H, module.BLOCK_M), 0), part_ptr=(0, 1))
    assert_traffic(w_up, a_ptr=(h, 0), b_ptr=(cdiv(D, module.BLOCK_M), 0), part_ptr=(0, 1))


def prove(module):
    """Values, gradients and traffic on shapes whose every edge is cut, then offsets beyond 32 bits."""
    for N, D, H, block in ((37, 23, 12, (16, 8, 64, 12)), (5, 40, 49, (8, 16, 128, 64))):
        inputs, dy = make(N, D, H)
        inputs[2].data[:4] = -5  # some hidden units are dead
        with traffic() as launches, tiles(module, *block):
            flat = [t.detach() for t in inputs]
            y, kept = module.forward(*flat)
            got = [y, *module.backward(dy, flat[0], kept, *(flat[i] for i in (1, 3, 4, 5)))]
            assert_planned_traffic(module, launches, N, D, H)
        assert_close(got, inputs, dy, 1e-12)
    inputs, dy = make(24, 20, 18, torch.bfloat16, torch.float32)  # as under autocast
    with traffic(), tiles(module, 16, 16, 32, 16), exact_bf16() as multiplied:
        flat = [t.detach() for t in inputs]
        y, kept = module.forward(*flat)
        got = [y, *module.backward(dy, flat[0], kept, *(flat[i] for i in (1, 3, 4, 5)))]
    assert multiplied == {tl.bfloat16}  # what tensor cores need
    with torch.autocast("cpu", torch.bfloat16):
        assert_as_good_as_eager(got, inputs, dy)
    nan, _ = make(3, 8, 8)
    nan[0].data[1, 2] = torch.nan
    with traffic():
        assert module.forward(*(t.detach() for t in nan))[0].isnan().any(1).tolist() == [False, True, False]
    assert_wide_offsets(module)


def assert_wide_offsets(module):
    """The last program of each launch at five million rows reaches the last element, beyond 32 bits."""
    N, D, H, f = 5_000_001, 896, 448, tl.float32
    options = dict(DOT=f, ACC=f, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64)

    def last(rows, cols):
        return cdiv(rows, 128) * cdiv(cols, 128) - 1, 0

    reached = last_offsets(module._down_kernel, dict(x=f, w=f, b=f, h=f), last(N, H), N, D, H, **options)
    assert reached == dict(x=N * D - 1, w=H * D - 1, b=H - 1, h=N * H - 1)
    reached = last_offsets(module._up_kernel, dict(h=f, w=f, b=f, scale=f, x=f, y=f), last(N, D), N, D, H, **options)
    assert reached == dict(h=N * H - 1, w=D * H - 1, b=D - 1, scale=D - 1, x=N * D - 1, y=N * D - 1)
    m = cdiv(N, 128)
    reached = last_offsets(module._dpre_kernel, dict(dy=f, w=f, h=f, dpre=f, sum=f), last(N, H), N, D, H, **options)
    assert reached == dict(dy=N * D - 1, w=D * H - 1, h=N * H - 1, dpre=N * H - 1, sum=m * H - 1)
    reached = last_offsets(module._dx_kernel, dict(dpre=f, w=f, dy=f, dx=f, sum=f), last(N, D), N, D, H, **options)
    assert reached == dict(dpre=N * H - 1, w=H * D - 1, dy=N * D - 1, dx=N * D - 1, sum=m * D - 1)
    parts = cdiv(N, 512)
    reached = last_offsets(module._weight_kernel, dict(a=f, b=f, part=f), (last(H, D)[0], parts - 1), N, H, D, 512, **options)
    assert reached == dict(a=N * H - 1, b=N * D - 1, part=parts * H * D - 1)


def test_values_gradients_traffic_and_wide_offsets():
    prove(adapter)
