"""What a user gets wrong in the API: each ends in a typed error that names it and says, after an arrow, what to do.

Operations have a table of their own in test_ops.py, the command line and checkpoints in test_cli.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

import minivit as mv
from minivit import nn, ops
from minivit.errors import ConfigError, DataError, DeviceError, DTypeError, GraphError, MinivitError, ShapeError
from minivit.train.optim import AdamW

SMALL = {"image_size": 8, "patch_size": 4, "in_channels": 1, "dim": 8, "depth": 1, "heads": 2, "num_classes": 3}
IMAGES = np.zeros((2, 1, 8, 8), np.float32)
LOGITS = np.zeros((2, 3), np.float32)
x = mv.tensor(np.ones((2, 3), np.float32))


def vit(**settings: Any) -> mv.ViT:
    return mv.ViT(**{**SMALL, **settings})


def dataset(images: Any = (2, 1, 8, 8), labels: Any = (0, 1)) -> mv.data.Dataset:
    return mv.data.Dataset(np.zeros(images, np.uint8), np.array(labels, np.int64), ("a", "b"), "mine")


def floats(images: np.ndarray) -> mv.data.Dataset:
    return mv.data.Dataset(images, np.array([0, 1]), ("a", "b"), "mine")


def step() -> mv.TrainStep:
    model = vit()
    return mv.TrainStep(model, AdamW(model.named_parameters()))


BAD: dict[str, tuple[Any, type[MinivitError], str]] = {
    # ---- Tensors ----
    "a ragged list": (lambda: mv.tensor([[1], [1, 2]]), ShapeError, "rows of equal length"),
    "text": (lambda: mv.tensor("cat"), DTypeError, "<U3"),
    "nothing": (lambda: mv.tensor(None), DTypeError, "object"),
    "a device that is not": (lambda: x.to("gpu"), ConfigError, "'gpu' is neither a device nor a dtype"),
    "a device number that is not": (lambda: x.to("cuda:x"), DeviceError, "cuda:x"),
    "to None": (lambda: x.to(None), ConfigError, "None is neither"),
    "to integers": (lambda: x.to(int), DTypeError, "int64"),
    "a float of many": (lambda: float(x), ShapeError, "one element"),
    "comparing other shapes": (lambda: x < np.ones(4), ShapeError, "lt: "),
    "equal to other shapes": (lambda: x == np.ones(4), ShapeError, "eq: "),
    "a gradient of an array": (lambda: mv.grad(x, [x.data]), GraphError, "input 0 of shape (2, 3)"),
    "a gradient of a number": (lambda: mv.grad(1.0, [x]), GraphError, "input 0"),
    "backward without a graph": (lambda: x.sum().backward(), GraphError, "no graph"),
    # ---- operations ----
    "a Tensor and a list": (lambda: x - [1.0, 2.0, 3.0], DTypeError, "sub: an input is a list"),
    "a list and a Tensor": (lambda: [1.0, 2.0, 3.0] * x, DTypeError, "mul: an input is a list"),
    "a Tensor and text": (lambda: x * "2", DTypeError, "mul: an input is a str"),
    "a Tensor and None": (lambda: x - None, DTypeError, "sub(float32(2, 3), NoneType)"),
    "a product with a list": (lambda: x @ [[1.0], [2.0], [3.0]], DTypeError, "matmul: an input is a list"),
    "a product with a short list": (lambda: x @ [1.0, 2.0, 3.0], DTypeError, "matmul: an input is a list"),
    "lists alone": (lambda: ops.gelu([1.0, 2.0]), DTypeError, "gelu(list"),
    "an axis that is text": (lambda: x.sum("rows"), DTypeError, "sum(float32(2, 3), str"),
    "joining a list": (lambda: ops.concat([x, [[1.0, 2.0, 3.0]]]), DTypeError, "concat: an input is a list"),
    "labels out of range": (lambda: ops.cross_entropy(LOGITS, [0, 3]), DataError, "label 3 at row 1"),
    "a label for two rows": (lambda: ops.cross_entropy(LOGITS, 1), ShapeError, "one label for each row"),
    "a label in a grid": (lambda: ops.cross_entropy(np.zeros((2, 2, 3)), [[0, 1], [2, 3]]), DataError, "3 at [1, 1]"),
    "a label of one row": (lambda: ops.cross_entropy(LOGITS[0], 3), DataError, "label 3 is outside 0 … 2"),
    "logits in a list": (lambda: ops.cross_entropy([[1.0, 2.0]], [0]), DTypeError, "the logits are a list"),
    "soft labels of float64": (lambda: ops.cross_entropy(LOGITS, LOGITS.astype(float)), DTypeError, "are float64"),
    "smoothing of text": (lambda: ops.cross_entropy(LOGITS, [0, 1], "0.1"), ConfigError, "smoothing is '0.1'"),
    "labels of text": (lambda: ops.cross_entropy(LOGITS, ["a", "b"]), DTypeError, "<U1"),
    "ragged labels": (lambda: ops.cross_entropy(LOGITS, [[1.0], [1.0, 2.0]]), ShapeError, "cross_entropy"),
    "labels of no logits": (lambda: ops.cross_entropy(LOGITS[:0], np.zeros(0, int)), ShapeError, "no rows"),
    "a mask of numbers": (lambda: ops.attention(x, x, x, [[0, 1], [0, 1]]), DTypeError, "bool"),
    # ---- layers ----
    "Linear of a list": (lambda: nn.Linear(3, 2)([[1.0, 2.0, 3.0]]), DTypeError, "linear: an input is a list"),
    "Linear of another width": (lambda: nn.Linear(4, 2)(x), ShapeError, "linear"),
    "Linear to nothing": (lambda: nn.Linear(3, 0), ConfigError, "out_features is 0"),
    "LayerNorm of a list": (lambda: nn.LayerNorm(3)([1.0, 2.0, 3.0]), DTypeError, "layer_norm: an input is a list"),
    "attention of a list": (lambda: nn.MultiHeadAttention(4, 2)([[[1.0] * 4]]), DTypeError, "linear: an input is"),
    "attention of one image": (lambda: nn.MultiHeadAttention(3, 1)(x), ShapeError, "of 1 heads"),
    "a block of a list": (lambda: nn.EncoderBlock(4, 2, 8)([[[1.0] * 4]]), DTypeError, "layer_norm: an input is"),
    "a rate of a layer": (lambda: nn.Dropout(1.5), ConfigError, "p is 1.5"),
    "a module to a device that is not": (lambda: nn.Linear(3, 2).to("gpu"), ConfigError, "'gpu' is neither"),
    "a module to integers": (lambda: nn.Linear(3, 2).to(int), DTypeError, "int64"),
    # ---- models ----
    "an unknown model": (lambda: mv.create_model("vit_digit"), ConfigError, "did you mean 'vit_digits'"),
    "an unknown setting": (lambda: mv.create_model("vit_digits", dept=3), ConfigError, "did you mean 'depth'"),
    "image_size (8,)": (lambda: vit(image_size=(8,)), ConfigError, "image_size is (8,)"),
    "image_size '8'": (lambda: vit(image_size="8"), ConfigError, "image_size is '8'"),
    "image_size 8.0": (lambda: vit(image_size=8.0), ConfigError, "image_size is 8.0"),
    "image_size 30": (lambda: vit(image_size=30), ShapeError, "28 or 32"),
    "patch_size None": (lambda: vit(patch_size=None), ConfigError, "patch_size"),
    "mlp_dim": (lambda: vit(mlp_dim=-1), ConfigError, "mlp_dim is -1"),
    "mlp_dim 0": (lambda: vit(mlp_dim=0), ConfigError, "mlp_dim is 0"),
    "dim_head": (lambda: vit(dim_head=0), ConfigError, "dim_head is 0"),
    "dim": (lambda: vit(dim=8.5), ConfigError, "dim is 8.5"),
    "depth": (lambda: vit(depth="2"), ConfigError, "depth is '2'"),
    "heads": (lambda: vit(heads=3), ConfigError, "heads"),
    "norm_eps": (lambda: vit(norm_eps=-1), ConfigError, "norm_eps is -1"),
    "dropout": (lambda: vit(dropout=1.0), ConfigError, "dropout is 1.0"),
    "attention_dropout": (lambda: vit(attention_dropout=-0.1), ConfigError, "attention_dropout is -0.1"),
    "embed_dropout": (lambda: vit(embed_dropout=float("nan")), ConfigError, "embed_dropout is nan"),
    "drop_path": (lambda: vit(drop_path="0.1"), ConfigError, "drop_path is '0.1'"),
    "pool": (lambda: vit(pool="max"), ConfigError, "'cls', 'mean', 'none'"),
    "activation": (lambda: vit(activation="gellu"), ConfigError, "did you mean 'gelu'"),
    "seed": (lambda: vit(seed="0"), ConfigError, "seed is '0'"),
    "another head of nothing": (lambda: vit().reset_head(0), ConfigError, "num_classes is 0"),
    "images in a list": (lambda: vit()(IMAGES.tolist()), DTypeError, "got a list"),
    "images of bytes": (lambda: vit()(IMAGES.astype(np.uint8)), DTypeError, "mv.data.standardize(images, mean, std)"),
    "images of float64": (lambda: vit()(IMAGES.astype(np.float64)), DTypeError, "images.astype(np.float32)"),
    "a Tensor of float64": (lambda: vit()(mv.tensor(IMAGES, dtype=np.float64)), DTypeError, "images.to(np.float32)"),
    "images of float32": (lambda: vit().to(np.float64)(IMAGES), DTypeError, "images.astype(np.float64)"),
    "a step of bytes": (lambda: step()(IMAGES.astype(np.uint8), [0, 1]), DTypeError, "mv.data.standardize"),
    "predicting bytes": (lambda: mv.predict_logits(vit(), IMAGES.astype(np.uint8)), DTypeError, "mv.data.standardize"),
    "one image alone": (lambda: vit()(IMAGES[0]), ShapeError, "(B, 1, 8, 8)"),
    "channels last": (lambda: vit()(IMAGES.transpose(0, 2, 3, 1)), ShapeError, "batch, channel, height, width"),
    "a mask of another size": (lambda: vit()(IMAGES, [[False]]), ShapeError, "(5, 5) or (2, 5, 5)"),
    "a mask of integers": (lambda: vit()(IMAGES, [[0] * 5] * 5), DTypeError, "mask.astype(bool)"),
    # ---- data ----
    "standardising floats": (lambda: mv.data.standardize(IMAGES, [0], [1]), DataError, "np.rint(255 * images)"),
    "a data set of floats": (lambda: floats(IMAGES), DataError, "np.rint(255 * images).astype(np.uint8)"),
    "a data set of float bytes": (lambda: floats(IMAGES + 16), DataError, "np.rint(images).astype(np.uint8)"),
    "a data set of integers": (lambda: floats(np.zeros((2, 1, 8, 8), int)), DataError, "images.astype(np.uint8)"),
    "a data set of NaN": (lambda: floats(IMAGES * np.nan), DataError, "from nan to nan"),
    "a data set of nothing": (lambda: dataset((0, 1, 8, 8), ()), DataError, "no images"),
    "a label too many": (lambda: dataset(labels=(0, 1, 1)), DataError, "3 labels"),
    "a label that is no class": (lambda: dataset(labels=(0, 2)), DataError, "label 2"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what):
    call, error, words = BAD[what]
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)
    assert "\n  → " in str(caught.value) and not str(caught.value).endswith("→ ")


@pytest.mark.parametrize(("threads", "micro_batch"), [(1, None), (1, 2), (2, 1)])
def test_a_label_in_a_batch_is_named_by_its_row_there(threads, micro_batch):
    model = vit()
    opt = mv.optim.AdamW(model.named_parameters(), lr=1e-3)
    smoothed = partial(ops.cross_entropy, smoothing=0.1)
    step = mv.TrainStep(model, opt, smoothed, threads=threads, micro_batch=micro_batch)
    with pytest.raises(DataError, match=r"label 10 at row 3 is outside 0 … 2"):
        step(np.zeros((6, 1, 8, 8), np.float32), np.array([0, 1, 2, 10, 0, 11]))


def test_what_looks_odd_but_works():
    model = vit()
    expected = model(IMAGES).data
    np.testing.assert_array_equal(model(mv.tensor(IMAGES)).data, expected)
    nowhere = np.eye(5, dtype=bool)
    for mask in (nowhere.tolist(), mv.tensor(nowhere)):
        np.testing.assert_array_equal(model(IMAGES, mask).data, model(IMAGES, nowhere).data)
    q = mv.tensor(np.arange(6.0).reshape(3, 2), requires_grad=True)
    mask = np.array([[False, True, False]] * 3)
    given = ops.attention(q, q, q, mask.tolist())
    np.testing.assert_array_equal(given.data, ops.attention(q, q, q, mask).data)
    given.sum().backward()
    with mv.first_order():
        np.testing.assert_allclose(ops.attention(q, q, q, mask.tolist()).data, given.data, rtol=1e-14)
    loss = ops.cross_entropy(LOGITS, np.array([0, 2]))
    assert ops.cross_entropy(LOGITS, [0, 2]) == loss and ops.cross_entropy(LOGITS[0], 2) == loss
    assert ops.cross_entropy(LOGITS, [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]) == loss
    logits = mv.tensor(LOGITS, requires_grad=True)
    ops.cross_entropy(logits, [0, 2]).backward()
    assert logits.grad is not None
    assert vit(image_size=np.int64(8)).config["image_size"] == 8
    assert nn.PatchEmbed(8, (4, 2), 1, 8)(IMAGES).shape == (2, 8, 8)


def test_a_float64_number_stays_one_where_asked():
    assert mv.tensor(0.1, dtype=np.float64).item() == 0.1
    assert mv.tensor([0.1]).dtype == np.float32
