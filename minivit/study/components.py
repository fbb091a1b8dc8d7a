"""Principal components, similarities and sizes: of the patch filters, the positions, the tokens and the updates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from minivit.autograd.graph import no_grad
from minivit.errors import ConfigError, DataError, ShapeError
from minivit.models.trace import Trace
from minivit.nn.module import Module
from minivit.study.asking import check_trace, patch_embed, values


class Components(NamedTuple):
    """Principal components, the largest first: their ``values``, and the ``shares`` (n,) of the variance they have."""

    values: np.ndarray
    shares: np.ndarray


def position_similarity(model: Any) -> np.ndarray:
    """Return the cosine of every two positions: (rows, columns, rows, columns), float64.

    [i, j] is the map of the patch in row i, column j (Dosovitskiy et al. 2020, 2010.11929, figure 7 centre). The class
    token's is left out; a position of zeros has 0. Raises ConfigError for a model that adds none at its input.
    """
    embed, pos = patch_embed(model), getattr(model, "pos_embed", None)
    if pos is None:
        raise ConfigError(f"{type(model).__name__} has no learned positions", "make it with position 'learned'")
    of_patches = values(pos() if isinstance(pos, Module) else pos, "the positions")[0, -embed.num_patches :].astype(
        np.float64
    )  # (1, T, D) → (N, D)
    sizes = np.sqrt(np.square(of_patches).sum(axis=1, keepdims=True))
    unit = np.divide(of_patches, sizes, out=np.zeros_like(of_patches), where=sizes > 0)
    return (unit @ unit.T).reshape(*embed.grid, *embed.grid)  # (N, N) → …


def filter_components(model: Any, n: int = 28) -> Components:
    """Return the first n principal components of the patch filters, as images (n, C, P, Q), float64, of length 1.

    Of the D filters, points of C·P·Q numbers, less their mean (Dosovitskiy et al. 2020, figure 7 left): those of the
    patches, or of the first convolution where one is before them. At most as many as there are: min(D, C·P·Q). The
    entry of the largest size is positive, as the sign is nobody's.
    """
    check_count(n)
    weight = values(patch_embed(model).filters, "the patch filters").astype(np.float64)
    return principal(weight.reshape(len(weight), -1), n, weight.shape[1:])  # (D, C, P, Q) → (D, C·P·Q)


def feature_components(trace: Trace, n: int = 3) -> Components:
    """Return the first n principal components of the patches' last tokens: values (B, rows, columns, n), float64.

    Of the tokens after the final norm, of all images together, so that a colour means the same in each (Oquab et al.
    2023, DINOv2, 2304.07193, figure 1).
    """
    check_count(n)
    check_trace(trace)
    x = trace.tokens[-1].detach()
    if not x.size:
        raise DataError("there is no image to study", "give at least one")
    with no_grad():
        x = trace.model.norm(x) if hasattr(trace.model, "norm") else x
    x = values(x, "the last tokens")[:, trace.prefix :].astype(np.float64)  # (B, T, D) → (B, N, D)
    flat = x.reshape(-1, x.shape[-1])
    axes, shares = principal(flat, n, (x.shape[-1],))
    projected = (flat - flat.mean(axis=0)) @ axes.T  # (B·N, D) → (B·N, n)
    return Components(projected.reshape(len(x), *trace.grid, -1), shares)


def principal(points: np.ndarray, n: int, shape: tuple[int, ...]) -> Components:
    """Return the first n principal axes of points (M, D), each of ``shape``."""
    centred = points - points.mean(axis=0)
    variances, axes = np.linalg.eigh(centred.T @ centred)  # ascending
    n = min(n, *points.shape)
    axes, variances = axes.T[::-1][:n], np.maximum(variances[::-1], 0.0)
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1)
    shares = variances[:n] / variances.sum() if variances.any() else np.zeros(n)
    return Components((axes * np.sign(largest)).reshape(n, *shape), shares)


def token_norms(trace: Trace) -> np.ndarray:
    """Return ‖x‖₂ of every token after the embedding and after every block: (L+1, B, T), float64.

    Large models keep what is of the whole image in few patches of nothing, whose norms stand out (Darcet et al. 2023,
    2309.16588, section 2).
    """
    check_trace(trace)
    parts = [values(x, "the tokens") for x in trace.tokens]
    return np.stack([np.sqrt(np.square(x, dtype=np.float64).sum(axis=-1)) for x in parts])  # (B, T, D) → (B, T)


def outlying_tokens(norms: np.ndarray, times: float = 3.0) -> np.ndarray:
    """Return which tokens have more than ``times`` the median norm of their layer: bool, (L+1, B, T).

    ``norms`` are :func:`token_norms`. The median is over all images and tokens.
    """
    if not isinstance(times, int | float) or not times > 0:
        raise ConfigError(f"{times!r} times the median", "give a number above 0, such as 3")
    if np.ndim(norms) != 3:
        raise ShapeError(f"norms of shape {np.shape(norms)}", "give token_norms(trace), (L+1, B, T)")
    return norms > times * np.median(norms, axis=(1, 2), keepdims=True)


def update_ratios(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """Return ‖after - before‖ / ‖before‖ of every parameter, by name.

    ``before`` and ``after`` are a model's ``state_dict()``, before and after a step. About 1e-3 is usual; much less
    learns nothing, much more is unstable. Infinite for a parameter that was 0 and is not, 0 for one that did not move.
    """
    if not (isinstance(before, Mapping) and isinstance(after, Mapping)):
        raise ConfigError(f"a {type(before).__name__} and a {type(after).__name__} are no states", "model.state_dict()")
    if before.keys() != after.keys():
        differ = ", ".join(sorted(before.keys() ^ after.keys())[:3])
        raise ConfigError(f"two states with other parameters: {differ}", "give two of one model")
    ratios = {}
    for name in before:
        old, new = (values(x, name).astype(np.float64) for x in (before[name], after[name]))
        if old.shape != new.shape:
            raise ConfigError(f"{name}: {old.shape} before, {new.shape} after", "give two states of one model")
        moved, size = float(np.linalg.norm(new - old)), float(np.linalg.norm(old))
        ratios[name] = 0.0 if moved == 0 else moved / size if size > 0 else float("inf")
    return ratios


def check_count(n: Any) -> None:
    """Raise ConfigError unless n is a number of components."""
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ConfigError(f"{n!r} components", "give a whole number from 1")
