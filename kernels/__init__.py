"""The two places where RISCLIP moves more bytes than it must, and attention on a CPU.

To read in this order: dice_focal.py (the loss, Sec. 3.5; Triton is explained there), adapter.py
(the Adapter, Sec. 3.1; tiled matrix products), attention.py (no Triton), backend.py (the switch).

`adapter` and `dice_focal` are what the model calls; `*_reference` is the same mathematics in plain
torch. Which of the two runs is decided in backend.py; RISCLIP_KERNELS=triton|torch forces it.
"""

from kernels.adapter import adapter, adapter_reference
from kernels.dice_focal import dice_focal, dice_focal_reference

__all__ = ["adapter", "adapter_reference", "dice_focal", "dice_focal_reference"]
