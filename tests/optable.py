"""What every operation should return: references in plain NumPy and Python, written apart from the package.

They are slow and plain on purpose: loops, math.erf, math.fsum. Each takes the operation's arguments (float64 arrays)
and knows nothing of how the package computes. The rows themselves are in minivit/ops/samples.py.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from minivit.backend import uniform


def _each(f: Callable[..., Any]) -> Callable[..., np.ndarray]:
    """Make a function of numbers one of arrays, with broadcasting."""
    return np.vectorize(f, otypes=[np.float64])


def _reduced(f: Callable[[list[float]], float]) -> Callable[..., np.ndarray]:
    """Make a function of a list of numbers a reduction over axes."""

    def reduction(x: np.ndarray, axis: Any = None, keepdims: bool = False) -> np.ndarray:
        axes = tuple(range(x.ndim)) if axis is None else (axis,) if isinstance(axis, int) else axis
        axes = [a % x.ndim for a in axes]
        kept = [a for a in range(x.ndim) if a not in axes]
        rows = x.transpose(kept + axes).reshape(math.prod(x.shape[a] for a in kept), -1)
        shape = [1 if a in axes else n for a, n in enumerate(x.shape)] if keepdims else [x.shape[a] for a in kept]
        return np.array([f(row.tolist()) for row in rows]).reshape(shape)

    return reduction


def _mean(row: list[float]) -> float:
    return math.fsum(row) / len(row)


def _logsumexp(row: list[float]) -> float:
    return max(row) + math.log(math.fsum(math.exp(x - max(row)) for x in row))


def _offsets(row: list[float]) -> list[float]:
    """Return numbers less their mean, which a float would round."""
    mean = sum(map(Fraction, row)) / len(row)
    return [float(Fraction(v) - mean) for v in row]


def _var(x: np.ndarray, axis: Any = None, keepdims: bool = False, correction: int = 0) -> np.ndarray:
    squares = _reduced(lambda row: math.fsum(v**2 for v in _offsets(row)) / (len(row) - correction))
    return squares(x, axis, keepdims)


def _softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    e = _each(math.exp)(x - _reduced(max)(x, axis, True))
    return e / _reduced(math.fsum)(e, axis, True)


def _layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    offsets = np.array([_offsets(row) for row in x.reshape(-1, x.shape[-1]).tolist()]).reshape(x.shape)
    return offsets / np.sqrt(_var(x, -1, True) + eps) * weight + bias


def _mean_of_squares(x: np.ndarray) -> np.ndarray:
    return _reduced(_mean)(x * x, -1, True)


def _gelu(x: np.ndarray, approximate: str = "none") -> np.ndarray:
    if approximate == "tanh":
        return _each(lambda v: 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))))(x)
    return _each(lambda v: v * math.erfc(-v / math.sqrt(2)) / 2)(x)


def _dropped(shape: tuple[int, ...], p: float, key: Any) -> np.ndarray:
    """Return 0 or 1/(1 - p): row i is row ``key.row + i`` of a batch that starts at 0."""
    whole = uniform(key, (key.row + shape[0], *shape[1:]))
    return np.where(whole[key.row :] < p, 0.0, 1.0 / (1.0 - p))


def _attention(
    q: Any, k: Any, v: Any, mask: Any = None, scale: Any = None, dropout: float = 0.0, key: Any = None
) -> np.ndarray:  # fmt: skip
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    q, k, v = (np.broadcast_to(x, (*lead, *x.shape[-2:])) for x in (q, k, v))
    shape = (*lead, q.shape[-2], k.shape[-2])
    mask = np.broadcast_to(False if mask is None else mask, shape)
    drop = _dropped(shape, dropout, key) if dropout else np.ones(shape)
    out = np.zeros((*lead, q.shape[-2], v.shape[-1]))
    for i in np.ndindex(*lead):
        for t in range(q.shape[-2]):
            allowed = [j for j in range(k.shape[-2]) if not mask[(*i, t, j)]]
            scores = [math.fsum(q[(*i, t)] * k[(*i, j)]) * (scale or 1 / math.sqrt(q.shape[-1])) for j in allowed]
            for j, p in zip(allowed, _softmax(np.array(scores)) if allowed else [], strict=True):
                out[(*i, t)] += p * drop[(*i, t, j)] * v[(*i, j)]
    return out


def _cross_entropy(logits: np.ndarray, target: Any, labels: Any = None, smoothing: float = 0.0) -> np.ndarray:
    k, labels = logits.shape[-1], labels if target is None else target
    rows = logits.reshape(-1, k).tolist()
    if labels.dtype.kind == "i":
        targets = [[float(j == label) for j in range(k)] for label in labels.reshape(-1).tolist()]
    else:
        targets = labels.reshape(-1, k).tolist()
    losses = [
        -math.fsum(
            (t * (1 - smoothing) + smoothing / k) * (x - _logsumexp(row)) for t, x in zip(target, row, strict=True)
        )
        for target, row in zip(targets, rows, strict=True)
    ]
    return np.array(_mean(losses))


def _getitem(x: np.ndarray, index: Any) -> np.ndarray:
    return np.take(x, np.arange(x.size).reshape(x.shape)[index])


def _scatter(x: np.ndarray, index: Any, shape: tuple[int, ...]) -> np.ndarray:
    out = np.zeros(shape)
    places = np.arange(out.size).reshape(shape)[index]
    for place, value in zip(np.ravel(places), np.ravel(x), strict=True):
        out.flat[place] += value
    return out


def _take_along_axis(x: np.ndarray, indices: np.ndarray, axis: int = -1) -> np.ndarray:
    out = np.zeros(indices.shape)
    for place in np.ndindex(*indices.shape):
        source = list(place)
        source[axis] = indices[place]
        out[place] = x[tuple(source)]
    return out


def _pad(x: np.ndarray, widths: Any, value: float = 0.0) -> np.ndarray:
    out = np.full([a + n + b for (a, b), n in zip(widths, x.shape, strict=True)], value)
    out[tuple(slice(a, a + n) for (a, _), n in zip(widths, x.shape, strict=True))] = x
    return out


def _patches(shape: tuple[int, ...], patch: tuple[int, int]) -> list[tuple[int, Any]]:
    """Return (number, index into the images) of every patch, row by row."""
    (p, q), (h, w) = patch, shape[2:]
    corners = [(i, j) for i in range(0, h, p) for j in range(0, w, q)]
    return [(n, np.s_[:, :, i : i + p, j : j + q]) for n, (i, j) in enumerate(corners)]


def _patchify(images: np.ndarray, patch: tuple[int, int], dtype: Any = None) -> np.ndarray:
    parts = [images[index].reshape(len(images), -1) for _, index in _patches(images.shape, patch)]
    return np.stack(parts, axis=1)


def _unpatchify(patches: np.ndarray, patch: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    images = np.zeros((len(patches), patches.shape[2] // math.prod(patch), *size))
    for n, index in _patches(images.shape, patch):
        images[index] = patches[:, n].reshape(images[index].shape)
    return images


def _windows(shape: tuple[int, ...], kernel: Any, stride: Any, padding: Any) -> tuple[tuple[int, int], Any]:
    """Return how many windows there are, and for each (its place, its pixels: (place in it, place in the image))."""
    (kh, kw), (sh, sw) = ((k, k) if isinstance(k, int) else k for k in (kernel, stride))
    down, across = (padding, padding) if isinstance(padding, int) else padding
    (top, bottom), (left, right) = ((p, p) if isinstance(p, int) else p for p in (down, across))
    h, w = shape[2:]
    grid = (top + h + bottom - kh) // sh + 1, (left + w + right - kw) // sw + 1
    found = []
    for r, c in np.ndindex(grid):
        pixels = [((i, j), (r * sh + i - top, c * sw + j - left)) for i in range(kh) for j in range(kw)]
        found.append(((r, c), [(at, (y, x)) for at, (y, x) in pixels if 0 <= y < h and 0 <= x < w]))
    return grid, found


def _conv2d(x: np.ndarray, weight: np.ndarray, bias: Any = None, stride: Any = 1, padding: Any = 0) -> np.ndarray:
    grid, windows = _windows(x.shape, weight.shape[2:], stride, padding)
    out = np.zeros((len(x), len(weight), *grid))
    for b, o in np.ndindex(out.shape[:2]):
        for (r, c), pixels in windows:
            terms = [x[b, k, y, z] * weight[o, k, i, j] for (i, j), (y, z) in pixels for k in range(x.shape[1])]
            out[b, o, r, c] = math.fsum(terms) + (0.0 if bias is None else bias[o])
    return out


def _pool(f: Callable[[list[float], int], float]) -> Callable[..., np.ndarray]:
    """Make a function of a window's pixels and its size a pooling."""

    def pooling(x: np.ndarray, kernel: Any, stride: Any = None, padding: Any = 0) -> np.ndarray:
        size = kernel * kernel if isinstance(kernel, int) else math.prod(kernel)
        grid, windows = _windows(x.shape, kernel, kernel if stride is None else stride, padding)
        out = np.zeros((*x.shape[:2], *grid))
        for b, c in np.ndindex(x.shape[:2]):
            for place, pixels in windows:
                out[(b, c, *place)] = f([x[(b, c, *at)] for _, at in pixels], size)
        return out

    return pooling


def _unfold(x: np.ndarray, kernel: Any, stride: Any = 1, padding: Any = 0) -> np.ndarray:
    grid, windows = _windows(x.shape, kernel, stride, padding)
    out = np.zeros((*x.shape[:2], *((kernel, kernel) if isinstance(kernel, int) else kernel), *grid))
    for place, pixels in windows:
        for (i, j), (y, z) in pixels:
            out[(slice(None), slice(None), i, j, *place)] = x[:, :, y, z]
    return out.reshape(len(x), -1, math.prod(grid))


def _fold(columns: np.ndarray, size: Any, kernel: Any, stride: Any = 1, padding: Any = 0) -> np.ndarray:
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    images = np.zeros((len(columns), columns.shape[1] // math.prod(kernel), *size))
    grid, windows = _windows(images.shape, kernel, stride, padding)
    parts = columns.reshape(*images.shape[:2], *kernel, *grid)
    for place, pixels in windows:
        for (i, j), (y, z) in pixels:
            images[:, :, y, z] += parts[(slice(None), slice(None), i, j, *place)]
    return images


def _group_norm(x: np.ndarray, groups: int, weight: np.ndarray, bias: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    ones, zeros = np.ones(x[0].size // groups), np.zeros(x[0].size // groups)
    x_hat = _layer_norm(x.reshape(len(x), groups, -1), ones, zeros, eps).reshape(*x.shape[:2], -1)
    return (x_hat * weight[:, None] + bias[:, None]).reshape(x.shape)


def _embed_tokens(patches: np.ndarray, cls: Any = None, positions: Any = None) -> np.ndarray:
    rows = [[*([] if cls is None else cls[0]), *image] for image in patches]
    return np.array(
        [[row + (0.0 if positions is None else positions[0, t]) for t, row in enumerate(image)] for image in rows]
    )


def _linear(x: np.ndarray, weight: np.ndarray, bias: Any, onto: Any = None) -> np.ndarray:
    product = np.einsum("...i,oi->...o", x, weight.reshape(len(weight), -1))
    return product + (0.0 if bias is None else bias) + (0.0 if onto is None else onto)


def _sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v)) if v > 0 else math.exp(v) / (1 + math.exp(v))


def _self_attention(qkv, heads, queries=None, *settings):
    q, k, v = (np.stack(np.split(x, heads, axis=2), axis=1) for x in np.split(qkv, 3, axis=2))  # (B, H, T, d)
    q = q if queries is None else q[:, :, :queries]
    return np.concatenate(np.split(_attention(q, k, v, *settings), heads, axis=1), axis=3)[:, 0]


FORWARD: dict[str, Callable[..., Any]] = {
    "abs": _each(math.fabs),
    "add": _each(operator.add),
    "attention": _attention,
    "avg_pool2d": _pool(lambda pixels, size: math.fsum(pixels) / size),
    "broadcast_to": lambda x, shape: np.zeros(shape) + x,
    "clip": lambda x, low=None, high=None: _each(
        lambda v: max(-math.inf if low is None else low, min(math.inf if high is None else high, v))
    )(x),
    "concat": lambda axis, *arrays: np.concatenate(arrays, axis),
    "conv2d": _conv2d,
    "convert": lambda x, to: x,
    "cos": _each(math.cos),
    "cross_entropy": _cross_entropy,
    "div": _each(operator.truediv),
    "drop_path": lambda x, p, key: x * _dropped((len(x), 1), p, key).reshape(-1, *[1] * (x.ndim - 1)),
    "dropout": lambda x, p, key: x * _dropped(x.shape, p, key),
    "embed_tokens": _embed_tokens,
    "erf": _each(math.erf),
    "exp": _each(math.exp),
    "fold": _fold,
    "gelu": _gelu,
    "getitem": _getitem,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "log": _each(math.log),
    "log_softmax": lambda x, axis=-1: x - _reduced(_logsumexp)(x, axis, True),
    "logsumexp": lambda x, axis=-1, keepdims=False: _reduced(_logsumexp)(x, axis, keepdims),
    "matmul": lambda a, b: np.einsum("...ij,...jk->...ik", a, b),
    "max": _reduced(max),
    "max_pool2d": _pool(lambda pixels, size: max(pixels)),
    "maximum": _each(max),
    "mean": _reduced(_mean),
    "min": _reduced(min),
    "minimum": _each(min),
    "mul": _each(operator.mul),
    "neg": _each(operator.neg),
    "pad": _pad,
    "patchify": _patchify,
    "pow": _each(operator.pow),
    "relu": _each(lambda v: v if v > 0 else 0.0),
    "reshape": lambda x, shape: np.array(x.tolist()).reshape(shape),
    "rms_norm": lambda x, weight, eps=1e-6: x / np.sqrt(_mean_of_squares(x) + eps) * weight,
    "scatter": _scatter,
    "self_attention": _self_attention,
    "sigmoid": _each(_sigmoid),
    "silu": _each(lambda v: v * _sigmoid(v)),
    "sin": _each(math.sin),
    "softmax": _softmax,
    "sqrt": _each(math.sqrt),
    "stack": lambda axis, *arrays: np.stack(arrays, axis),
    "sub": _each(operator.sub),
    "sum": _reduced(math.fsum),
    "swapaxes": lambda x, i, j: np.swapaxes(x, i, j),
    "take_along_axis": _take_along_axis,
    "tanh": _each(math.tanh),
    "transpose": lambda x, axes=None: np.moveaxis(x, range(x.ndim)[::-1] if axes is None else axes, range(x.ndim)),
    "unfold": _unfold,
    "unpatchify": _unpatchify,
    "var": _var,
    "where": _each(lambda condition, a, b: a if condition else b),
}
"""Operation → its reference."""
