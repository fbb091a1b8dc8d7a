"""The figures of a study, each from the arrays that were found of a trained model and of an untrained one.

L are layers, H heads, N images, n those that are drawn one by one, (rows, columns) the grid of patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minivit.show.beside import heat_tiles, map_tiles
from minivit.show.colours import heat
from minivit.show.curves import chart
from minivit.show.matrix import maps_of_maps, matrix, sheet

Found = Mapping[str, Any]
"""The arrays of a figure, of one of the two models."""


@dataclass(frozen=True)
class Shown:
    """What was looked at: ``images`` uint8 (N, C, H, W), and the class that each is, N integers.

    ``predictions`` are what the trained and the untrained model take each for, N integers each; ``classes`` are the
    names of all of them, ``singly`` the places of the images that are drawn one by one. ``reader`` is the token, or
    tokens, that the model's answer is read from, in words.
    """

    images: np.ndarray
    labels: Sequence[int]
    predictions: tuple[Sequence[int], Sequence[int]]
    classes: Sequence[str]
    singly: Sequence[int]
    reader: str

    def captions(self, places: Iterable[int]) -> list[tuple[str, str]]:
        """Return the names of label and the trained model's prediction of some of the images."""
        return [(self.classes[self.labels[i]], self.classes[self.predictions[0][i]]) for i in places]


@dataclass(frozen=True)
class Drawn:
    """A figure: SVGs by the names of their files, the two models' in turn, HTML, and what can be read off it."""

    svgs: Mapping[str, str]
    html: str = ""
    said: str = ""


# ---- over images -----------------------------------------------------------------------------------------------------


def attention(trained: Found, untrained: Found, shown: Shown) -> Drawn:
    """Draw ``maps`` (N, rows, columns) over a few images."""
    few = list(shown.singly)
    maps = trained["maps"][few], untrained["maps"][few]
    html = heat_tiles([shown.images[i] for i in few], maps, shown.captions(few), many=False)
    before, after = (np.median([peak(one) for one in found["maps"]]) for found in (untrained, trained))
    said = f"The brightest patch gets {after:.2f} times the mean of its image's patches (median of the images); in the "
    said += f"untrained model {before:.2f} times. The two models' maps of an image correlate at "
    return Drawn({}, html, f"{said}{likeness(trained['maps'], untrained['maps']):z.2f} on average.")


def gallery(trained: Found, untrained: Found, shown: Shown) -> Drawn:
    """Draw ``maps`` (N, rows, columns) over all images."""
    every = range(len(shown.images))
    html = heat_tiles([*shown.images], (trained["maps"], untrained["maps"]), shown.captions(every), many=True)
    alike = [f"{agreement(found['maps']):z.2f}" for found in (trained, untrained)]
    said = f"Two images' maps correlate at {alike[0]} on average, in the untrained model at {alike[1]}: at 1 the maps "
    return Drawn({}, html, f"{said}would be the same whatever the image.")


def peak(weights: np.ndarray) -> float:
    """Return the largest of a map's weights, in times of their mean."""
    return float(weights.max() / weights.mean())


def agreement(maps: np.ndarray) -> float:
    """Return the mean correlation of two different ones of ``maps`` (N, …), 1 where there are not two to compare."""
    patterns = _patterns(maps)
    count = int(patterns.any(axis=1).sum())
    return float((np.square(patterns.sum(axis=0)).sum() - count) / (count * (count - 1))) if count > 1 else 1.0


def likeness(maps: np.ndarray, others: np.ndarray) -> float:
    """Return the mean correlation of each of ``maps`` (N, …) with the same one of ``others``, 0 for an even one."""
    return float((_patterns(maps) * _patterns(others)).sum(axis=1).mean())


def _patterns(maps: np.ndarray) -> np.ndarray:
    """Return maps (N, …) as (N, M), float64, each less its mean and of length 1; of one that is even zeros."""
    flat = maps.reshape(len(maps), -1).astype(np.float64)
    flat = flat - flat.mean(axis=1, keepdims=True)
    sizes = np.linalg.norm(flat, axis=1, keepdims=True)
    return np.divide(flat, sizes, out=np.zeros_like(flat), where=sizes > 1e-12 * np.abs(maps).max())


def features(trained: Found, untrained: Found, shown: Shown) -> Drawn:
    """Draw ``colours`` (n, rows, columns, 3), from 0 to 1; ``share`` (3,) of the variance is said."""
    few = list(shown.singly)
    colours = tuple((255 * found["colours"]).round().astype(np.uint8) for found in (trained, untrained))
    html = map_tiles([shown.images[i] for i in few], (colours[0], colours[1]), shown.captions(few))
    shares = [f"{found['share'].sum():.0%}" for found in (trained, untrained)]
    said = f"The three components hold {shares[0]} of the variance of the patches' tokens, of the untrained model's "
    return Drawn({}, html, f"{said}{shares[1]}.")


# ---- filters and positions -------------------------------------------------------------------------------------------


def filters(trained: Found, untrained: Found, shown: Shown) -> Drawn:
    """Draw ``components`` (n, C, p, q), each on a scale of its own around grey; ``share`` (n,) of variance is said."""
    svgs = {}
    for name, found in both(trained, untrained):
        note = f"{len(found['components'])} components, {found['share'].sum():.0%} of the filters' variance"
        svgs[f"filters_{name}"] = sheet(f"Filters, {name}", _pictures(found["components"]), 7, f"{note}; grey is 0")
    half = [int(np.searchsorted(np.cumsum(found["share"]), 0.5)) + 1 for found in (trained, untrained)]
    said = f"Half of the filters' variance is in the first {half[0]}, in the untrained model in the first {half[1]}."
    return Drawn(svgs, said=said)


def _pictures(components: np.ndarray) -> list[np.ndarray]:
    """Return components (n, C, p, q) as n pictures, uint8 (p, q, 3), each on a scale of its own."""
    channels = components.shape[1]
    some = components[:, : 3 if channels >= 3 else 1]
    most = np.abs(some).max(axis=(1, 2, 3), keepdims=True)
    pixels = 127.5 + 127.5 * some / np.where(most > 0, most, 1)  # (n, 1 or 3, p, q)
    return [np.broadcast_to(one.transpose(1, 2, 0), (*one.shape[1:], 3)).round().astype(np.uint8) for one in pixels]


def positions(trained: Found, untrained: Found, shown: Shown) -> Drawn:
    """Draw ``similarity`` (rows, columns, rows, columns), cosines."""
    least = math.floor(10 * min(float(found["similarity"].min()) for found in (trained, untrained))) / 10
    svgs = {
        f"positions_{name}": maps_of_maps(f"Positions, {name}", found["similarity"], ("row", "column"), least)
        for name, found in both(trained, untrained)
    }
    near = [neighbours(found["similarity"]) for found in (trained, untrained)]
    if near[0] is None:
        return Drawn(svgs, said="There is one patch only.")
    said = f"Neighbouring positions have a mean cosine of {near[0]:z.2f}, in the untrained model of {near[1]:z.2f}."
    return Drawn(svgs, said=said)


def neighbours(similarity: np.ndarray) -> float | None:
    """Return the mean of ``similarity`` (R, C, R, C) over patches side by side or one above the other."""
    rows, columns = similarity.shape[:2]
    i, j = np.indices((rows, columns))
    beside = similarity[i[:, 1:], j[:, 1:], i[:, :-1], j[:, :-1]].ravel()
    above = similarity[i[1:], j[1:], i[:-1], j[:-1]].ravel()
    pairs = np.concatenate([beside, above])
    return float(pairs.mean()) if len(pairs) else None


# ---- by layer and head -----------------------------------------------------------------------------------------------


def distance(trained: Found, untrained: Found, shown: Shown) -> Drawn:
    """Draw ``pixels`` (L, H), with ``even``, what attention to all patches alike has."""
    return _by_head(trained, untrained, "distance", ("pixels", "px"), trained["even"], "even attention")


def entropy(trained: Found, untrained: Found, shown: Shown) -> Drawn:
    """Draw ``bits`` (L, H), with ``most``, the largest possible."""
    return _by_head(trained, untrained, "entropy", ("bits", "bits"), trained["most"], "largest possible")


def _by_head(
    trained: Found, untrained: Found, figure: str, units: tuple[str, str], level: float, level_name: str
) -> Drawn:
    """Draw the values (L, H) called as the first of ``units``, which stands in sentences; the other stands at axes."""
    unit, short = units
    everything = [*trained[unit].ravel(), *untrained[unit].ravel(), 0.0, level]  # both on one scale
    svgs, said = {}, []
    for name, found in both(trained, untrained):
        values = found[unit]  # (L, H), NaN for a head that looks at no patch
        means = [mean_of_finite(row) for row in values]
        least, most = np.nanmin(values, initial=np.inf), np.nanmax(values, initial=0.0)
        dots = [
            (layer, value, f"layer {layer}, head {head}: {value:.3g} {unit}")
            for layer, row in enumerate(values, 1)
            for head, value in enumerate(row, 1)
        ]
        title, form = f"{figure.capitalize()}, {name}", f"{{:.4g}} {short}".format
        svgs[f"{figure}_{name}"] = chart(
            title, {"mean": [*enumerate(means, 1)]}, "layer", form, dots=dots, dots_are="a head",
            levels={level_name: level}, reach=everything,
        )  # fmt: skip
        span = f"heads from {least:.3g} to {most:.3g} {unit}"
        said.append(f"{name}: {span}, {means[0]:.3g} in the first layer and {means[-1]:.3g} in the last on average")
    return Drawn(svgs, said=f"{sentence(said)}; {level_name}: {level:.3g}.")


def importance(trained: Found, untrained: Found, shown: Shown) -> Drawn:
    """Draw ``logits`` (L, H)."""
    svgs = {}
    for name, found in both(trained, untrained):
        values = found["logits"]
        svgs[f"importance_{name}"] = matrix(
            f"Importance, {name}", values, numbered(len(values)), numbered(values.shape[1]), ("layer", "head"),
            float(values.max()),
        )  # fmt: skip
    values = trained["logits"]
    if not values.any():
        return Drawn(svgs, said="The logit does not answer to the attention of any head.")
    layer, head = np.unravel_index(values.argmax(), values.shape)
    share = values.max() / values.sum()
    said = f"Most important: head {head + 1} of layer {layer + 1}, with {share:.0%} of the sum over all "
    return Drawn(svgs, said=f"{said}{values.size:,} heads. Numbers in logits; each scale ends at its own largest.")


def attribution(trained: Found, untrained: Found, shown: Shown) -> Drawn:
    """Draw ``heads`` (L, H), ``attention_bias`` and ``mlp`` (L,), in logits; say ``embedding``, ``bias``, ``logit``."""
    svgs, said = {}, []
    for name, found in both(trained, untrained):
        values = np.column_stack([found["heads"], found["attention_bias"], found["mlp"]])  # (L, H + 2)
        columns = [*numbered(found["heads"].shape[1]), "bias", "MLP"]
        svgs[f"attribution_{name}"] = matrix(
            f"Logit, {name}", values, numbered(len(values)), columns, ("layer", "head"), float(np.abs(values).max()),
            two_signs=True,
        )  # fmt: skip
        parts = {"heads": found["heads"].sum(), "MLPs": found["mlp"].sum(), "embedding": found["embedding"]}
        parts["biases"] = found["attention_bias"].sum() + found["bias"]
        terms = ", ".join(f"{what} {value:+z.2f}" for what, value in parts.items())
        said.append(f"{name}: logit {found['logit']:.2f} = {terms}")
    return Drawn(svgs, said=f"{sentence(said)} (means over the images).")


# ---- by layer --------------------------------------------------------------------------------------------------------


def lens(trained: Found, untrained: Found, shown: Shown) -> Drawn:
    """Draw ``probability`` and ``first`` (L+1,): of the label, and the share of images where it comes first."""
    svgs = {}
    for name, found in both(trained, untrained):
        lines = {"label first": [*enumerate(found["first"])], "probability": [*enumerate(found["probability"])]}
        title = f"Lens, {name}"
        svgs[f"lens_{name}"] = chart(title, lines, "layer (0: embedding)", percent, reach=(0.0, 1.0))
    first = trained["first"]
    enough = int(np.argmax(first >= 0.9 * first[-1]))
    said = f"After {enough} of {len(first) - 1} layers the label comes first in {first[enough]:.0%} of the images, "
    return Drawn(svgs, said=f"{said}after all in {first[-1]:.0%}.")


def norms(trained: Found, untrained: Found, shown: Shown) -> Drawn:
    """Draw ``mean`` and ``longest`` (L+1,) of the patches, ``token`` (L+1,) or None, ``maps`` (n, rows, columns)."""
    svgs, colours, said = {}, [], []
    reach = [0.0, *trained["longest"], *untrained["longest"]]  # both on one scale
    for name, found in both(trained, untrained):
        lines = {"mean patch": [*enumerate(found["mean"])], "longest": [*enumerate(found["longest"])]}
        token = found["token"]
        dots = [] if token is None else [(i, y, f"class token, layer {i}: {y:.3g}") for i, y in enumerate(token)]
        svgs[f"norms_{name}"] = chart(
            f"Length, {name}", lines, "layer (0: embedding)", dots=dots, dots_are="class token", reach=reach
        )
        colours.append(heat(found["maps"] / found["maps"].max()))
        said.append(f"{name}: the longest patch is {found['longest'][-1] / found['mean'][-1]:.2f} times the mean")
    few = list(shown.singly)
    ends = "0", "longest"
    html = map_tiles([shown.images[i] for i in few], (colours[0], colours[1]), shown.captions(few), ends)
    return Drawn(svgs, html, f"{sentence(said)}, after the last layer.")


def flow(trained: Found, untrained: Found, shown: Shown) -> Drawn:
    """Draw ``patch`` (L+1,) and ``token`` (L+1,) or None, on a logarithmic axis."""
    svgs = {}
    everything = [y for _, found in both(trained, untrained) for line in _flows(found).values() for _, y in line]
    for name, found in both(trained, untrained):
        title = f"Gradient, {name}"
        svgs[f"flow_{name}"] = chart(title, _flows(found), "layer (0: embedding)", log_y=True, reach=everything)
    whole = [found["all"][0] / (found["all"][-1] or math.nan) for found in (trained, untrained)]
    if not np.isfinite(whole).all():
        return Drawn(svgs, said="No gradient goes back from the logits: the head lets none through.")
    said = "From the last layer to the embedding the gradient of all tokens together changes by a factor of "
    return Drawn(svgs, said=f"{said}{whole[0]:.2g}, in the untrained model of {whole[1]:.2g}.")


def _flows(found: Found) -> dict[str, list[tuple[int, float]]]:
    lines = {"mean of the patches": found["patch"], "class token": found["token"]}
    return {name: [*enumerate(line.tolist())] for name, line in lines.items() if line is not None}


# ---- what the drawings share -----------------------------------------------------------------------------------------


def both(trained: Found, untrained: Found) -> Sequence[tuple[str, Found]]:
    """Return the two models by what they are called."""
    return (("trained", trained), ("untrained", untrained))


def mean_of_finite(values: np.ndarray) -> float:
    """Return the mean of those of the values that are finite, NaN if none is."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def numbered(count: int) -> list[str]:
    """Return "1", "2", …: layers and heads are counted from 1 here."""
    return [str(i) for i in range(1, count + 1)]


def sentence(parts: Sequence[str]) -> str:
    """Return parts as one sentence, without its full stop."""
    whole = "; ".join(parts)
    return whole[0].upper() + whole[1:]


def percent(y: float) -> str:
    """Return a share as a percentage."""
    return f"{100 * y:.4g}%"


DRAW: dict[str, Callable[[Found, Found, Shown], Drawn]] = {
    "attention": attention,
    "gallery": gallery,
    "filters": filters,
    "positions": positions,
    "distance": distance,
    "entropy": entropy,
    "importance": importance,
    "attribution": attribution,
    "lens": lens,
    "features": features,
    "norms": norms,
    "flow": flow,
}
