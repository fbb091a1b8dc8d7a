"""Files of weights for tests: safetensors, right or wrong, and the memory that reading one takes."""

from __future__ import annotations

import json
import struct
import tracemalloc

import numpy as np

NAMES = {np.dtype("f4"): "F32", np.dtype("f2"): "F16", np.dtype("f8"): "F64", np.dtype("i8"): "I64"}


def safetensors(tensors, about=None, edit=lambda header: header):
    """Return a file of the format, its header as ``edit`` changes it: a table, or a list of (name, entry)."""
    header, data = {} if about is None else {"__metadata__": about}, b""
    for name, a in tensors.items():
        kind = "BF16" if a.dtype == np.uint16 else NAMES[a.dtype]
        header[name] = {"dtype": kind, "shape": list(a.shape), "data_offsets": [len(data), len(data) + a.nbytes]}
        data += np.ascontiguousarray(a).tobytes()
    header = edit(header)
    if isinstance(header, list):
        text = "{" + ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in header) + "}"
    else:
        text = header if isinstance(header, str) else json.dumps(header)
    return struct.pack("<Q", len(text.encode())) + text.encode() + data


def peak(work):
    tracemalloc.start()
    try:
        return work(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
