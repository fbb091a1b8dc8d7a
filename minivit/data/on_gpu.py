"""Where a loader's images lie whose batches are made on a GPU: there as well, or on the CPU until they are needed."""

from __future__ import annotations

from typing import Any

import numpy as np

from minivit.backend import Array, SideStream, array_module, available_memory, packed_to, resident, through_pinned
from minivit.data.augment import Augment
from minivit.data.file_array import ImageFiles


class Resident:
    """Images, uint8 (N, C, H, W), on a GPU: an index, int64 (n,) on the CPU, gathers some of them there."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = resident(images)

    def __getitem__(self, index: np.ndarray) -> Array:
        (places,) = packed_to(self.images, index)
        return self.images[places]


class Streamed:
    """Images, uint8 (N, C, H, W), on the CPU or in files: those at an index, int64 (n,), are taken to the current GPU.

    They are gathered in page-locked memory, from which they are copied while the next are gathered.
    """

    def __init__(self, images: np.ndarray | ImageFiles) -> None:
        self.images = images

    def __getitem__(self, index: np.ndarray) -> Array:
        def gather(out: np.ndarray) -> None:
            if isinstance(self.images, np.ndarray):
                self.images.take(index, axis=0, out=out, mode="clip")  # "raise" would gather elsewhere first
            else:
                out[...] = self.images[index]

        return through_pinned(gather, (len(index), *self.images.shape[1:]), np.uint8)


def placed(
    images: np.ndarray | ImageFiles, augment: Augment | None, side: SideStream, most: int | None
) -> tuple[Any, str]:
    """Return what gathers ``images`` by an index for batches on a GPU, and what a user ought to know of it, or "".

    They are copied there if they take no more than ``most`` bytes (None: half of the memory that is free there, because
    the rest is for what is computed with them). Where ``augment`` cannot work there, what gathers them does so on the
    CPU.
    """
    if augment is not None and (why_not := _refusal(augment, images.shape[1:], side)):
        name = type(augment).__name__
        return images, f"batches are made on the CPU, because {name} does not work on a GPU: {why_not}"
    if isinstance(images, ImageFiles):
        remark = f"image files are read on the CPU; what is done with the images is done on {side.device}"
        return Streamed(images), remark
    most = available_memory(side.device) // 2 if most is None else most
    if images.nbytes > most:
        what = f"the images take {images.nbytes:,} bytes, {most:,} of {side.device} are for them"
        return Streamed(images), f"{what}: they stay on the CPU, and are copied there batch by batch"
    with side.working():
        return Resident(images), ""


def _refusal(augment: Augment, shape: tuple[int, ...], side: SideStream) -> str:
    """Return why ``augment`` does not change images (C, H, W) on a GPU, "" if it does: two black ones are tried."""
    try:
        with side.working():
            images = through_pinned(lambda out: out.fill(0), (2, *shape), np.float32)
            changed = augment(images, np.zeros((2, augment.draws), np.float32))
    except (TypeError, AttributeError) as error:  # CuPy's, for what it does not take or have
        return str(error).split("\n")[0] or type(error).__name__
    return "" if array_module(changed) is array_module(images) else "it returns images on the CPU"
