"""Conversions between dtypes and between devices, with gradients that convert back."""

from __future__ import annotations

from typing import Any

import numpy as np

from minivit.autograd.op import op
from minivit.backend import Array, is_floating, named_dtype, to_device
from minivit.errors import ConfigError, DTypeError


def device_or_dtype(target: Any) -> Any:
    """Return a device's name as it is and any other ``target`` as a NumPy dtype; raise ConfigError if it is neither."""
    if isinstance(target, str) and target.split(":")[0] in ("cpu", "cuda"):
        return target
    try:
        # to NumPy None is float64
        return named_dtype(target) if isinstance(target, str) else np.dtype("no dtype" if target is None else target)
    except DTypeError:  # bfloat16, and what it needs is not installed
        raise
    except TypeError:
        remedy = "use 'cpu', 'cuda', 'cuda:1', …, or np.float32 and the like"
        raise ConfigError(f"{target!r} is neither a device nor a dtype", remedy) from None


@op()
def convert(x: Array, to: Any) -> Array:
    """Return x as another floating dtype (``np.float64``) or on another device (``"cuda"``)."""
    to = device_or_dtype(to)
    if isinstance(to, str):
        return to_device(x, to)
    if is_floating(x.dtype) and not is_floating(to):
        raise DTypeError(f"a differentiable {x.dtype} array cannot become {to}", "use detach() first")
    return x.astype(to, copy=False)


convert.changes_dtype = True


@convert.vjp
def _(g: Any, out: Any, x: Any, to: Any, needs: tuple[bool, ...]) -> Any:
    return convert(g, x.device if isinstance(device_or_dtype(to), str) else x.dtype)
