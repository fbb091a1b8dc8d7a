"""Write an operation with its gradient, and have the gradient checked. Then make a mistake, and see it found."""

from typing import Any

import numpy as np

import minivit as mv
from minivit.backend import Array, normal


@mv.op(save=("x", "weight"))  # all that the gradient may read
def rms_norm(x: Array, weight: Array, eps: float = 1e-6) -> Array:
    """Return x / √(mean(x²) + eps) · weight (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4)."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


@rms_norm.vjp
def _(g: Any, out: Any, x: Any, weight: Any, eps: float, needs: tuple[bool, ...]) -> Any:
    r = ((x * x).mean(axis=-1, keepdims=True) + eps) ** -0.5
    gw = g * weight
    gx = gw * r - x * r**3 * (gw * x).mean(axis=-1, keepdims=True)
    return gx, g * x * r  # the engine sums the second over the rows


x, weight = normal(mv.Key(0), (2, 3, 5)), normal(mv.Key(1), (5,))
report = mv.check_grads(rms_norm, [x, weight], order=3)  # the gradient, its gradient, and the gradient of that
print(f"{report}\n\n{report.table()}\n")


class RMSNorm(mv.nn.Module):
    def __init__(self, dim: int) -> None:
        self.weight = mv.nn.Parameter(np.ones(dim))

    def forward(self, x: Any) -> Any:
        return rms_norm(x, self.weight)


print(mv.check_module(RMSNorm(5), x))


@rms_norm.vjp
def _(g: Any, out: Any, x: Any, weight: Any, eps: float, needs: tuple[bool, ...]) -> Any:
    r = ((x * x).mean(axis=-1, keepdims=True) + eps) ** -0.5
    return g * weight * r, g * x * r  # forgets that r depends on x


try:
    mv.check_grads(rms_norm, [x, weight])
except mv.GradientError as error:
    print(f"\nthe mistake is found:\n{error}")
else:
    raise SystemExit("a wrong gradient passed")
