"""Backpropagation through attention, by hand: every formula in NumPy beside the engine's gradient, equal to 1e-12.

Forward, for one head of dimension d:

    S = Q·Kᵀ/√d        scores: how well token i's query fits token j's key
    P = softmax(S)     each row sums to 1
    O = P·V            each token's mixture of values

Backward, given dO = ∂loss/∂O:

    dV = Pᵀ·dO
    dP = dO·Vᵀ
    dS = P ∘ (dP - rowsum(P ∘ dP))      the softmax's whole Jacobian: diag(p) - p·pᵀ for each row
    dQ = dS·K/√d
    dK = dSᵀ·Q/√d
"""

import math

import numpy as np

import minivit as mv
from minivit.backend import normal

tokens, d = 5, 8
q, k, v, d_out = (mv.Key(0, stream=i) for i in range(4))
q, k, v, d_out = (normal(key, (tokens, d)) for key in (q, k, v, d_out))

# ---- by hand ----
s = q @ k.T / math.sqrt(d)  # (T, d) · (d, T) → (T, T)
p = np.exp(s - s.max(axis=1, keepdims=True))
p /= p.sum(axis=1, keepdims=True)
out = p @ v  # (T, T) · (T, d) → (T, d)

d_v = p.T @ d_out
d_p = d_out @ v.T
d_s = p * (d_p - (p * d_p).sum(axis=1, keepdims=True))
d_q = d_s @ k / math.sqrt(d)
d_k = d_s.T @ q / math.sqrt(d)

# ---- by the engine ----
tq, tk, tv = (mv.tensor(x, requires_grad=True) for x in (q, k, v))
engine_out = mv.ops.attention(tq, tk, tv)
engine_out.backward(d_out)

for name, hand, engine in (
    ("O", out, engine_out.data), ("dQ", d_q, tq.grad), ("dK", d_k, tk.grad), ("dV", d_v, tv.grad),
):  # fmt: skip
    error = np.abs(hand - engine).max() / np.abs(hand).max()
    print(f"{name:3} by hand and by the engine differ by {error:.1e}")
    assert error < 1e-12

# ---- the classic mistake: only the diagonal of the softmax's Jacobian ----
wrong = d_p * p * (1 - p)
print(f"with the diagonal alone dS would be off by {np.abs(wrong - d_s).max() / np.abs(d_s).max():.0%}")
assert np.abs(wrong - d_s).max() > 0.01 * np.abs(d_s).max()
