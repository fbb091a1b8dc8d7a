"""Your own gradients under pytest: `pytest examples/test_your_gradients.py`. No engine and no Tensor is needed."""

import numpy as np
import pytest

import minivit as mv


def gelu(x):  # yours: any NumPy code, here GELU's tanh form
    return 0.5 * x * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x**3)))


def gelu_backward(g, x):  # g is ∂loss/∂output, of the output's shape
    t = np.tanh(0.7978845608 * (x + 0.044715 * x**3))
    return g * (0.5 * (1 + t) + 0.5 * x * (1 - t**2) * 0.7978845608 * (1 + 3 * 0.044715 * x**2))


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_gelu(shape):
    x = np.random.default_rng(0).normal(size=shape)
    mv.check_vjp(gelu, gelu_backward, [x])


def test_the_test_itself():
    x = np.linspace(-2.0, 2.0, 7)
    with pytest.raises(mv.GradientError):  # a wrong one must not pass
        mv.check_vjp(gelu, lambda g, x: g * (x > 0), [x])
