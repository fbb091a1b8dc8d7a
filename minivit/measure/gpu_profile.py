"""Which kernels the time of a training step on a GPU goes to.

The step is launched from Python with marks of the GPU's clock around every operation, every kernel of our own and every
matrix product. Copies keep the GPU busy until all is launched, so that what lies between two marks is the work and no
wait for the host; a mark itself takes about a microsecond, which counts to what it is around. What an operation does
besides those launches, CuPy's own kernels, is one row for each operation.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from minivit.autograd.op import OPS
from minivit.backend import cublaslt, is_array, on_device_of, tile
from minivit.backend.clock import backlog, mark, seconds_between, wait_for
from minivit.measure.gpu_speed import copy_pair, launched

SIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}  # bytes of a number
STEPS = 5  # that are profiled, of which the median counts
BACKLOG = 3.0  # times what the host takes to launch a step


@dataclass
class Spent:
    """What one kind of work took in a step: launches, seconds, and the bytes and FLOPs that are known of it."""

    launches: int = 0
    seconds: float = 0.0
    bytes: int = 0
    flops: int = 0


@dataclass
class GpuProfile:
    """Where the ``seconds`` of one launched step went on the GPU: by kernel, and outside of all of them."""

    kernels: dict[str, Spent]
    seconds: float

    @property
    def outside(self) -> float:
        """Seconds in which no kernel of the table ran: between them, and what no operation has launched."""
        return self.seconds - sum(spent.seconds for spent in self.kernels.values())


@dataclass
class _Span:
    """Work between two marks; ``inner`` is what other spans within it have already counted."""

    name: str
    start: Any
    bytes: int = 0
    flops: int = 0
    end: Any = None
    inner: list[_Span] = field(default_factory=list)

    def seconds(self) -> float:
        return seconds_between(self.start, self.end)


def profile_on_gpu(step: Any, images: Any, labels: Any, copies: float) -> GpuProfile:
    """Return the profile of the median of some launched steps, after one that does not count.

    The step is launched from Python: a replay has no operations to look into. ``copies`` are the bytes that a copy
    moves in a second: see :func:`~minivit.measure.gpu_speed.copy_rate`.
    """
    device = step.team.device
    source, target = copy_pair(device)
    profiles, host = [], 0.0
    for _ in range(1 + STEPS):
        spans: list[_Span] = []
        wait_for(device)
        with launched(step), marked_calls(spans, step), on_device_of(source):
            backlog(source, target, BACKLOG * host, copies)
            first = mark()
            started = time.perf_counter()
            submitted = step.submit(images, labels)
            last = mark()
            host = host or time.perf_counter() - started
            submitted.totals()
        profiles.append(_summed(spans, seconds_between(first, last)))
    return sorted(profiles[1:], key=lambda p: p.seconds)[(STEPS - 1) // 2]


def _summed(spans: list[_Span], seconds: float) -> GpuProfile:
    found: dict[str, Spent] = {}
    for span in spans:
        own = span.seconds() - math.fsum(inner.seconds() for inner in span.inner)
        spent = found.setdefault(span.name, Spent())
        spent.launches += 1
        spent.seconds += max(own, 0.0)
        spent.bytes += span.bytes
        spent.flops += span.flops
    return GpuProfile(dict(sorted(found.items(), key=lambda item: -item[1].seconds)), seconds)


@contextlib.contextmanager
def marked_calls(spans: list[_Span], step: Any) -> Iterator[None]:
    """Put marks around every operation, kernel and matrix product in this block, and note them in ``spans``."""
    running: list[_Span] = []

    def marked(function: Callable[..., Any], about: Callable[..., _Span]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            span = about(*args, **kwargs)
            if running:
                running[-1].inner.append(span)
                if "attention" in span.name and running[-1].flops:  # its kernel makes the operation's products
                    span.flops, running[-1].flops = running[-1].flops, 0
            running.append(span)
            span.start = mark()
            try:
                return function(*args, **kwargs)
            finally:
                span.end = mark()
                running.pop()
                spans.append(span)

        return run

    owners: list[tuple[Any, str, Callable[..., _Span]]] = [
        (tile.Kernel, "__call__", _kernel),
        (cublaslt.Plan, "run", _product),
        (step.opt, "update_spans", lambda *args, **kwargs: _Span("optimizer's update: CuPy's kernels", None)),
    ]
    for name, op in OPS.items():
        for it in (op, *op.twins.values()):
            owners.append((it, "forward", partial(_forward, name)))
            owners.append((it, "gradient", partial(_backward, name)))
    with contextlib.ExitStack() as restore:
        for owner, attribute, about in owners:
            function, own = getattr(owner, attribute), attribute in vars(owner)
            restore.callback(*(setattr, owner, attribute, function) if own else (delattr, owner, attribute))
            setattr(owner, attribute, marked(function, about))
        yield


def _kernel(kernel: tile.Kernel, grid: Any, *args: Any, **constants: Any) -> _Span:
    """Return the span of a kernel of our own: it reads or writes each of its arrays once, as far as is known."""
    return _Span(kernel.factory, None, bytes=sum(a.nbytes for a in args if is_array(a)))


def _product(plan: cublaslt.Plan, *args: Any) -> _Span:
    """Return the span of a matrix product, by the lengths of its axes: batch, rows, columns, sums."""
    spec = plan.spec
    read = sum(m.rows * m.columns * SIZES[m.dtype] for m in (spec.a, spec.b, spec.c, spec.d) if m is not None)
    read += spec.d.rows * spec.d.columns * SIZES[spec.d.dtype] * spec.add
    lengths = [spec.d.columns, spec.d.rows, spec.k]  # cuBLASLt counts in columns, minivit in rows
    name = f"product {'×'.join(map(str, [spec.batch, *lengths] if spec.batch > 1 else lengths))}"
    return _Span(name, None, bytes=spec.batch * read, flops=2 * spec.batch * math.prod(lengths))


def _forward(name: str, *args: Any) -> _Span:
    flops = 0
    if name == "self_attention" and is_array(args[0]):
        b, tokens, features = args[0].shape
        queries = args[2] if len(args) > 2 and args[2] else tokens
        flops = 4 * b * queries * tokens * features // 3  # QKᵀ and PV
    return _Span(f"{name}: CuPy's kernels", None, flops=flops)


def _backward(name: str, node: Any, g: Any, *args: Any) -> _Span:
    flops = 0
    if name == "self_attention":  # QKᵀ again, dV, dP, dQ and dK
        b, queries, features = node.shape
        flops = 10 * b * queries * _tokens(node) * features
    return _Span(f"{name} backward: CuPy's kernels", None, flops=flops)


def _tokens(node: Any) -> int:
    """Return how many tokens an attention was over: those of its input."""
    return next(parent.shape[1] for parent in node.parents if parent is not None)
