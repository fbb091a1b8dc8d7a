"""Autograd in twenty lines: derivatives of first and second order, checked to the last bits."""

import numpy as np

import minivit as mv

x = mv.tensor(np.array([0.5, -1.0, 2.0]), requires_grad=True)
y = (x * mv.ops.tanh(x)).sum()
y.backward()
by_hand = np.tanh(x.data) + x.data * (1 - np.tanh(x.data) ** 2)
print("d/dx x·tanh(x)   ", x.grad)
print("written by hand  ", by_hand)
assert np.allclose(x.grad, by_hand, rtol=1e-15)

y = (x * mv.ops.tanh(x)).sum()
(first,) = mv.grad(y, [x], create_graph=True)  # a Tensor that can be differentiated again
(second,) = mv.grad(first.sum(), [x])
print("second derivative", second.data)

report = mv.check_grads(lambda x: x * mv.ops.tanh(x), [x], order=2)
print(report)
assert report.worst.error < 1e-12
