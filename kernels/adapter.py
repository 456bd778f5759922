"""The Adapter of Sec. 3.1: y = x + scale * (relu(x @ w_down.T + b_down) @ w_up.T + b_up).

x is (..., D), the bottleneck H. w_down (H, D), b_down (H,), w_up (D, H), b_up (D,), scale (D,), y as x.

Dtypes. Outside autocast all six tensors have one dtype. Under autocast the parameters are cast to autocast's dtype, the
matrix products run in it, and gradients flow back through the cast; x, the residual stream, keeps its own dtype, and
so does y. That is what autocast does to torch.nn.Linear.
"""

import torch
import torch.nn.functional as F


def adapter_reference(x, w_down, b_down, w_up, b_up, scale):
    """The Adapter in plain torch. Shapes and dtypes as in `adapter`."""
    return _reference(x, *_checked(x, w_down, b_down, w_up, b_up, scale))


def _reference(x, w_down, b_down, w_up, b_up, scale):
    h = F.relu(F.linear(x, w_down, b_down))  # (..., H)
    z = F.linear(h, w_up, b_up)  # (..., D)
    return x + (scale * z).to(x.dtype)


def _checked(x, w_down, b_down, w_up, b_up, scale):
    """The parameters in the dtype of the products; a ValueError if anything does not fit x."""
    if not x.is_floating_point() or x.dim() == 0:
        raise ValueError(f"x must be floating point of shape (..., D), got {x.dtype} of shape {tuple(x.shape)}")
    D, H = x.shape[-1], w_down.shape[0] if w_down.dim() else 0
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    needed = {"w_down": (H, D), "b_down": (H,), "w_up": (D, H), "b_up": (D,), "scale": (D,)}
    parameters = dict(w_down=w_down, b_down=b_down, w_up=w_up, b_up=b_up, scale=scale)
    for name, p in parameters.items():
        got = f"{name} is {p.dtype} of shape {tuple(p.shape)} on {p.device}"
        asked = f"x is {x.dtype} of shape {tuple(x.shape)} on {x.device}"
        if p.shape != needed[name]:
            raise ValueError(f"{got}, but shape {needed[name]} is needed: {asked}, w_down of {tuple(w_down.shape)}")
        if p.device != x.device or not p.is_floating_point() or (p.dtype != dtype and not autocast):
            raise ValueError(f"{got}, but {asked}: device and dtype must agree (autocast casts floating point)")
    return [p.to(dtype) for p in parameters.values()]


def adapter(x, w_down, b_down, w_up, b_up, scale):
    """x + scale * (relu(x @ w_down.T + b_down) @ w_up.T + b_up), Sec. 3.1; y as x.

    x (..., D) floating point, strides of any kind; w_down (H, D), b_down (H,), w_up (D, H), b_up (D,), scale (D,).
    """
    return _reference(x, *_checked(x, w_down, b_down, w_up, b_up, scale))
