"""How pictures are prepared for the weights of a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, BinaryIO

import numpy as np

from minivit.data.fit import read_fit
from minivit.data.images import read_image
from minivit.data.loader import standardize


@dataclass(frozen=True)
class Preparation:
    """How pictures are prepared for the weights of a model: brought to its size, then (x / 255 − mean) / std.

    ``fit`` says how they are brought to its size, as :func:`minivit.data.fit.fitted` has it: "centre bicubic 0.9".
    ``mean`` and ``std`` are of each channel.
    """

    fit: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        read_fit(self.fit)

    def read(self, source: str | PathLike[str] | BinaryIO, shape: tuple[int, int, int]) -> np.ndarray:
        """Return the image file ``source`` as a model takes it, float32 (C, H, W), the ``shape``. ::

            x = mv.preparation(name).read("cat.jpg", model.settings.image_shape)
            logits = mv.predict_logits(model, x[None])  # (1, K)

        Raises DataError for a file that cannot be used: :func:`minivit.data.read_image`.
        """
        channels, height, width = shape
        image: np.ndarray = read_image(source, (height, width), channels, self.fit)
        return np.asarray(standardize(image[None], self.mean, self.std))[0]

    def of_channels(self, channels: int) -> Preparation:
        """Return it for images of another number of channels: each has the average of the mean, and of the std."""
        if len(self.mean) == channels:
            return self
        mean, std = ((sum(values) / len(values),) * channels for values in (self.mean, self.std))
        return replace(self, mean=mean, std=std)

    def meta(self) -> dict[str, Any]:
        """Return it as a checkpoint keeps it, in its ``data``."""
        return {"fit": self.fit, "mean": list(self.mean), "std": list(self.std)}

    def text(self, height: int, width: int) -> str:
        """Return it in words, for images of this size."""
        how, interpolation, part = read_fit(self.fit)
        high, wide = int(height / part), int(width / part)
        scaled = {
            "stretch": "stretched", "crop": "the middle, scaled",
            "centre": f"shorter side to {high}" if high == wide else f"to cover {high} × {wide}",
            "squash": f"squashed to {high} × {wide}",
        }[how] + (f", {interpolation}" if how in ("centre", "squash") else "")  # fmt: skip
        middle = f", the middle {height} × {width}" if how == "centre" or (high, wide) != (height, width) else ""
        shown = (values[:1] if len(set(values)) == 1 else values for values in (self.mean, self.std))
        numbers = (" ".join(f"{x:.6g}" for x in values) for values in shown)
        return "{}{}; mean {}, std {}".format(scaled, middle, *numbers)


def recorded(data: dict[str, Any]) -> Preparation | None:
    """Return what a checkpoint's ``data`` says of the preparation, None if it does not."""
    if "mean" not in data or "std" not in data:
        return None
    return Preparation(data.get("fit", "stretch"), tuple(data["mean"]), tuple(data["std"]))
