"""kernels/attention.py: every path against float64 and against torch's own attention."""

import pytest
import torch
import torch.nn.functional as F

from kernels.attention import LONG, attend


def inputs(queries, keys, dtype, learns=True, width=8):
    torch.manual_seed(0)
    return [torch.randn(2, 3, n, width).to(dtype).requires_grad_(learns)
            for n in (queries, keys, keys)]


def textbook(q, k, v, keep=None, causal=False):
    scores = q @ k.transpose(2, 3) / q.size(-1) ** 0.5
    if keep is not None:
        scores = scores.masked_fill(~keep, -torch.inf)
    if causal:
        later = torch.ones(q.size(2), k.size(2)).triu(1).bool()
        scores = scores.masked_fill(later, -torch.inf)
    return scores.softmax(dim=-1) @ v


def exactly(tensors, *options):
    """The output in float64 and the gradients of its weighted sum."""
    exact = [x.detach().double().requires_grad_() for x in tensors]
    y = textbook(*exact, *options)
    return y.detach(), torch.autograd.grad(y, exact, weights_of(y))


def weights_of(y):
    """A gradient that differs from element to element."""
    return torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("queries, keys, masked, causal", [
    (7, 9, False, False), (7, 9, True, False), (7, 7, False, True), (520, 530, False, False)])
def test_every_path_of_attention_is_softmax_of_scaled_products(dtype, learns, queries, keys,
                                                               masked, causal):
    q, k, v = inputs(queries, keys, dtype, learns)
    keep = None
    if masked:
        keep = (torch.arange(keys) < torch.tensor([[keys - 2], [keys - 4]]))[:, None, None]
    y = attend(q, k, v, keep, causal)
    expected, gradients = exactly((q, k, v), keep, causal)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02  # values and gradients are about 1
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance)
    if learns:
        got = torch.autograd.grad(y, (q, k, v), weights_of(y))
        for a, b in zip(got, gradients):
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("learning", ["qkv", "q", "k", "v"])
def test_the_loop_over_heads_is_as_exact_as_torchs_plain_attention(learning):
    """In bf16, where it is used. Like sdpa without fusion, the loop rounds scores and weights to
    bf16, so its error is about twice that of the fused kernel, which keeps them in float32."""
    def run(function):
        tensors = inputs(LONG + 3, LONG + 8, torch.bfloat16, learns=False)
        for name, x in zip("qkv", tensors):
            x.requires_grad_(name in learning)
        y = function(*tensors)
        wanted = [x for x in tensors if x.requires_grad]
        return [y.detach(), *torch.autograd.grad(y, wanted, weights_of(y))]

    y, gradients = exactly(inputs(LONG + 3, LONG + 8, torch.bfloat16))
    exact = [y, *(g for name, g in zip("qkv", gradients) if name in learning)]
    paths = run(attend), run(textbook), run(F.scaled_dot_product_attention)
    for ours, plain, fused, truth in zip(*paths, exact):
        assert ours.dtype == torch.bfloat16
        error, plain, fused = ((t.double() - truth).square().mean().sqrt()
                               for t in (ours, plain, fused))
        assert error <= 1.5 * plain and error <= 4 * fused, (error / plain, error / fused)


def test_no_scores_are_kept_for_backward():
    tensors, kept = inputs(LONG + 3, LONG + 8, torch.bfloat16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        attend(*tensors)
    assert kept and not any(LONG + 3 in t.shape and LONG + 8 in t.shape for t in kept)
