"""Every operation, usable on arrays and on Tensors, and the operators of Tensor."""

from __future__ import annotations

import operator
from typing import Any

from minivit.autograd.tensor import Tensor
from minivit.ops import cpu as _cpu  # noqa: F401 - attaches the twins on NumPy arrays to their operations
from minivit.ops import cuda as _cuda  # noqa: F401 - and those on CuPy arrays
from minivit.ops.activation import ACTIVATIONS, gelu, relu, sigmoid, silu
from minivit.ops.attention import attention, attention_weights, self_attention
from minivit.ops.conv import avg_pool2d, conv2d, fold, max_pool2d, same_padding, unfold
from minivit.ops.convert import convert
from minivit.ops.dropout import drop_path, dropout
from minivit.ops.elementwise import (
    abs,
    add,
    clip,
    cos,
    div,
    erf,
    exp,
    log,
    maximum,
    minimum,
    mul,
    neg,
    pow,
    sin,
    sqrt,
    sub,
    tanh,
    where,
)
from minivit.ops.loss import cross_entropy
from minivit.ops.matmul import linear, matmul
from minivit.ops.normalize import group_norm, layer_norm, log_softmax, rms_norm, softmax
from minivit.ops.numpy_calls import OfTheClass, array_function, array_ufunc, compare
from minivit.ops.reduce import logsumexp, max, mean, min, sum, var
from minivit.ops.shape import (
    broadcast_to,
    concat,
    embed_tokens,
    getitem,
    pad,
    patchify,
    reshape,
    scatter,
    split,
    stack,
    swapaxes,
    take_along_axis,
    transpose,
    unpatchify,
)

__all__ = [
    "ACTIVATIONS", "abs", "add", "attention", "attention_weights", "avg_pool2d", "broadcast_to", "clip", "concat",
    "conv2d", "convert", "cos", "cross_entropy", "div", "drop_path", "dropout", "embed_tokens", "erf", "exp", "fold",
    "gelu", "getitem", "group_norm", "layer_norm", "linear", "log", "log_softmax", "logsumexp", "matmul", "max",
    "max_pool2d", "maximum", "mean", "min", "minimum", "mul", "neg", "pad", "patchify", "pow", "relu", "reshape",
    "rms_norm", "same_padding", "scatter", "self_attention", "sigmoid", "silu", "sin", "softmax", "split", "sqrt",
    "stack", "sub", "sum", "swapaxes", "take_along_axis", "tanh", "transpose", "unfold", "unpatchify", "var", "where",
]  # fmt: skip


# ---- Tensor's operators and methods: autograd knows no operation, so they are attached here --------------------------


def _attach() -> None:
    def flipped(op: Any) -> Any:
        return lambda self, other: op(other, self)

    def spread(op: Any) -> Any:  # x.reshape(2, 3) as well as x.reshape((2, 3))
        return lambda self, *args: op(self, args[0] if len(args) == 1 and not isinstance(args[0], int) else args)

    def compared(comparison: Any) -> Any:
        return lambda self, other: compare(comparison, self, other)

    methods: dict[str, Any] = {
        "__add__": add, "__radd__": flipped(add), "__sub__": sub, "__rsub__": flipped(sub),
        "__mul__": mul, "__rmul__": flipped(mul), "__truediv__": div, "__rtruediv__": flipped(div),
        "__pow__": pow, "__rpow__": flipped(pow), "__neg__": neg, "__abs__": abs,
        "__matmul__": lambda self, other: matmul(self, other), "__rmatmul__": flipped(matmul),
        "__getitem__": getitem,
        "abs": abs, "exp": exp, "log": log, "sqrt": sqrt, "tanh": tanh, "sin": sin, "cos": cos, "clip": clip,
        "sum": sum, "mean": mean, "var": var, "max": max, "min": min, "softmax": softmax,
        "logsumexp": logsumexp,
        "reshape": spread(reshape), "swapaxes": swapaxes, "astype": convert, "to": convert,
        "transpose": lambda self, *axes: transpose(self, (axes[0] if not isinstance(axes[0], int) else axes)
                                                   if axes else None),
        "T": property(lambda self: transpose(self)),
        "__array_function__": array_function, "__array_ufunc__": OfTheClass(array_ufunc),
    }  # fmt: skip
    for name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"):
        methods[name] = compared(getattr(operator, name))
    for name, method in methods.items():
        setattr(Tensor, name, method)


_attach()
