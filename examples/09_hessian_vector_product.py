"""A Hessian-vector product: the curvature of a ViT's loss along a direction, without the Hessian.

The Hessian H of P parameters has P² entries. H·v needs two walks back: the gradient, recorded, and the gradient of its
product with v (Pearlmutter 1994, "Fast exact multiplication by the Hessian", Neural Computation 6(1)).
"""

import numpy as np

import minivit as mv
from minivit.backend import normal

model = mv.ViT(image_size=8, patch_size=4, in_channels=1, num_classes=10, dim=16, depth=2, heads=2).to(np.float64)
train = mv.data.load("digits", split="train")
images = mv.data.standardize(train.images[:32], train.mean, train.std).astype(np.float64)
labels, parameters = train.labels[:32], list(model.parameters())
for i, p in enumerate(parameters):  # away from the start, where the head is 0 and much of H with it
    p.data += 0.1 * normal(mv.Key(1).child(i), p.shape)
directions = [[normal(mv.Key(seed).child(i), p.shape) for i, p in enumerate(parameters)] for seed in (2, 3)]


def gradient(create_graph: bool = False) -> tuple:
    return mv.grad(mv.ops.cross_entropy(model(images), labels), parameters, create_graph=create_graph)


def hessian_times(v: list[np.ndarray]) -> list[np.ndarray]:
    """Return H·v, an array for each parameter."""
    along = sum((g * d).sum() for g, d in zip(gradient(create_graph=True), v, strict=True))  # ∇L · v
    return [h.data for h in mv.grad(along, parameters)]  # ∇(∇L · v) = H·v


def dot(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    return float(sum((x * y).sum() for x, y in zip(a, b, strict=True)))


v, w = directions
hv = hessian_times(v)
print(
    f"{model.num_parameters():,} parameters: H would have {model.num_parameters() ** 2:,} entries; H·v has as many as v"
)

# ---- by differences of gradients: two more gradients, and half of the digits lost ----
h, here = 1e-6, [p.data.copy() for p in parameters]
sides = []
for sign in (1.0, -1.0):
    for p, x, d in zip(parameters, here, v, strict=True):
        p.data[...] = x + sign * h * d
    sides.append([g.data for g in gradient()])
for p, x in zip(parameters, here, strict=True):
    p.data[...] = x
differences = [(up - down) / (2 * h) for up, down in zip(*sides, strict=True)]
off = [a - b for a, b in zip(hv, differences, strict=True)]
error = (dot(off, off) / dot(hv, hv)) ** 0.5
print(f"against a difference of gradients: off by {error:.0e} of its length, which is the difference's error")
assert error < 1e-6

# ---- H is symmetric: w·(H·v) = v·(H·w), by two passes that know nothing of each other ----
one, other = dot(w, hv), dot(v, hessian_times(w))
print(f"w·Hv = {one:.14f}\nv·Hw = {other:.14f}")
assert abs(one - other) < 1e-12 * dot(hv, hv) ** 0.5 * dot(w, w) ** 0.5

# ---- and the proof to the last digits: order 2 of the check is a complex step through the recorded gradient ----
report = mv.check_module(model, images[:2], order=2)
print(report)
assert report.worst.error < 1e-12
print(f"curvature along v: v·Hv / v·v = {dot(v, hv) / dot(v, v):.4f}")
