"""Triton or plain torch: the one switch.

    RISCLIP_KERNELS unset    Triton, where it is installed, on AMD GPUs and on NVIDIA GPUs of
                             compute capability 8.0 (A100, RTX 30) or higher, where a kernel can
                             pay; plain torch everywhere else, and for float64
    RISCLIP_KERNELS=torch    plain torch everywhere
    RISCLIP_KERNELS=triton   Triton everywhere: needs a GPU, or TRITON_INTERPRET=1 to run the
                             kernels on a CPU; an error, not plain torch, where that is missing
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

# As TRITON_INTERPRET was when the kernels were made.
INTERPRETED = INSTALLED and triton.knobs.runtime.interpret
BACKEND = os.environ.get("RISCLIP_KERNELS", "auto")
if BACKEND not in ("auto", "triton", "torch"):
    raise ValueError(f"RISCLIP_KERNELS must be triton or torch, got {BACKEND!r}")
if BACKEND == "triton" and not INSTALLED:
    raise ImportError("RISCLIP_KERNELS=triton, but Triton is not installed: install it (Linux "
                      "only) or unset this")

# What either path computes with.
FLOATING = torch.float16, torch.bfloat16, torch.float32, torch.float64

__all__ = ["FLOATING", "tl", "triton", "use_triton"]


def use_triton(tensor, worthwhile=True):
    """Whether the Triton kernels take `tensor`. A RuntimeError if they are asked to and cannot.

    worthwhile: whether the kernel can be faster than plain torch, as far as the caller knows.
    """
    if BACKEND == "triton" and not (tensor.is_cuda or INTERPRETED):
        raise RuntimeError(f"RISCLIP_KERNELS=triton, but a tensor is on {tensor.device}: move it "
                           "to a GPU, or set TRITON_INTERPRET=1 before Python starts to run the "
                           "kernels in Triton's interpreter")
    if BACKEND == "auto":  # float64 is there for the proofs
        return (worthwhile and INSTALLED and tensor.is_cuda and tensor.dtype != torch.float64
                and _new_enough(tensor.device))
    return BACKEND == "triton"


def _new_enough(device):
    """Older NVIDIA GPUs have no bf16, and nothing was compiled for them. AMD's, which are "cuda" to
    torch, number otherwise."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
