"""mv.study by hand: two layers of two heads, to be checked with a pencil, and what must always hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import minivit as mv
from minivit import study
from minivit.backend import normal, uniform
from minivit.models.trace import Trace
from minivit.nn.attention import Heads
from minivit.study.distance import patch_distances

P1 = [[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]]  # layer 1: two heads of two tokens, (H, T, T)
P2 = [[[0.2, 0.8], [1.0, 0.0]], [[0.6, 0.4], [0.0, 1.0]]]
D1 = [[[2.0, -1.0], [0.0, 4.0]], [[3.0, 1.0], [-2.0, 2.0]]]  # what flows back through them
D2 = [[[5.0, 1.0], [1.0, 7.0]], [[-1.0, 2.0], [3.0, 1.0]]]
GRADIENT = [np.array([d]) for d in (D1, D2)]


def traced(*attention: Any, grid: tuple[int, int] = (1, 1), pool: str = "cls", images: int = 1) -> Trace:
    """Return a trace with this attention, (H, T, T) of each layer, the same for every image; patches are 3 × 4."""
    tokens = np.shape(attention[0])[-1]
    model = mv.ViT((3 * grid[0], 4 * grid[1]), (3, 4), 1, 2, dim=4, depth=1, heads=1, pool=pool)
    given = [mv.tensor(np.array([p] * images, np.float64)) for p in attention]
    passed = [Heads(None, None, None, None, p, None) for p in given]
    x = mv.tensor(np.zeros((images, tokens, 4)))
    logits = mv.tensor(np.zeros((images, 2)))
    return Trace(model, logits, [x] * (len(given) + 1), passed, [], [], grid, int(pool == "cls"))


HAND = traced(P1, P2)


def small(pool: str = "cls", dtype: Any = np.float64, **settings: Any) -> mv.ViT:
    """Return a ViT of two blocks, grid 3 × 2, none of whose parameters is 0."""
    settings = {"dim": 12, "depth": 2, "heads": 3, "num_classes": 5} | settings
    model = mv.ViT((12, 8), 4, 2, pool=pool, **settings)
    for i, p in enumerate(model.parameters()):
        p.data[...] += normal(mv.Key(99, i), p.shape) * 0.2
    return model.to(dtype)


IMAGES = normal(mv.Key(1), (3, 2, 12, 8))


# ---- two layers by hand ----------------------------------------------------------------------------------------------


def test_rollout_by_hand() -> None:
    # (mean of heads + I)/2 is [[3, 1], [1, 3]]/4, then [[14, 6], [5, 15]]/20; the later layer stands on the left
    np.testing.assert_allclose(study.rollout(HAND)[0], [[0.6, 0.4], [0.375, 0.625]], rtol=1e-15)
    assert study.rollout(traced(P2, P1))[0, 0, 0] == pytest.approx(0.5875)  # and not: the product's order matters
    # max + I is [[2, 1], [1/2, 3/2]], then [[1.6, 0.8], [1, 2]]: rows that do not sum to 2
    np.testing.assert_allclose(study.rollout(HAND, "max")[0], [[19 / 36, 17 / 36], [14 / 36, 22 / 36]], rtol=1e-15)
    # min + I is [[1, 0], [1/2, 3/2]], then [[1.2, 0.4], [0, 1]]
    np.testing.assert_allclose(study.rollout(HAND, "min")[0], [[13 / 16, 3 / 16], [1 / 4, 3 / 4]], rtol=1e-15)


def test_rollout_divides_each_row_by_its_own_sum() -> None:
    """vit-explain divides ``a / a.sum(dim=-1)``, which scales columns (its issue 16): its rows sum to 7/6 and 11/12."""
    a = np.max(P1, axis=0) + np.eye(2)
    np.testing.assert_allclose((a / a.sum(axis=-1)).sum(axis=-1), [7 / 6, 11 / 12], rtol=1e-15)
    one_layer = study.rollout(traced(P1), "max")
    np.testing.assert_allclose(one_layer[0], [[2 / 3, 1 / 3], [1 / 4, 3 / 4]], rtol=1e-15)


def test_relevance_by_hand() -> None:
    # mean of (dP ∘ P)⁺: [[1, 1/2], [0, 3/2]], so R = [[2, 1/2], [0, 5/2]]; then [[1/2, 4/5], [1/2, 1/2]]
    np.testing.assert_allclose(study.relevance(HAND, GRADIENT)[0], [[3.0, 2.75], [1.0, 4.0]], rtol=1e-15)
    np.testing.assert_allclose(study.relevance(traced(P1), GRADIENT[:1])[0], [[2.0, 0.5], [0.0, 2.5]], rtol=1e-15)


def test_relevance_takes_gradients_in_the_order_of_the_layers() -> None:
    """vit-explain's hooks collect them from the last layer on (its issue 6): by hand that is another number."""
    # D2 with P1: [[5/2, 1], [1, 2]], R = [[7/2, 1], [1, 3]]; D1 with P2: [[1.1, 0.2], [0, 1]]
    backwards = study.relevance(HAND, GRADIENT[::-1])[0]
    np.testing.assert_allclose(backwards, [[7.55, 2.7], [2.0, 6.0]], rtol=1e-15)


def test_gradient_attention_legrad_and_importance_by_hand() -> None:
    first, second = study.gradient_attention(HAND, GRADIENT)
    np.testing.assert_allclose(first[0], [[[2, 0], [0, 2]], [[0, 1], [-1, 1]]], rtol=1e-15)
    np.testing.assert_allclose(second[0], [[[1, 0.8], [1, 0]], [[-0.6, 0.8], [0, 1]]], rtol=1e-15)
    # (dP)⁺ in the patch's column: 0, 4, 1, 2 and 1, 7, 2, 1
    np.testing.assert_allclose(study.legrad(HAND, GRADIENT), [[[(7 / 4 + 11 / 4) / 2]]], rtol=1e-15)
    importance = [[4.0, 1.0], [2.8, 1.2]]
    np.testing.assert_allclose(study.head_importance(HAND, GRADIENT), importance, rtol=1e-15)
    # of two images of which one has it the other way round: |Σ| of each, then the mean
    both = [np.concatenate([g, -g]) for g in GRADIENT]
    np.testing.assert_allclose(study.head_importance(traced(P1, P2, images=2), both), importance, rtol=1e-15)


def test_entropy_by_hand() -> None:
    bits, largest = study.entropy(HAND)  # rows of 0 and 1 bit; of 0.2 and 0.8: 0.7219 bits, of 0.6 and 0.4: 0.9710
    np.testing.assert_allclose(bits, [[0.5, 0.5], [0.360964047, 0.485475297]], rtol=1e-8)
    assert largest == 1.0
    uniform_rows = study.entropy(traced(np.full((1, 5, 5), 0.2), grid=(2, 2)))
    assert uniform_rows.bits[0, 0] == pytest.approx(np.log2(5)) and uniform_rows.largest == pytest.approx(np.log2(5))


def test_distance_by_hand() -> None:
    """Four patches of 3 × 4 pixels: their centres are 4 apart along a row, 3 along a column, 5 across."""
    np.testing.assert_allclose(patch_distances((2, 2), (3, 4))[0], [0, 4, 3, 5])
    mean = patch_distances((2, 2), (3, 4)).mean()
    assert mean == 3.0
    distance = lambda p, pool: float(study.attention_distance(traced([p], grid=(2, 2), pool=pool))[0, 0])
    assert distance(np.full((4, 4), 0.25), "mean") == mean
    assert distance(np.full((5, 5), 0.2), "cls") == pytest.approx(mean)
    assert distance(np.eye(4), "mean") == distance(np.eye(5), "cls") == 0.0
    rows = [[0.5, 0.5, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0.25, 0.75]]  # 2, 4, 5 and 1
    assert distance(rows, "mean") == 3.0
    seen = [[0, 0.1, 0.2, 0.3, 0.4], [0.5, 0.25, 0.25, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0.6, 0, 0.4, 0, 0]]
    # the first patch: half at itself, half at 4, of what is left beside the class token; two look at no patch
    assert distance(seen, "cls") == pytest.approx((2 + 3) / 2)
    only_class = np.zeros((5, 5))
    only_class[:, 0] = 1
    assert np.isnan(distance(only_class, "cls"))


def test_what_the_model_reads_by_hand() -> None:
    rows = np.arange(25.0).reshape(1, 5, 5)
    of_class = study.class_attention(traced(rows, grid=(2, 2)))[0]
    np.testing.assert_array_equal(of_class, [[[[1, 2], [3, 4]]]])
    for pool in ("mean", "none"):  # the mean of the rows 0 to 3
        four = np.arange(16.0).reshape(1, 4, 4)
        np.testing.assert_array_equal(
            study.class_attention(traced(four, grid=(2, 2), pool=pool))[0], [[[[6, 7], [8, 9]]]]
        )


def two_numbers() -> tuple[mv.ViT, np.ndarray]:
    """Return a model of tokens of two numbers whose every step is an addition, and an image."""
    model = mv.ViT((1, 2), 1, 1, 2, dim=2, depth=2, heads=2, norm_eps=1e-13, position="none").to(np.float64)
    for p in model.parameters():
        p.data[...] = 0.0
    model.cls_token.data[...] = [1, 3]
    for norm in (model.norm, *(n for b in model.blocks for n in (b.norm1, b.norm2))):
        norm.weight.data[...] = 1.0
    first, second = model.blocks
    first.attn.qkv.bias.data[...] = [0, 0, 0, 0, 3, 2]  # the heads' values: 3 and 2, whatever is attended to
    first.attn.proj.weight.data[...] = [[1, 0], [0, -0.5]]  # the heads add (3, 0) and (0, -1)
    first.attn.proj.bias.data[...] = [0.5, 0]
    first.mlp.fc2.bias.data[...] = [0, 0.5]
    second.mlp.fc2.bias.data[...] = [-0.5, 0.5]
    model.norm.bias.data[...] = [0.5, 0]
    model.head.weight.data[...], model.head.bias.data[...] = [[2, 0], [0, 1]], [0.25, 0]
    return model, np.zeros((1, 1, 1, 2))


def test_direct_attribution_and_lens_by_hand() -> None:
    """x = (1, 3) + (3, 0) + (0, -1) + (0.5, 0) + (0, 0.5) + (-0.5, 0.5) = (4, 3): 1/σ = 2, and v adds 2·(v₀ - v₁)."""
    model, image = two_numbers()
    trace = study.trace_model(model, image)
    found = study.direct_attribution(trace, 0)
    expected = [
        ("embedding", -4.0), ("layer 1, head 1", 6.0), ("layer 1, head 2", 2.0), ("layer 1, attention's bias", 1.0),
        ("layer 1, MLP", -1.0), ("layer 2, head 1", 0.0), ("layer 2, head 2", 0.0), ("layer 2, attention's bias", 0.0),
        ("layer 2, MLP", -2.0), ("final norm's and head's bias", 1.25),
    ]  # fmt: skip
    assert [name for name, _ in found.terms()] == [name for name, _ in expected]
    np.testing.assert_allclose([term[0] for _, term in found.terms()], [term for _, term in expected], atol=1e-11)
    assert found.logit[0] == pytest.approx(3.25) and found.total[0] == pytest.approx(3.25)
    # (1, 3) is normalised to (-1, 1), (4.5, 2.5) and (4, 3) to (1, -1); and the norm's bias is (0.5, 0)
    np.testing.assert_allclose(study.logit_lens(trace)[:, 0], [[-0.75, 1], [3.25, -1], [3.25, -1]], atol=1e-9)


def test_gradient_flow_and_norms_by_hand() -> None:
    """One number c = (x₀ - x₁)/2 = 0.75 is normalised to c/√(c² + 1), whose slope is (c² + 1)^(-3/2) = 0.512."""
    model = mv.ViT((1, 2), 1, 1, 2, dim=2, depth=1, heads=1, norm_eps=1.0, position="none").to(np.float64)
    for p in model.parameters():
        p.data[...] = 0.0
    model.cls_token.data[...], model.norm.weight.data[...] = [1.5, 0], 1.0
    model.head.weight.data[...] = [[2, 0], [0, 1]]
    model.patch_embed.proj.bias.data[...] = [3, 4]
    trace = study.trace_model(model, np.zeros((1, 1, 1, 2)))
    slope = 2 * 0.512 / 2 * np.sqrt(2)  # along x₀ and against x₁
    np.testing.assert_allclose(study.gradient_flow(trace, 0), [[[slope, 0, 0]]] * 2, rtol=1e-12)
    np.testing.assert_allclose(study.token_norms(trace), [[[1.5, 5, 5]]] * 2, rtol=1e-15)


def test_outlying_tokens_by_hand() -> None:
    norms = np.array([[[1.0, 1.0, 3.1, 2.9], [0.5, 1.0, 1.0, 1.0]]])  # the layer's median is 1
    assert study.outlying_tokens(norms).nonzero()[2].tolist() == [2]


def test_components_and_positions_by_hand() -> None:
    model = mv.ViT((1, 2), (1, 2), 1, 2, dim=4, depth=1, heads=1)
    model.patch_embed.proj.weight.data[...] = np.reshape([[4, 5], [1, 1], [7, 9], [4, 5]], (4, 1, 1, 2))
    found = study.filter_components(model)  # all along (3, 4)/5; the largest entry positive
    np.testing.assert_allclose(np.abs(found.values[0, 0, 0]), [0.6, 0.8], rtol=1e-6)
    assert found.values.shape == (2, 1, 1, 2) and found.values[0, 0, 0, 1] > 0
    np.testing.assert_allclose(found.shares, [1, 0], atol=1e-12)

    model = mv.ViT((2, 2), 1, 1, 2, dim=2, depth=1, heads=1)
    model.pos_embed.data[...] = [[[9, 9], [1, 0], [0, 2], [3, 3], [0, 0]]]  # of the class token first
    half = 0.5**0.5
    np.testing.assert_allclose(study.position_similarity(model)[0, 0], [[1, 0], [half, 0]], atol=1e-12)
    np.testing.assert_allclose(study.position_similarity(model)[1, 0], [[half, half], [1, 0]], atol=1e-12)


def test_update_ratios_by_hand() -> None:
    before = {"a": np.array([3.0, 4.0]), "b": np.zeros(2), "c": np.zeros(2), "d": np.float32([1, 1])}
    after = {"a": np.array([3.0, 4.5]), "b": np.zeros(2), "c": np.ones(2), "d": np.float32([1, 1])}
    assert study.update_ratios(before, after) == {"a": 0.1, "b": 0.0, "c": float("inf"), "d": 0.0}
    model = small()
    before = model.state_dict()
    model.head.bias.data *= 1.01
    moved = {name: ratio for name, ratio in study.update_ratios(before, model.state_dict()).items() if ratio}
    assert moved == {"head.bias": pytest.approx(0.01)}


# ---- what must always hold -------------------------------------------------------------------------------------------


def a_mask(tokens: int) -> np.ndarray:
    mask = uniform(mv.Key(5), (tokens, tokens)) > 0.6
    mask[2] = True  # which may attend to nothing
    mask[0, :2] = False
    return mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pool", ["cls", "mean", "none"])
def test_methods_equal_their_formulas_written_as_loops(pool: str, masked: bool) -> None:
    model = small(pool)
    tokens = model.num_tokens
    mask = a_mask(tokens) if masked else None
    trace = study.trace_model(model, IMAGES, mask)
    gradient = study.attention_gradient(trace, [0, 4, 2])
    first, (rows, columns) = trace.prefix, trace.grid
    p = np.array([a.data for a in trace.attention])  # (L, B, H, T, T)
    dp = np.array(gradient)
    layers, images, heads = p.shape[:3]
    rolled, relevant = np.zeros((2, images, tokens, tokens))
    legrad = np.zeros((images, tokens))
    for b in range(images):
        rolled[b] = relevant[b] = np.eye(tokens)
        for n in range(layers):
            a = sum(p[n, b, h] for h in range(heads)) / heads + np.eye(tokens)
            rolled[b] = np.array([row / row.sum() for row in a]) @ rolled[b]
            product = sum(np.where(dp[n, b, h] * p[n, b, h] > 0, dp[n, b, h] * p[n, b, h], 0) for h in range(heads))
            relevant[b] = relevant[b] + product / heads @ relevant[b]
            legrad[b] += sum(np.where(g > 0, g, 0) for h in range(heads) for g in dp[n, b, h]) / (
                heads * tokens * layers
            )
    np.testing.assert_allclose(study.rollout(trace), rolled, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(study.rollout(trace).sum(axis=-1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(study.relevance(trace, gradient), relevant, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(study.legrad(trace, gradient).reshape(images, -1), legrad[:, first:], rtol=1e-12)

    distance, bits, importance = np.zeros((3, layers, heads))
    for n in range(layers):
        for h in range(heads):
            seen, known = [], []
            for b in range(images):
                importance[n, h] += abs((dp[n, b, h] * p[n, b, h]).sum()) / images
                for i in range(tokens):
                    row = p[n, b, h, i]
                    if row.sum() > 0:
                        known.append(-sum(x * np.log2(x) for x in row if x > 0))
                    if i >= first and row[first:].sum() > 0:
                        at = lambda t: np.array(divmod(t - first, columns)) * 4.0
                        far = [np.linalg.norm(at(i) - at(j)) for j in range(first, tokens)]
                        seen.append(row[first:] @ far / row[first:].sum())
            distance[n, h], bits[n, h] = np.mean(seen), np.mean(known)
    np.testing.assert_allclose(study.attention_distance(trace), distance, rtol=1e-12)
    np.testing.assert_allclose(study.entropy(trace).bits, bits, rtol=1e-12)
    np.testing.assert_allclose(study.head_importance(trace, gradient), importance, rtol=1e-12)
    allowed = [np.log2(n) for n in (~mask).sum(axis=1) if n] if masked else [np.log2(tokens)]
    assert study.entropy(trace).largest == pytest.approx(np.mean(allowed))
    assert (study.entropy(trace).bits <= study.entropy(trace).largest + 1e-12).all()
    assert study.legrad(trace, gradient).shape == (images, rows, columns)


def test_features_equal_a_singular_value_decomposition() -> None:
    model = small()
    trace = study.trace_model(model, IMAGES)
    found = study.feature_components(trace)
    x = model.norm(trace.tokens[-1].detach()).numpy()[:, 1:].reshape(18, 12)
    x = x - x.mean(axis=0)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    np.testing.assert_allclose(np.abs(found.values.reshape(18, 3)), np.abs(u[:, :3] * s[:3]), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.shares, s[:3] ** 2 / np.sum(s**2), rtol=1e-9)
    weight = study.filter_components(model, 5).values.reshape(5, -1)
    np.testing.assert_allclose(weight @ weight.T, np.eye(5), atol=1e-12)
