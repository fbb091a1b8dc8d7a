"""Kernels of layer normalisation, and of that by the root mean square: see ops/normalize.py for the formula.

Rows (M, D) are worked on R at a time, each a tuple of tiles (R, m) for the pieces of D; what is beyond D is 0.
"""

import cuda.tile as ct

from minivit.ops.cuda.kernels.tiles import F32, I32, load, load_rows, load_vector, pieces, row_sum, store, store_rows


def less(parts, by, D, cut):
    """Return rows less ``by`` (R, 1), beyond D still 0."""
    return tuple(
        ct.where(j * m + ct.arange(m, dtype=I32)[None, :] < D, u - by, 0.0) if (j + 1) * m > D else u - by
        for u, (m, j) in ct.static_iter(zip(parts, cut))
    )


def from_first(x, i, D, R, cut):
    """Return rows of x less their first number: equal ones give 0, and ones far from 0 keep their digits."""
    return less(load_rows(x, i, R, cut, tma=False), load(x, (i, 0), (R, 1), tma=False).astype(F32), D, cut)


def layer_norm_forward(D, R, eps):
    """y = (x - μ)/σ · weight + bias; statistics (2, M): μ less the row's first number, and 1/σ. Grid: (M / R,)."""
    cut = pieces(D, 16)

    @ct.kernel
    def kernel(x, weight, bias, y, statistics):
        i = ct.bid(0)
        offsets = from_first(x, i, D, R, cut)
        mean = row_sum(offsets) * (1.0 / D)
        offsets = less(offsets, mean, D, cut)
        variance = row_sum(tuple(u * u for u in ct.static_iter(offsets))) * (1.0 / D)
        rstd = 1.0 / ct.sqrt(variance + eps)
        ws, bs = load_vector(weight, cut, tma=False), load_vector(bias, cut, tma=False)
        y_rows = tuple(u * rstd * w + b for u, w, b in ct.static_iter(zip(offsets, ws, bs)))
        store_rows(y, i, y_rows, cut, tma=False)
        store(statistics, (0, i), mean.reshape((1, R)), tma=False)
        store(statistics, (1, i), rstd.reshape((1, R)), tma=False)

    return kernel


def layer_norm_backward(D, R, rows, add):
    """dx = (gw - mean(gw) - x̂·mean(gw·x̂))/σ, gw = g·weight, x̂ = (x - μ)/σ, and ``so_far`` on top, if ``add``.

    partials (rows, 3, D): sums of g·x̂, the weight's gradient, of g, the bias's, and of dx. Grid: (rows,).
    """
    cut = pieces(D, 16)

    def gradient(g, x, weight, statistics, so_far, dx, partials):
        ws = load_vector(weight, cut, tma=False)
        sums = tuple(tuple(ct.zeros((R, m), F32) for m, j in ct.static_iter(cut)) for k in ct.static_iter(range(3)))
        for i in range(ct.bid(0), ct.num_tiles(g, 0, (R, cut[0][0])), rows):
            mean = load(statistics, (0, i), (1, R), tma=False).reshape((R, 1))
            rstd = load(statistics, (1, i), (1, R), tma=False).reshape((R, 1))
            gs, offsets = load_rows(g, i, R, cut, tma=False), less(from_first(x, i, D, R, cut), mean, D, cut)
            x_hat = tuple(u * rstd for u in ct.static_iter(offsets))
            gw = tuple(u * w for u, w in ct.static_iter(zip(gs, ws)))
            along_one = row_sum(gw) * (1.0 / D)
            along_x = row_sum(tuple(u * v for u, v in ct.static_iter(zip(gw, x_hat)))) * (1.0 / D)
            ds = tuple((u - along_one - v * along_x) * rstd for u, v in ct.static_iter(zip(gw, x_hat)))
            if add:
                before = load_rows(so_far, i, R, cut, tma=False)
                ds = tuple(u + v for u, v in ct.static_iter(zip(ds, before)))
            store_rows(dx, i, ds, cut, tma=False)
            terms = (tuple(u * v for u, v in ct.static_iter(zip(gs, x_hat))), gs, ds)
            sums = tuple(
                tuple(u + v for u, v in ct.static_iter(zip(a, b))) for a, b in ct.static_iter(zip(sums, terms))
            )
        for parts, k in ct.static_iter(zip(sums, range(3))):
            for total, (m, j) in ct.static_iter(zip(parts, cut)):
                store(partials, (ct.bid(0), k, j), ct.sum(total, 0).reshape((1, 1, m)), tma=False)  # (R, m) → (m,)

    @ct.kernel
    def alone(g, x, weight, statistics, dx, partials):
        gradient(g, x, weight, statistics, g, dx, partials)

    @ct.kernel
    def on_top(g, x, weight, statistics, so_far, dx, partials):
        gradient(g, x, weight, statistics, so_far, dx, partials)

    return on_top if add else alone


def rms_norm_forward(D, R, eps):
    """y = x/r · weight; statistics (1, M): 1/r, r² = mean x² + eps. Grid: (M / R,)."""
    cut = pieces(D, 16)

    @ct.kernel
    def kernel(x, weight, y, statistics):
        i = ct.bid(0)
        xs, ws = load_rows(x, i, R, cut, tma=False), load_vector(weight, cut, tma=False)
        square = row_sum(tuple(u * u for u in ct.static_iter(xs))) * (1.0 / D)
        over_root = 1.0 / ct.sqrt(square + eps)
        store_rows(y, i, tuple(u * over_root * w for u, w in ct.static_iter(zip(xs, ws))), cut, tma=False)
        store(statistics, (0, i), over_root.reshape((1, R)), tma=False)

    return kernel


def rms_norm_backward(D, R, rows, add):
    """dx = (gw - x̂·mean(gw·x̂))/r, gw = g·weight, x̂ = x/r, and ``so_far`` on top, if ``add``.

    partials (rows, 2, D): sums of g·x̂, the weight's gradient, and of dx. Grid: (rows,).
    """
    cut = pieces(D, 16)

    def gradient(g, x, weight, statistics, so_far, dx, partials):
        ws = load_vector(weight, cut, tma=False)
        sums = tuple(tuple(ct.zeros((R, m), F32) for m, j in ct.static_iter(cut)) for k in ct.static_iter(range(2)))
        for i in range(ct.bid(0), ct.num_tiles(g, 0, (R, cut[0][0])), rows):
            over_root = load(statistics, (0, i), (1, R), tma=False).reshape((R, 1))
            gs, xs = load_rows(g, i, R, cut, tma=False), load_rows(x, i, R, cut, tma=False)
            x_hat = tuple(u * over_root for u in ct.static_iter(xs))
            gw = tuple(u * w for u, w in ct.static_iter(zip(gs, ws)))
            along_x = row_sum(tuple(u * v for u, v in ct.static_iter(zip(gw, x_hat)))) * (1.0 / D)
            ds = tuple((u - v * along_x) * over_root for u, v in ct.static_iter(zip(gw, x_hat)))
            if add:
                before = load_rows(so_far, i, R, cut, tma=False)
                ds = tuple(u + v for u, v in ct.static_iter(zip(ds, before)))
            store_rows(dx, i, ds, cut, tma=False)
            terms = (tuple(u * v for u, v in ct.static_iter(zip(gs, x_hat))), ds)
            sums = tuple(
                tuple(u + v for u, v in ct.static_iter(zip(a, b))) for a, b in ct.static_iter(zip(sums, terms))
            )
        for parts, k in ct.static_iter(zip(sums, range(2))):
            for total, (m, j) in ct.static_iter(zip(parts, cut)):
                store(partials, (ct.bid(0), k, j), ct.sum(total, 0).reshape((1, 1, m)), tma=False)  # (R, m) → (m,)

    @ct.kernel
    def alone(g, x, weight, statistics, dx, partials):
        gradient(g, x, weight, statistics, g, dx, partials)

    @ct.kernel
    def on_top(g, x, weight, statistics, so_far, dx, partials):
        gradient(g, x, weight, statistics, so_far, dx, partials)

    return on_top if add else alone
