"""The dice + focal kernels against float64, their memory traffic, and whether any change in them
shows."""

import importlib
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_proof import (
    assert_all_caught,
    assert_traffic,
    exact_bf16,
    force,
    last_offsets,
    run,
    survivors,
    traffic,
)

import kernels
from risclip import CONFIGS, RISCLIP
from train import locator_loss

# The module; kernels.dice_focal is the function.
dice_focal = importlib.import_module("kernels.dice_focal")
PAPER = dict(dice_weight=1.0, focal_weight=1.75, alpha=0.65, gamma=2.0)


def blocks(module, block):
    """Small blocks, two in a chunk, so that small tensors cross their edges."""
    return mock.patch.multiple(module, BLOCK=block, BLOCKS_PER_CHUNK=2)


def make(*shape, dtype=torch.float64, target="soft", size=2.0, seed=0):
    """Logits of standard deviation `size` and a target: soft, hard (bool), bytes (uint8), empty or
    full."""
    g = torch.Generator().manual_seed(seed)
    logits = (
        (torch.randn(shape, generator=g, dtype=torch.float64) * size).to(dtype).requires_grad_()
    )
    t = torch.rand(shape, generator=g)
    t = {
        "soft": t,
        "hard": t > 0.6,
        "bytes": (t > 0.6).byte(),
        "half": t.half(),
        "empty": torch.zeros(shape),
        "full": torch.ones(shape, dtype=torch.bool),
    }[target]
    return logits, t


def exactly(logits, target, **options):
    return run(lambda x: kernels.dice_focal_reference(x, target.to(torch.float64), **options),
               [logits.detach().double().requires_grad_()])


def rms(t):
    return t.double().square().mean().sqrt().item()


def assert_close(got, want, tolerance):
    for name, a, b in zip(("loss", "dlogits"), got, want):
        error = ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()
        assert a.isfinite().all() and error <= tolerance, f"{name}: relative error {error:.1e}"


# ---- kernel equals reference, by property ------------------------------------------------------

@st.composite
def cases(draw):
    shape = draw(
        st.sampled_from(
            [(1, 1), (1, 2), (5, 31), (2, 32), (3, 33), (4, 257), (2, 3, 7), (2, 2, 9, 11)]
        )
    )
    dtype = draw(
        st.sampled_from(
            [torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]
        )
    )
    target = draw(st.sampled_from(["soft", "hard", "bytes", "half", "empty", "full"]))
    size = draw(st.sampled_from([1e-3, 1.0, 10.0, 80.0]))
    alpha, gamma = (
        draw(st.sampled_from([0.0, 0.65, 1.0])),
        draw(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.5])),
    )
    block, strided, seed = (
        draw(st.sampled_from([16, 64, 2048])),
        draw(st.booleans()),
        draw(st.integers(0, 99)),
    )
    return shape, dtype, target, size, dict(alpha=alpha, gamma=gamma), block, strided, seed


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate, Phase.shrink],
)
@given(cases())
def test_loss_and_gradient_equal_float64(case):
    shape, dtype, target, size, options, block, strided, seed = case
    logits, t = make(*shape, dtype=dtype, target=target, size=size, seed=seed)
    if strided:  # the same values in every second place of memory
        logits = torch.stack([logits.detach()] * 2, -1)[..., 0].requires_grad_()
        t = t.transpose(0, -1).contiguous().transpose(0, -1)
    with force("triton"), blocks(dice_focal, block), exact_bf16():
        got = run(lambda x: kernels.dice_focal(x, t, **options), [logits])
    assert (
        got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        and got[1].dtype == dtype
    )
    # The loss is in float32 whatever the logits' dtype; their gradient is rounded to it once, at
    # the end, by at most half a unit in the last place: relative eps / 2, and among subnormal
    # numbers their spacing, smallest_normal * eps. In the loss dice is a difference from 1, so the
    # 1 is one of the terms that rounding is relative to.
    info, half = torch.finfo(dtype), dtype in (torch.bfloat16, torch.float16)
    rounding = info.eps / 2 + 1e-5 if half else {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    smallest = max(info.smallest_normal * info.eps, 1e-15)  # 1e-15: the reference takes 1 - p
    loss, gradient = exactly(logits, t, **options)
    assert (got[0] - loss).abs() <= min(rounding, 1e-5) * (1 + loss)
    error = (got[1] - gradient).abs()
    assert got[1].isfinite().all() and (error <= rounding * gradient.abs().max() + smallest).all()
    if half:
        eager = run(lambda x: kernels.dice_focal_reference(x, t, **options), [logits])[1]
        assert rms(error) <= 1.5 * rms(eager - gradient)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 2.5])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 5), (2, 2, 3, 4)])
def test_gradcheck_in_float64(shape, gamma):
    logits, t = make(*shape)
    with force("triton"), blocks(dice_focal, 16):
        assert torch.autograd.gradcheck(
            lambda x: kernels.dice_focal(x, t, gamma=gamma), logits, fast_mode=True
        )


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits_and_empty_targets_stay_finite(backend, dtype):
    for value in (80.0, -80.0, 1e4, -1e4):
        for t in (torch.zeros(2, 9), torch.ones(2, 9)):
            logits = torch.full((2, 9), value, dtype=dtype, requires_grad=True)
            with force(backend), exact_bf16():
                for gamma in (0.5, 2.0):
                    loss = partial(kernels.dice_focal, target=t, gamma=gamma)
                    for got in run(loss, [logits]):
                        assert got.isfinite().all()
    logits = torch.full((2, 9), -80.0, dtype=dtype)
    with force(backend), exact_bf16():
        # Nothing there and nothing claimed.
        assert kernels.dice_focal(logits, torch.zeros(2, 9)).abs() < 1e-6


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_slope_of_an_empty_target_on_a_large_map_is_not_lost(backend):
    """1 / (n / 2 + 1)^2 for each pixel: a difference of two terms n times as large would leave no
    digit of it."""
    logits, t = torch.zeros(1, 2**17, requires_grad=True), torch.zeros(1, 2**17)
    with force(backend):
        slope = run(lambda x: kernels.dice_focal(x, t, focal_weight=0.0), [logits])[1]
    assert torch.allclose(
        slope.double(), torch.full_like(slope, 0.25 / (2**16 + 1) ** 2).double(), rtol=1e-5, atol=0
    )


# ---- the reference -----------------------------------------------------------------------------

def textbook(logits, target, dice_weight, focal_weight, alpha, gamma):
    """Sample by sample as the papers have it: DETR's dice, RetinaNet's focal loss."""
    losses = []
    for x, t in zip(logits, target.to(logits.dtype)):
        p = x.sigmoid()
        dice = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
        p_t = p * t + (1 - p) * (1 - t)
        focal = (1 - p_t) ** gamma * F.binary_cross_entropy(p, t, reduction="none")
        losses.append(
            dice_weight * dice + focal_weight * ((alpha * t + (1 - alpha) * (1 - t)) * focal).mean()
        )
    return sum(losses) / len(losses)


@pytest.mark.parametrize("target", ["soft", "hard", "bytes", "empty"])
def test_the_reference_is_the_textbooks(target):
    logits, t = make(3, 11, target=target)
    options = dict(dice_weight=0.7, focal_weight=1.3, alpha=0.3, gamma=1.5)
    assert_close(run(lambda x: kernels.dice_focal_reference(x, t, **options), [logits]),
                 run(lambda x: textbook(x, t, **options), [logits]), 1e-12)


def test_the_defaults_are_table_a1s():
    logits, t = make(2, 9)
    assert torch.equal(kernels.dice_focal(logits, t), kernels.dice_focal(logits, t, **PAPER))


def test_every_channel_of_a_map_is_a_sample_of_its_own():
    logits, t = make(2, 3, 4, 5)
    per_map = [
        kernels.dice_focal(logits[b, c][None], t[b, c][None]) for b in range(2) for c in range(3)
    ]
    assert torch.allclose(kernels.dice_focal(logits, t), torch.stack(per_map).mean())
    whole = kernels.dice_focal(logits[:, 0], t[:, 0])  # (B, H, W): a sample each
    assert torch.allclose(whole, kernels.dice_focal(logits[:, 0].flatten(1), t[:, 0].flatten(1)))


# ---- which path runs, torch.library, training --------------------------------------------------

def test_triton_runs_where_it_is_asked_for_and_torch_elsewhere():
    logits, t = make(2, 2, 5, 7, target="hard")
    with traffic() as launches:
        run(lambda x: kernels.dice_focal(x, t), [logits])  # a CPU tensor
        run(lambda x: kernels.dice_focal_reference(x, t), [logits])
        assert launches == []
        with force("triton"):
            run(lambda x: kernels.dice_focal(x, t), [logits])
    assert [launch.kernel for launch in launches] == ["_sums_kernel", "_gradient_kernel"]
    assert launches[0].tensors["t_ptr"].data_ptr() == t.data_ptr()  # a bool target is not copied


def test_the_target_gets_no_gradient_on_either_path():
    logits, t = make(2, 9)
    t = t.double().requires_grad_()
    for backend in ("triton", "torch"):
        with force(backend):
            assert torch.autograd.grad(kernels.dice_focal(logits, t), t, allow_unused=True) == (
                None,
            )


def test_the_same_input_gives_the_same_bits():
    """The interpreter runs programs one after another, so what proves it is that traffic() allows
    no atomics."""
    logits, t = make(3, 333, dtype=torch.float32)
    with traffic(), force("triton"), blocks(dice_focal, 32):
        for a, b in zip(*(run(lambda x: kernels.dice_focal(x, t), [logits]) for _ in range(2))):
            assert torch.equal(a, b)


def test_opcheck_of_both_operators():
    logits, t = make(2, 9)
    torch.library.opcheck(dice_focal._sums_op, (logits, t, 0.65, 2.0))
    torch.library.opcheck(
        dice_focal._backward_op, (torch.ones(2, 4).double(), logits.detach(), t, 0.65, 2.0)
    )


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("target", ["hard", "soft"])
def test_compile_keeps_one_graph(backend, target):
    torch.compiler.reset()
    logits, t = make(2, 2, 5, 7, dtype=torch.float32, target=target)
    compiled = torch.compile(kernels.dice_focal, fullgraph=True, backend="aot_eager")
    with force(backend), torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(
            run(lambda x: compiled(x, t), [logits]),
            run(lambda x: kernels.dice_focal(x, t), [logits]),
        ):
            assert a.dtype == torch.float32 and torch.allclose(a, b, rtol=1e-5)


def test_both_paths_train_the_model_alike():
    """The miniature with 2 x 2 Adapters in each tower, 20 steps of stage 1 in fp32: the same losses
    within 1e-5."""
    masks = torch.zeros(2, 24, 24, dtype=torch.bool)
    masks[0, :8, 8:20] = masks[1, 16:, :8] = True

    def losses(backend):
        torch.manual_seed(0)
        model = RISCLIP(
            replace(
                CONFIGS["tiny"], clip="random", image_size=24, precision="fp32", adapter_layers=2
            )
        )
        batch = dict(
            images=torch.randn(2, 3, 24, 24),
            tokens=model.tokenize(["the small red circle", "a star"]),
            image_index=torch.arange(2),
            masks=masks,
        )
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5)
        for _ in range(20):
            with force(backend):
                loss = locator_loss(model, batch)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            yield loss.item()

    with traffic() as launches:
        ours = list(losses("triton"))
    assert len({launch.kernel for launch in launches}) == 6  # all of both files
    torchs = list(losses("torch"))
    assert torchs[-1] < 0.5 * torchs[0]  # it does learn
    assert max(abs(a / b - 1) for a, b in zip(ours, torchs)) < 1e-5


# ---- bad input ---------------------------------------------------------------------------------

@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    "logits, target, message",
    [
        (
            torch.ones(2, 3, dtype=torch.int64),
            torch.ones(2, 3),
            r"logits must be floating point.*int64 of shape \(2, 3\)",
        ),
        (
            torch.ones(2, 3).to(torch.float8_e5m2),
            torch.ones(2, 3),
            "logits must be floating point.*float8_e5m2",
        ),
        (torch.ones(3), torch.ones(3), r"logits must be .*shape \(3,\)"),
        (torch.ones(0, 3), torch.ones(0, 3), r"logits must be .*not empty.*shape \(0, 3\)"),
        (torch.ones(2, 3), torch.ones(3, 2), r"target must have the shape.*\(2, 3\).*\(3, 2\)"),
        (
            torch.ones(2, 3),
            torch.ones(2, 3, device="meta"),
            "target must have the shape and device.* on cpu.* on meta",
        ),
        (
            torch.ones(2, 3),
            torch.ones(2, 3, dtype=torch.int64),
            "target must be bool, uint8 or floating point.*int64",
        ),
        (
            torch.ones(2, 3),
            torch.full((2, 3), 255, dtype=torch.uint8),
            r"target must lie in \[0, 1\].*255",
        ),
        (torch.ones(2, 3), torch.full((2, 3), -1e-3), r"target must lie in \[0, 1\].*-0.001"),
        (torch.ones(2, 3), torch.full((2, 3), torch.nan), r"target must lie in \[0, 1\].*nan"),
    ],
)
def test_bad_input_is_a_value_error_before_any_launch(backend, logits, target, message):
    with force(backend), traffic() as launches:
        for function in (kernels.dice_focal, kernels.dice_focal_reference):
            with pytest.raises(ValueError, match=message):
                function(logits, target)
    assert launches == []


# ---- traffic, wide offsets, and mutants, which this proof has to catch -------------------------

def prove(module):
    """Values, gradients and traffic with cut blocks, extreme logits, then offsets beyond 32
    bits."""
    for target, gamma, size in (("soft", 2.0, 2.0), ("hard", 0.5, 50.0), ("soft", 3.0, 2.0)):
        logits, t = make(3, 37, target=target, size=size)
        t = t.to(torch.float32)
        with traffic() as launches, blocks(module, 16):
            sums = module.forward(logits.detach(), t, 0.3, gamma)
            weights = torch.randn(
                3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64
            )
            dx = module.backward(weights, logits.detach(), t, 0.3, gamma)
        want = dice_focal._sums_reference(logits, t, 0.3, gamma)
        assert_close(
            [sums, dx], [want.detach(), torch.autograd.grad(want, logits, weights)[0]], 1e-12
        )
        forward, backward = launches
        assert_traffic(forward, x_ptr=(1, 0), t_ptr=(1, 0), part_ptr=(0, 1))
        # Each of the two chunks of a sample reads its three numbers.
        programs = torch.tensor([2, 2, 0, 2] * 3).numpy()
        assert_traffic(backward, x_ptr=(1, 0), t_ptr=(1, 0), dsums_ptr=(programs, 0), dx_ptr=(0, 1))
    x = torch.tensor([[-700.0, -80, -30, -1e-3, 1e-3, 30, 80, 700]], dtype=torch.float64)
    p, q = x.sigmoid(), (-x).sigmoid()
    for t, slope in (
        (0, 0.35 * p**2 * (p + 2 * q * F.softplus(x))),
        (1, -0.65 * q**2 * (q + 2 * p * F.softplus(-x))),
    ):
        with traffic():
            dx = module.backward(
                torch.ones(1, 4, dtype=torch.float64), x, torch.full((1, 8), t), 0.65, 2.0
            )
        # Each element by itself, so that the small ones count: torch's own gradient has lost them
        # (p - 1).
        assert torch.allclose(dx, p * q * (1 + t) + slope, rtol=1e-12, atol=1e-40)
    for terms in (1e-9, 1e-6):  # a sum of very small focal terms: log(1 + e) must not round e away
        x = torch.full((1, 4), terms, dtype=torch.float64).logit()
        with traffic():
            small = module.forward(x.float(), torch.zeros(1, 4), 0.5, 0.0)[0, 3].item()
        assert abs(small / (4 * 0.5 * terms) - 1) < 1e-5
    B, n, f = 6000, 640 * 640, tl.float32
    chunks = -(-n // 16384)
    last, options = (B - 1, chunks - 1), dict(GAMMA=2.0, TERMS=7, ACC=f, CHUNK=16384, BLOCK=2048)
    tensors = dict(x=f, t=f, part=f)
    reached = last_offsets(module._sums_kernel, tensors, last, n, 0.65, **options)
    assert reached == dict(x=B * n - 1, t=B * n - 1, part=4 * B * chunks - 1)
    tensors = dict(x=f, t=f, dsums=f, dx=f)
    reached = last_offsets(module._gradient_kernel, tensors, last, n, 0.65, **options)
    assert reached == dict(x=B * n - 1, t=B * n - 1, dsums=4 * B - 1, dx=B * n - 1)


def test_values_gradients_traffic_and_wide_offsets():
    prove(dice_focal)


# Changes that cannot show: a power taken by exp and log instead, and a zero of another dtype.
EQUIVALENT = ["elif EXPONENT == 1: -> elif EXPONENT == 2:",
              "pt_sum = tl.zeros((BLOCK,), ACC) -> pt_sum = tl.zeros((BLOCK,), tl.float32)"]


@pytest.mark.filterwarnings("ignore")  # mutants divide by zero
def test_a_change_in_the_kernels_is_caught(tmp_path):
    """A tenth of the mutants; test_any_change_in_the_kernels_is_caught runs all."""
    assert_all_caught(survivors("dice_focal", prove, tmp_path, every=10), 15, EQUIVALENT)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_any_change_in_the_kernels_is_caught(tmp_path):
    assert_all_caught(survivors("dice_focal", prove, tmp_path), 150, EQUIVALENT)
