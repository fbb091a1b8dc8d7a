"""Conversions between dtypes and between devices, with gradients that convert back."""

from __future__ import annotations

from typing import Any

import numpy as np

from minivit.autograd.op import op
from minivit.backend import Array, to_device
from minivit.errors import DTypeError


@op()
def convert(x: Array, to: Any) -> Array:
    """Return x as another floating dtype (``np.float64``) or on another device (``"cuda"``)."""
    if isinstance(to, str) and (to == "cpu" or to.startswith("cuda")):
        return to_device(x, to)
    dtype = np.dtype(to)
    if x.dtype.kind in "fc" and dtype.kind not in "fc":
        raise DTypeError(f"a differentiable {x.dtype} array cannot become {dtype}", "use detach() first")
    return x.astype(dtype, copy=False)


@convert.vjp
def _(g: Any, out: Any, x: Any, to: Any, needs: tuple[bool, ...]) -> Any:
    return convert(g, x.device if isinstance(to, str) and (to == "cpu" or to.startswith("cuda")) else x.dtype)
