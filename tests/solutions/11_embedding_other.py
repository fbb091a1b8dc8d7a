"""Patch by patch, in loops and einsum."""

import numpy as np


def places(images, weight):
    p, q = weight.shape[2:]
    corners = [(i, j) for i in range(0, images.shape[2], p) for j in range(0, images.shape[3], q)]
    return [(1 + n, (..., slice(i, i + p), slice(j, j + q))) for n, (i, j) in enumerate(corners)]


def forward(images, weight, bias, cls, positions):
    tokens = np.empty((len(images), *positions.shape))
    tokens[:, 0] = cls
    for n, place in places(images, weight):
        tokens[:, n] = np.einsum("bcpq,dcpq->bd", images[place], weight) + bias
    return tokens + positions


def backward(g, images, weight, bias, cls, positions):
    dimages, dweight = np.zeros(images.shape), np.zeros(weight.shape)
    for n, place in places(images, weight):
        dimages[place] = np.einsum("bd,dcpq->bcpq", g[:, n], weight)
        dweight += np.einsum("bd,bcpq->dcpq", g[:, n], images[place])
    return dimages, dweight, np.einsum("bnd->d", g[:, 1:]), np.einsum("bd->d", g[:, 0]), np.einsum("btd->td", g)
