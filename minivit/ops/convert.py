"""Conversions between dtypes and between devices, with gradients that convert back."""

from __future__ import annotations

from typing import Any

import numpy as np

from minivit.autograd.op import op
from minivit.backend import Array, to_device
from minivit.errors import ConfigError, DTypeError


def device_or_dtype(target: Any) -> Any:
    """Return a device's name as it is and any other ``target`` as a NumPy dtype; raise ConfigError if it is neither."""
    if isinstance(target, str) and target.split(":")[0] in ("cpu", "cuda"):
        return target
    try:
        return np.dtype("no dtype" if target is None else target)  # to NumPy None is float64
    except TypeError:
        remedy = "use 'cpu', 'cuda', 'cuda:1', …, or np.float32 and the like"
        raise ConfigError(f"{target!r} is neither a device nor a dtype", remedy) from None


@op()
def convert(x: Array, to: Any) -> Array:
    """Return x as another floating dtype (``np.float64``) or on another device (``"cuda"``)."""
    to = device_or_dtype(to)
    if isinstance(to, str):
        return to_device(x, to)
    if x.dtype.kind in "fc" and to.kind not in "fc":
        raise DTypeError(f"a differentiable {x.dtype} array cannot become {to}", "use detach() first")
    return x.astype(to, copy=False)


@convert.vjp
def _(g: Any, out: Any, x: Any, to: Any, needs: tuple[bool, ...]) -> Any:
    return convert(g, x.device if isinstance(device_or_dtype(to), str) else x.dtype)
