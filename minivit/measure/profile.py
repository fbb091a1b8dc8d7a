"""Which operations the time of a training step goes to."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from minivit.autograd.op import OPS
from minivit.errors import ConfigError
from minivit.measure.speed import time_steps
from minivit.train.step import TrainStep


@dataclass
class OpTimes:
    """Seconds of each forward pass and of each gradient of one operation."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    @property
    def total(self) -> float:
        """Seconds of all together."""
        return sum(self.forward) + sum(self.backward)


@dataclass
class Profile:
    """Where the ``seconds`` of one training step went: to each operation, to the optimizer's update, and outside both.

    Outside is recording the graph and walking back through it, adding gradients up, and the code of the layers.
    """

    ops: dict[str, OpTimes]
    update: float
    seconds: float

    @property
    def outside(self) -> float:
        """Seconds outside of operations and update."""
        return self.seconds - self.update - sum(times.total for times in self.ops.values())


def profile_step(step: TrainStep, images: Any, labels: Any, steps: int = 5, warmup: int = 2) -> Profile:
    """Return where the time of step(images, labels) goes: the profile of the median of ``steps`` calls.

    Raises ConfigError unless the step works on one thread of the CPU: there only do times add up to the step.
    """
    if step.team.threads != 1 or step.team.device != "cpu":
        raise ConfigError(
            f"cannot profile a step on {step.team.threads} threads of the device {step.team.device}",
            "times add up on one thread of the CPU only: TrainStep(model, opt, threads=1)",
        )
    profiles = []
    for _ in range(warmup + steps):
        ops: dict[str, OpTimes] = {name: OpTimes() for name in OPS}
        update: list[float] = []
        calls: list[tuple[Any, str, list[float]]] = [(step.opt, "update_spans", update)]
        for name, op in OPS.items():
            for it in (op, *op.twins.values()):
                calls += [(it, "forward", ops[name].forward), (it, "gradient", ops[name].backward)]
        with timed_calls(calls):
            (seconds,) = time_steps(step, images, labels, 1, warmup=0)
        profiles.append(Profile({name: times for name, times in ops.items() if times.total}, sum(update), seconds))
    return sorted(profiles[warmup:], key=lambda p: p.seconds)[(steps - 1) // 2]


@contextlib.contextmanager
def timed_calls(calls: Iterable[tuple[Any, str, list[float]]]) -> Iterator[None]:
    """Add the seconds of every call of a function (its owner, its name) to a list, in this block and on one thread.

    Functions are replaced by timed ones for the time of the block, so that nothing is slower outside. A call that
    another one makes is part of that one and not counted itself.
    """
    running = False

    def timed(function: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal running
            if running:
                return function(*args, **kwargs)
            running = True
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                times.append(time.perf_counter() - start)
                running = False

        return run

    with contextlib.ExitStack() as restore:
        for owner, name, times in calls:
            function, own = getattr(owner, name), vars(owner)
            # a method is found in the class again, a function of the object's own has to be put back
            restore.callback(own.update, {name: function}) if name in own else restore.callback(own.pop, name)
            own[name] = timed(function, times)
        yield
