"""The two places where RISCLIP moves more bytes than it must, each as plain torch and as fused Triton kernels.

`adapter` (Sec. 3.1) and `dice_focal` (Sec. 3.5) are what the model calls; `*_reference` is the same mathematics in
plain torch. Which of the two runs is decided in one place, kernels/backend.py: RISCLIP_KERNELS=triton|torch forces it.
"""

from kernels.adapter import adapter, adapter_reference
from kernels.dice_focal import dice_focal, dice_focal_reference

__all__ = ["adapter", "adapter_reference", "dice_focal", "dice_focal_reference"]
