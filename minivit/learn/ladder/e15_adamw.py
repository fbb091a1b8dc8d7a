"""Exercise 15: AdamW, one step and a run of several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minivit.backend import Key
from minivit.learn.exercise import Asked, Exercise, Mistake, Sample
from minivit.learn.stepped import (
    NEVER,
    Step,
    corrections,
    coupled,
    from_step_number,
    means_kept_corrected,
    not_squared,
    other_corrections,
    other_numerator,
    other_step,
    shares_exchanged,
    shares_forgotten,
    step,
    uncorrected_m,
    uncorrected_v,
)
from minivit.ops.samples import Draw


def samples(key: Key) -> list[Sample]:
    """Draw a parameter, its gradient, the two means, the step's number and the settings."""
    r = Draw(key)

    def drawn(*shape: int, t: int, size: float = 1.0, settings: tuple[float, ...]) -> tuple[Any, ...]:
        m, v = (size * r(*shape), size**2 * r(*shape) ** 2) if t > 1 else (np.zeros(shape), np.zeros(shape))
        return r(*shape), size * r(*shape), m, v, t, *settings

    return [
        ("the first step", drawn(2, 3, t=1, settings=(0.01, 0.9, 0.999, 1e-8, 0.1))),
        ("the second step", drawn(5, t=2, settings=(0.1, 0.8, 0.95, 1e-8, 0.3))),
        ("step 40, a large eps", drawn(2, 1, 3, t=40, settings=(0.05, 0.9, 0.99, 0.1, 0.05))),
        ("gradients of the size of eps", drawn(3, 2, t=3, size=1e-6, settings=(0.02, 0.9, 0.999, 1e-6, 0.2))),
        ("one number, no decay", drawn(1, t=5, settings=(0.5, 0.7, 0.9, 1e-3, 0.0))),
    ]


STEP_MISTAKES = (
    Mistake(
        "decay in the gradient",
        "decay·p is added to the gradient, so that it goes into m and v and is divided by the root: this is Adam with "
        "L2, what AdamW was made to replace. Where does p shrink in step 4, and what do m and v see?",
        coupled,
    ),
    Mistake(
        "decay in Adam's step",
        "decay·p is added to m̂ and divided by the root. It should stand outside the fraction.",
        other_step(lambda shrunk, move, p, of: p - move - of[1] * of[3] * p / (np.sqrt(of[0]) + of[2])),
    ),
    Mistake(
        "decay without the learning rate",
        "p shrinks by decay itself in each step. Look at the unit that the text chooses at the end of step 4.",
        lambda *args: step(*args[:-1], args[-1] / args[5]),
    ),
    Mistake(
        "decay of the new p",
        "The shrinking is done after Adam's step, and so of the new p. It is of the p from before the step.",
        other_step(lambda shrunk, move, p, of: (p - move) * (1.0 - of[1] * of[3])),
    ),
    Mistake("decay forgotten", "p does not shrink: decay is not used.", lambda *args: step(*args[:-1], 0.0)),
    Mistake(
        "decay makes p grow",
        "p is made larger by lr·decay of itself.",
        lambda *args: other_step(lambda shrunk, move, p, of: (1.0 + of[1] * of[3]) * p - move)(*args),
    ),
    Mistake(
        "no bias correction",
        "m and v are used as they are. They began at zero: step 2.",
        lambda *args: step(*args[:4], NEVER, *args[5:]),
    ),
    Mistake("only v corrected", "m is used as it is. It began at zero, as v did: step 2.", uncorrected_m),
    Mistake("only m corrected", "v is used as it is. It began at zero, as m did: step 2.", uncorrected_v),
    Mistake(
        "beta1 in both corrections",
        "v is corrected with beta1. Each mean has its own β: look at the index in v̂.",
        other_corrections(lambda t, beta1, beta2: (1.0 - beta1**t, 1.0 - beta1**t)),
    ),
    Mistake(
        "beta2 in both corrections",
        "m is corrected with beta2. Each mean has its own β: look at the index in m̂.",
        other_corrections(lambda t, beta1, beta2: (1.0 - beta2**t, 1.0 - beta2**t)),
    ),
    Mistake(
        "corrections without t",
        "m and v are divided by 1 - β, in every step. That is the geometric sum of one step: after t steps it is more.",
        other_corrections(lambda t, beta1, beta2: (1.0 - beta1, 1.0 - beta2)),
    ),
    Mistake(
        "multiplied by the sum",
        "m and v are multiplied by the sum of their weights. A mean has weights that add up to 1: which way does one "
        "get there?",
        other_corrections(lambda t, beta1, beta2: (1.0 / (1.0 - beta1**t), 1.0 / (1.0 - beta2**t))),
    ),
    Mistake(
        "t counted from 0",
        "The corrections are those of step t - 1, and in the first step one divides by 0. t is 1 in the first step.",
        from_step_number(lambda t: t - 1),
    ),
    Mistake(
        "t counted from 2",
        "The corrections are those of step t + 1. t is given as the number of this very step.",
        from_step_number(lambda t: t + 1),
    ),
    Mistake(
        "corrected means kept",
        "m and v come back corrected. p is right, but the next step would correct them once more: what is kept?",
        means_kept_corrected,
    ),
    Mistake(
        "eps in the root",
        "eps is added to v̂ under the root. It stands beside the root.",
        other_step(lambda shrunk, move, p, of: shrunk - move * (np.sqrt(of[0]) + of[2]) / np.sqrt(of[0] + of[2])),
    ),
    Mistake(
        "eps before the correction",
        "eps is added to √v, and the bias correction is applied to the sum. It is added to √v̂. (Adam's paper has this "
        "form at the end of section 2, with another eps.)",
        lambda *args: step(*args[:8], args[8] / corrections(args[4], *args[6:8])[1], args[9]),
    ),
    Mistake(
        "root forgotten",
        "The step is divided by v̂ + eps. Of what unit is v̂?",
        other_step(lambda shrunk, move, p, of: shrunk - move * (np.sqrt(of[0]) + of[2]) / (of[0] + of[2])),
    ),
    Mistake(
        "betas exchanged",
        "beta2 is used for m and beta1 for v.",
        lambda *args: step(*args[:6], args[7], args[6], *args[8:]),
    ),
    Mistake(
        "shares exchanged",
        "The old mean has the share 1 - β and the new gradient β. Which of them should weigh 0.9?",
        shares_exchanged,
    ),
    Mistake(
        "shares of the new forgotten",
        "g and g² are added whole: these are sums that fade, and not means. Look at the factor of the new in step 1.",
        shares_forgotten,
    ),
    Mistake(
        "gradient not squared",
        "v is made of g as it is. It is the mean of its squares: what should the root of a negative number be?",
        not_squared(lambda g: g),
    ),
    Mistake(
        "size for square",
        "v is made of |g|. It is the mean of g²: only of a square is the root taken.",
        not_squared(np.abs),
    ),
    Mistake(
        "g in the place of m̂",
        "The step is made of this step's gradient over √v̂: that is RMSprop. Adam's has m̂ above.",
        other_numerator(lambda g, m, first: g),
    ),
    Mistake(
        "m̂ of the old m",
        "m̂ is made of the m that came in. First the new m and v, then m̂ and v̂ of them.",
        other_numerator(lambda g, m, first: m / first),
    ),
    Mistake(
        "uphill",
        "Adam's step is added to p. The gradient points to where the loss rises.",
        other_step(lambda shrunk, move, p, of: shrunk + move),
    ),
)

# ---- several steps ---------------------------------------------------------------------------------------------------


def run_samples(key: Key) -> list[Sample]:
    """Draw a parameter, gradients and learning rates of several steps, the settings, and whether it decays."""
    r = Draw(key)

    def drawn(steps: int, *shape: int, decays: bool) -> tuple[Any, ...]:
        return r(*shape), r(steps, *shape), 0.05 * r.positive(steps), 0.9, 0.98, 1e-8, 0.4, decays

    return [
        ("four steps, decayed", drawn(4, 2, 3, decays=True)),
        ("three steps, not decayed", drawn(3, 4, decays=False)),
        ("one step", drawn(1, 3, decays=True)),
        ("six steps of one number", drawn(6, 1, decays=True)),
    ]


def run_by(
    one: Step = step,
    number: Callable[[int], int] = lambda i: i + 1,
    rate: Callable[[Any, int], float] = lambda lrs, i: lrs[i],
    keeps: tuple[float, float] = (1.0, 1.0),
    decayed: Callable[[bool], bool] = lambda decays: decays,
    steps: Callable[[int], int] = lambda count: count,
) -> Callable[..., Any]:
    """Return a run: a step's function, number and rate, what is kept of m and v, who decays, how many steps."""

    def run(
        p: Any, gradients: Any, lrs: Any, beta1: float, beta2: float, eps: float, decay: float, decays: bool
    ) -> Any:
        m = v = np.zeros_like(p)
        for i in range(steps(len(gradients))):
            settings = (rate(lrs, i), beta1, beta2, eps, decay if decayed(decays) else 0.0)
            p, m, v = one(p, gradients[i], m * keeps[0], v * keeps[1], number(i), *settings)
        return np.array(p)

    return run


RUN_MISTAKES = (
    Mistake(
        "m and v begin anew",
        "m and v are zero at the beginning of every step. They are made once, before the loop.",
        run_by(keeps=(0.0, 0.0))
    ),
    Mistake("v begins anew", "m lives on from step to step, v does not.", run_by(keeps=(1.0, 0.0))),
    Mistake("m begins anew", "v lives on from step to step, m does not.", run_by(keeps=(0.0, 1.0))),
    Mistake("t stays 1", "Every step is made as if it were the first: t does not advance.", run_by(number=lambda i: 1)),
    Mistake(
        "t from 0",
        "The first step is made with t = 0, and one divides by zero. enumerate and range begin at 0; t begins at 1.",
        run_by(from_step_number(lambda t: t), number=lambda i: i)
    ),
    Mistake("t from 2", "The first step is made with t = 2: is t raised twice?", run_by(number=lambda i: i + 2)),
    Mistake(
        "first learning rate for all",
        "Every step is made with lrs[0]. Each has a rate of its own.",
        run_by(rate=lambda lrs, i: lrs[0])
    ),
    Mistake(
        "everything decays",
        "The parameter is decayed although decays is False.",
        run_by(decayed=lambda decays: True)
    ),
    Mistake(
        "nothing decays",
        "The parameter is not decayed although decays is True.",
        run_by(decayed=lambda decays: False)
    ),
    Mistake("decays the wrong way about", "It decays if decays is False, and does not if it is True.",
            run_by(decayed=lambda decays: not decays)),
    Mistake(
        "corrected means carried on",
        "m and v are replaced by m̂ and v̂, and so corrected anew in every step.",
        run_by(means_kept_corrected)
    ),
    Mistake("decay in the gradient", "decay·p is added to the gradient, in every step.", run_by(coupled)),
    Mistake(
        "one step only",
        "p comes back after the first step. Does the return stand within the loop?",
        run_by(steps=lambda count: 1),
    ),
    Mistake("a step too few", "The last gradient is not used.", run_by(steps=lambda count: count - 1)),
)  # fmt: skip

EXERCISE = Exercise(
    number=15,
    slug="adamw",
    title="AdamW",
    asked=(
        Asked("step", ("p", "m", "v"), right=step, samples=samples, mistakes=STEP_MISTAKES),
        Asked("run", ("p",), right=run_by(), samples=run_samples, mistakes=RUN_MISTAKES),
    ),
    hints=(
        "Five lines: m, v, m̂, v̂, p, each under a name of its own. None with +=, -= or *=, which would write into the "
        "caller's arrays.",
        "The geometric sum: (1 - β)·(1 + β + … + β^(t-1)) has a closed form with β^t in it. Divide m by that of beta1 "
        "and v by that of beta2, and return m and v themselves.",
        "The new p has two terms: the old p times one minus a product of two settings, and minus a fraction. In the "
        "fraction lr and m̂ are above, and a root plus eps below; decay is nowhere in it. run is a loop over step with "
        "t = 1, 2, ….",
    ),
)
