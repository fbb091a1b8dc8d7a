import numpy as np

from minivit.learn.given import (
    block,
    block_backward,
    cross_entropy,
    cross_entropy_backward,
    embed,
    embed_backward,
    layer_norm,
    layer_norm_backward,
    linear,
    linear_backward,
)


def steps(images, heads, embedding, norm, head, blocks):
    z = [embed(images, *embedding)]
    for i in range(len(blocks[0])):
        z.append(block(z[-1], *(p[i] for p in blocks), heads))
    u = layer_norm(z[-1], *norm)
    return z, u, linear(u[:, 0], *head)


def forward(images, labels, heads, pw, pb, cls, positions, nw, nb, hw, hb, *blocks):
    return cross_entropy(steps(images, heads, (pw, pb, cls, positions), (nw, nb), (hw, hb), blocks)[-1], labels)


def backward(g, images, labels, heads, pw, pb, cls, positions, nw, nb, hw, hb, *blocks):
    z, u, logits = steps(images, heads, (pw, pb, cls, positions), (nw, nb), (hw, hb), blocks)
    dlogits = cross_entropy_backward(g, logits, labels)
    du0, dhw, dhb = linear_backward(dlogits, u[:, 0], hw, hb)
    du = np.zeros_like(u)
    du[:, 0] = du0
    dz, dnw, dnb = layer_norm_backward(du, z[-1], nw, nb)
    dblocks = [np.zeros_like(p) for p in blocks]
    for i in reversed(range(len(blocks[0]))):
        dz, *found = block_backward(dz, z[i], *(p[i] for p in blocks), heads)
        for stacked, d in zip(dblocks, found, strict=True):
            stacked[i] = d
    _, dpw, dpb, dcls, dpositions = embed_backward(dz, images, pw, pb, cls, positions)
    return dpw, dpb, dcls, dpositions, dnw, dnb, dhw, dhb, *dblocks
