"""The end of a training step on a GPU, in one launch each: whether its update is made, and by what it is clipped.

See :class:`minivit.train.numbers.DeviceNumbers`, whose text says the same in a dozen operations on single numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minivit.backend import Array, is_array, tile

_FINISH = tile.Kernel("verdict", "finish")
_CLIP = tile.Kernel("verdict", "clip")


def finish(loss: Any, norm: Any, right: Any, running: Array, steps: Array, report: Array) -> bool:
    """Put what a step came to into ``report``, see whether its update is made, and count it; False, if no kernel does.

    ``loss`` and ``norm`` float32, ``right`` a number or None, ``running`` bool, ``steps`` uint64: 0-d on the device.
    """
    # sums that CuPy's arrays keep are bare numbers of NumPy's, whose arrays are met while planning
    loss, norm, right = (np.asarray(x) if isinstance(x, np.generic) else x for x in (loss, norm, right))
    if not (is_array(loss) and is_array(norm) and (right is None or is_array(right))):
        return False
    if not (loss.dtype == norm.dtype == np.float32):
        return False
    numbers = [x.reshape(1) for x in (loss, norm, norm if right is None else right, running, steps)]  # () → (1,)
    if not _FINISH.ready(*numbers, report, counted=right is not None):
        return False
    _FINISH(1, *numbers, report, counted=right is not None)
    return True


def clip(norm: Array, factor: Array, limit: float) -> bool:
    """Set ``factor``, float32, to limit/(norm + 1e-6) if ``norm`` is above it, else 1; False, if no kernel is ready."""
    numbers = norm.reshape(1), factor.reshape(1)  # () → (1,)
    if factor.dtype != np.float32 or not _CLIP.ready(*numbers, float(limit)):
        return False
    _CLIP(1, *numbers, float(limit))
    return True
