"""The rows of the table of samples (:mod:`minivit.ops.samples`) for operations on images: windows, groups of channels.

Odd sizes, sides that differ, kernels larger and smaller than their stride, one pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

IMAGE_ROWS: dict[str, dict[str, Callable[[Any], tuple[Any, ...]]]] = {
    "conv2d": {
        "3 by 3, padded": lambda r: (r(2, 3, 5, 4), r(2, 3, 3, 3), r(2), 1, 1),
        "stride 2, uneven sides": lambda r: (r(2, 2, 5, 7), r(3, 2, 3, 2), r(3), 2, ((0, 1), (1, 0))),
        "a kernel smaller than its stride, no bias": lambda r: (r(1, 2, 7, 5), r(3, 2, 1, 2), None, (3, 2), (1, 0)),
        "1 by 1": lambda r: (r(2, 3, 2, 3), r(5, 3, 1, 1), r(5)),
        "one pixel": lambda r: (r(3, 2, 1, 1), r(2, 2, 3, 3), r(2), 1, 1),
    },
    "max_pool2d": {
        "side by side": lambda r: (r(2, 3, 4, 5), 2),
        "overlapping, padded": lambda r: (r(1, 2, 5, 7), 3, 2, 1),
        "uneven sides": lambda r: (r(2, 1, 6, 5), (3, 2), (2, 1), ((0, 2), (1, 0))),
        "smaller than its stride": lambda r: (r(2, 1, 7, 5), (1, 2), (3, 2)),
        "one pixel": lambda r: (r(3, 2, 1, 1), 3, 2, 1),
    },
    "avg_pool2d": {
        "side by side": lambda r: (r(2, 3, 4, 5), 2),
        "overlapping, padded": lambda r: (r(1, 2, 5, 7), 3, 2, 1),
        "uneven sides": lambda r: (r(2, 1, 6, 5), (3, 2), (2, 1), ((0, 2), (1, 0))),
        "smaller than its stride": lambda r: (r(2, 1, 7, 5), (1, 2), (3, 2)),
        "one pixel": lambda r: (r(3, 2, 1, 1), 1),
    },
    "unfold": {
        "overlapping, padded": lambda r: (r(2, 3, 5, 4), 3, 1, 1),
        "uneven sides": lambda r: (r(2, 1, 6, 5), (3, 2), (2, 1), ((0, 2), (1, 0))),
        "smaller than its stride": lambda r: (r(2, 3, 7, 5), (1, 2), (3, 2)),
        "one pixel": lambda r: (r(3, 2, 1, 1), 3, 1, 1),
    },
    "fold": {
        "overlapping, padded": lambda r: (r(2, 27, 20), (5, 4), 3, 1, 1),
        "uneven sides": lambda r: (r(2, 6, 15), (6, 5), (3, 2), (2, 1), ((0, 2), (1, 0))),
        "smaller than its stride": lambda r: (r(2, 6, 6), (7, 5), (1, 2), (3, 2)),
        "one pixel": lambda r: (r(3, 18, 1), (1, 1), 3, 1, 1),
    },
    "group_norm": {
        "images": lambda r: (r(2, 6, 2, 3), 3, r.positive(6), r(6)),
        "3-D, one group, a large eps": lambda r: (r(3, 2, 5), 1, r(2), r(2), 0.5),
        "a group for each channel": lambda r: (r(2, 3, 2, 2), 3, r.positive(3), r(3)),
        "2-D, far from zero": lambda r: (r.far_apart(3, 6), 2, r.positive(6), r(6)),
        "groups of equal numbers": lambda r: (
            np.concatenate([r(2, 4, 3), np.full((1, 4, 3), 0.1)]), 2, r.positive(4), r(4)
        ),
    },
}  # fmt: skip
