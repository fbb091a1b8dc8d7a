"""A classifier with scikit-learn's interface: ``fit``, ``predict``, ``predict_proba``, ``score``.

It goes into scikit-learn's pipelines, cross-validation and grid search; scikit-learn itself is not needed, and only
imported when it asks for its tags.
"""

from __future__ import annotations

import inspect
import math
from numbers import Integral
from typing import Any

import numpy as np

from minivit import ops
from minivit.backend import Key, permutation
from minivit.errors import ConfigError, DataError, DTypeError, ShapeError, unknown_name
from minivit.models import Model, build
from minivit.nn.rules import Size
from minivit.train.inference import predict_logits
from minivit.train.optimizer import AdamW
from minivit.train.schedule import warmup_cosine
from minivit.train.step import TrainStep

ORDER_STREAM = 0x0DE2  # the stream of the epochs' orders under random_state
WARMUP = 0.1  # of all steps
MOST_PATCHES = 8  # along an axis, where the patch size is chosen here
CHANNELS = (1, 3, 4)  # of images with an axis for them
CHUNK = 1 << 20  # numbers standardised at a time


class ViTClassifier:
    """A Vision Transformer that is trained by ``fit(X, y)``, as scikit-learn's classifiers are.

    X holds numbers of any kind: images (N, H, W), (N, C, H, W) or (N, H, W, C), C 1, 3 or 4, or their pixels in rows
    (N, H·W) or (N, H·W·C), as scikit-learn has them. ``image_shape``, (H, W), (C, H, W) or (H, W, C), says how to read
    them; without it rows are taken for square grey images. Every channel is standardised by the mean and standard
    deviation of the images in ``fit``. y holds labels of any kind that can be sorted.

    ``patch_size`` divides height and width, and is chosen unless given. The other settings are those of
    :class:`~minivit.models.vit.ViT`, :class:`~minivit.train.optim.AdamW` and a warm-up with a cosine down to 0; equal
    ``random_state`` give equal bits on equal machines. None of them is looked at before ``fit``, which starts afresh
    every time.

    After ``fit``: ``classes_``, the labels in order; ``model_``, the ViT; ``image_shape_``, (C, H, W), and
    ``n_features_in_``, the numbers in an image; ``mean_`` and ``std_`` by channel; ``loss_curve_``, the mean loss of
    each epoch.
    """

    classes_: np.ndarray
    model_: Model
    image_shape_: tuple[int, ...]
    n_features_in_: int
    mean_: np.ndarray
    std_: np.ndarray
    loss_curve_: list[float]

    def __init__(
        self,
        image_shape: tuple[int, ...] | None = None,
        patch_size: Size | None = None,
        dim: int = 64,
        depth: int = 4,
        heads: int = 4,
        mlp_dim: int | None = None,
        drop_path: float = 0.1,
        epochs: int = 30,
        batch_size: int = 64,
        lr: float = 4e-3,
        weight_decay: float = 0.05,
        label_smoothing: float = 0.1,
        random_state: int = 0,
        threads: int | None = None,
    ) -> None:
        self.image_shape = image_shape
        self.patch_size = patch_size
        self.dim = dim
        self.depth = depth
        self.heads = heads
        self.mlp_dim = mlp_dim
        self.drop_path = drop_path
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.label_smoothing = label_smoothing
        self.random_state = random_state
        self.threads = threads

    # ---- settings ----

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the settings by name."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **params: Any) -> ViTClassifier:
        """Change settings by name, for the next ``fit``; return self."""
        known = inspect.signature(type(self)).parameters
        for name in params:
            if name not in known:
                raise unknown_name("setting", name, known)
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        defaults = inspect.signature(type(self)).parameters
        changed = [
            f"{k}={v!r}"
            for k, v in self.get_params().items()
            if v is not defaults[k].default and repr(v) != repr(defaults[k].default)
        ]
        return f"{type(self).__name__}({', '.join(changed)})"

    def __sklearn_tags__(self) -> Any:
        """Return what scikit-learn wants to know of a classifier (1.6 and later)."""
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

        return Tags(
            estimator_type="classifier",
            target_tags=TargetTags(required=True),
            classifier_tags=ClassifierTags(),
            input_tags=InputTags(three_d_array=True),
        )

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "model_")

    # ---- fit ----

    def fit(self, X: Any, y: Any) -> ViTClassifier:
        """Train a new model on images X with labels y (N,); return self.

        Raises DataError for NaN, infinity or labels of one class only, ShapeError for shapes that do not fit, and
        ConfigError for settings that cannot be used.
        """
        for name in ("epochs", "batch_size"):
            if not isinstance(n := getattr(self, name), Integral) or isinstance(n, bool) or n < 1:
                raise ConfigError(f"{name} is {n!r}", "it must be a whole number, at least 1")
        if not isinstance(self.random_state, Integral):
            raise ConfigError(f"random_state is {self.random_state!r}", "give a whole number: equal ones, equal bits")
        images = _images(_numbers(X), self.image_shape)  # (N, C, H, W)
        classes, labels = _labels(y, len(images))
        mean, std = _mean_and_std(images)
        model = self._new_model(images.shape[1:], len(classes))
        for name in [n for n in vars(self) if n.endswith("_")]:
            delattr(self, name)  # what an earlier fit has left: should this one fail, none is there
        losses = self._train(model, _standard(images, mean, std), labels)
        self.classes_, self.mean_, self.std_, self.loss_curve_ = classes, mean, std, losses
        self.image_shape_, self.n_features_in_ = images.shape[1:], math.prod(images.shape[1:])
        self.model_ = model.eval()
        return self

    def _new_model(self, shape: tuple[int, ...], classes: int) -> Model:
        channels, height, width = shape
        sizes = {name: getattr(self, name) for name in ("dim", "depth", "heads", "drop_path")}
        return build("vit", sizes | {
            "image_size": (height, width), "in_channels": channels, "num_classes": classes,
            "patch_size": self.patch_size or (_patch(height), _patch(width)),
            "mlp_dim": 2 * self.dim if self.mlp_dim is None else self.mlp_dim, "seed": int(self.random_state),
        })  # fmt: skip

    def _train(self, model: Model, images: np.ndarray, labels: np.ndarray) -> list[float]:
        opt = AdamW(model.named_parameters(), lr=self.lr, weight_decay=self.weight_decay)

        def loss(logits: Any, labels: Any) -> Any:
            return ops.cross_entropy(logits, labels, self.label_smoothing)

        step = TrainStep(model, opt, loss, threads=self.threads, clip_norm=1.0, seed=int(self.random_state))
        batches = -(-len(images) // self.batch_size)
        total = self.epochs * batches
        schedule = warmup_cosine(self.lr, total, int(WARMUP * total))
        key, losses = Key(int(self.random_state), ORDER_STREAM), []
        model.train()
        for epoch in range(self.epochs):
            order, summed = permutation(key.at(epoch), len(images)), 0.0
            for i in range(batches):
                index = order[i * self.batch_size : (i + 1) * self.batch_size]
                opt.lr = schedule(opt.steps)
                summed += step(images[index], labels[index]) * len(index)
            losses.append(summed / len(images))
        return losses

    # ---- predict ----

    def decision_function(self, X: Any) -> np.ndarray:
        """Return the logits of images X, float32 (N, K) in the order of ``classes_``."""
        if not self.__sklearn_is_fitted__():
            raise ConfigError(f"this {type(self).__name__} is not fitted", "call fit(X, y) first")
        x = _numbers(X)
        if x.ndim == 2 and x.shape[1] != self.n_features_in_:
            what = f"X has {x.shape[1]} features, but this {type(self).__name__} was fitted to {self.n_features_in_}"
            raise ShapeError(
                what, f"give rows of {self.n_features_in_} numbers, or images as in fit; one image: X[None]"
            )
        images = _images(x, self.image_shape if x.ndim > 2 or self.image_shape else self.image_shape_)
        if images.shape[1:] != self.image_shape_:
            what = f"images of (C, H, W) = {images.shape[1:]}, but the model was fitted to {self.image_shape_}"
            raise ShapeError(what, "give images of the size and the channels that fit got")
        return predict_logits(self.model_, _standard(images, self.mean_, self.std_), threads=self.threads)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probabilities of the classes, float64 (N, K) in the order of ``classes_``; rows add up to 1."""
        return np.asarray(ops.softmax(self.decision_function(X).astype(np.float64)))

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable label of each image, (N,)."""
        places = self.decision_function(X).argmax(axis=1)
        return np.asarray(self.classes_[places])

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the share of images X whose label y (N,) is predicted, weighted by ``sample_weight`` (N,) if given."""
        predicted, labels = self.predict(X), _column(y, "y")
        if len(labels) != len(predicted):
            raise ShapeError(f"{len(predicted)} images, {len(labels)} labels", "give one label for each image")
        return float(np.average(predicted.astype(object) == labels.astype(object), weights=sample_weight))


# ---- reading X and y -------------------------------------------------------------------------------------------------


def _numbers(x: Any) -> np.ndarray:
    """Return X as an array of rows of real, finite numbers; raise DTypeError, ShapeError or DataError if it is none."""
    try:
        x = np.asarray(x)
    except ValueError as error:
        raise ShapeError(f"X: {error}", "give images of one size") from error
    if x.dtype.kind not in "biuf":
        raise DTypeError(f"X is {x.dtype}", "give an array of real numbers: np.asarray(images)")
    if x.ndim < 2 or 0 in x.shape:
        raise ShapeError(
            f"X has the shape {x.shape}", "give at least one image: (N, H, W), (N, C, H, W) or rows (N, D)"
        )
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        row = int(np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(axis=1))[0])
        raise DataError(f"X[{row}] has NaN or an infinity in it", "mend or leave out such images")
    return x


def _images(x: np.ndarray, image_shape: tuple[int, ...] | None) -> np.ndarray:
    """Return X, rows or images, as (N, C, H, W); raise ShapeError where it is not clear how to read it."""
    hint = "give image_shape=(H, W), (C, H, W) or (H, W, C)"
    if image_shape is not None:
        shape = tuple(image_shape) if isinstance(image_shape, (tuple, list)) else (image_shape,)
        if len(shape) not in (2, 3) or not all(isinstance(n, Integral) and n > 0 for n in shape):
            raise ConfigError(f"image_shape is {image_shape!r}", hint)
        if x.shape[1:] not in (shape, (math.prod(shape),)):
            raise ShapeError(f"X of shape {x.shape} does not hold images of image_shape={shape}", hint)
        x = x.reshape(len(x), *shape)
    elif x.ndim == 2:
        side = math.isqrt(x.shape[1])
        if side * side != x.shape[1]:
            raise ShapeError(f"rows of {x.shape[1]} numbers are no square grey images", hint)
        x = x.reshape(len(x), side, side)
    if x.ndim == 3:
        return x[:, None]  # (N, H, W) → (N, 1, H, W)
    first, last = (x.ndim == 4 and x.shape[axis] in CHANNELS for axis in (1, 3))
    if first == last:
        remedy = f"give (N, C, H, W) or (N, H, W, C), where C is one of {CHANNELS} and the other end is not"
        raise ShapeError(f"it is not clear which axis of X {x.shape} holds the channels", remedy)
    return x if first else x.transpose(0, 3, 1, 2)


def _column(y: Any, name: str) -> np.ndarray:
    """Return labels (N,) or (N, 1) as (N,)."""
    try:
        y = np.asarray(y)
    except ValueError as error:
        raise ShapeError(f"{name}: {error}", "give one label for each image") from error
    if y.ndim != 1 and y.shape[1:] != (1,):
        raise ShapeError(f"{name} has the shape {y.shape}", "give one label for each image, (N,)")
    return y.reshape(-1)


def _labels(y: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the classes in order and each label's place among them, int64."""
    y = _column(y, "y")
    if len(y) != count:
        raise ShapeError(f"{count} images, {len(y)} labels", "give one label for each image")
    if y.dtype.kind == "f" and not (np.isfinite(y).all() and (y == np.round(y)).all()):
        raise DataError("y holds fractions, NaN or infinities: no labels of classes", "give whole numbers or names")
    try:
        classes, labels = np.unique(y, return_inverse=True)
    except TypeError as error:
        raise DTypeError(f"y holds labels that cannot be sorted: {error}", "give labels of one kind") from error
    if len(classes) < 2:
        raise DataError(f"y holds one class only: {classes[0].item()!r}", "give images of at least two classes")
    return classes, labels.astype(np.int64)


# ---- standardising ---------------------------------------------------------------------------------------------------


def _mean_and_std(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation by channel, float64 (C,), 1 for a channel that is everywhere the same."""
    with np.errstate(over="ignore", invalid="ignore"):
        mean = images.mean(axis=(0, 2, 3), dtype=np.float64)
        std = images.std(axis=(0, 2, 3), dtype=np.float64)
    if not np.isfinite(std).all():
        raise DataError("the squares of the numbers in X overflow", "scale X down")
    std[std <= 1e-12 * np.abs(mean)] = 1.0
    return mean, std


def _standard(images: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Return (images - mean)/std by channel, computed in float64, as float32 (N, C, H, W)."""
    out = np.empty(images.shape, np.float32)
    rows = max(1, CHUNK // math.prod(images.shape[1:]))
    for i in range(0, len(images), rows):
        out[i : i + rows] = (images[i : i + rows] - mean[:, None, None]) / std[:, None, None]
    return out


def _patch(size: int) -> int:
    """Return the side of patches that cuts ``size`` pixels into 2 to 8: the smallest from 4 on, else the largest."""
    sides = [side for side in range(1, size + 1) if size % side == 0 and 2 <= size // side <= MOST_PATCHES]
    if not sides and size > 1:
        what = f"images of {size} pixels cannot be cut into 2 to {MOST_PATCHES} patches along an axis"
        raise ShapeError(what, "give patch_size, or pad or crop the images")
    return next((side for side in sides if side >= 4), sides[-1] if sides else 1)
