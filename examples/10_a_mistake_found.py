"""A student's LayerNorm backward: the check says where it is wrong, and the exercise which mistake it is.

On the command line:  minivit learn start learn 6,  write the two functions,  minivit learn check learn 6
"""

import runpy
from functools import partial
from pathlib import Path

import minivit as mv
from minivit.backend import normal
from minivit.cli.main import main

STUDENT = """
def forward(x, weight, bias, eps):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps) * weight + bias


def backward(g, x, weight, bias, eps):
    centred = x - x.mean(axis=-1, keepdims=True)
    root = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    x_hat = centred / root
    a = g * weight
    dx = (a - a.mean(axis=-1, keepdims=True)) / root
    rows = tuple(range(g.ndim - 1))
    return dx, (g * x_hat).sum(axis=rows), g.sum(axis=rows)
"""

print("$ minivit learn start learn 6")
assert main(["learn", "start", "learn", "6"]) == 0
file = Path("learn", "06_layer_norm.py")
given = file.read_text(encoding="utf-8")
file.write_text(given[: given.index("def forward")] + STUDENT.lstrip(), encoding="utf-8")

# ---- anybody's gradient: forward and backward as they are, and arguments to try ----
student = runpy.run_path(str(file))
x, weight, bias = normal(mv.Key(0), (3, 5)), 1 + normal(mv.Key(1), (5,)), normal(mv.Key(2), (5,))
try:
    mv.check_vjp(partial(student["forward"], eps=1e-6), partial(student["backward"], eps=1e-6), [x, weight, bias])
except mv.GradientError as error:
    print(f"\nmv.check_vjp says where:\n{error}")
    assert "for x" in str(error) and "right: weight, bias" in str(error)
else:
    raise SystemExit("a wrong gradient passed")

# ---- the exercise: it knows the mistakes that people make ----
print("\n$ minivit learn check learn 6")
assert main(["learn", "check", "learn", "6"]) == 1

# ---- mended ----
file.write_text(
    file.read_text(encoding="utf-8").replace(
        "(a - a.mean(axis=-1, keepdims=True))",
        "(a - a.mean(axis=-1, keepdims=True) - x_hat * (a * x_hat).mean(axis=-1, keepdims=True))",
    ),
    encoding="utf-8",
)
print("\n… and with what was forgotten:\n\n$ minivit learn check learn 6")
assert main(["learn", "check", "learn", "6"]) == 0
