"""Gradients written by hand in NumPy, checked without the engine: a forward, and a backward that says its gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from minivit.autograd.check import (
    STREAM,
    GradientReport,
    Settings,
    argument_names,
    finite,
    is_checked,
    leaf_of,
    listed,
    passed,
)
from minivit.autograd.orders import Scalar, close, holding, nearby
from minivit.autograd.returned import gradients_of, output_of
from minivit.autograd.tensor import Tensor
from minivit.backend import Key, normal
from minivit.errors import ConfigError, DTypeError, GradientError, GraphError, MinivitError, UndecidedError

__tracebackhide__ = True  # as in orders.py

LOUDER = 1024.0
"""A cotangent so many times as large must give a gradient so many times as large: a power of two, so to the last bit
of any precision."""


def check_vjp(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    args: Sequence[Any],
    *,
    cache: bool = False,
    method: str = "auto",
    seed: int = 0,
    rtol: float | None = None,
    atol: float | None = None,
) -> GradientReport:
    """Check a hand-written gradient of plain NumPy code; raise GradientError if it is wrong.

    ``forward(*args)`` returns an array, a number, or a tuple of several. ``backward(g, *args)`` returns the gradient of
    Σ g·out for each of the arguments, in their order and of their shapes: a tuple, or the gradient itself of a single
    argument. g has the shape of out, and is a tuple where forward returns one (with None for what holds no floating
    numbers, such as the places of a maximum)::

        def forward(x, w): return np.tanh(x @ w)
        def backward(g, x, w):
            g = g * (1 - forward(x, w) ** 2)
            return g @ w.T, x.T @ g

        mv.check_vjp(forward, backward, [x, w])

    With ``cache=True`` forward returns (out, what backward needs) and ``backward(g, cache)`` is called. A layer that
    keeps it in itself is checked so, a new one each time::

        def forward(x, w): layer = Layer(w); return layer(x), layer
        def backward(g, layer): return layer.backward(g), layer.dw

    Arguments that hold floating numbers (arrays of any precision, or a float) are checked, as float64; others are
    passed on as they are, and their gradient is None. What is to be held constant is bound: ``functools.partial(…,
    eps=1e-5)``, for both functions. The cotangent is random. ``method``, ``seed``, ``rtol`` and ``atol`` are those of
    :func:`minivit.check_grads`; the complex step needs a forward that takes complex numbers, as NumPy's functions do.

    Raises GradientError for a gradient that is wrong, missing, of another shape or not linear in g, or where there can
    be none, UndecidedError where rounding hides whether it is right, NonFiniteError for NaN or infinity, ConfigError
    for functions that change their arguments or depend on earlier calls, and what the two functions raise.
    """
    settings = Settings(method, seed, rtol, atol)
    scalar = HandWritten(forward, backward, listed(args, "check_vjp"), cache, Key(seed, STREAM))
    try:
        report = passed([scalar], settings)
    except UndecidedError as error:
        hints = scalar.hints(next(iter(scalar.leaves)))
        raise UndecidedError("\n  ".join([error.what, *hints]), error.remedy) if hints else error from None
    scalar.check_repeats()
    scalar.check_linear()
    return report


class HandWritten(Scalar):
    """The scalar s = Σ g · forward(*args), and its gradient in every floating argument as backward says it is.

    The leaves are Tensors only to hold arrays; no engine runs. Both functions are called with copies.
    """

    function, backward_function = "forward", "backward"
    steadier = "the same seed in every call"
    remedy = "mend it in backward; to narrow it down, check its parts alone"

    def __init__(
        self, forward: Callable[..., Any], backward: Callable[..., Any], args: list[Any], cache: bool, key: Key
    ) -> None:
        self.forward, self.backward, self.args, self.cache = forward, backward, args, cache
        self.names = argument_names(forward, len(args))
        self.leaves = {name: leaf_of(a) for name, a in zip(self.names, args, strict=True) if is_checked(a)}
        for name, a in zip(self.names, args, strict=True):
            if np.iscomplexobj(a):
                raise DTypeError(f"check_vjp: {name} is complex", "pass its real and imaginary parts as two arguments")
        if not self.leaves:
            raise GraphError("check_vjp: no argument holds floating numbers", "pass float arrays")
        finite(self.leaves)
        self.rounded: dict[str, Any] = {}  # gradients' dtypes, where they are narrower than float64
        out = self.run(self.arguments())[0]
        self.several = isinstance(out, tuple | list)
        self.outputs = (
            [output_of(x, f" in place {i}") for i, x in enumerate(out)] if self.several else [output_of(out, "")]
        )
        self.weighed = [i for i, x in enumerate(self.outputs) if x is not None and x.dtype.kind == "f"]
        if not self.weighed:
            raise GraphError("check_vjp: forward returns no floating numbers", "return an array of floats")
        found = [np.array(self.outputs[i], np.float64) for i in self.weighed]
        self.begin(found, [key.child(1).child(i) for i in self.weighed])

    def weight(self, key: Key, values: np.ndarray) -> np.ndarray:
        """Draw a cotangent; of several outputs so that each counts, however small it is beside another."""
        size = float(np.abs(values).mean()) if self.several and values.size else 1.0
        return normal(key, values.shape) / (size or 1.0)

    # ---- calling the two ----

    def arguments(self) -> list[Any]:
        """Return the arguments to call with: copies, each of the kind that was given, with the leaves as they are."""
        values = []
        for name, given in zip(self.names, self.args, strict=True):
            if name not in self.leaves:
                values.append(given.copy(order="K") if isinstance(given, np.ndarray) else given)
                continue
            x = self.leaves[name].data
            number = given.data if isinstance(given, Tensor) else given
            kept = x[()] if isinstance(number, np.generic) else x.copy(order="K")
            values.append(x.item() if type(number) is float else kept)
        return values

    def run(self, values: list[Any]) -> tuple[Any, Any]:
        """Call forward, and return (its output, its cache)."""
        result = self.call(self.forward, values, f"forward({', '.join(self.names)})")
        if not self.cache:
            return result, None
        if not (isinstance(result, tuple | list) and len(result) == 2):
            what = f"{len(result)} things" if isinstance(result, tuple | list) else f"a {type(result).__name__}"
            raise ConfigError(f"check_vjp: with cache=True forward returns (out, cache), not {what}", "return both")
        return result[0], result[1]

    def call(self, function: Callable[..., Any], values: list[Any], spelled: str, g: tuple[Any, ...] = ()) -> Any:
        """Call ``function(*g, *values)``; raise ConfigError if it changes one of the values in place."""
        try:
            with np.errstate(all="ignore"):  # what is not finite is said by the check
                result = function(*g, *values)
        except Exception as error:
            shape = f" with g {_described(g[0])}" if g else ""
            error.add_note(f"check_vjp called {spelled}{shape}; see help(minivit.check_vjp)")
            raise
        self.check_unchanged(values, spelled)
        return result

    def check_unchanged(self, values: list[Any], spelled: str) -> None:
        """Raise ConfigError unless the arrays of ``values`` hold what they were made with."""
        for name, value, given in zip(self.names, values, self.args, strict=True):
            before = self.leaves[name].data if name in self.leaves else given
            if isinstance(value, np.ndarray) and not _same(value, before):
                raise ConfigError(
                    f"check_vjp: {spelled} changes {name} in place: whoever calls it has another array then",
                    f"work on a copy ({name} = {name}.copy()), or without +=, out= and {name}[...] =",
                )

    def values(self) -> Sequence[np.ndarray]:
        """Return the floating outputs, with the leaves as they are now."""
        out = self.run(self.arguments())[0]
        outputs = [out[i] for i in self.weighed] if self.several else [out]
        return [np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64) for x in outputs]

    def differentiate(self, between: Callable[[], Any] = lambda: None) -> dict[str, np.ndarray]:
        """Return what backward gives for every leaf, ``between`` being called after forward and before backward."""
        g, values = self.cotangents(), self.arguments()
        before = [np.array(w) for w in g]
        if self.cache:
            cache = self.run(values)[1]
            between()
            result = self.call(lambda g, *_: self.backward(g, cache), values, "backward(g, cache)", self.spelled(g))
        else:
            between()
            names = ", ".join(["g", *self.names])
            result = self.call(self.backward, values, f"backward({names})", self.spelled(g))
        if any(not _same(np.array(w), b) for w, b in zip(g, before, strict=True)):
            raise ConfigError(
                "check_vjp: backward changes g in place: it may be the gradient of something else as well",
                "work on a copy (g = g.copy()), or without +=, out= and g[...] =",
            )
        found = gradients_of(result, self.names, {name: x.shape for name, x in self.leaves.items()})
        narrow = {name: x.dtype for name, x in found.items() if x.dtype.kind == "f" and x.dtype.itemsize < 8}
        self.rounded.update(narrow)
        return {name: np.array(x, np.float64) for name, x in found.items()}

    def moved(self, steps: Mapping[Tensor, np.ndarray]) -> np.ndarray:
        """Return the terms of s with some leaves moved; raise ArithmeticError if forward refuses them."""
        try:
            return super().moved(steps)
        except Exception as error:
            raise ArithmeticError("forward refuses what lies so far away") from error

    def cotangents(self) -> list[Any]:
        """Return a cotangent for each output, None for those that hold no floating numbers."""
        weights = dict(zip(self.weighed, self.weights, strict=True))
        return [np.array(weights[i]) if i in weights else None for i in range(len(self.outputs))]

    def spelled(self, g: list[Any]) -> tuple[Any, ...]:
        """Return the cotangents as backward takes them: a number for a number, a tuple for a tuple."""
        out = [w if w is None or isinstance(x, np.ndarray) else w[()] for w, x in zip(g, self.outputs, strict=True)]
        return (tuple(out) if self.several else out[0],)

    # ---- what a right gradient does besides ----

    def check_repeats(self) -> None:
        """Raise ConfigError unless both functions give what they gave before, whatever was called in between."""
        super().check_repeats()
        if not self.gradients:
            return
        if not all(close(g, self.gradients[name]) for name, g in self.differentiate(self.call_elsewhere).items()):
            raise ConfigError(
                "check_vjp: backward gives another result when forward was called with other arguments in between: "
                "it reads what forward left behind",
                "let backward compute it from its arguments; or let forward return it, (out, cache), and pass "
                "cache=True: of a layer that keeps it in itself, a new one each time",
            )

    def call_elsewhere(self) -> None:
        """Call forward with other arguments."""
        with holding(nearby(self.leaves.values(), 0.01)):
            try:
                self.run(self.arguments())
            except MinivitError:
                raise
            except Exception:  # it refuses them
                return

    def check_linear(self) -> None:
        """Raise GradientError unless a larger cotangent gives a gradient as much larger."""
        weights = self.weights
        try:
            self.weights = [LOUDER * w for w in weights]
            louder = self.differentiate()
        finally:
            self.weights = weights
        for name, g in louder.items():
            if np.isfinite(g).all() and not close(g, LOUDER * self.gradients[name]):
                raise GradientError(
                    f"the gradient for {name} is right for one cotangent g, but that of {LOUDER:g}·g is not {LOUDER:g} "
                    "times as large",
                    "a gradient is linear in g: nothing clips it, rounds it or is added to it in backward",
                )

    def unreached(self) -> list[str]:
        """Return no names: there is no graph."""
        return []

    def hints(self, name: str) -> list[str]:
        """Return what may explain a wrong gradient for ``name``."""
        found = []
        narrow = [x.dtype for i, x in enumerate(self.outputs) if i in self.weighed and x.dtype.itemsize < 8]
        if narrow:
            found.append(
                f"forward returns {narrow[0]} for float64 arguments: it rounds to {_digits(narrow[0])} of them"
            )
        if name in self.rounded:
            allowed = f"rtol=1e-{np.finfo(self.rounded[name]).precision - 1} allows that"
            found.append(f"backward returns {self.rounded[name]}, rounded to {_digits(self.rounded[name])}: {allowed}")
        return found


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.all((a == b) | (a != a)))


def _described(g: Any) -> str:
    if not isinstance(g, tuple):
        return f"of shape {np.shape(g)}"
    return f"a tuple of {len(g)}, one for each output (of a forward that returns (out, cache): pass cache=True)"


def _digits(dtype: Any) -> str:
    return f"{np.finfo(dtype).precision} digits"
