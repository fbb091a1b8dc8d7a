"""How fast a training step is, and how much of what the machine can do that is: seconds, FLOPs, and sgemm's rate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from minivit.autograd.graph import Node, first_order
from minivit.autograd.tensor import Tensor
from minivit.autograd.twin import Twin
from minivit.backend import Key, blas_threads, to_device, uniform
from minivit.backend.outline import outline
from minivit.errors import ConfigError
from minivit.nn.module import mode
from minivit.nn.recompute import keeping

SGEMM_SIZES = (256, 512, 1024)  # rows and columns: in a core's cache, about as large as it, and larger
SGEMM_FLOPS = 4e9  # of one measurement: about 40 ms on a core


def time_steps(step: Callable[..., Any], images: Any, labels: Any, steps: int, warmup: int = 3) -> list[float]:
    """Return the seconds of each of ``steps`` calls of step(images, labels), after ``warmup`` that do not count."""
    times = []
    for _ in range(warmup + steps):
        start = time.perf_counter()
        step(images, labels)
        times.append(time.perf_counter() - start)
    return times[warmup:]


def sgemm_rate(threads: int = 1) -> float:
    """Return the FLOP/s of float32 matrix products, the best of several sizes and repeats.

    ``threads`` products run side by side, each on one thread of BLAS: the way a training step uses the cores.
    """
    if threads < 1:
        raise ConfigError(f"sgemm on {threads} threads", "use at least 1")
    best = 0.0
    with blas_threads(1), ThreadPoolExecutor(threads) as pool:
        for n in SGEMM_SIZES:
            count = max(1, round(SGEMM_FLOPS / (2 * n**3)))

            def multiply(operands: list[np.ndarray], count: int = count) -> None:
                a, b, out = operands
                for _ in range(count):
                    np.matmul(a, b, out=out)

            work = [[uniform(Key(thread, i), (n, n)) for i in range(3)] for thread in range(threads)]
            for _ in range(4):
                start = time.perf_counter()
                list(pool.map(multiply, work))
                best = max(best, threads * count * 2 * n**3 / (time.perf_counter() - start))
    return best


# ---- counting --------------------------------------------------------------------------------------------------------


def flops(node: Node) -> int:
    """Return the floating-point operations of a recorded matrix product; 0 for other operations."""
    name, out, shapes = node.op.name, math.prod(node.shape), [p.shape if p else () for p in node.parents]
    if name == "linear":  # (…, in) · (out, in)ᵀ; the axes of in may be several
        return 2 * out * (shapes[0][-1] if shapes[0] else math.prod(shapes[1][1:]))
    if name == "matmul":  # (…, n, k) · (…, k, m)
        return 2 * out * (shapes[0][-1] if shapes[0] else shapes[1][-2])
    if name == "conv2d":  # each of its numbers is the product of a window and a channel's weight (C, kh, kw)
        arguments = node.args[0] if isinstance(node.op, Twin) else node.args
        return 2 * out * math.prod(arguments[1].shape[1:])
    if name == "self_attention":  # (B, T, 3·heads·d) → (B, T or fewer, heads·d): QKᵀ and PV
        return 4 * out * shapes[0][-2]
    if name == "attention":  # q (…, T, d), k (…, S, d), v (…, S, e)
        return 2 * out // node.shape[-1] * shapes[1][-2] * (shapes[0][-1] + shapes[2][-1])
    return 0


def image_flops(model: Any) -> tuple[int, int]:
    """Return the FLOPs of a registered model's matrix products for one image: (forward, backward).

    A multiplication and an addition are 2. Backward are the products that the gradients of the parameters need: none
    for the images', and none below the lowest parameter that requires a gradient. What is computed twice
    (:mod:`minivit.nn.recompute`) is counted once. On the CPU nothing is computed: the image is an outline.
    """
    parameter, shape = next(model.parameters()), (1, *model.settings.image_shape)
    on_cpu = parameter.device == "cpu"
    image = Tensor(
        outline(shape, parameter.dtype) if on_cpu else to_device(np.zeros(shape, parameter.dtype), parameter.device)
    )
    image.requires_grad = True  # all that is computed is then recorded, whatever is frozen
    with mode(True), first_order(), keeping():
        out = model(image)
    below = {p.node for p in model.parameters() if p.requires_grad}  # nodes whose gradient is computed
    forward = backward = 0
    for node in recorded(out.node):
        needs = sum(p in below for p in node.parents[:2])  # of a product's factors; bias gradients are sums
        if any(p in below for p in node.parents):
            below.add(node)
        forward += flops(node)
        # from QKᵀ and PV come dQ, dK and dP, dV; of a product only the factors' gradients that somebody wants
        backward += flops(node) * (2 * bool(needs) if "attention" in node.op.name else needs)
    return forward, backward


def step_flops(model: Any, batch_size: int) -> int:
    """Return the FLOPs of the matrix products of one training step; see :func:`image_flops`."""
    return batch_size * sum(image_flops(model))


def recorded(root: Node) -> list[Node]:
    """Return the recorded operations that ``root`` was made by, earliest first."""
    seen, stack = {root}, [root]
    while stack:
        new = {p for p in stack.pop().parents if p is not None and p.op is not None} - seen
        seen |= new
        stack.extend(new)
    return sorted(seen, key=lambda node: node.age)
