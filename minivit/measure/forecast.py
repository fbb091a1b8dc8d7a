"""How long a step of training takes on a device and on many, from rates, by a model small enough to be checked by hand.

A step is compute + update + exchange, less what of the exchange is hidden behind the backward pass; or what its data
take to come in, if that is more. Compute is, kernel by kernel,

    matrix products    √((FLOPs / product rate)² + (bytes / copy rate)²)
    attention          FLOPs / attention rate + bytes / copy rate
    all others         bytes / copy rate
    each of them       + launch

(the roofline of Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance model", its corner
rounded), and the gradients of N devices are added up in

    all-reduce         2 ⌈log₂ N⌉ · latency + 2 (N - 1) / N · bytes / bandwidth

The term with the bandwidth is the least that any algorithm moves, and what a ring or recursive halving and doubling
does move (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations"); that with
the latency is recursive halving and doubling's (Thakur, Rabenseifner and Gropp 2005, "Optimization of collective
communication operations in MPICH", section 4.5); a plain ring's would be 2 (N - 1).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from minivit.autograd.graph import Node
from minivit.autograd.tensor import Tensor
from minivit.backend.outline import outline
from minivit.backend.threads import SHARE_NUMBERS
from minivit.errors import ConfigError
from minivit.measure.gpu_costs import HALF
from minivit.measure.here import Core, Machine
from minivit.measure.speed import flops, recorded
from minivit.models import Model
from minivit.nn.module import mode
from minivit.nn.recompute import keeping

VIEWS = ("reshape", "transpose", "swapaxes", "broadcast_to", "getitem")
"""Operations that move nothing to speak of."""

# ---- rates -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """What a device does in a second: ``product`` and ``attention`` in FLOP, ``copy`` in bytes, read and written.

    ``launch`` are seconds that each kernel takes besides: to begin, to end, and while it does not fill the device.
    """

    product: float
    attention: float
    copy: float
    launch: float


@dataclass(frozen=True)
class Link:
    """What connects the devices: ``bandwidth`` in bytes a second out of each one, ``latency`` in seconds a message."""

    bandwidth: float
    latency: float


H200 = Rates(product=788e12, attention=165e12, copy=4.24e12, launch=4.8e-6)
"""Of one NVIDIA H200 in bfloat16. Measured: the copy, and the fastest matrix product. Fitted to three measured steps:
attention and launch, of which the attention's kernels alone give 128e12 to 175e12."""

H200_MEMORY = 141e9
"""Bytes, by the data sheet."""

FABRIC = Link(bandwidth=50e9, latency=10e-6)
"""One adapter of 400 Gbit/s a GPU, and 10 µs a message: assumed, not measured. Within one machine NVLink is faster."""

MEASURED = (
    (
        "ViT-Ti/4",
        {"image_size": 32, "patch_size": 4, "dim": 192, "depth": 12, "heads": 3, "pool": "mean", "class_token": True},
        128,
        2.59e-3,
    ),
    (
        "ViT-Ti/4",
        {"image_size": 32, "patch_size": 4, "dim": 192, "depth": 12, "heads": 3, "pool": "mean", "class_token": True},
        1024,
        10.3e-3,
    ),
    (
        "ViT-S/16",
        {"image_size": 224, "patch_size": 16, "dim": 384, "depth": 12, "heads": 6, "pool": "mean", "class_token": True},
        256,
        20.15e-3,
    ),
)
"""What :data:`H200` is fitted to: name, settings, images, seconds. They are captured steps in bfloat16 of a prototype
whose kernels minivit's were made after. Its last block works on all tokens, as with pool "mean"."""


# ---- a device --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compute:
    """Seconds of a step on one device, besides what it exchanges with others."""

    forward: float
    backward: float
    update: float

    @property
    def seconds(self) -> float:
        """All together."""
        return self.forward + self.backward + self.update


@dataclass(frozen=True)
class Kernel:
    """An operation as a GPU sees it: FLOPs and numbers of one image, those it is given, those it makes, and of weights.

    ``kind`` is "product", "attention", "move" or "view"; ``wanted`` of a product's two factors want a gradient, and
    ``readers`` other operations read what it makes.
    """

    kind: str
    flops: int
    given: int
    made: int
    weights: int
    wanted: int
    readers: int


@dataclass(frozen=True)
class Work:
    """What a model asks of a GPU for one image; ``again`` says that a block's forward pass is computed twice."""

    kernels: tuple[Kernel, ...]
    parameters: int
    again: bool


def work_of(model: Model) -> Work:
    """Return what ``model``, or its outline, asks of a GPU."""
    again = any(node.op.name == "recompute" for node in recorded(_run(model)))
    with keeping():
        nodes = recorded(_run(model))  # with what is inside of the blocks
    readers = Counter(p for node in nodes for p in node.parents if p is not None and p.op is not None)
    return Work(tuple(_kernel(node, readers[node]) for node in nodes), model.num_parameters(), again)


def _run(model: Model) -> Node:
    image = outline((1, *model.settings.image_shape), next(model.parameters()).dtype)
    with mode(True):
        out = model(Tensor(image))
    if out.node is None:
        raise ConfigError("none of the model's parameters requires a gradient", "there is nothing to train")
    node: Node = out.node
    return node


def _kernel(node: Node, readers: int) -> Kernel:
    given = sum(math.prod(p.shape) for p in node.parents if p is not None and p.op is not None)
    weights = sum(math.prod(p.shape) for p in node.parents if p is not None and p.op is None)
    kind = "view" if node.op.name in VIEWS else "attention" if "attention" in node.op.name else "move"
    work = flops(node)
    kind = "product" if work and kind == "move" else kind
    wanted = sum(p is not None for p in node.parents[:2])
    return Kernel(kind, work, given, math.prod(node.shape), weights, wanted, readers)


def on_gpu(work: Work, rows: int, dtype: str, rates: Rates = H200, micro_batch: int | None = None) -> Compute:
    """Return what a captured step takes on ``rows`` images, at most ``micro_batch`` of them at once."""
    pieces = -(-rows // (micro_batch or rows))
    size, forward, backward = 2 if dtype in HALF else 4, 0.0, rates.launch  # the loss is a kernel of its own
    for kernel in work.kernels:
        there, back = kernel_seconds(kernel, -(-rows // pieces), size, rates)
        forward, backward = forward + there, backward + back
    backward += forward if work.again else 0.0
    copied = 2 if dtype in HALF else 0  # the working copy; of 4 bytes each: p, m, v and g read, p, m, v written
    update = (28 + copied) * work.parameters / rates.copy + rates.launch
    return Compute(pieces * forward, pieces * backward, update)


def kernel_seconds(kernel: Kernel, rows: int, size: int, rates: Rates) -> tuple[float, float]:
    """Return the seconds of an operation on ``rows`` images, in numbers of ``size`` bytes, and of its gradient."""
    work, moved = rows * kernel.flops, size * (rows * (kernel.given + kernel.made) + kernel.weights)
    forward = backward = 0.0
    if kernel.kind == "product":
        forward = math.hypot(work / rates.product, moved / rates.copy) + rates.launch
        backward = kernel.wanted * forward
    elif kernel.kind == "attention":  # back go two products for each one
        forward = work / rates.attention + moved / rates.copy + rates.launch
        backward = 2 * (work / rates.attention + moved / rates.copy) + rates.launch
    elif kernel.kind == "move":  # back: what was given, the gradient of what was made, and that of what was given
        forward = moved / rates.copy + rates.launch
        backward = forward + size * rows * kernel.given / rates.copy
    for _ in range(1, kernel.readers):  # gradients from more than one side are added up
        backward += 3 * size * rows * kernel.made / rates.copy + rates.launch
    return forward, backward


# ---- many of them ----------------------------------------------------------------------------------------------------


def all_reduce(devices: int, size: float, link: Link) -> float:
    """Return the seconds in which ``size`` bytes on each of the ``devices`` are added up, and all have the sum."""
    if devices == 1:
        return 0.0
    steps = 2 * math.ceil(math.log2(devices))
    return steps * link.latency + 2 * (devices - 1) / devices * size / link.bandwidth


@dataclass(frozen=True)
class Step:
    """Seconds of one step of ``devices`` devices; ``best`` is the rate of one alone, in images a second."""

    devices: int
    batch: int
    compute: Compute
    exchange: float
    exchanged: float  # bytes that each GPU sends, or that go through the first of some processes
    hidden: float  # seconds of the exchange that pass during the backward pass
    data: float  # seconds in which the data of a step come in: behind the step before
    best: float

    @property
    def seconds(self) -> float:
        """Return the seconds from one step to the next."""
        return max(self.compute.seconds + self.exchange - self.hidden, self.data)

    @property
    def rate(self) -> float:
        """Return the images of a second, all devices together."""
        return self.batch / self.seconds

    @property
    def efficiency(self) -> float:
        """Return the rate as a share of what so many devices would reach, each as fast as one alone."""
        return self.rate / (self.devices * self.best)


def gpu_step(
    work: Work,
    devices: int,
    batch: int,
    dtype: str = "bfloat16",
    rates: Rates = H200,
    link: Link = FABRIC,
    overlap: float = 0.0,
    data_rate: float = math.inf,
    micro_batch: int | None = None,
) -> Step:
    """Return a step of ``batch`` images on GPUs that each have an even share of them.

    Gradients are exchanged in float32. ``overlap`` is the share of the exchange that may pass during the backward pass,
    as far as that lasts; ``data_rate`` images come in a second for each GPU. At most ``micro_batch`` images are
    worked on at once: one GPU alone, with which the others are compared, could seldom hold the whole batch.
    """
    rows = shares(devices, batch)
    compute = on_gpu(work, rows, dtype, rates, micro_batch)
    best = batch / max(on_gpu(work, batch, dtype, rates, micro_batch).seconds, batch / data_rate)
    size = 4 * work.parameters
    exchange = all_reduce(devices, size, link)
    hidden = min(overlap * exchange, compute.backward)
    sent = 2 * (devices - 1) / devices * size
    return Step(devices, batch, compute, exchange, sent, hidden, rows / data_rate, best)


def cpu_step(
    model: Model,
    processes: int,
    batch: int,
    core: Core,
    alone: Core,
    machine: Machine,
    link: Link | None = None,
    data_rate: float = math.inf,
) -> Step:
    """Return a step of ``batch`` images on processes of one core each: the first hands out rows, adds up, and updates.

    ``core`` works on a share of the batch, ``alone`` on all of it, both measured here. Gradients lie in memory that all
    share; with a ``link`` parameters and gradients go through it, as between ranks on several machines.
    """
    rows, parameters = shares(processes, batch), model.num_parameters()
    hands = min(processes, max(1, parameters // SHARE_NUMBERS))
    share = rows / core.rows / machine.shared
    compute = Compute(share * core.forward, share * core.backward, parameters * machine.update / hands)
    others, image = processes - 1, 4 * math.prod(model.settings.image_shape)
    sent = others * (rows * image + 4 * parameters * (1 if link is None else 2))
    if link is None:
        exchange = others * (machine.message + rows * image * machine.sent)
    else:
        exchange = 2 * others * link.latency + sent / link.bandwidth
    exchange += others * parameters * machine.add / hands
    best = batch / max(batch / alone.rows * alone.seconds + parameters * machine.update, batch / data_rate)
    return Step(processes, batch, compute, exchange, sent, 0.0, rows / data_rate, best)


def shares(devices: int, batch: int) -> int:
    """Return how many images the device with the most has; raise ConfigError where one would have none."""
    if devices < 1 or batch < 1:
        raise ConfigError(f"{devices} devices, a batch of {batch} images", "each must be at least 1")
    if batch < devices:
        remedy = f"use a batch of {devices:,} images or more, or fewer devices"
        raise ConfigError(f"a batch of {batch:,} images for {devices:,} devices leaves some without any", remedy)
    return -(-batch // devices)


# ---- a run -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run of some epochs over some images: its steps, its hours and, for a price an hour and device, its cost."""

    step: Step
    images: int
    epochs: int
    price: float | None = None

    @property
    def steps(self) -> int:
        """Return all steps: an epoch's last, which may be smaller, is counted as a whole one."""
        return self.epochs * -(-self.images // self.step.batch)

    @property
    def hours(self) -> float:
        """Return the hours of the steps, and of nothing else."""
        return self.steps * self.step.seconds / 3600

    @property
    def cost(self) -> float | None:
        """Return what all devices cost in that time, in the currency of the price."""
        return None if self.price is None else self.price * self.step.devices * self.hours


def largest_share(needs: Any, room: float, most: int) -> int:
    """Return the most images, up to ``most``, of which ``needs(images)``, in bytes, fit into ``room``; 0 if none do."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needs(middle) <= room else (low, middle - 1)
    return low
