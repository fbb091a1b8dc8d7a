"""Mutants: gradients made wrong on purpose, to see whether the gradient check refuses every one of them.

A check that accepts a wrong gradient is worth nothing, and does not tell. So each operation's gradient is spoiled in
two ways: what it returns is changed (a sign, a factor, an axis, zeros, another input's gradient, …), and its source is
(``+`` for ``-``, ``*`` for ``/``, a factor dropped, another constant, another variable, …; DeMillo, Lipton and Sayward
1978, "Hints on test data selection"). A spoiled gradient that raises, or whose values are the true ones after all,
is no mutant and is not counted. Every other one must be refused, and that also where the operation stands between two
factors that make its gradients a millionth, or a million times, what they are.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from minivit.autograd.check import GradientReport, check_grads, judged
from minivit.autograd.op import OPS, Op
from minivit.autograd.tensor import Tensor, tensor
from minivit.autograd.tensor import grad_or_zeros as grad
from minivit.backend import Key, is_array, normal
from minivit.errors import GradientError, NonFiniteError, UndecidedError

SCALES = (1.0, 1e-6, 1e6)
"""How large the gradients are made that are checked, mutants and true ones."""


class Verdict(NamedTuple):
    """How the mutants of one operation fared on one sample, each on every scale."""

    killed: int
    total: int
    survivors: list[str]


def check_op(op: Op, args: Sequence[Any], order: int = 2, seed: int = 0, scale: float = 1.0) -> GradientReport:
    """Check the gradient of ``op(*args)`` in every array at a differentiable position (see check_grads).

    With a ``scale``, that of √scale · op(√scale · x) at x = arg / √scale: ``scale`` times the gradient.
    """
    fn, inputs = _function(op, args, scale)
    return check_grads(fn, inputs, order, seed=seed)


def check_mutants(op: Op, args: Sequence[Any], seed: int = 0, scales: Sequence[float] = SCALES) -> Verdict:
    """Let the check judge every mutant of ``op`` on these arguments, on every scale; count those that it refuses."""
    functions = [(scale, *_function(op, args, scale)) for scale in scales]  # made before any mutation
    truths = [list(_gradients(fn, arrays)) for _, fn, arrays in functions]
    total, survivors = 0, []
    for description, mutated in mutants(op, args):
        with mutated:
            for (scale, fn, arrays), truth in zip(functions, truths, strict=True):
                try:
                    if _equal(_gradients(fn, arrays), truth, scale):
                        continue
                except Exception:  # it fails by itself: whatever it is, nobody would take it for a gradient
                    continue
                total += 1
                if not refuses(fn, arrays, seed):
                    survivors.append(description if scale == 1.0 else f"{description}, scale {scale:.0e}")
    return Verdict(total - len(survivors), total, survivors)


def refuses(fn: Callable[..., Tensor], arrays: Sequence[np.ndarray], seed: int) -> bool:
    """Return whether the check finds the gradient of ``fn`` wrong, or NaN; without looking for the entry."""
    leaves = {str(i): tensor(a, requires_grad=True) for i, a in enumerate(arrays)}
    try:
        return not all(check.passed for check in judged(lambda: fn(*leaves.values()), leaves, seed=seed))
    except (GradientError, NonFiniteError):
        return True
    except UndecidedError:
        return False


def mutants(op: Op, args: Sequence[Any]) -> Iterator[tuple[str, contextlib.AbstractContextManager[None]]]:
    """Yield (description, a context in which ``op`` has that wrong gradient)."""
    arrays = [k for k, i in enumerate(_positions(op, args)) if is_array(args[i])]
    for description, gradient in _wrong_results(op, arrays):
        yield description, _replaced(op, gradient=gradient)
    for description, attributes in _wrong_sources(op):
        yield description, _replaced(op, **attributes)


@contextlib.contextmanager
def _replaced(op: Op, **attributes: Any) -> Iterator[None]:
    before = dict(vars(op))
    vars(op).update(attributes)
    try:
        yield
    finally:
        vars(op).clear()
        vars(op).update(before)


def _positions(op: Op, args: Sequence[Any]) -> list[int]:
    return [i for i in op.input_positions(args) if i < len(args)]


def _function(op: Op, args: Sequence[Any], scale: float = 1.0) -> tuple[Callable[..., Tensor], list[Any]]:
    """Return ``op`` between two factors √scale as a function of the arrays at its inputs, and these arrays / √scale."""
    places = [i for i in _positions(op, args) if is_array(args[i])]
    root = math.sqrt(scale)
    mul = Op.__new__(Op)  # a copy, which stays what it is while the operation itself is mutated
    vars(mul).update(vars(OPS["mul"]))

    def fn(*inputs: Any) -> Tensor:
        values = list(args)
        for i, x in zip(places, inputs, strict=True):
            values[i] = x if scale == 1.0 else mul(x, root)
        return op(*values) if scale == 1.0 else mul(op(*values), root)

    return fn, [args[i] if scale == 1.0 else args[i] / root for i in places]


_normal = functools.cache(normal)


def _gradients(fn: Callable[..., Tensor], arrays: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the gradients, of order 1 and then of order 2, for one random cotangent and random weights."""
    inputs = [tensor(a, requires_grad=True) for a in arrays]
    out = fn(*inputs)
    cotangent = tensor(_normal(Key(1), out.shape), requires_grad=True)
    yield from (d.numpy() for d in grad(fn(*inputs), inputs, cotangent.data))
    firsts = grad(out, inputs, cotangent, create_graph=True)
    yield from (d.numpy() for d in firsts)
    total: Any = sum((d * _normal(Key(2, i), d.shape)).sum() for i, d in enumerate(firsts))
    leaves = [*inputs, cotangent]
    yield from (d.numpy() for d in grad(total, leaves)) if total.requires_grad else (np.zeros(x.shape) for x in leaves)


def _equal(some: Iterable[np.ndarray], others: Iterable[np.ndarray], scale: float) -> bool:
    atol = 1e-9 * min(1.0, scale**1.5)  # gradients of order 1 are of size scale, those of order 2 of scale · √scale
    return all(np.allclose(a, b, rtol=1e-9, atol=atol) for a, b in zip(some, others, strict=True))


# ---- wrong results ---------------------------------------------------------------------------------------------------


def _transposed(d: Any) -> Any:
    return d.swapaxes(-1, -2) if len(d.shape) > 1 and d.shape[-1] == d.shape[-2] else d


def _rolled(d: Any, axis: int) -> Any:
    return d[(*[slice(None)] * axis, np.arange(d.shape[axis]) - 1)] if len(d.shape) > axis else d


def _first_slice(d: Any, shape: tuple[int, ...]) -> Any:
    """Return the first slice along each axis that the engine would sum over."""
    extra = len(d.shape) - len(shape)
    return d[(*[0] * extra, *[slice(0, 1) if n == 1 else slice(None) for n in shape])] if d.shape != shape else d


_CHANGES: dict[str, Callable[[Any, Any, tuple[int, ...]], Any]] = {
    "1% too large": lambda d, g, shape: d * 1.01,
    "zero": lambda d, g, shape: d * 0.0,
    "a millionth": lambda d, g, shape: d * 1e-6,
    "a million times too large": lambda d, g, shape: d * 1e6,
    "the sign flipped": lambda d, g, shape: -d,
    "a factor √d too large": lambda d, g, shape: d * math.sqrt(shape[-1]) if shape else d,
    "the cotangent itself": lambda d, g, shape: g if g.shape == d.shape else d,
    "transposed": lambda d, g, shape: _transposed(d),
    "shifted along the first axis": lambda d, g, shape: _rolled(d, 0),
    "shifted along the second axis": lambda d, g, shape: _rolled(d, 1),
    "not summed where broadcast": lambda d, g, shape: _first_slice(d, shape),
    "a constant to the second order": lambda d, g, shape: d.detach() if isinstance(d, Tensor) else d,
}
"""(gradient, cotangent, the input's shape) → a wrong gradient, or the same one where the change does not apply."""


def _wrong_results(op: Op, inputs: Sequence[int]) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield functions to stand in for ``op.gradient``."""
    true = op.gradient

    def changed(i: int, change: Callable[..., Any]) -> Callable[..., Any]:
        def gradient(node: Any, g: Any, needs: tuple[bool, ...], wrap: Any) -> Any:
            results = list(true(node, g, needs, wrap))
            if results[i] is not None:
                results[i] = change(results[i], g, node.parents[i].shape)
            return results

        return gradient

    def swapped(i: int, j: int) -> Callable[..., Any]:
        def gradient(node: Any, g: Any, needs: tuple[bool, ...], wrap: Any) -> Any:
            results = list(true(node, g, needs, wrap))
            results[i], results[j] = results[j], results[i]
            return results

        return gradient

    def ones(node: Any, g: Any, needs: tuple[bool, ...], wrap: Any) -> Any:
        return true(node, g * 0.0 + 1.0, needs, wrap)

    yield f"{op.name}: the cotangent taken for ones", ones
    for i in inputs:
        for name, change in _CHANGES.items():
            yield f"{op.name}: gradient {i} {name}", changed(i, change)
        for j in [j for j in inputs if j < i]:
            yield f"{op.name}: gradients {j} and {i} swapped", swapped(i, j)


# ---- wrong sources ---------------------------------------------------------------------------------------------------


def _wrong_sources(op: Op) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield attributes of ``op`` that hold a gradient with one place of its source changed."""
    if op._vjp is not None:
        for description, mutated in _respelled(op._vjp):
            yield f"{op.name}: {description}", {"_vjp": mutated}
    for i, function in enumerate(op._vjps):
        for description, mutated in _respelled(function):
            yield f"{op.name}: {description}", {"_vjps": (*op._vjps[:i], mutated, *op._vjps[i + 1 :])}


@functools.cache
def _respelled(function: Callable[..., Any]) -> list[tuple[str, Callable[..., Any]]]:
    """Return (what changed, the function compiled anew) for every place that can change."""
    tree, found = _tree(function), []
    for node, attribute, value in list(_edits(tree)):
        before, text = getattr(node, attribute), ast.unparse(node)
        setattr(node, attribute, value)
        found.append((f"{text} → {ast.unparse(node)}, line {node.lineno}", _compiled(tree, function)))
        setattr(node, attribute, before)
    return found


def _edits(tree: ast.Lambda | ast.FunctionDef) -> Iterator[tuple[ast.expr, str, Any]]:
    """Yield (node, attribute, another value for it) for every place to change."""
    names = [a.arg for a in tree.args.args]
    others: dict[type, type] = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
    for part in tree.body if isinstance(tree, ast.FunctionDef) else [tree.body]:
        for node in ast.walk(part):
            if isinstance(node, ast.BinOp) and type(node.op) in others:
                neutral = ast.Constant(0.0 if isinstance(node.op, ast.Add | ast.Sub) else 1.0)
                yield from [(node, "op", others[type(node.op)]()), (node, "left", neutral), (node, "right", neutral)]
            elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
                yield node, "operand", ast.UnaryOp(ast.USub(), node.operand)  # -(-x)
            elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
                yield node, "value", not node.value if isinstance(node.value, bool) else node.value + 1
            elif isinstance(node, ast.Name) and node.id in names and isinstance(node.ctx, ast.Load):
                yield from [(node, "id", other) for other in names if other != node.id]


def _tree(function: Callable[..., Any]) -> ast.Lambda | ast.FunctionDef:
    """Return the syntax tree of a lambda or function at the top of its module."""
    code = function.__code__
    places = {(line, column) for line, _, column, _ in code.co_positions()}
    for node in ast.walk(ast.parse(inspect.getsource(inspect.getmodule(function)))):  # type: ignore[arg-type]
        if isinstance(node, ast.Lambda) and node.lineno == code.co_firstlineno:
            if (node.body.lineno, node.body.col_offset) in places:  # of several on the line, this one
                return node
        elif isinstance(node, ast.FunctionDef) and code.co_firstlineno in (d.lineno for d in node.decorator_list):
            return node
    raise LookupError(f"no source for {function}")


def _compiled(tree: ast.Lambda | ast.FunctionDef, like: Callable[..., Any]) -> Any:
    space = dict(like.__globals__)
    if isinstance(tree, ast.Lambda):
        expression = ast.fix_missing_locations(ast.Expression(tree))
        return eval(compile(expression, "<mutant>", "eval"), space)
    bare = copy.copy(tree)
    bare.name, bare.decorator_list = "mutant", []
    exec(compile(ast.fix_missing_locations(ast.Module([bare], [])), "<mutant>", "exec"), space)
    return space["mutant"]
