"""Triton or plain torch: the one switch.

    RISCLIP_KERNELS unset    Triton for CUDA tensors where Triton is installed, plain torch for everything else
    RISCLIP_KERNELS=torch    plain torch everywhere
    RISCLIP_KERNELS=triton   Triton everywhere: needs a GPU, or TRITON_INTERPRET=1 to run the kernels on a CPU
"""

import os
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
    INSTALLED = True
except ImportError:  # no wheels for macOS or Windows: the files still import, and plain torch runs
    triton = SimpleNamespace(jit=lambda function=None, **options: lambda kernel: None)
    tl = SimpleNamespace(constexpr=None)
    INSTALLED = False

BACKEND = os.environ.get("RISCLIP_KERNELS", "auto")
if BACKEND not in ("auto", "triton", "torch"):
    raise ValueError(f"RISCLIP_KERNELS must be triton or torch, got {BACKEND!r}")

__all__ = ["triton", "tl", "use_triton"]


def use_triton(tensor):
    """Whether the Triton kernels take `tensor`. float64 stays with torch on a GPU: the kernels' fp64 is for proofs."""
    if BACKEND == "auto":
        return tensor.is_cuda and tensor.dtype != torch.float64 and INSTALLED
    return BACKEND == "triton"
