"""A training step on a GPU, recorded once and replayed: its kernels are not launched one by one from Python.

The work is that of a step as it is written, on arrays that stay where they are. What differs from step to step lies in
them, or in :class:`~minivit.train.numbers.DeviceNumbers`; all else is in the recording as it was. So the settings that
the work reads are looked at before each replay, and if one has changed the work is recorded anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from minivit.backend import array_module, device_of, is_floating, on_device_of, to_device
from minivit.backend.cuda import Aside, Graph
from minivit.errors import DataError
from minivit.nn.module import Module, is_watched
from minivit.ops.cuda.sums import Arena
from minivit.ops.loss import check_labels
from minivit.train.parameters import FlatParameters
from minivit.train.pieces import Batch
from minivit.train.seen import Seen

SHAPES = 4  # of batches that are recorded: an epoch has two, with its last batch
CHANGES = 4  # of settings, for one shape: more are a setting that differs in every step, and recording is no gain


class Capture:
    """Does ``work(batch)``, a whole step on a GPU: launched once for each shape of batches, then recorded and replayed.

    ``settings()`` is what the work reads besides the model and the batch, by name. ``why_not`` says why some steps are
    launched for good, "" as long as none are.
    """

    def __init__(
        self,
        work: Callable[[Batch], None],
        settings: Callable[[], dict[str, Any]],
        model: Module,
        store: FlatParameters,
        dtype: Any,
    ) -> None:
        self.work, self.settings, self.model, self.store, self.dtype = work, settings, model, store, dtype
        self.why_not = ""
        self.shapes: dict[Any, _Shape] = {}
        self._sums = Arena(store.grad)

    def run(self, batch: Batch) -> None:
        """Do a step's work on a batch from anywhere."""
        shape = self._shape(batch)
        if shape is None:
            self.work(replace(batch, sums=self._sums))
            return
        shape.take(batch)
        changed = "its first step" if shape.seen is None else shape.seen.changed()
        why_not = shape.record() if not changed and shape.graph is None else ""
        if changed or why_not:
            shape.launch()  # where the step itself is wrong, and not its recording, this raises
        else:
            shape.replay()
        if shape.launches > CHANGES:
            why_not = f"{changed} differs from step to step"
        if why_not:
            shape.why_not, shape.graph, shape.seen = why_not, None, None
            self.why_not = self.why_not or why_not

    def nodes(self) -> dict[tuple[int, ...], int]:
        """Return how many kernels, copies and fillings a recorded step is, by the shape of its images."""
        graphs = [(shape.images.shape, shape.graph) for shape in self.shapes.values()]
        return {shape: graph.nodes for shape, graph in graphs if graph is not None}

    def memory(self) -> int:
        """Return the bytes that recorded steps hold on the GPU: CuPy's own pool has no part in them."""
        with on_device_of(self.store.values):
            return sum(shape.aside.pool.total_bytes() for shape in self.shapes.values())

    def _shape(self, batch: Batch) -> _Shape | None:
        """Return what is kept for batches of this shape, or None if they are to be launched."""
        if is_watched():  # a replay runs no module
            return None
        images, labels = batch.images, batch.labels
        key = (images.shape, images.dtype, labels.shape, labels.dtype, batch.counted, batch.training)
        if key not in self.shapes and len(self.shapes) < SHAPES:
            self.shapes[key] = _Shape(self, batch)
        shape = self.shapes.get(key)
        return None if shape is None or shape.why_not else shape


class _Shape:
    """Batches of one shape: the arrays that they are put into, and the graph that works on those."""

    def __init__(self, capture: Capture, batch: Batch) -> None:
        self.capture, store = capture, capture.store
        xp = array_module(store.values)
        images = xp.empty(batch.images.shape, capture.dtype if is_floating(batch.images.dtype) else batch.images.dtype)
        labels = xp.empty(batch.labels.shape, batch.labels.dtype)
        # A graph writes wherever it wrote when it was recorded. So no other work has its memory, and each shape a pool:
        # neither another graph gets it, nor what the first step of another shape makes to keep. All share a stream.
        self.aside: Aside = Aside(next((shape.aside.stream for shape in capture.shapes.values()), None))
        self.batch = replace(batch, images=images, labels=labels, sums=Arena(store.grad))
        self.images, self.labels = images, labels
        self.seen: Seen | None = None  # the settings of the last launch
        self.graph: Graph | None = None
        self.updated = store.updated
        self.launches = 0  # since the last replay of a graph that was there already
        self.why_not = ""

    def take(self, batch: Batch) -> None:
        """Put a batch where the graph reads it; raise DataError for labels that the recorded loss would not take."""
        if self.graph is not None and self.batch.asked:
            check_labels(batch.labels, min(self.batch.asked))
        device = device_of(self.images)
        self.images[...] = to_device(batch.images, device)
        self.labels[...] = to_device(batch.labels, device)
        self.batch = replace(self.batch, key=batch.key, given=batch.labels)

    def launch(self) -> None:
        """Do a step by launching it. It compiles kernels, makes what they keep, and takes memory for the graph."""
        self.seen = self.graph = None
        seen = Seen(self.capture.model, self.capture.settings)
        with self.aside.entered():
            self.capture.work(self.batch)
        self.seen = seen
        self.launches += 1

    def record(self) -> str:
        """Record a step, of which nothing is run; return why that cannot be, "" if it could.

        Raises DataError for labels that its loss does not take.
        """
        store, before = self.capture.store, self.capture.store.updated
        self.batch.asked.clear()
        try:
            self.graph = self.aside.record(lambda: self.capture.work(self.batch))
            self.updated = store.updated
        except DataError:
            raise
        except Exception as error:  # whatever it is: without a recording the step is launched
            return f"{type(error).__name__}: {error}".splitlines()[0]
        finally:
            store.updated = before
        self.launches += 1
        return ""

    def replay(self) -> None:
        """Do a step by its graph."""
        assert self.graph is not None
        self.graph.replay()
        self.capture.store.updated = self.updated
