"""The classifier with scikit-learn's interface: by itself, in scikit-learn's tools, and given what it cannot use."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest

import minivit as mv
from minivit.errors import ConfigError, DataError, DTypeError, MinivitError, ShapeError
from minivit.train.classifier import _patch

DIGITS = mv.data.load("digits", "test")
PIXELS = DIGITS.images[:240].astype(np.float64) / 16  # (240, 1, 8, 8)
ROWS = PIXELS.reshape(240, 64)
LABELS = DIGITS.labels[:240]


def small(**settings):
    return mv.ViTClassifier(**{"epochs": 2, "depth": 1, "dim": 16, "lr": 1e-2, "threads": 1, **settings})


@pytest.fixture(scope="module")
def fitted():
    return small(epochs=8).fit(ROWS, LABELS)


def test_it_learns_the_digits(fitted):
    assert fitted.score(ROWS, LABELS) > 0.7
    assert fitted.loss_curve_[-1] < fitted.loss_curve_[0] and len(fitted.loss_curve_) == 8
    assert fitted.n_features_in_ == 64 and fitted.image_shape_ == (1, 8, 8)
    np.testing.assert_array_equal(fitted.classes_, np.arange(10))
    proba = fitted.predict_proba(ROWS)
    assert proba.shape == (240, 10) and proba.dtype == np.float64
    np.testing.assert_allclose(proba.sum(1), 1.0, rtol=1e-12)
    np.testing.assert_array_equal(fitted.predict(ROWS), proba.argmax(1))


def test_equal_seeds_give_equal_bits_and_fit_starts_afresh(fitted):
    again = small(epochs=8)
    again.fit(ROWS[:50], LABELS[:50])
    again.fit(ROWS, LABELS)
    np.testing.assert_array_equal(again.decision_function(ROWS), fitted.decision_function(ROWS))
    other = small(epochs=8, random_state=1).fit(ROWS, LABELS)
    assert not np.array_equal(other.decision_function(ROWS), fitted.decision_function(ROWS))
    assert not fitted.model_.training


@pytest.mark.parametrize(
    "x",
    [PIXELS, PIXELS[:, 0], PIXELS.transpose(0, 2, 3, 1), ROWS.tolist(), (ROWS * 16).astype(np.uint8), ROWS * 1e6 - 3e5],
    ids=["NCHW", "NHW", "NHWC", "lists", "uint8", "other units"],
)
def test_images_in_any_form_are_the_same_images(fitted, x):
    model = small(epochs=8).fit(x, LABELS)
    np.testing.assert_allclose(model.decision_function(x), fitted.decision_function(ROWS), atol=0.02)
    if np.ndim(x) > 2:
        np.testing.assert_array_equal(fitted.predict(x), fitted.predict(ROWS))


def test_colours_are_standardised_by_channel():
    colours = np.concatenate([PIXELS, 200.0 * PIXELS - 7.0, np.full_like(PIXELS, 0.1)], axis=1)
    last = colours.transpose(0, 2, 3, 1)
    expected = small().fit(colours, LABELS).decision_function(colours)
    for shape, x in (
        (None, last),
        ((3, 8, 8), colours),
        ((3, 8, 8), colours.reshape(240, -1)),
        ((8, 8, 3), last.reshape(240, -1)),
    ):
        model = small(image_shape=shape).fit(x, LABELS)
        np.testing.assert_allclose(model.mean_, colours.mean(axis=(0, 2, 3)))
        assert model.std_[2] == 1.0  # nothing to divide by
        np.testing.assert_allclose(model.decision_function(x), expected, atol=1e-4)


@pytest.mark.parametrize(
    "names",
    [
        np.array(["a", "bb", "c"]), np.array([-5, 3, 1000]), np.array([0.0, 2.0, 7.0]),
        np.array(["x", "y", "z"], object), np.array([3, 4, 200], np.uint8),
    ],
)  # fmt: skip
def test_labels_of_any_kind(names):
    y = names[LABELS % 3]
    model = small().fit(ROWS, y)
    assert model.classes_.dtype == names.dtype
    np.testing.assert_array_equal(model.classes_, names)
    assert set(model.predict(ROWS)) <= set(names)
    assert model.score(ROWS, y) == np.mean(model.predict(ROWS) == y)
    assert model.score(ROWS, y[:, None].tolist()) == model.score(ROWS, y)


def test_settings():
    model = small(lr=1e-3)
    assert model.get_params()["lr"] == 1e-3
    assert model.set_params(lr=2e-3, dim=32) is model and (model.lr, model.dim) == (2e-3, 32)
    with pytest.raises(ConfigError, match="did you mean 'depth'"):
        model.set_params(dim=8, depht=3)
    assert model.dim == 32  # all or nothing
    assert repr(mv.ViTClassifier(dim=32)) == "ViTClassifier(dim=32)"


def test_a_copy_predicts_the_same(fitted):
    for other in (pickle.loads(pickle.dumps(fitted)), copy.deepcopy(fitted)):
        np.testing.assert_array_equal(other.decision_function(ROWS), fitted.decision_function(ROWS))
        assert other.get_params() == fitted.get_params()


def test_patches():
    assert [_patch(n) for n in (1, 7, 8, 9, 10, 12, 28, 32, 64, 100, 224)] == [1, 1, 4, 3, 5, 4, 4, 4, 8, 20, 28]


NAN = ROWS.copy()
NAN[3, 5] = np.nan

BAD = {
    "NaN": (lambda: small().fit(NAN, LABELS), DataError, r"X\[3\]"),
    "text": (lambda: small().fit(np.full((4, 64), "a"), [0, 1, 0, 1]), DTypeError, "<U1"),
    "ragged": (lambda: small().fit([[1.0], [1.0, 2.0]], [0, 1]), ShapeError, "X: "),
    "no images": (lambda: small().fit(ROWS[:0], []), ShapeError, r"\(0, 64\)"),
    "one number each": (lambda: small().fit(ROWS[:, 0], LABELS), ShapeError, r"\(240,\)"),
    "rows of 63": (lambda: small().fit(ROWS[:, 1:], LABELS), ShapeError, "63 numbers"),
    "another image_shape": (lambda: small(image_shape=(8, 9)).fit(ROWS, LABELS), ShapeError, r"\(8, 9\)"),
    "no image_shape": (lambda: small(image_shape="8x8").fit(ROWS, LABELS), ConfigError, "image_shape"),
    "no channels": (lambda: small().fit(np.zeros((4, 5, 8, 5)), [0, 1] * 2), ShapeError, "channels"),
    "two ends": (lambda: small().fit(np.zeros((4, 3, 8, 3)), [0, 1] * 2), ShapeError, "channels"),
    "29 pixels": (lambda: small().fit(np.zeros((4, 29, 29)), [0, 1] * 2), ShapeError, "29 pixels"),
    "overflow": (lambda: small().fit(np.float64([[1e300] * 64, [-1e300] * 64]), [0, 1]), DataError, "overflow"),
    "one class": (lambda: small().fit(ROWS, LABELS * 0), DataError, "one class only: 0"),
    "labels too few": (lambda: small().fit(ROWS, LABELS[:3]), ShapeError, "240 images, 3 labels"),
    "one-hot labels": (lambda: small().fit(ROWS, np.eye(10)[LABELS]), ShapeError, "y has the shape"),
    "fractions": (lambda: small().fit(ROWS, LABELS + 0.5), DataError, "fractions"),
    "mixed labels": (lambda: small().fit(ROWS[:2], np.array(["a", 1], object)), DTypeError, "sorted"),
    "no epochs": (lambda: small(epochs=0).fit(ROWS, LABELS), ConfigError, "epochs is 0"),
    "half a batch": (lambda: small(batch_size=0.5).fit(ROWS, LABELS), ConfigError, "batch_size is 0.5"),
    "no seed": (lambda: small(random_state=None).fit(ROWS, LABELS), ConfigError, "random_state"),
    "heads": (lambda: small(heads=3).fit(ROWS, LABELS), ConfigError, "heads"),
    "unfitted": (lambda: small().predict(ROWS), ConfigError, "not fitted"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what):
    call, error, words = BAD[what]
    with pytest.raises(error, match=words) as caught:
        call()
    assert "\n  → " in str(caught.value) and not str(caught.value).endswith("→ ")


def test_predict_refuses_other_images(fitted):
    for x, words in (
        (ROWS[:, :49], "49 features"),
        (ROWS[0], r"\(64,\)"),
        (PIXELS[0, 0], "8 features"),
        (np.zeros((2, 16, 16)), "fitted to"),
        (np.zeros((2, 3, 8, 8)), "fitted to"),
        (NAN, "NaN"),
    ):
        with pytest.raises(MinivitError, match=words):
            fitted.predict(x)
    with pytest.raises(ShapeError, match="240 images, 2 labels"):
        fitted.score(ROWS, [1, 2])


def test_a_fit_that_fails_leaves_no_model(fitted):
    model = copy.deepcopy(fitted).set_params(lr=1e30)
    with pytest.raises(MinivitError):
        model.fit(ROWS, LABELS)
    with pytest.raises(ConfigError, match="not fitted"):
        model.predict(ROWS)


def test_scikit_learn_is_not_imported():
    code = "import sys, minivit as mv; mv.ViTClassifier().get_params(); assert 'sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


# ---- in scikit-learn -------------------------------------------------------------------------------------------------


def test_clone_and_what_it_is(fitted):
    base = pytest.importorskip("sklearn.base")
    from sklearn.utils.validation import check_is_fitted

    other = base.clone(fitted)
    assert other.get_params() == fitted.get_params() and not hasattr(other, "classes_")
    assert base.is_classifier(fitted) and not base.is_regressor(fitted)
    check_is_fitted(fitted)
    with pytest.raises(ValueError, match="not fitted"):
        check_is_fitted(other)


def test_pipeline_cross_validation_and_grid_search():
    pytest.importorskip("sklearn")
    from sklearn.model_selection import GridSearchCV, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import MinMaxScaler

    names = np.array(list("abcdefghij"))[LABELS]
    pipeline = make_pipeline(MinMaxScaler(), small())
    assert pipeline.fit(ROWS, names).score(ROWS, names) == np.mean(pipeline.predict(ROWS) == names)
    scores = cross_val_score(pipeline, ROWS, names, cv=2, error_score="raise")
    assert scores.shape == (2,) and (scores > 0.1).all()
    losses = cross_val_score(small(), PIXELS, names, cv=2, scoring="neg_log_loss", error_score="raise")
    assert np.isfinite(losses).all()
    search = GridSearchCV(pipeline, {"vitclassifier__lr": [1e-6, 1e-2]}, cv=2, error_score="raise")
    search.fit(ROWS, names)
    assert search.best_params_ == {"vitclassifier__lr": 1e-2}
    assert "ViTClassifier(" in repr(search)
