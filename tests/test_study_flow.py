"""mv.study through the engine: gradients, attribution, many images, other dtypes and devices, and what is refused."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

import minivit as mv
from minivit import ops, study
from minivit.backend import normal
from minivit.errors import ConfigError, DataError, DTypeError, GraphError, NonFiniteError, ShapeError
from minivit.models import build
from minivit.study.batches import batch_size, kept_bytes
from tests import (
    mixer,  # noqa: F401 - registers a model without attention
    strict,
)
from tests.test_study import IMAGES, a_mask, small

strict_cupy = strict.strict_cupy


# ---- what flows back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pool", ["cls", "mean", "none"])
def test_every_number_of_the_attention_gradient_equals_a_complex_step(pool: str, masked: bool) -> None:
    """Of each block in its place, too: a list in the order of the backward pass would fail here."""
    model = small(pool)
    mask = a_mask(model.num_tokens) if masked else None
    places = (
        3 * model.num_tokens**2
    )  # of (H, T, T): each is stepped in a copy of the image, as no image acts on another
    copies = np.repeat(IMAGES[:1], places, axis=0)
    for layer, found in enumerate(study.attention_gradient(study.trace_model(model, IMAGES[:1], mask), 3)):
        way = 1e-30j * np.eye(places).reshape(places, *found.shape[1:])
        with mv.no_grad():
            trace = study.trace_model(model, copies, mask, lambda at, p, i=layer, way=way: p + way if at == i else p)
        logits = trace.logits.data.imag / 1e-30
        stepped = (logits if logits.ndim == 2 else logits.mean(axis=1))[:, 3].reshape(found.shape)
        np.testing.assert_allclose(found, stepped, rtol=1e-12, atol=1e-12 * np.abs(stepped).max())
        assert np.abs(stepped).max() > 1e-3


def test_what_is_followed_may_be_a_class_classes_or_a_number_made_of_logits() -> None:
    trace = study.trace_model(small(), IMAGES)
    one, each = study.attention_gradient(trace, 2), study.attention_gradient(trace, [2, 2, 2])
    number = study.attention_gradient(trace, trace.logits[:, 2].sum())
    tensor = study.attention_gradient(trace, mv.tensor(np.array([2, 2, 2])))
    loss = study.attention_gradient(trace, ops.cross_entropy(trace.logits, np.array([2, 2, 2])))
    for a, b, c, d, e in zip(one, each, number, tensor, loss, strict=True):
        assert np.array_equal(a, b) and np.array_equal(a, d) and type(a) is np.ndarray
        np.testing.assert_allclose(a, c, rtol=1e-12, atol=1e-15)
        assert np.abs(e - a).max() > 1e-6
    assert study.gradient_flow(trace, 2).shape == (3, 3, 7)  # and the graph is still there


def test_the_flow_into_the_embedding_equals_a_complex_step_of_the_positions() -> None:
    model = small()
    trace = study.trace_model(model, IMAGES[:1])
    flow = study.gradient_flow(trace, 1)
    (g,) = mv.grad(trace.logits[0, 1], [trace.tokens[0]])
    pos = model.pos_embed.data
    for t in (0, 3, 6):
        slopes = []
        for d in range(12):
            model.pos_embed.data = pos.astype(complex)
            model.pos_embed.data[0, t, d] += 1e-30j
            with mv.no_grad():
                slopes.append(float(model.trace(IMAGES[:1]).logits.data[0, 1].imag) / 1e-30)
        assert flow[0, 0, t] == pytest.approx(np.linalg.norm(slopes), rel=1e-12)
        np.testing.assert_allclose(g.numpy()[0, t], slopes, rtol=1e-10, atol=1e-14)
    model.pos_embed.data = pos
    assert flow[2, 0, 0] > 0 and not flow[2, 0, 1:].any()  # only the class token is read


@pytest.mark.parametrize("pool", ["cls", "mean", "none"])
def test_lens_and_lens_gradient_end_in_the_models_own(pool: str) -> None:
    trace = study.trace_model(small(pool), IMAGES)
    seen = study.logit_lens(trace)
    assert np.array_equal(seen[-1], trace.logits.data) and seen.shape == (3, *trace.logits.shape)
    through = study.lens_gradient(trace, [0, 1, 2])
    whole = study.attention_gradient(trace, [0, 1, 2])
    np.testing.assert_allclose(through[-1], whole[-1], rtol=1e-12, atol=1e-15)
    assert np.abs(through[0] - whole[0]).max() > 1e-4  # the first block's logit is another
    shorter = small(pool, depth=1)  # which the first block and the head are, alone
    shorter.load_state_dict(trace.model.state_dict(), strict=False)
    alone = study.attention_gradient(study.trace_model(shorter, IMAGES), [0, 1, 2])
    np.testing.assert_allclose(through[0], alone[0], rtol=1e-12, atol=1e-15)


# ---- attribution -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"qkv_bias": False, "dim_head": 5}, {"position": "none", "heads": 1}])
@pytest.mark.parametrize("pool", ["cls", "mean", "none"])
def test_the_terms_of_a_logit_add_up_to_it(pool: str, settings: dict[str, Any]) -> None:
    model = small(pool, **settings)
    for mask in (None, a_mask(model.num_tokens)):
        trace = study.trace_model(model, IMAGES, mask)
        found = study.direct_attribution(trace, [4, 0, 1])
        logits = trace.logits.data if pool != "none" else trace.logits.data.mean(axis=1)
        np.testing.assert_allclose(found.total, logits[[0, 1, 2], [4, 0, 1]], rtol=0, atol=1e-10)
        assert np.array_equal(found.logit, logits[[0, 1, 2], [4, 0, 1]])
        assert found.heads.shape == (3, 2, model.settings.heads) and found.mlp.shape == (3, 2)


def test_a_head_s_term_is_what_the_logit_loses_without_it_while_the_norm_stands_still() -> None:
    """An independent way to the same number: of the last block's heads, with the final norm put by hand."""
    model = small(depth=1)
    trace = study.trace_model(model, IMAGES)
    found = study.direct_attribution(trace, 2)
    x, mlp = trace.tokens[-1].data[:, 0], trace.mlp[0].data[:, 0]
    sigma = np.sqrt(x.var(axis=-1, keepdims=True) + model.norm.eps)

    def logit(x: np.ndarray) -> np.ndarray:
        y = (x - x.mean(axis=-1, keepdims=True)) / sigma * model.norm.weight.data + model.norm.bias.data
        return y @ model.head.weight.data[2] + model.head.bias.data[2]

    for h in range(3):
        off = study.trace_model(
            model, IMAGES, change=lambda block, p, h=h: p * np.float64(np.arange(3) != h)[:, None, None]
        )
        without = (off.tokens[0].data + off.attended[0].data)[:, 0] + mlp  # the MLP's own answer left as it was
        np.testing.assert_allclose(logit(x) - logit(without), found.heads[:, 0, h], rtol=1e-9, atol=1e-12)


def test_attribution_says_when_a_logit_is_no_sum() -> None:
    with pytest.raises(ConfigError, match="hidden tanh layer"):
        study.direct_attribution(study.trace_model(small(head="mlp"), IMAGES), 0)
    model = small(dropout=0.5)
    with mv.random_key(mv.Key(3)), pytest.raises(NonFiniteError, match=r"add up to something else.*\n.*eval mode"):
        study.direct_attribution(model.trace(IMAGES), 0)
    trace = study.trace_model(model, IMAGES)
    model.head.weight.data *= 1.5
    with pytest.raises(NonFiniteError, match="as they are now"):
        study.direct_attribution(trace, 0)


# ---- models of all kinds ---------------------------------------------------------------------------------------------


def everything(model: Any, images: Any = IMAGES) -> dict[str, np.ndarray]:
    """Return what every method says of a model."""
    trace = study.trace_model(model, images)
    g = study.attention_gradient(trace, [0, 1, 2])
    found = study.direct_attribution(trace, 3)
    arrays = {
        "gradient": g[0], "lens gradient": study.lens_gradient(trace, 1)[0], "class": study.class_attention(trace)[1],
        "product": study.gradient_attention(trace, g)[1], "rollout": study.rollout(trace, "max"),
        "relevance": study.relevance(trace, g), "legrad": study.legrad(trace, g),
        "map": study.patch_map(trace, study.rollout(trace)), "distance": study.attention_distance(trace),
        "entropy": study.entropy(trace).bits, "importance": study.head_importance(trace, g),
        "lens": study.logit_lens(trace), "heads": found.heads, "total": found.total,
        "positions": study.position_similarity(model), "filters": np.abs(study.filter_components(model).values[:5]),
        "features": np.abs(study.feature_components(trace).values), "norms": study.token_norms(trace),
        "flow": study.gradient_flow(trace, 2), "statistics": study.head_statistics(model, images).importance,
    }  # fmt: skip
    assert all(type(a) is np.ndarray for a in arrays.values())
    return arrays


def agree(a: dict[str, np.ndarray], b: dict[str, np.ndarray], within: float) -> None:
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=within, atol=within * np.abs(b[name]).max(), err_msg=name)


@pytest.mark.parametrize("pool", ["cls", "mean", "none"])
def test_float32_frozen_and_training_models(pool: str) -> None:
    exact = everything(small(pool))
    agree(everything(small(pool, np.float32)), exact, 1e-4)
    frozen = small(pool)
    for p in frozen.parameters():
        p.requires_grad = False
    agree(everything(frozen), exact, 1e-12)
    agree(everything(small(pool, dropout=0.3, attention_dropout=0.2, drop_path=0.2, recompute=True)), exact, 1e-12)
    assert frozen.training  # as it was set


def test_a_model_on_a_gpu(strict_cupy: Any) -> None:
    agree(everything(small().to("cuda")), everything(small()), 1e-10)
    trace = study.trace_model(small("none").to("cuda"), strict_cupy.asarray(IMAGES), a_mask(6))
    assert type(study.lens_gradient(trace, 2)[0]) is np.ndarray and study.entropy(trace).largest > 0
    assert study.attention_gradient(trace, ops.mean(trace.logits))[0].any()


def test_an_untrained_model_of_the_same_settings() -> None:
    model = small("mean", np.float32)
    other = study.untrained_like(model, seed=4)
    assert other.settings == mv.ViT(**model.config | {"seed": 4}).settings
    assert other.head.weight.dtype == np.float32 and np.abs(other.head.weight.data).max() > 0.01
    g = study.attention_gradient(study.trace_model(other, IMAGES), 0)
    assert all(part.any() for part in g)
    assert type(study.untrained_like(build("mixer", {}))) is type(build("mixer", {}))


# ---- many images -----------------------------------------------------------------------------------------------------


def test_batches_of_any_size_give_the_same_statistics() -> None:
    model, images = small("cls", np.float32), normal(mv.Key(8), (7, 2, 12, 8)).astype(np.float32)
    told: list[int] = []
    one_by_one = study.head_statistics(model, images, memory=1, after_batch=told.append)
    assert told == [1] * 7 and one_by_one.images == 7
    whole = study.trace_model(model, images)
    gradient = study.attention_gradient(whole, study.predicted(whole))
    for found in (one_by_one, study.head_statistics(model, images, memory=3 * kept_bytes(whole))):
        np.testing.assert_allclose(found.distance, study.attention_distance(whole), rtol=1e-5)
        np.testing.assert_allclose(found.entropy, study.entropy(whole).bits, rtol=1e-5)
        np.testing.assert_allclose(found.importance, study.head_importance(whole, gradient), rtol=1e-4)
        assert found.largest_entropy == study.entropy(whole).largest

    def stop(n: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study.head_statistics(model, images, after_batch=stop)
    assert study.predicted(whole).tolist() == [max(range(5), key=list(row).__getitem__) for row in whole.logits.data]
    labels = np.array([0, 1, 2, 3, 4, 0, 1])
    of_labels = study.head_statistics(model, images, labels, memory=1)
    gradient = study.attention_gradient(whole, labels)
    np.testing.assert_allclose(of_labels.importance, study.head_importance(whole, gradient), rtol=1e-4)


def test_a_batch_takes_the_memory_that_was_told() -> None:
    model = mv.ViT(32, 4, 3, dim=32, depth=2, heads=4)
    images = normal(mv.Key(2), (16, 3, 32, 32)).astype(np.float32)
    first = study.trace_model(model, images[:1])
    assert batch_size(first, 1) == 1
    study.head_statistics(model, images[:2])  # so that nothing is made for the first time
    memory = 4 * 2**20
    assert 2 < batch_size(first, memory) < 10
    del first
    tracemalloc.start()
    try:
        study.head_statistics(model, images, memory=memory)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 0.5 * memory < peak < 1.25 * memory


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_model_without_attention_is_told_apart() -> None:
    mixing = build("mixer", {})
    with pytest.raises(ConfigError, match="Mixer has no trace"):
        study.trace_model(mixing, np.zeros((1, 1, 8, 8), np.float32))
    with pytest.raises(ConfigError, match="Mixer has no trace"):
        study.head_statistics(mixing, np.zeros((1, 1, 8, 8), np.float32))
    with pytest.raises(ConfigError, match="a trace is studied, got a Mixer"):
        study.rollout(mixing)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no learned positions"):
        study.position_similarity(small(position="none"))
    with pytest.raises(ConfigError, match="no Tokenizer"):
        study.filter_components(mixing)


def test_what_cannot_be_followed_is_refused() -> None:
    model = small()
    trace, other = study.trace_model(model, IMAGES), study.trace_model(model, IMAGES)
    for wrong, error, words in (
        (5, ConfigError, "no class 5: the model has 5"),
        (-1, ConfigError, "no class -1"),
        ([0, 1, 9], ConfigError, "no class 9"),
        ([0, 1], ShapeError, r"classes of shape \(2,\) for 3 images"),
        (1.0, DTypeError, "a class is an integer, got 1.0"),
        (True, DTypeError, "a class is an integer, got True"),
        ("cat", DTypeError, "a class is an integer, got 'cat'"),
        ([[1], [2, 3]], DTypeError, "a class is an integer"),
        (10**30, DTypeError, "a class is an integer"),
        (None, DTypeError, "a class is an integer, got None"),
        (trace.logits, ShapeError, r"one number is asked for, got a Tensor of shape \(3, 5\)"),
        (other.logits.sum(), GraphError, "very forward pass"),
        (mv.tensor(1.0), GraphError, "no graph"),
    ):
        with pytest.raises(error, match=words):
            study.attention_gradient(trace, wrong)
        with pytest.raises(error, match=words):
            study.gradient_flow(trace, wrong)
    for wrong in (7, [0, 1], "cat"):
        with pytest.raises((ConfigError, ShapeError, DTypeError)):
            study.direct_attribution(trace, wrong)
        with pytest.raises((ConfigError, ShapeError, DTypeError)):
            study.lens_gradient(trace, wrong)
    with mv.no_grad():
        silent = study.trace_model(model, IMAGES)
    for ask in (study.attention_gradient, study.gradient_flow, study.lens_gradient):
        with pytest.raises(GraphError, match="under no_grad"):
            ask(silent, 0)
    assert study.rollout(silent).shape == (3, 7, 7)  # which needs none


def test_gradients_that_are_not_this_traces_are_refused() -> None:
    trace = study.trace_model(small(), IMAGES)
    gradient = study.attention_gradient(trace, 0)
    for wrong in (gradient[:1], gradient[0], [g[:2] for g in gradient], [g.tolist() for g in gradient], None):
        for ask in (study.relevance, study.legrad, study.gradient_attention, study.head_importance):
            with pytest.raises(ShapeError, match="the same trace"):
                ask(trace, wrong)
    gradient[1][0, 2, 3, 4] = np.nan
    with pytest.raises(
        NonFiniteError, match=r"gradient of block 1's attention: 1 of 441 .* the first at \[0, 2, 3, 4\]"
    ):
        study.relevance(trace, gradient)


def test_numbers_that_are_none_are_refused() -> None:
    images = IMAGES.copy()
    images[1, 0, 0, 0] = np.nan
    with np.errstate(invalid="ignore"):
        trace = study.trace_model(small(), images)
        for ask in (study.rollout, study.attention_distance, study.entropy, study.token_norms, study.logit_lens):
            with pytest.raises(NonFiniteError, match=r"the first at \[1, "):
                ask(trace)
        with pytest.raises(NonFiniteError, match="image 1 holds NaN"):
            study.head_statistics(small(), images, memory=1)
    stepped = study.trace_model(small(), IMAGES, change=lambda block, p: p + 0j)
    with pytest.raises(DTypeError, match="complex128"):
        study.rollout(stepped)
    with pytest.raises(ConfigError, match="unknown way to fuse heads 'median'"):
        study.rollout(study.trace_model(small(), IMAGES), "median")
    for n in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match="components"):
            study.filter_components(small(), n)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="other parameters: b"):
        study.update_ratios({"a": np.ones(1)}, {"a": np.ones(1), "b": np.ones(1)})
    with pytest.raises(ConfigError, match="are no states"):
        study.update_ratios(small(), small())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="before"):
        study.update_ratios({"a": np.ones(1)}, {"a": np.ones(2)})


def test_images_that_cannot_be_studied_are_refused() -> None:
    model = small()
    with pytest.raises(DataError, match="no image"):
        study.head_statistics(model, IMAGES[:0])
    with pytest.raises(DTypeError, match="a list"):
        study.head_statistics(model, IMAGES.tolist())
    with pytest.raises(DTypeError, match="an array"):
        study.head_statistics(model, np.array(1.0))
    for memory in (0, -1, "1 GB", 1.5):
        with pytest.raises(ConfigError, match="memory is"):
            study.head_statistics(model, IMAGES, memory=memory)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"\(3, 3\) over 7 tokens"):
        study.patch_map(study.trace_model(model, IMAGES), np.ones((3, 3)))
    with pytest.raises(ConfigError, match="no class 5"):
        study.head_statistics(model, IMAGES, 5)
    with pytest.raises(ShapeError, match="for 3 images"):
        study.head_statistics(model, IMAGES, [0, 1])
    with pytest.raises(ShapeError, match="images of shape"):
        study.trace_model(model, IMAGES[0])
    with pytest.raises(DTypeError, match="standardise"):
        study.trace_model(model, (IMAGES * 10).astype(np.uint8))
