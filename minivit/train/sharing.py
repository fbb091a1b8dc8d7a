"""How a batch is shared out: the arrays it comes in, and the team whose threads work on its micro-batches."""

from __future__ import annotations

from typing import Any

import numpy as np

from minivit.autograd.op import raw
from minivit.backend import Array, Team, is_array, is_bfloat16, l2_cache
from minivit.backend.threads import THREAD_NUMBERS
from minivit.nn.module import Module

CACHED_NUMBERS = 51 << 12  # of a micro-batch in a layer, for each MiB of L2 cache: fewer make calls too short
USUAL_NUMBERS = 192  # of a row of a model that does not say
KEPT_NUMBERS = 5 << 18  # of a micro-batch in all layers: its activations, some 20 times as many, are kept


def team_for(model: Module, threads: int | None = None, micro_batch: int | None = None) -> Team:
    """Return the threads that a batch of this model is shared out to, on its device, and the size of their pieces.

    On the CPU a micro-batch, unless given, is as large as the cache holds of a layer's activations, and as the memory
    should hold of all layers' together, by the model's :meth:`~minivit.nn.module.Module.row_size`; on a GPU it is
    the whole batch. Raises ConfigError for ``threads`` or a ``micro_batch`` below 1.
    """
    device, size = next(model.parameters()).device, model.row_size()
    # of a model that says nothing, each row is taken to be worth a thread, and nothing to be large
    numbers, layers = size or (THREAD_NUMBERS, 1)
    if micro_batch is None and device == "cpu":
        cached = CACHED_NUMBERS * l2_cache() // 2**20 // (numbers if size else USUAL_NUMBERS)
        kept = KEPT_NUMBERS // (numbers * max(1, layers))
        micro_batch = max(1, min(cached, kept))
    return Team(threads, micro_batch, device, numbers)


def as_array(x: Any, dtype: Any = None) -> Array:
    """Return the array of a Tensor, an array itself or one made of a list; floating numbers as ``dtype``, if given."""
    x = raw(x) if is_array(raw(x)) else np.asarray(x)
    return x.astype(dtype, copy=False) if dtype is not None and (x.dtype.kind == "f" or is_bfloat16(x.dtype)) else x
