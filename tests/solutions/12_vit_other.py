"""Recursive in the blocks, the embedding, the norm of the one row that is read and the loss in plain NumPy."""

import numpy as np

from minivit.learn.given import block, block_backward

EPS = 1e-6


def cut(images, p, q):
    rows = [images[:, :, i : i + p, j : j + q].reshape(len(images), -1)
            for i in range(0, images.shape[2], p) for j in range(0, images.shape[3], q)]  # fmt: skip
    return np.stack(rows, axis=1)


def head(z, labels, nw, nb, hw, hb):
    centred = z[:, 0] - z[:, 0].mean(axis=1, keepdims=True)
    sigma = np.sqrt(np.einsum("bd,bd->b", centred, centred) / centred.shape[1] + EPS)[:, None]
    x_hat = centred / sigma
    u = x_hat * nw + nb
    logits = np.einsum("bd,kd->bk", u, hw) + hb
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return x_hat, sigma, u, log_p


def forward(images, labels, heads, pw, pb, cls, positions, nw, nb, hw, hb, *blocks):
    z = np.concatenate([np.broadcast_to(cls, (len(images), 1, len(cls))),
                        cut(images, *pw.shape[2:]) @ pw.reshape(len(pw), -1).T + pb], axis=1) + positions  # fmt: skip
    for own in zip(*blocks, strict=True):
        z = block(z, *own, heads)
    return -head(z, labels, nw, nb, hw, hb)[-1][np.arange(len(labels)), labels].mean()


def encoder(z, heads, blocks, finish):
    """Return what finish gives for the last z, ∂loss/∂z and a list of the blocks' gradients."""
    if not blocks:
        dz, found = finish(z)
        return found, dz, []
    found, dz, later = encoder(block(z, *blocks[0], heads), heads, blocks[1:], finish)
    dz, *own = block_backward(dz, z, *blocks[0], heads)
    return found, dz, [own, *later]


def backward(g, images, labels, heads, pw, pb, cls, positions, nw, nb, hw, hb, *blocks):
    patches = cut(images, *pw.shape[2:])

    def finish(z):
        x_hat, sigma, u, log_p = head(z, labels, nw, nb, hw, hb)
        dlogits = (np.exp(log_p) - np.eye(len(hb))[labels]) * (g / len(labels))
        du = np.einsum("bk,kd->bd", dlogits, hw)
        gw = du * nw
        dz = np.zeros_like(z)
        dz[:, 0] = (gw - gw.mean(1, keepdims=True) - x_hat * (gw * x_hat).mean(1, keepdims=True)) / sigma
        return dz, ((du * x_hat).sum(0), du.sum(0), np.einsum("bk,bd->kd", dlogits, u), dlogits.sum(0))

    first = np.broadcast_to(cls, (len(images), 1, len(cls)))
    z = np.concatenate([first, patches @ pw.reshape(len(pw), -1).T + pb], axis=1) + positions
    found, dz, own = encoder(z, heads, list(zip(*blocks, strict=True)), finish)
    dpw = np.einsum("bnd,bnf->df", dz[:, 1:], patches).reshape(pw.shape)
    embedding = dpw, dz[:, 1:].sum((0, 1)), dz[:, 0].sum(0), dz.sum(0)
    return *embedding, *found, *(np.stack(d) for d in zip(*own, strict=True))
