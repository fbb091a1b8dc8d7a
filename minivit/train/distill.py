"""Learning from a teacher: what a trained model makes of the images stands beside their labels.

Touvron et al. 2021, "Training data-efficient image transformers & distillation through attention" (DeiT), arXiv
2012.12877, section 4. ::

    student = Student(model, teacher)                    # both take the same images; the teacher does not change
    opt = AdamW(model.named_parameters(), lr=1e-3)
    step = mv.TrainStep(student, opt, partial(distillation, kind="hard"))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minivit import ops
from minivit.autograd.graph import no_grad
from minivit.autograd.op import raw
from minivit.backend import array_module, to_device
from minivit.errors import ConfigError, ShapeError
from minivit.nn.module import Constant, Module, RowSize, mode
from minivit.ops.reduce import wide

KINDS = ("hard", "soft")


class Student(Module):
    """Images → (B, 3, K): logits of ``model`` that learn from labels, those that learn from the teacher, the teacher's.

    The first two are those of the class and of the distillation token; of a model without that (setting ``distilled``)
    they are the same. The teacher is asked in eval mode, without dropout, and gets no gradient: it is frozen here.
    ``scale`` and ``shift`` for each channel make of images that are standardised for the model those that are for the
    teacher. Raises ConfigError for a teacher of other images or classes.
    """

    def __init__(
        self, model: Any, teacher: Any, scale: Sequence[float] | None = None, shift: Sequence[float] | None = None
    ) -> None:
        check_alike(model, teacher)
        self.model, self.teacher = model, teacher
        for p in teacher.parameters():
            p.requires_grad = False
        first = next(model.parameters())
        fitted = lambda values: Constant(np.array(values, np.float32).reshape(1, -1, 1, 1))  # (C,) → (1, C, 1, 1)
        self.scale = None if scale is None else fitted(scale)
        self.shift = None if shift is None else fitted(shift)
        for constant in (self.scale, self.shift):
            if constant is not None:
                constant.data = to_device(constant.data, first.device).astype(first.dtype)

    def row_size(self) -> RowSize | None:
        """Return the model's."""
        return self.model.row_size()

    def forward(self, images: Any) -> Any:
        """Return the three logits, (B, C, H, W) → (B, 3, K), never in half precision."""
        own = self.model.logits_apart(images) if hasattr(self.model, "logits_apart") else None
        if own is None:
            one = self.model(images)
            own = ops.stack([one, one], axis=1)  # (B, K) → (B, 2, K)
        with no_grad(), mode(False):
            seen = raw(images) if self.scale is None else raw(images) * self.scale.data.astype(images.dtype)
            seen = seen if self.shift is None else seen + self.shift.data.astype(images.dtype)
            asked = self.teacher(seen)
        return ops.concat([wide(own), wide(asked)[:, None]], axis=1)  # (B, 2, K), (B, 1, K) → (B, 3, K)


def check_alike(model: Any, teacher: Any) -> None:
    """Raise ConfigError for a teacher of other images or classes than the model's, where both say theirs."""
    for what, name in {"num_classes": "classes", "image_shape": "images"}.items():
        own, its = (getattr(getattr(m, "settings", None), what, None) for m in (model, teacher))
        if own is not None and its is not None and own != its:
            raise ConfigError(
                f"the teacher's {name} are {its}, the model's {own}", f"choose a teacher of the {name} {own}"
            )


def distillation(
    logits: Any, labels: Any, kind: str = "hard", share: float = 0.5, temperature: float = 1.0, smoothing: float = 0.0
) -> Any:
    """Return the loss of logits (B, 3, K) as :class:`Student` gives them: (1 - share)·CE + share·what the teacher says.

    CE is the cross-entropy of the first logits with ``labels``, smoothed by ``smoothing``. "hard" is that of the second
    with the teacher's decision, argmax of its logits (eq. 3: share 1/2); "soft" is τ²·KL(softmax(z_t/τ) ‖
    softmax(z_s/τ)), τ the temperature (eq. 2; there 3, and share 0.1). Raises ConfigError for another kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"distillation of kind {kind!r}", f"use one of {', '.join(map(repr, KINDS))}")
    if len(logits.shape) != 3 or logits.shape[1] != 3:
        raise ShapeError(f"distillation of logits {tuple(logits.shape)}", "give (B, 3, K), as a Student returns them")
    own = ops.cross_entropy(logits[:, 0], labels, smoothing=smoothing)
    taught, teacher = logits[:, 1], raw(logits)[:, 2]  # (B, K)
    if kind == "hard":
        choice = teacher.argmax(axis=-1)[:, None] == array_module(teacher).arange(teacher.shape[-1])
        learned = ops.cross_entropy(taught, choice.astype(teacher.dtype))
    else:
        target = ops.log_softmax(teacher / temperature)
        apart = ops.sub(target, ops.log_softmax(taught / temperature))  # (B, K)
        learned = ops.sum(ops.mul(ops.exp(target), apart)) * (temperature**2 / logits.shape[0])
    return own * (1.0 - share) + learned * share
